"""The contract between the sweep of `sparse_grad`, the logits of `kept_ids` and a backend: the operations on some of a
row's vocabulary entries.
"""

import math
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from drpo_kernels.backends.rows import Outcome, RowBatch, RowOps

# Rounding to float32 changes a sum of shares of 1 - p_y by less than this. The report of what a row leaves out adds it.
SHARE_ROUNDING = 4e-6
# Shares are sorted into levels, LEVELS_PER_OCTAVE to a factor of two, up from the smallest share that counts. The last
# level is beyond any budget.
LEVELS, LEVELS_PER_OCTAVE = 128, 8
# The least Σ exp(q) of a row's other tokens of which shares are accurate. Below it the terms that matter may not be
# normal float32 numbers: they are rounded to few digits, or to 0 on a device that flushes them.
LEAST_OTHERS = 2.0**-100
# Rounding to float32 changes an entropy by less than this, relatively.
ENTROPY_ROUNDING = 1e-4
# An entry of a sparse row is gathered from two tables, 4H bytes. A column of a dense row takes 4H FLOP. By an H200's
# rates an entry costs as much as 256 columns; on two CPU cores, by measurement, as 64.
COLUMNS_PER_ENTRY, CPU_COLUMNS_PER_ENTRY = 256, 64
LEAST_ENTRIES, MOST_ENTRIES = 16, 1024


class Sparsity(IntEnum):
    """The fields that follow `Outcome` in a row's report where `sparse_grad` is used."""

    ENTRIES = len(Outcome)  # vocabulary entries of the row's gradient, its target among them; 0 where it is dense
    LEFT_OUT = len(Outcome) + 1  # probability mass of the other entries, which have no gradient


# A row reports so many fields.
SPARSE_OUTCOME = len(Outcome) + len(Sparsity)


class Selection(NamedTuple):
    """The dense rows of a chunk, and the entries of its sparse rows: their targets and their largest probabilities."""

    dense: Tensor  # positions of the dense rows, ascending, [D] int64
    counts: Tensor  # number of entries of each row, [n] int64; 0 where it is dense, or not ACTIVE
    rows: Tensor  # the row of each entry, ascending, [M] int64
    columns: Tensor  # the vocabulary entry, [M] int64
    weights: Tensor  # p, or p - 1 < 0 at the target, [M]
    left_out: Tensor  # each row's probability mass without an entry, [n]; 0 where counts are


Base = tuple[Tensor, Tensor]  # a row [H], and its factor in each group [G]


class GatheredSums(NamedTuple):
    """G sums over rows of a table [R, H]. Each adds consecutive products factor · row and has a place in the output."""

    rows: Tensor  # of the table, [M] int64
    factors: Tensor  # [M], in the accumulator's dtype
    offsets: Tensor  # where each sum begins, and M, [G + 1] int64
    places: Tensor  # rows of the output, [G] int64; no two are the same


class EntryOps(RowOps, Protocol):
    """The operations of a backend on some entries of its rows, beside `RowOps`."""

    def consume(self, batch: RowBatch) -> tuple[Tensor, RowBatch]:
        """Compute the statistics, and return the batch for `select` and `write_gradient`, which alone may read it."""
        ...

    def select(self, batch: RowBatch, statistics: Tensor, tolerance: float, limit: int) -> Selection:
        """Choose entries of each ACTIVE row, beside its target, that leave out at most tolerance · (1 - p_y): the
        largest ones, and as few as possible if of each level (LEVELS) all or none are kept.

        A row is dense if it needs more than `limit` entries. It may also be called dense without an exact count: if
        more than 3 · limit entries exceed the smallest probability that can matter, if the sum of its other tokens is
        below LEAST_OTHERS, or if its entropy H = H(p_y) + (1 - p_y) · H(other tokens) exceeds that of any sparse row.
        """
        ...

    def gathered_sums(
        self, table: Tensor, sums: GatheredSums, out: Tensor, dtype: torch.dtype, base: Base | None = None
    ) -> None:
        """out[places] += sums, or with `base` (a row [H], factors [G]) out[places] = sums + factors · row.

        Rows of the table are rounded to `dtype`. Sums are added in the order given, in the accumulator's precision, and
        rounded once to the dtype of `out` [., H].
        """
        ...

    def gathered_dots(
        self, left: Tensor, left_index: Tensor, right: Tensor, right_index: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """left[left_index[i]] · right[right_index[i]], [M] in the accumulator's precision.

        The tables [., H] may have any strides; their rows are rounded to `dtype`. Indices are [M] int64.
        """
        ...


def entry_ops(backend: str) -> EntryOps:
    if backend == "triton":
        from drpo_kernels.backends.sparse.triton_ops import TritonEntries

        return TritonEntries()
    from drpo_kernels.backends.sparse.torch_ops import TorchEntries

    return TorchEntries()


def entry_limit(vocab: int, device_type: str) -> int:
    """The most vocabulary entries of a sparse row. A row that needs more is cheaper as a dense one."""
    columns = CPU_COLUMNS_PER_ENTRY if device_type == "cpu" else COLUMNS_PER_ENTRY
    return min(max(vocab // columns, LEAST_ENTRIES), MOST_ENTRIES)


def most_entropy(vocab: int, tolerance: float, limit: int) -> float:
    """The largest entropy, in nats, of a row's other tokens if `limit` of them hold all but `tolerance` of their mass.

    The distribution with this entropy is flat over those `limit` tokens, and flat over the others. If `limit` tokens
    hold that much of every distribution, the result is a number that no entropy exceeds.
    """
    rest = vocab - 1 - limit
    if limit >= (1 - tolerance) * (limit + rest):
        return float(vocab)
    kept, left = 1 - tolerance, tolerance
    return kept * math.log(limit / kept) + left * math.log(rest / left)
