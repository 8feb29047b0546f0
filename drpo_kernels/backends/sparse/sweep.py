"""The sweep of `sparse_grad`: a row whose probability few tokens hold costs 2F, not 6F. docs/sparse.md has the bounds.

A row's dlogits are slope · (onehot - p). S are its largest entries other than the target, chosen so that all others
together weigh m <= τ · (1 - p_y), and W̄ is the mean row of the weight:
    dX_t  = slope · ((1 - p_y) W[y] - Σ_{v in S} p_v W[v] - m W̄)
    dW   += slope · ((1 - p_y) e_y - Σ_{v in S} p_v e_v - m/V · 1) x_tᵀ         by column, in a fixed order
What is left out is spread evenly, so that dlogits still sum to 0. (With a soft-cap they need not, and validation
refuses the two together.) A row that needs more than `entry_limit` entries is dense. The dlogits of dense rows wait
until a window of them is full; its dX and dW are one product each. The entries of sparse rows wait as coordinates,
until there are as many as the plan has room for.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.backends.matmul import exact_products, product
from drpo_kernels.backends.planning import NeedsGrad
from drpo_kernels.backends.ready import gradient_rows, policy_rows
from drpo_kernels.backends.rows import Field, Outcome, RowBatch, Terms, float16_scale
from drpo_kernels.backends.sparse.contract import (
    SPARSE_OUTCOME,
    EntryOps,
    GatheredSums,
    Selection,
    Sparsity,
    entry_limit,
    entry_ops,
)
from drpo_kernels.backends.sparse.plan import SparsePlan, sparse_plan
from drpo_kernels.backends.spec import Execution, Spec
from drpo_kernels.backends.sweep import Head, LinearSweep


class Entries(NamedTuple):
    """The dlogits of sparse rows as coordinates, ordered by row."""

    counts: Tensor  # the number of entries of each of n consecutive rows, [n] int64; 0 for a dense row
    rows: Tensor  # [M] int64, positions among the swept rows
    columns: Tensor  # [M] int64
    values: Tensor  # [M]
    spread: Tensor  # the sum of each row's dlogits that is spread over all V columns, [n]


class SparseSweep(LinearSweep):
    """The chunk loop in which only dense rows reach the products."""

    ops: EntryOps
    plan: SparsePlan
    make_plan = staticmethod(sparse_plan)
    writes_every_row = False

    def __init__(
        self, hidden: Tensor, head: Head, targets: Tensor, rows: Tensor, execution: Execution, needs_grad: NeedsGrad
    ):
        super().__init__(hidden, head, targets, rows, execution, needs_grad)
        self.ops = entry_ops(execution.backend)

    def run_sparse(self, terms: Terms, outcome: Tensor) -> None:
        """Fill `outcome` [len(Outcome) + len(Sparsity), swept] and the gradients."""
        for chunk in self.plan.forward:
            rows = slice(self.active + chunk.start, self.active + chunk.stop)
            outcome[: len(Outcome), rows] = policy_rows(self.ops, self.head.vocab, terms, self._multiplied(rows))[0]
        self._dense: list[Tensor] = []  # the positions of those rows
        self._filled, self._products = 0, 0
        self._to_all = self._waiting.new_zeros(1, self.hidden.shape[-1], dtype=self.matmul.accumulator)  # Σ spread · x
        limit = entry_limit(self.head.vocab, self.hidden.device.type)
        most, start, waiting = self.plan.sparse_chunk_rows(limit), 0, 0
        self._entries: list[Entries] = []
        self._added = 0  # the rows whose entries have been added
        while start < self.active:
            stop = min(start + min(self._room(), most), self.active)
            found = self._chunk(slice(start, stop), terms, outcome, limit)
            waiting += len(found.columns)
            if self._entries and waiting > self.plan.entries:
                self._flush(last=True)
                self._add_entries()
                waiting = len(found.columns)
            self._entries.append(found)
            start = stop
        if self.active:
            self._flush(last=True)
            self._logits = self._dlogits = None  # the sums need their memory
            self._add_entries()

    @property
    def _waiting(self) -> Tensor:
        """The buffer for dlogits of dense rows, the first `_filled` of which wait."""
        waiting = self._logits if self._dlogits is None else self._dlogits
        assert waiting is not None
        return waiting

    def _room(self) -> int:
        """The rows of the next chunk, all of which may be dense. If the window has no room for them, it is emptied."""
        if self._dlogits is None:  # the chunk's logits lie behind the rows that wait
            if 2 * self._filled > len(self._waiting):
                self._flush()
            return len(self._waiting) - self._filled
        assert self._logits is not None
        most = min(len(self._logits), len(self._waiting))
        if self._filled + most > len(self._waiting):
            self._flush()
        return most

    def _chunk(self, rows: slice, terms: Terms, outcome: Tensor, limit: int) -> Entries:
        statistics, batch = self.ops.consume(self._multiplied(rows, self._filled if self._dlogits is None else 0))
        outcome[: len(Outcome), rows], slopes = self.ops.losses(statistics, batch.rows, terms)
        chosen = self.ops.select(batch, statistics, self.execution.sparse_grad, limit)
        outcome[Sparsity.ENTRIES, rows] = chosen.counts.to(outcome.dtype)
        outcome[Sparsity.LEFT_OUT, rows] = chosen.left_out
        entries = self._coordinates(rows, batch, slopes[0], chosen)
        if len(chosen.dense):  # this comes last, because the dlogits overwrite the logits
            self._keep(rows.start, chosen.dense, batch, statistics, slopes)
        return entries

    def _keep(self, start: int, dense: Tensor, batch: RowBatch, statistics: Tensor, slopes: Tensor) -> None:
        """Write the dlogits of the dense rows behind those that wait."""
        out = self._waiting[self._filled : self._filled + len(dense)]
        batch = batch._replace(targets=batch.targets[dense], rows=batch.rows[:, dense], order=dense)
        unscale = gradient_rows(self.ops, batch, self.head.vocab, statistics[:, dense], slopes[:, dense], out)
        self._dense.append(start + dense)
        self._filled += len(dense)
        if unscale is not None:  # a float16 scale belongs to one chunk
            self._flush(unscale)

    def _coordinates(self, rows: slice, batch: RowBatch, slope: Tensor, chosen: Selection) -> Entries:
        slope = slope * batch.transform.factor(batch.rows[Field.INV_TEMPERATURE])
        values = -slope[chosen.rows] * chosen.weights
        spread = torch.where(chosen.left_out > 0, -slope * chosen.left_out, 0)
        if self.needs_grad.weight:
            product(spread[None], self.hidden_rows(rows).to(spread.dtype), self._to_all, accumulate=True)
        return Entries(chosen.counts, rows.start + chosen.rows, chosen.columns, values, spread)

    def _flush(self, unscale: Tensor | None = None, last: bool = False) -> None:
        """Add dX, dW and db of the dense rows that wait. `last` comes before entries are added: the window then has one
        more row, for the sum that is spread over all columns, so that dW is read and written once for both.
        """
        if last and self._filled == len(self._waiting):
            self._flush()
        if not (self._filled or last):
            return
        rows = torch.cat([self._to_all.new_empty(0, dtype=torch.int64), *self._dense])
        dlogits, x, vocab = self._waiting[: self._filled], self.hidden_rows(rows), self.head.vocab
        complete = None
        if self.needs_grad.hidden and self._filled:
            complete = self._add_hidden_gradient(rows, dlogits, unscale)
        if self._gradients.bias is not None and self._filled:
            bias = self._gradients.bias[:vocab]
            self.matmul.add_bias_gradient(dlogits, bias, first=not self._products, unscale=unscale)
        if self.needs_grad.weight:
            if last:
                to_all = self._to_all / vocab
                if x.dtype == torch.float16:  # no other row waits: every chunk of float16 was flushed
                    scale, unscale = float16_scale(to_all)
                    to_all = to_all * scale
                dlogits, x = self._waiting[: self._filled + 1], torch.cat([x, to_all.to(x.dtype)])
                dlogits[-1] = 1
                self._to_all.zero_()
            self._add_weight_gradient(dlogits, x, unscale, first=not self._products)
        if complete is not None:
            complete()
        self._dense, self._filled, self._products = [], 0, self._products + 1

    def _add_entries(self) -> None:
        """Add dX, dW and db of the entries that wait."""
        entries = Entries(*(torch.cat(x) for x in zip(*self._entries, strict=True)))
        self._entries = []
        if self._gradients.hidden is not None:
            self._add_to_hidden(entries, self._gradients.hidden)
        if self.needs_grad.weight or self.needs_grad.bias:
            self._add_to_head(entries)
        self._added += len(entries.counts)

    @functools.cached_property
    def _mean_row(self) -> Tensor:
        """The mean row W̄ [H] of the weight."""
        mean = self._to_all.new_empty(1, self.hidden.shape[-1])
        self.matmul.hidden_gradient(mean.new_ones(1, self.head.vocab, dtype=self.matmul.operand_dtype), mean)
        return mean[0] / self.head.vocab

    def _add_to_hidden(self, entries: Entries, out: Tensor) -> None:
        sparse = entries.counts.nonzero()[:, 0]
        places = self._places(self._added + sparse)
        sums = GatheredSums(entries.columns, entries.values, offsets_of(entries.counts[sparse]), places)
        table, base = self.head.weight[: self.head.vocab], (self._mean_row, entries.spread[sparse])
        self.ops.gathered_sums(table, sums, out, self.execution.compute_dtype, base)

    def _add_to_head(self, entries: Entries) -> None:
        order = entries.columns.argsort(stable=True)  # by column, and by row within a column
        columns, counts = entries.columns[order].unique_consecutive(return_counts=True)
        values, offsets = entries.values[order], offsets_of(counts)
        if self.needs_grad.weight:
            table, rows = self._hidden_view, self._places(entries.rows[order])
            if table is None:
                table, rows = self._selected(slice(0, self.active)), entries.rows[order]
            sums = GatheredSums(rows, values, offsets, columns)
            self.ops.gathered_sums(table, sums, self._weight_out, self.execution.compute_dtype)
        if self._gradients.bias is not None:
            bias = self._gradients.bias[: self.head.vocab]
            bias += entries.spread.sum() / self.head.vocab
            bias[columns] += torch.segment_reduce(values, "sum", offsets=offsets).to(bias.dtype)

    def _places(self, rows: Tensor) -> Tensor:
        """The places of swept rows among the caller's rows."""
        return rows if self.index is None else self.index[rows]


def offsets_of(counts: Tensor) -> Tensor:
    """The sizes of groups, [G] -> where each group begins, and the sum, [G + 1]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def sparse_policy_sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    main_grad: Tensor | None,
    spec: Spec,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`policy_sweep` with `sparse_grad` -> (outcome [len(Outcome) + len(Sparsity), N], gradients)."""
    head, needs_grad = Head.of(weight, bias, spec, main_grad), NeedsGrad(*needs_grad)
    with exact_products():
        sweep = SparseSweep(hidden, head, targets, rows, spec.execution, needs_grad)
        outcome = rows.new_zeros(SPARSE_OUTCOME, sweep.swept)
        assert spec.terms is not None
        sweep.run_sparse(spec.terms, outcome)
        return sweep.scatter([outcome], SPARSE_OUTCOME), *sweep.gradients()
