"""Row operations in PyTorch, for any device, in blocks of rows that stay in a CPU's cache.

A block's base logits b (rows.py) become q = (b - max b) · factor · log2(e), so that p = 2^q / Σ 2^q: exp2 is the
cheapest exponential, and subtracting before scaling keeps q exact for logits far from 0. If a gradient is a multiple of
p, logits are read once and their 2^q are kept, in place of the logits if that is allowed.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.backends.row_loss import row_losses
from drpo_kernels.backends.rows import Field, RowBatch, RowKind, Slope, Stat, Terms
from drpo_kernels.softcap import tanh_slope

LOG2E = 1 / math.log(2)
# 2^-1e5 is 0 even in float64, so that a banned (-inf) logit keeps p = 0, and p · log p is 0 instead of 0 · inf.
LOWEST_SHIFT = -1e5
# The logits of a block. On a CPU two float32 copies of it stay in the L3 cache; a GPU is busy with one such launch.
CPU_BLOCK = 1 << 20
DEVICE_BLOCK = 1 << 24
# So many elements are scaled at a time. If the device needs a float32 temporary, it takes 64 MiB.
SCALE_BLOCK = 1 << 24


class TorchRows:
    """`RowOps` in PyTorch. Numbers of rows are computed for all rows at once, and only work on logits in blocks."""

    def statistics(self, batch: RowBatch) -> Tensor:
        return self._statistics(batch, None)

    def _statistics(self, batch: RowBatch, kept: Tensor | None) -> Tensor:
        """`kept` [N, V], which may be the logits, gets the 2^q of the rows that are not SKIPPED, so that the gradient
        needs no second exponential. They are 0 at the target, and with a soft-cap multiplied by its slope.
        """
        capped = batch.transform.softcap is not None
        in_place = kept is not None and kept.dtype == batch.rows.dtype and not capped
        scratch = Scratch(batch)
        index, outside = safe_targets(batch)
        factor = batch.transform.factor(batch.rows[Field.INV_TEMPERATURE])
        sums = batch.rows.new_ones(4, batch.rows.shape[1])
        for block in scratch.blocks(RowKind.FORWARD):
            base, buffers = scratch.base(block)
            direct = in_place and isinstance(block, slice)
            e = buffers[1] if kept is None else kept[block] if direct else scratch.third(len(buffers[0]))
            sums[:, block] = _block_sums(base, buffers, e, index[block], factor[block, None] * LOG2E)
            if kept is not None and not direct:
                kept[block] = (e.mul_(scratch.cap_slope(block)) if capped else e).to(kept.dtype)
        statistics = _from_sums(sums, factor, outside)
        return statistics.masked_fill_(batch.rows[Field.KIND] < RowKind.FORWARD, 0)

    def write_gradient(self, batch: RowBatch, statistics: Tensor, slopes: Tensor, out: Tensor) -> None:
        vocab = batch.logits.shape[1]
        scratch = Scratch(batch)
        per_row = GradientRows.of(batch, statistics, slopes)
        for block in scratch.blocks(RowKind.ACTIVE):
            base, buffers = scratch.base(block)
            gradient = _block_gradient(base, buffers, per_row.at(block))
            if batch.transform.softcap is not None:
                gradient.mul_(scratch.cap_slope(block))
            out[block, :vocab] = gradient.to(out.dtype)
        out[:, vocab:] = 0
        inactive = batch.rows[Field.KIND] < RowKind.ACTIVE
        if not scratch.on_cpu or inactive.any():
            out.masked_fill_(inactive[:, None], 0)

    def fuses(self, terms: Terms) -> bool:
        return True

    def scale(self, values: Tensor, factor: Tensor) -> None:
        if factor.device.type == "cpu" and factor.item() == 1:  # reading it synchronises nothing there
            return
        # A 1-d factor takes part in type promotion. A 0-d one would first be rounded to bf16.
        factor = factor.reshape(1)
        for block in values.view(-1).split(SCALE_BLOCK):
            torch.mul(block, factor, out=block)

    def losses(self, statistics: Tensor, rows: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
        return row_losses(statistics, rows, terms)

    def factors(self, terms: Terms, logits: torch.dtype, dlogits: torch.dtype) -> bool:
        return not (terms.entropy_bonus or terms.z_loss) and dlogits != torch.float16

    def policy(self, batch: RowBatch, terms: Terms, out: Tensor | None, factors: Tensor | None = None) -> Tensor:
        multiplied = (
            factors is None
            and out is not None
            and (out.dtype, out.shape) == (batch.rows.dtype, batch.logits.shape)
            and self.factors(terms, batch.logits.dtype, out.dtype)
        )
        if multiplied:
            factors = torch.empty_like(batch.rows[0])
        cap_slope: Tensor | int = 1
        if factors is not None and batch.transform.softcap is not None:
            cap_slope = Scratch(batch).cap_slope_at(safe_targets(batch)[0])
        statistics = self._statistics(batch, None if factors is None else out)
        outcome, slopes = row_losses(statistics, batch.rows, terms)
        if factors is not None:
            assert out is not None
            self._finish_factors(batch, statistics, slopes, out, factors, cap_slope)
            if multiplied:
                out.mul_(factors[:, None])
        elif out is not None:
            self.write_gradient(batch, statistics, slopes, out)
        return outcome

    def _finish_factors(
        self,
        batch: RowBatch,
        statistics: Tensor,
        slopes: Tensor,
        out: Tensor,
        factors: Tensor,
        cap_slope: Tensor | int,
    ) -> None:
        """Write `factors` and the targets' places of `out` for `RowOps.policy`, after `out` got its exponentials."""
        others = (statistics[Stat.MISS] * statistics[Stat.SUM])[:, None]
        out.scatter_(1, safe_targets(batch)[0], (-cap_slope * others).to(out.dtype))
        chain = batch.rows[Field.INV_TEMPERATURE] * -batch.transform.logit_scale  # dz/dx without a tanh's slope
        torch.div(slopes[0] * chain, statistics[Stat.SUM], out=factors)
        inactive = batch.rows[Field.KIND] < RowKind.ACTIVE
        if out.device.type != "cpu" or inactive.any():
            out.masked_fill_(inactive[:, None], 0)
            factors.masked_fill_(inactive, 0)


