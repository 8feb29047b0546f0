"""`EntryOps` in PyTorch."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from drpo_kernels.backends import torch_rows
from drpo_kernels.backends.matmul import cast_rows
from drpo_kernels.backends.rows import Field, RowBatch, RowKind, Stat
from drpo_kernels.backends.sparse.contract import LEAST_OTHERS, Base, GatheredSums, Selection
from drpo_kernels.backends.sparse.selection import above, too_flat, trimmed
from drpo_kernels.backends.torch_rows import LOG2E, GradientRows, Scratch, TorchRows, safe_targets

# The entries of so many rows are chosen together. The sums by level of a row take a KiB, several times.
SELECTED_ROWS = 4096


class Exponentials(RowBatch):
    """A batch whose logits have been overwritten by their 2^q (torch_rows.py), with 0 at the target."""


class TorchEntries(TorchRows):
    """`EntryOps` in PyTorch. On a CPU the exponentials of a chunk replace its logits, so that each is computed once."""

    def consume(self, batch: RowBatch) -> tuple[Tensor, RowBatch]:
        kept = (
            batch.transform.softcap is None
            and batch.logits.dtype == batch.rows.dtype
            and batch.logits.device.type == "cpu"
            and bool((batch.rows[Field.KIND] == RowKind.ACTIVE).all())
        )
        statistics = self._statistics(batch, batch.logits if kept else None)
        return statistics, Exponentials(*batch._replace(bias=None)) if kept else batch

    def select(self, batch: RowBatch, statistics: Tensor, tolerance: float, limit: int) -> Selection:
        scratch, miss, total = Scratch(batch), statistics[Stat.MISS], statistics[Stat.SUM]
        index, _ = safe_targets(batch)
        factor = batch.transform.factor(batch.rows[Field.INV_TEMPERATURE]) * LOG2E
        others = miss * total
        active = batch.rows[Field.KIND] == RowKind.ACTIVE
        dense = ~active | ~(others >= LEAST_OTHERS) | too_flat(statistics, batch.logits.shape[1], tolerance, limit)
        others = others.masked_fill(dense, torch.nan)  # a comparison with NaN is False
        candidates = (~dense).nonzero()[:, 0]
        if 2 * len(candidates) > len(dense):  # looking at all rows is cheaper than copying some
            candidates = torch.arange(len(dense), device=dense.device)
        counts, left_out = torch.zeros_like(batch.targets), torch.zeros_like(others)
        found = [(index.new_empty(0), index.new_empty(0), others.new_empty(0))]
        for block in candidates.split(min(scratch.block, SELECTED_ROWS)):
            following = slice(int(block[0]), int(block[0]) + len(block)) if len(candidates) == len(dense) else block
            e = _exponentials(batch, scratch, following, statistics[Stat.REFERENCE], factor, index)
            rows, columns, values = above(e, others[block], tolerance, limit)
            kept, entries, mass = trimmed(rows, values / others[block][rows], len(block), tolerance, limit)
            sparse = (entries <= limit) & (mass <= tolerance)
            kept &= sparse[rows]
            chosen, rows, at = block[sparse], block[rows[kept]], sparse.nonzero()[:, 0]
            counts[chosen], left_out[chosen] = entries[at] + 1, mass[at].to(others.dtype) * miss[chosen]
            weights = torch.cat([-miss[chosen], values[kept] / total[rows]])
            rows, columns = torch.cat([chosen, rows]), torch.cat([batch.targets[chosen], columns[kept]])
            order = rows.argsort(stable=True)
            found.append((rows[order], columns[order], weights[order]))
        rows, columns, weights = (torch.cat(tensors) for tensors in zip(*found, strict=True))
        return Selection((active & (counts == 0)).nonzero()[:, 0], counts, rows, columns, weights, left_out)

    def write_gradient(self, batch: RowBatch, statistics: Tensor, slopes: Tensor, out: Tensor) -> None:
        if not isinstance(batch, Exponentials):
            super().write_gradient(batch, statistics, slopes, out)
            return
        # slope · (onehot - p) is written in the order of the rows, because `out` may be earlier rows of the batch.
        per_row = GradientRows.of(batch, statistics, slopes)
        count, vocab = batch.rows.shape[1], batch.logits.shape[1]
        together = batch.order is None or len(batch.order) == len(batch.logits)
        step = max(torch_rows.CPU_BLOCK // max(vocab, 1), 1)
        for block in (slice(start, min(start + step, count)) for start in range(0, count, step)):
            e = batch.logits[block if batch.order is None or together else batch.order[block]]
            gradient = torch.mul(e, per_row.scale[block], out=out[block] if together else e)
            gradient.scatter_(1, per_row.target[block], per_row.at_target[block])
            if not together:
                out[block] = gradient

    def gathered_sums(
        self, table: Tensor, sums: GatheredSums, out: Tensor, dtype: torch.dtype, base: Base | None = None
    ) -> None:
        for groups, index, rows in _gathered(table, sums, dtype):
            start, stop = (int(sums.offsets[edge]) for edge in (groups.start, groups.stop))
            total = torch.nn.functional.embedding_bag(
                index, rows, sums.offsets[groups] - start, mode="sum", per_sample_weights=sums.factors[start:stop]
            )
            places = sums.places[groups]
            if base is None:
                out[places] += total
            else:
                out[places] = total.addcmul_(base[1][groups, None], base[0]).to(out.dtype)

    def gathered_dots(
        self, left: Tensor, left_index: Tensor, right: Tensor, right_index: Tensor, dtype: torch.dtype
    ) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        out = left.new_empty(len(left_index), dtype=wide)
        step = cast_rows(left, 3 * wide.itemsize)
        for block in (slice(start, start + step) for start in range(0, len(out), step)):
            rows = left[left_index[block]].to(dtype).to(wide)
            out[block] = rows.mul_(right[right_index[block]].to(dtype)).sum(1)
        return out


def _exponentials(
    batch: RowBatch, scratch: Scratch, block: slice | Tensor, reference: Tensor, factor: Tensor, index: Tensor
) -> Tensor:
    """The 2^q of a block of rows [n, V], with 0 at the target."""
    if isinstance(batch, Exponentials):
        return batch.logits[block]
    base, buffers = scratch.base(block)
    q = torch.sub(base, reference[block, None], out=buffers[0]).mul_(factor[block, None])
    return q.exp2_().scatter_(1, index[block], 0)


def _gathered(table: Tensor, sums: GatheredSums, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(range of groups, their index into a table, that table in the accumulator's dtype), a few groups at a time. Their
    sums, which exist three times until they are in place, and gathered rows in another dtype are temporaries.
    """
    wide, groups, stops = sums.factors.dtype, len(sums.places), sums.offsets[1:]
    step = cast_rows(table, 3 * wide.itemsize)
    if table.dtype == wide == dtype:
        edges = list(range(0, groups, step))
    else:
        starts = torch.arange(0, len(sums.rows), step, device=stops.device)
        edges = torch.searchsorted(stops, starts, right=True).tolist()
    for first, last in itertools.pairwise(sorted({0, groups, *edges})):
        index = sums.rows[int(sums.offsets[first]) : int(sums.offsets[last])]
        if table.dtype == wide == dtype:
            yield slice(first, last), index, table
        else:
            yield slice(first, last), torch.arange(len(index), device=index.device), table[index].to(dtype).to(wide)
