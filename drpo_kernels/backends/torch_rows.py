"""Row operations in PyTorch, for any device: two passes over the logits, in blocks of rows small enough to stay in a CPU's cache."""

import torch
from torch import Tensor

from drpo_kernels.backends.rows import Row, RowKind, Stat, Terms, Transform

# exp(-1e5) is 0 even in float64: a banned (-inf) logit keeps p = 0, and p · log p stays 0 instead of 0 · inf
LOWEST_SHIFT = -1e5
# logits per block: on a CPU two float32 copies stay in the L2 cache; on an accelerator a block is one good launch
CPU_BLOCK = 1 << 18
DEVICE_BLOCK = 1 << 26


class TorchRows:
    """`RowOps` in PyTorch."""

    def statistics(
        self, logits: Tensor, targets: Tensor, rows: Tensor, transform: Transform, bias: Tensor | None
    ) -> Tensor:
        statistics = rows.new_zeros(len(Stat), logits.shape[0])
        scratch = _Scratch(logits, rows.dtype)
        for block in scratch.blocks(rows, RowKind.FORWARD):
            z = scratch.transformed(block, rows, transform, bias)
            statistics[:, block] = _block_statistics(z, scratch.second(z), targets[block])
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
        slopes = slopes * (transform.logit_scale * rows[Row.INV_TEMPERATURE])
        for block in scratch.blocks(rows, RowKind.ACTIVE):
            z = scratch.transformed(block, rows, transform, bias)
            capped = None if transform.softcap is None else _softcap_slope(z, rows[:, block], transform)
            gradient = _block_gradient(z, scratch.second(z), targets[block], statistics[:, block], slopes[:, block])
            out[block, :vocab] = gradient if capped is None else gradient.mul_(capped)
        out[:, vocab:] = 0
        out.masked_fill_((rows[Row.KIND] < RowKind.ACTIVE)[:, None], 0)

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

    def transformed(self, block: slice | Tensor, rows: Tensor, transform: Transform, bias: Tensor | None) -> Tensor:
        """z of a block of rows, [n, V], in the first buffer."""
        x = self.logits[block]
        z = self._buffers[0, : x.shape[0]]
        inv_temperature = rows[Row.INV_TEMPERATURE, block, None]
        if bias is not None:
            x = torch.add(x, bias, out=z)
        if transform.softcap is None:
            return torch.mul(x, transform.logit_scale * inv_temperature, out=z)
        scale = torch.full_like(inv_temperature, transform.logit_scale / transform.softcap)
        return torch.mul(x, scale, out=z).tanh_().mul_(transform.softcap * inv_temperature)

    def second(self, z: Tensor) -> Tensor:
        return self._buffers[1, : z.shape[0]]


def _safe(targets: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Targets as a gather index [n, 1] that is never out of bounds, and which of them were."""
    index = targets[:, None]
    return index.clamp(0, vocab - 1), (index < 0) | (index >= vocab)


def _block_statistics(z: Tensor, scratch: Tensor, targets: Tensor) -> Tensor:
    """[len(Stat), n] of z [n, V], which is overwritten."""
    index, outside = _safe(targets, z.shape[1])
    row_max = z.amax(1, keepdim=True)
    q = z.sub_(row_max)
    target = q.gather(1, index).masked_fill_(outside, torch.nan)
    q.clamp_(min=LOWEST_SHIFT)
    e = torch.exp(q, out=scratch).scatter_(1, index, 0)
    others = e.sum(1, keepdim=True)
    total = others + target.exp()
    log_total = torch.where(target == 0, others.log1p(), total.log())
    target_moment = target.exp() * target.clamp(min=LOWEST_SHIFT)
    entropy = log_total - (e.mul_(q).sum(1, keepdim=True) + target_moment) / total
    # rounding may leave -1e-8 where all mass is on one token
    return torch.cat([target - log_total, entropy.clamp_(min=0), row_max, total, others / total], dim=1).T


def _block_gradient(z: Tensor, scratch: Tensor, targets: Tensor, statistics: Tensor, slopes: Tensor) -> Tensor:
    """slopes[0] · (onehot - p) - slopes[1] · p (log p + H) of z [n, V], which is overwritten."""
    index, outside = _safe(targets, z.shape[1])
    logprob, entropy, row_max, total, miss = statistics[:, :, None]
    slope = slopes[0, :, None]
    q = z.sub_(row_max)
    at_target = slope * miss
    if slopes.shape[0] == 1:
        gradient = q.exp_().mul_(-slope / total)
    else:
        p = torch.exp(q, out=scratch).mul_(1 / total)
        gradient = q.clamp_(min=LOWEST_SHIFT).add_(entropy - total.log()).mul_(-slopes[1, :, None]).sub_(slope).mul_(p)
        at_target = at_target - slopes[1, :, None] * logprob.exp() * (logprob.clamp(min=LOWEST_SHIFT) + entropy)
    return gradient.scatter_(1, index, at_target.masked_fill(outside, torch.nan))


def _softcap_slope(z: Tensor, rows: Tensor, transform: Transform) -> Tensor:
    """1 - tanh² from z = cap · tanh / temperature."""
    tanh = z * (1 / (transform.softcap * rows[Row.INV_TEMPERATURE, :, None]))
    return tanh.square_().neg_().add_(1)
