"""Row operations in PyTorch, for any device: two passes over the logits, in blocks of rows that stay in a CPU's cache.

A block's base logits b (rows.py) become q = (b - max b) · factor · log2(e), so that p = 2^q / Σ 2^q: exp2 is the
cheapest exponential, and subtracting before scaling keeps q exact for logits far from 0.
"""

import math

import torch
from torch import Tensor

from drpo_kernels.backends.rows import Row, RowKind, Stat, Terms, Transform

LOG2E = 1 / math.log(2)
# 2^-1e5 is 0 even in float64: a banned (-inf) logit keeps p = 0, and p · log p stays 0 instead of 0 · inf
LOWEST_SHIFT = -1e5
# logits per block: on a CPU two float32 copies stay in the L2 and L3 caches; on an accelerator a block is one good
# launch
CPU_BLOCK = 1 << 18
DEVICE_BLOCK = 1 << 26


class TorchRows:
    """`RowOps` in PyTorch."""

    def statistics(
        self, logits: Tensor, targets: Tensor, rows: Tensor, transform: Transform, bias: Tensor | None
    ) -> Tensor:
        statistics = rows.new_zeros(len(Stat), logits.shape[0])
        scratch = _Scratch(logits, rows.dtype)
        factor = transform.factor(rows[Row.INV_TEMPERATURE])
        for block in scratch.blocks(rows, RowKind.FORWARD):
            base, buffers = scratch.base(block, transform, bias)
            statistics[:, block] = _block_statistics(base, buffers, targets[block], factor[block, None])
        return statistics.masked_fill_(rows[Row.KIND] < RowKind.FORWARD, 0)

    def write_gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        rows: Tensor,
        statistics: Tensor,
        slopes: Tensor,
        transform: Transform,
        bias: Tensor | None,
        out: Tensor,
    ) -> None:
        vocab = logits.shape[1]
        scratch = _Scratch(logits, rows.dtype)
        factor = transform.factor(rows[Row.INV_TEMPERATURE])
        slopes = slopes * (transform.logit_scale * rows[Row.INV_TEMPERATURE])
        for block in scratch.blocks(rows, RowKind.ACTIVE):
            base, buffers = scratch.base(block, transform, bias)
            capped = None if transform.softcap is None else base.square().neg_().add_(1)
            gradient = _block_gradient(
                base, buffers, targets[block], factor[block, None], statistics[:, block], slopes[:, block]
            )
            gradient = gradient if capped is None else gradient.mul_(capped)
            out[block, :vocab] = gradient.to(out.dtype)
        out[:, vocab:] = 0
        inactive = rows[Row.KIND] < RowKind.ACTIVE
        if not scratch.on_cpu or inactive.any():
            out.masked_fill_(inactive[:, None], 0)

    def fuses(self, terms: Terms) -> bool:
        return False


class _Scratch:
    """Two reused buffers of one block each: allocating per block would cost more in page faults than the arithmetic."""

    def __init__(self, logits: Tensor, dtype: torch.dtype):
        self.logits = logits
        self.on_cpu = logits.device.type == "cpu"
        count, vocab = logits.shape
        self.block = min(max((CPU_BLOCK if self.on_cpu else DEVICE_BLOCK) // max(vocab, 1), 1), max(count, 1))
        self._buffers = torch.empty(2, self.block, vocab, dtype=dtype, device=logits.device)

    def blocks(self, rows: Tensor, least: RowKind) -> list[slice | Tensor]:
        """Blocks of the rows of at least this kind; away from the CPU, where asking would synchronise, of all rows."""
        count = self.logits.shape[0]
        wanted = rows[Row.KIND] >= least
        if self.on_cpu and not wanted.all():
            return list(wanted.nonzero()[:, 0].split(self.block)) if wanted.any() else []
        return [slice(start, min(start + self.block, count)) for start in range(0, count, self.block)]

    def base(self, block: slice | Tensor, transform: Transform, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The block's base logits [n, V], the logits themselves where they are that, and two buffers [2, n, V]."""
        x = self.logits[block]
        buffers = self._buffers[:, : x.shape[0]]
        if bias is not None:
            x = torch.add(x, bias, out=buffers[0])
        if transform.softcap is not None:
            x = torch.mul(
                x, x.new_tensor([transform.logit_scale / transform.softcap], dtype=buffers.dtype), out=buffers[0]
            ).tanh_()
        return x, buffers


def _safe(targets: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Targets as a gather index [n, 1] that is never out of bounds, and which of them were."""
    index = targets[:, None]
    return index.clamp(0, vocab - 1), (index < 0) | (index >= vocab)


def _block_statistics(base: Tensor, buffers: Tensor, targets: Tensor, factor: Tensor) -> Tensor:
    """[len(Stat), n] of a block's base logits; factor [n, 1]."""
    index, outside = _safe(targets, base.shape[1])
    row_max = base.amax(1, keepdim=True).to(buffers.dtype)
    q = torch.sub(base, row_max, out=buffers[0]).mul_(factor * LOG2E)
    target = q.gather(1, index).masked_fill_(outside, torch.nan)
    e = torch.exp2(q, out=buffers[1]).scatter_(1, index, 0)
    others = e.sum(1, keepdim=True)
    moment = e.mul_(q).sum(1, keepdim=True)
    if base.device.type != "cpu" or moment.isnan().any():  # 0 · -inf: some token is banned
        q.clamp_(min=LOWEST_SHIFT)
        moment = torch.exp2(q, out=buffers[1]).scatter_(1, index, 0).mul_(q).sum(1, keepdim=True)
    at_target = target.exp2()
    total = others + at_target
    log_total = torch.where(target == 0, others.log1p(), total.log())
    moment = (moment + at_target * target.clamp(min=LOWEST_SHIFT)) / LOG2E
    # rounding may leave -1e-8 where all mass is on one token
    entropy = (log_total - moment / total).clamp_(min=0)
    return torch.cat([target / LOG2E - log_total, entropy, row_max, total, others / total], dim=1).T


def _block_gradient(
    base: Tensor, buffers: Tensor, targets: Tensor, factor: Tensor, statistics: Tensor, slopes: Tensor
) -> Tensor:
    """slopes[0] · (onehot - p) - slopes[1] · p (log p + H), [n, V] in a buffer."""
    index, outside = _safe(targets, base.shape[1])
    logprob, entropy, row_max, total, miss = statistics[:, :, None]
    slope = slopes[0, :, None]
    q = torch.sub(base, row_max, out=buffers[0]).mul_(factor * LOG2E)
    at_target = slope * miss
    if slopes.shape[0] == 1:
        gradient = q.exp2_().mul_(-slope / total)
    else:
        p = torch.exp2(q, out=buffers[1]).mul_(1 / total)
        log_p = q.clamp_(min=LOWEST_SHIFT).mul_(1 / LOG2E).sub_(total.log())
        gradient = log_p.add_(entropy).mul_(-slopes[1, :, None]).sub_(slope).mul_(p)
        at_target = at_target - slopes[1, :, None] * logprob.exp() * (logprob.clamp(min=LOWEST_SHIFT) + entropy)
    return gradient.scatter_(1, index, at_target.masked_fill(outside, torch.nan))
