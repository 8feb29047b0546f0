"""Gradients of few entries: the sweep of `sparse_grad`, which pays 4F for the rows alone that many tokens share.

A row's dlogits are slope · (onehot - p). With S_t its largest other entries, of which those left out weigh at most
τ · (1 - p_y):
    dX_t  = slope_t · ((1 - p_y) W[y_t] - Σ_{v in S_t} p_v W[v])
    dW   += Σ_t slope_t · ((1 - p_y) e_{y_t} - Σ_{v in S_t} p_v e_v) x_tᵀ        by column, in a fixed order
A row that needs more than `limit` entries is dense: its whole dlogits are kept until a window of such rows is full, of
which dX and dW are one product each. docs/sparse.md has the bound on the error, and how S_t is found in one pass.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drpo_kernels.backends.matmul import HeadProducts, cast_rows, exact_float32
from drpo_kernels.backends.planning import Wanted
from drpo_kernels.backends.ready import gradient_rows, policy_rows
from drpo_kernels.backends.rows import (
    Outcome,
    Row,
    RowBatch,
    RowKind,
    Selection,
    Sparsity,
    Stat,
    Terms,
    row_losses,
)
from drpo_kernels.backends.sweep import Execution, Gradients, Head, LinearSweep


class Entries(NamedTuple):
    """dlogits in coordinates, ordered by row."""

    rows: Tensor  # [M] int64, positions among the swept rows
    columns: Tensor  # [M] int64
    values: Tensor  # [M]


# break-even: an entry's gathers cost as much as so many columns of the products. An H200: its matmul rate over its
# bandwidth. Two CPU cores, with the selection of the entry, about as much
COLUMNS_PER_ENTRY = {"cpu": 256, "cuda": 264}
LIMIT_LEAST, LIMIT_MOST = 16, 1024


def outcome_fields(sparse_grad: float) -> int:
    return len(Outcome) + (len(Sparsity) if sparse_grad else 0)


def entry_limit(vocab: int, device: torch.device) -> int:
    """The most entries of a sparse row."""
    return min(max(vocab // COLUMNS_PER_ENTRY.get(device.type, 264), LIMIT_LEAST), LIMIT_MOST)


class SparseSweep(LinearSweep):
    """The chunk loop in which only dense rows reach the products."""

    def run_sparse(self, terms: Terms, outcome: Tensor) -> None:
        """Fill `outcome` [len(Outcome) + len(Sparsity), swept] and the gradients."""
        for chunk in self.plan.forward:
            rows = slice(self.active + chunk.start, self.active + chunk.stop)
            batch = self._batch(rows, self._logits[: chunk.stop - chunk.start])
            outcome[: len(Outcome), rows] = policy_rows(self.ops, batch, self.head.vocab, terms, None)[0]
        self._dense: list[Tensor] = []  # positions of the rows whose dlogits wait
        self._filled, self._products = 0, 0
        parts: list[Entries] = []
        start = 0
        while start < self.active:
            stop = min(start + self._room(), self.active)
            parts.append(self._chunk(slice(start, stop), terms, outcome))
            start = stop
        self._flush(None)
        self._logits = self._dlogits = None
        if parts:
            self._add_entries(Entries(*(torch.cat(x) for x in zip(*parts, strict=True))))

    def _room(self) -> int:
        """Rows of the next chunk; the window of dense rows is emptied where little is left beside it."""
        if self._dlogits is None:
            if 2 * self._filled > len(self._logits):
                self._flush(None)
            return len(self._logits) - self._filled
        rows = len(self._logits)
        if self._filled + rows > len(self._dlogits):
            self._flush(None)
        return min(rows, len(self._dlogits))

    def _chunk(self, rows: slice, terms: Terms, outcome: Tensor) -> Entries:
        count = rows.stop - rows.start
        at = self._filled if self._dlogits is None else 0
        batch = self._batch(rows, self._logits[at : at + count])
        statistics, batch = self.ops.consume(batch)
        outcome[: len(Outcome), rows], slopes = row_losses(
            statistics[Stat.LOGPROB], statistics[Stat.ENTROPY], batch.rows, terms
        )
        limit = entry_limit(self.head.vocab, self.hidden.device)
        chosen = self.ops.select(batch, statistics, self.execution.sparse_grad, limit)
        dense = (~chosen.sparse & (batch.rows[Row.KIND] == RowKind.ACTIVE)).nonzero()[:, 0]
        outcome[Sparsity.ENTRIES, rows] = (chosen.counts + chosen.sparse).to(outcome.dtype)
        outcome[Sparsity.LEFT_OUT, rows] = chosen.left_out
        if len(dense):
            self._keep(rows.start + dense, dense, batch, statistics, slopes)
        return self._entries(rows.start, batch, statistics, slopes, chosen)

    def _keep(self, positions: Tensor, dense: Tensor, batch: RowBatch, statistics: Tensor, slopes: Tensor) -> None:
        """Write the dense rows' dlogits behind those that wait."""
        buffer = self._logits if self._dlogits is None else self._dlogits
        out = buffer[self._filled : self._filled + len(dense)]
        undo = gradient_rows(
            self.ops, batch._replace(targets=batch.targets[dense], rows=batch.rows[:, dense], order=dense),
            self.head.vocab, statistics[:, dense], slopes[:, dense], out,
        )  # fmt: skip
        self._dense.append(positions)
        self._filled += len(dense)
        if undo is not None:
            self._flush(undo)  # a float16 scale is of one chunk

    def _flush(self, undo: Tensor | None) -> None:
        """dX, dW and db of the dense rows that wait."""
        if not self._filled:
            return
        buffer = self._logits if self._dlogits is None else self._dlogits
        self._accumulate_rows(torch.cat(self._dense), buffer[: self._filled], undo, first=not self._products)
        self._dense, self._filled, self._products = [], 0, self._products + 1

    def _entries(
        self, start: int, batch: RowBatch, statistics: Tensor, slopes: Tensor, chosen: Selection
    ) -> Entries:
        """The targets' entries and the selected ones, ordered by row."""
        transform, rows = batch.transform, chosen.sparse.nonzero()[:, 0]
        chain = slopes[0] * (transform.logit_scale * batch.rows[Row.INV_TEMPERATURE])
        target = batch.targets[rows]
        at_target = chain[rows] * statistics[Stat.MISS, rows]
        owner = torch.arange(len(chosen.counts), device=rows.device).repeat_interleave(
            chosen.counts, output_size=len(chosen.columns)
        )
        every, columns = torch.cat([rows, owner]), torch.cat([target, chosen.columns])
        values = torch.cat([at_target, -chain[owner] * chosen.probs])
        if transform.softcap is not None:
            logp = torch.cat([statistics[Stat.LOGPROB, rows], chosen.probs.log()])
            values = values * capped_slope(batch, statistics, every, logp)
        order = every.argsort(stable=True)
        return Entries(start + every[order], columns[order], values[order])

    def _add_entries(self, entries: Entries) -> None:
        vocab = self.head.vocab
        if self.wanted.hidden:
            rows, counts = entries.rows.unique_consecutive(return_counts=True)
            for some, sums in weighted_sums(self.matmul, self.head.weight, entries.columns, entries.values, counts):
                places = rows[some] if self.index is None else self.index[rows[some]]
                self._gradients.hidden[places] = sums.to(self._gradients.hidden.dtype)
        if not (self.wanted.weight or self.wanted.bias):
            return
        order = entries.columns.argsort(stable=True)  # by column, and within one by row
        columns, counts = entries.columns[order].unique_consecutive(return_counts=True)
        values = entries.values[order]
        if self.wanted.weight:
            adds = self.head.main_grad is not None
            out = (self.head.main_grad if adds else self._gradients.weight)[:vocab]
            if not (adds or self._products):
                out.zero_()
            table, rows = self._hidden_table(entries.rows[order])
            for some, sums in weighted_sums(self.matmul, table, rows, values, counts):
                out[columns[some]] += sums
        if self.wanted.bias and len(columns):
            self._gradients.bias[columns] += torch.segment_reduce(values, "sum", lengths=counts).to(
                self._gradients.bias.dtype
            )

    def _hidden_table(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden states [R, H], where those of the swept `rows` lie among them)."""
        if self._hidden_view is not None:
            return self._hidden_view, rows if self.index is None else self.index[rows]
        return self._selected(slice(0, self.active)), rows


def capped_slope(batch: RowBatch, statistics: Tensor, rows: Tensor, logp: Tensor) -> Tensor:
    """1 - b² of a soft-cap at entries [M] of `rows` with log-probs `logp`: b = max b + (log p + log Σ) / factor."""
    factor = batch.transform.factor(batch.rows[Row.INV_TEMPERATURE, rows])
    q = logp + statistics[Stat.SUM, rows].log()
    return 1 - (statistics[Stat.MAX, rows] + q / factor).square()


def weighted_sums(
    matmul: HeadProducts, table: Tensor, index: Tensor, factors: Tensor, counts: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Sums of `counts` [G] consecutive factors [M] times rows of the table [R, H] -> (a range of G, [its length, H]).

    In the accumulator's precision and in order.
    """
    stops = counts.cumsum(0)
    offsets = torch.cat([stops.new_zeros(1), stops])
    if not len(counts):
        return
    if table.dtype == matmul.accumulator:
        yield slice(0, len(counts)), F.embedding_bag(
            index, table, offsets[:-1], mode="sum", per_sample_weights=factors.to(table.dtype)
        )
        return
    step = cast_rows(table)
    pieces = torch.searchsorted(stops, torch.arange(step, int(stops[-1]) + step, step, device=stops.device))
    edges = sorted({0, len(counts), *pieces.clamp(max=len(counts)).tolist()})
    for first, last in itertools.pairwise(edges):
        some = slice(int(offsets[first]), int(offsets[last]))
        gathered = matmul.operand(table[index[some]]).to(matmul.accumulator)
        positions = torch.arange(len(gathered), device=index.device)
        weights = factors[some].to(matmul.accumulator)
        yield slice(first, last), F.embedding_bag(
            positions, gathered, offsets[first:last] - some.start, mode="sum", per_sample_weights=weights
        )


def sparse_policy_sweep(
    hidden: Tensor, head: Head, targets: Tensor, rows: Tensor, terms: Terms, execution: Execution, wanted: Wanted
) -> tuple[Tensor, Gradients]:
    """`policy_sweep` with `execution.sparse_grad` -> (outcome [len(Outcome) + len(Sparsity), N], gradients)."""
    sweep = SparseSweep(hidden, head, targets, rows, execution, wanted)
    outcome = rows.new_zeros(outcome_fields(execution.sparse_grad), sweep.swept)
    with torch.autocast(hidden.device.type, enabled=False), exact_float32():
        sweep.run_sparse(terms, outcome)
        return sweep.scatter(outcome), sweep.gradients()