class Scratch:
    """Two reused buffers of one block each: allocating per block would cost more in page faults than the arithmetic."""

    def __init__(self, batch: RowBatch):
        self.batch = batch
        self.on_cpu = batch.logits.device.type == "cpu"
        count, vocab = batch.rows.shape[1], batch.logits.shape[1]
        self.block = min(max((CPU_BLOCK if self.on_cpu else DEVICE_BLOCK) // max(vocab, 1), 1), max(count, 1))
        self._buffers = batch.rows.new_empty(2, self.block, vocab)
        self._third: Tensor | None = None
        # The sum of 16-bit logits and a 16-bit bias would be rounded to 16 bits.
        self._bias = None if batch.bias is None else batch.bias.to(batch.rows.dtype)

    def blocks(self, least: RowKind) -> list[slice | Tensor]:
        """Blocks of the rows of at least this kind. On a GPU they cover all rows, because asking would synchronise."""
        count = self.batch.rows.shape[1]
        wanted = self.batch.rows[Field.KIND] >= least
        if self.on_cpu and not wanted.all():
            return list(wanted.nonzero()[:, 0].split(self.block)) if wanted.any() else []
        return [slice(start, min(start + self.block, count)) for start in range(0, count, self.block)]

    def base(self, block: slice | Tensor) -> tuple[Tensor, Tensor]:
        """The block's base logits [n, V], which may be the logits themselves, and two buffers [2, n, V]."""
        buffers = self._buffers[:, : len(self.batch.targets[block])]
        x = self._before_tanh(block, buffers[0])
        return (x if self.batch.transform.softcap is None else x.tanh_()), buffers

    def cap_slope(self, block: slice | Tensor) -> Tensor:
        """The slope of the tanh at the block's logits [n, V], in a tensor of its own."""
        return tanh_slope(self._before_tanh(block, None))

    def third(self, count: int) -> Tensor:
        """A third buffer [n, V], which is made when it is first needed."""
        if self._third is None:
            self._third = torch.empty_like(self._buffers[0])
        return self._third[:count]

    def cap_slope_at(self, index: Tensor) -> Tensor:
        """The slope of the tanh at an entry of every row, [N, 1]."""
        x = self.batch.logits.gather(1, index).to(self.batch.rows.dtype)
        x = x if self._bias is None else x + self._bias[index]
        assert self.batch.transform.softcap is not None
        return tanh_slope(x * (self.batch.transform.logit_scale / self.batch.transform.softcap))

    def _before_tanh(self, block: slice | Tensor, out: Tensor | None) -> Tensor:
        """x + bias, which may be the logits themselves, or with a soft-cap the argument of its tanh. A new tensor is
        `out`, if that is given.
        """
        order, transform = self.batch.order, self.batch.transform
        x = self.batch.logits[block if order is None else order[block]]
        if self._bias is not None:
            x = torch.add(x, self._bias, out=out)
        if transform.softcap is not None:
            # The scale is a tensor of the statistics dtype, so that 16-bit logits are promoted before they are scaled.
            scale = self._buffers.new_full((1,), transform.logit_scale / transform.softcap)
            x = torch.mul(x, scale, out=out)
        return x


def safe_targets(batch: RowBatch) -> tuple[Tensor, Tensor]:
    """The targets as a gather index [N, 1] that is never out of bounds, and whether a target was out of bounds."""
    index, vocab = batch.targets[:, None], batch.logits.shape[1]
    return index.clamp(0, vocab - 1), (index < 0) | (index >= vocab)


def _block_sums(base: Tensor, buffers: Tensor, e: Tensor, index: Tensor, factor: Tensor) -> Tensor:
    """[4, n] of a block: max b, q of the target, Σ 2^q and Σ 2^q q over the other tokens; q = (b - max b) · factor.

    The 2^q of the other tokens are left in `e`, which may be `base`. If `e` is the second buffer they are overwritten.
    """
    row_max = base.amax(1, keepdim=True).to(buffers.dtype)
    q = torch.sub(base, row_max, out=buffers[0]).mul_(factor)
    target = q.gather(1, index)
    on_cpu = base.device.type == "cpu"
    if not on_cpu:
        q.clamp_(min=LOWEST_SHIFT)
    torch.exp2(q, out=e).scatter_(1, index, 0)
    others = e.sum(1, keepdim=True)
    moment = torch.mul(e, q, out=buffers[1]).sum(1, keepdim=True)
    if on_cpu and moment.isnan().any():  # a banned token gives 0 · -inf, too rarely to clamp all rows
        moment = (
            torch.exp2(q.clamp_(min=LOWEST_SHIFT), out=buffers[1]).scatter_(1, index, 0).mul_(q).sum(1, keepdim=True)
        )
    return torch.cat([row_max, target, others, moment], dim=1).T


def _from_sums(sums: Tensor, factor: Tensor, outside: Tensor) -> Tensor:
    """[len(Stat), N] from the sums [4, N] of `_block_sums`; NaN where the target is outside the vocabulary."""
    reference, target, others, moment = sums
    target = target.masked_fill(outside[:, 0], torch.nan)
    at_target = target.exp2()
    total = others + at_target
    log_total = torch.where(target == 0, others.log1p(), total.log())
    mean = (moment + at_target * target.clamp(min=LOWEST_SHIFT)) / LOG2E / total
    # The entropy is never below 0, because no q is above 0 and one of them is 0.
    entropy = log_total - mean
    logsumexp = factor * reference + log_total
    return torch.stack([target / LOG2E - log_total, entropy, reference, total, others / total, mean, logsumexp])


class GradientRows(NamedTuple):
    """The numbers that a row's gradient needs, [N, 1] each.

    dx = 2^q · scale, or 2^q · scale · (per_q · q + constant) with an entropy term. At the target -slope · p becomes
    slope · (1 - p_y). A slope z of the log-sum-exp acts as a slope -z of log π, and adds z at the target.
    """

    reference: Tensor
    factor: Tensor  # of q
    scale: Tensor  # of 2^q, -slope / Σ without an entropy term, 1 / Σ with one
    per_q: Tensor | None  # coefficient of q in dx / p, or None without an entropy term
    constant: Tensor | None  # and what does not depend on the token
    entropy_constant: Tensor | None  # of the entropy term alone
    target: Tensor  # its index
    at_target: Tensor  # dx there, without the entropy term
    elsewhere: Tensor | None  # bool, the target is in another shard and its index is of some other token; None: nowhere

    @staticmethod
    def of(batch: RowBatch, statistics: Tensor, slopes: Tensor) -> "GradientRows":
        index, outside = safe_targets(batch)
        logprob, _, reference, total, miss, mean, _ = statistics[:, :, None]
        transform, inv_temperature = batch.transform, batch.rows[Field.INV_TEMPERATURE, :, None]
        slopes = slopes[:, :, None] * (transform.logit_scale * inv_temperature)  # dz/dx without a tanh's slope
        at_target, slope, per_q, constant, spread = slopes[0] * miss, slopes[0], None, None, None
        if len(slopes) > Slope.LOGSUMEXP:
            z_slope = slopes[Slope.LOGSUMEXP]
            at_target, slope = at_target + z_slope * logprob.exp(), slope - z_slope
        scale = -slope / total
        if len(slopes) > Slope.ENTROPY:
            entropy_slope = slopes[Slope.ENTROPY]
            scale, per_q, spread = 1 / total, -entropy_slope / LOG2E, entropy_slope * mean
            constant = spread - slope
        factor = transform.factor(inv_temperature) * LOG2E
        elsewhere = outside if batch.sharded else None
        at_target = at_target if batch.sharded else at_target.masked_fill(outside, torch.nan)
        return GradientRows(reference, factor, scale, per_q, constant, spread, index, at_target, elsewhere)

    def at(self, block: slice | Tensor) -> "GradientRows":
        return GradientRows._make(None if x is None else x[block] for x in self)


def _block_gradient(base: Tensor, buffers: Tensor, row: GradientRows) -> Tensor:
    """slope · (onehot - p) + logsumexp slope · p - entropy slope · p (log p + H) of a block, times dz/dx, [n, V] in a
    buffer.
    """
    q = torch.sub(base, row.reference, out=buffers[0]).mul_(row.factor)
    at_target = row.at_target
    if row.per_q is None:
        gradient = q.exp2_().mul_(row.scale)
    else:
        assert row.constant is not None and row.entropy_constant is not None
        p = torch.exp2(q, out=buffers[1]).mul_(row.scale)
        q.clamp_(min=LOWEST_SHIFT).mul_(row.per_q)
        at_target = at_target + (q.gather(1, row.target) + row.entropy_constant) * p.gather(1, row.target)
        gradient = q.add_(row.constant).mul_(p)
    if row.elsewhere is not None:
        at_target = torch.where(row.elsewhere, gradient.gather(1, row.target), at_target)
    return gradient.scatter_(1, row.target, at_target)
