"""The chunked linear path: 6F with the gradient in the forward, or 2F + 6F by recomputation.

F = T·V·H. Per chunk of rows: logits GEMM -> row operations (gradient written over the logits) -> dX and dW GEMMs. No
[T, V] tensor exists unless the plan retains 16-bit dlogits on purpose. Nothing here knows an objective or a kernel.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.backends import head_products, planning, row_ops
from drpo_kernels.backends.fp8_head import Fp8Logits
from drpo_kernels.backends.matmul import HeadProducts, exact_float32
from drpo_kernels.backends.ready import gradient_rows, policy_rows
from drpo_kernels.backends.rows import Outcome, Row, RowBatch, RowKind, RowOps, Stat, Terms, Transform
from drpo_kernels.backends.sharded import ShardedRows
from drpo_kernels.collectives import VocabShard, start_sum

# a row of a matrix starts on a 32-byte boundary for every element size: wide loads for any vocabulary
COLUMN_MULTIPLE = 16


@dataclass(frozen=True)
class Execution:
    """How to run: of these, only the dtypes change what is computed.

    With a `shard` the head's weight and bias are this rank's rows of it. The ranks of its group must then call with the
    same inputs, options and `Wanted`: every chunk is a collective, and so is its dX.
    """

    backend: str
    compute_dtype: torch.dtype
    logits_dtype: torch.dtype | None = None
    workspace_bytes: int | None = None
    every_row: bool = False  # compact="none": sweep SKIPPED rows too, with no count read back from the device
    shard: VocabShard | None = None
    head_dtype: str | None = None  # of the logits' product alone, which it does change: see fp8_head.py
    batch_invariant: bool = False  # products in one order: see triton/invariant.py


class Wanted(NamedTuple):
    """Which gradients a linear sweep computes."""

    hidden: bool
    weight: bool
    bias: bool


class Head(NamedTuple):
    """The output head: weight [V, H], bias [V] or None, the real vocabulary (V' <= V), and the transform after it.

    Of a sharded head, this rank's rows and how many of them are real, perhaps none.
    """

    weight: Tensor
    bias: Tensor | None
    vocab: int
    transform: Transform


class Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def stored_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 gradients wait in float32 for the upstream scale: a GradScaler acts only in the backward."""
    return torch.float32 if dtype == torch.float16 else dtype


class LinearSweep:
    """The chunk loop of one call, shared by the fused and the recompute route."""

    def __init__(self, hidden: Tensor, head: Head, targets: Tensor, rows: Tensor, execution: Execution, wanted: Wanted):
        self.hidden, self.head, self.execution, self.wanted = hidden, head, execution, wanted
        self.shard = execution.shard if execution.shard is not None and len(execution.shard.sizes) > 1 else None
        ops = row_ops(execution.backend)
        self.ops: RowOps = ops if self.shard is None else ShardedRows(ops, self.shard)
        weight = head.weight[: head.vocab]
        self.matmul: HeadProducts = head_products(weight, execution.compute_dtype, execution.batch_invariant)
        quantized = execution.head_dtype is not None
        self.head_product = Fp8Logits(self.matmul, execution.head_dtype) if quantized else self.matmul
        self.bias = None if head.bias is None else head.bias[: head.vocab].contiguous()
        self._order(targets, rows, any(wanted))
        self._allocate()

    def _order(self, targets: Tensor, rows: Tensor, with_gradient: bool) -> None:
        """Rows to sweep, those with a gradient first. Compaction reads two counts back: the only synchronisation."""
        count = rows.shape[1]
        self.count, self.index = count, None
        if self.execution.every_row:
            self.active, self.swept = (count if with_gradient else 0), count
        else:
            kinds = rows[Row.KIND]
            active, forward = torch.stack(
                [(kinds == kind).sum() for kind in (RowKind.ACTIVE, RowKind.FORWARD)]
            ).tolist()
            self.swept = active + forward
            self.active = active if with_gradient else 0
            if max(active, forward) < count:
                self.index = kinds.argsort(descending=True, stable=True)[: self.swept]
        self.targets = targets if self.index is None else targets[self.index]
        self.rows = rows if self.index is None else rows[:, self.index]

    def _allocate(self) -> None:
        # every rank must cut the rows into the same chunks, whatever its own share of the vocabulary
        device, vocab = self.hidden.device, self.head.vocab if self.shard is None else self.shard.largest
        logits_dtype = self.execution.logits_dtype or self.matmul.accumulator
        retainable = self.wanted.weight and self.matmul.operand_dtype == torch.bfloat16
        self.retain = retainable and planning.retain_dlogits(self.active, self.hidden.shape[1])
        shares_buffer = logits_dtype == self.matmul.operand_dtype and not self.retain
        separate = self.active and not shares_buffer
        per_logit = logits_dtype.itemsize + (self.matmul.operand_dtype.itemsize if separate and not self.retain else 0)
        budget = planning.workspace_bytes(device, vocab, per_logit, self.execution.workspace_bytes)
        self.active_plan = planning.plan_chunks(self.active, vocab, per_logit, budget, self.matmul.row_multiple)
        self.forward_plan = planning.plan_chunks(self.swept - self.active, vocab, logits_dtype.itemsize, budget)
        largest = max(
            self.active_plan.chunk_rows if self.active else 0,
            self.forward_plan.chunk_rows if self.swept > self.active else 0,
        )
        self._logits = self._rows_buffer(largest, logits_dtype)
        kept = self.active if self.retain else min(self.active_plan.chunk_rows, self.active)
        self._dlogits = self._rows_buffer(kept, self.matmul.operand_dtype) if separate else self._logits
        self._gradients = self._gradient_buffers()

    def _rows_buffer(self, count: int, dtype: torch.dtype) -> Tensor:
        padded = -(-self.head.vocab // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        return torch.empty(count, padded, dtype=dtype, device=self.hidden.device)[:, : self.head.vocab]

    def _gradient_buffers(self) -> Gradients:
        accumulator, weight = self.matmul.accumulator, self.head.weight
        hidden_dtype = stored_gradient_dtype(self.hidden.dtype)
        one_product = self.retain or self.active_plan.chunk_rows >= self.active
        direct = one_product and weight.dtype == self.matmul.operand_dtype != torch.float16
        weight_dtype = weight.dtype if direct else accumulator
        hidden_gradient = weight_gradient = bias_gradient = None
        if self.wanted.hidden:
            make = torch.zeros_like if self.active < self.count else torch.empty_like
            hidden_gradient = make(self.hidden, dtype=hidden_dtype, memory_format=torch.contiguous_format)
        if self.wanted.weight:
            make = torch.empty if self.active else torch.zeros
            weight_gradient = make(weight.shape, dtype=weight_dtype, device=weight.device)
            weight_gradient[self.head.vocab :] = 0
        if self.wanted.bias:
            bias_gradient = torch.zeros(self.head.bias.shape, dtype=accumulator, device=weight.device)
        return Gradients(hidden_gradient, weight_gradient, bias_gradient)

    def chunks(self):
        """(chunk of the swept rows, whether it has a gradient)."""
        for chunk in self.active_plan if self.active else ():
            yield chunk, True
        for chunk in self.forward_plan if self.swept > self.active else ():
            yield slice(self.active + chunk.start, self.active + chunk.stop), False

    def hidden_rows(self, chunk: slice) -> Tensor:
        """The chunk's hidden states as GEMM operands, [n, H]; SKIPPED rows become 0, for 0 · NaN would reach dW."""
        x = self.hidden[chunk] if self.index is None else self.hidden[self.index[chunk]]
        x = self.matmul.operand(x)
        if self.execution.every_row:
            x = torch.where((self.rows[Row.KIND, chunk] > RowKind.SKIPPED)[:, None], x, 0)
        return x

    def batch(self, chunk: slice, hidden_rows: Tensor) -> RowBatch:
        """The chunk's logits, in the shared buffer, with what its rows carry in."""
        logits = self.head_product.logits(hidden_rows, self._logits[: hidden_rows.shape[0]])
        return RowBatch(logits, self.targets[chunk], self.rows[:, chunk], self.head.transform, self.bias)

    def dlogits(self, chunk: slice) -> Tensor:
        start = chunk.start if self.retain else 0
        return self._dlogits[start : start + chunk.stop - chunk.start]

    def accumulate(self, chunk: slice, hidden_rows: Tensor, dlogits: Tensor, undo: Tensor | None) -> None:
        """Add the chunk's dX, dW and db; `undo` is the 0-d factor that takes the float16 scale back, or None."""
        gradients = self._gradients
        if gradients.hidden is not None:
            dx = self.matmul.hidden_gradient(dlogits)
            dx = dx if undo is None else dx.mul_(undo)
            # in the accumulator's precision, and under way while dW is computed
            sums = self.shard is not None and not self.shard.partial_hidden_gradient
            complete = start_sum(dx, self.shard.group) if sums else lambda: None
        if gradients.weight is not None and not self.retain:
            out = gradients.weight[: self.head.vocab]
            self.matmul.add_weight_gradient(dlogits, hidden_rows, out, first=chunk.start == 0, undo=undo)
        if gradients.bias is not None:
            out = gradients.bias[: self.head.vocab]
            self.matmul.add_bias_gradient(dlogits, out, first=chunk.start == 0, undo=undo)
        if gradients.hidden is not None:
            complete()
            if self.index is None:
                gradients.hidden[chunk] = dx
            else:
                gradients.hidden[self.index[chunk]] = dx.to(gradients.hidden.dtype)

    def gradients(self) -> Gradients:
        """The finished gradients, in the dtype they are stored in until the backward."""
        hidden, weight, bias = self._gradients
        if weight is not None:
            if self.retain and self.active:
                rows = slice(0, self.active)
                out = weight[: self.head.vocab]
                self.matmul.add_weight_gradient(self._dlogits, self.hidden_rows(rows), out, first=True, undo=None)
            self._logits = self._dlogits = None  # the cast below needs the room
            weight = weight.to(stored_gradient_dtype(self.head.weight.dtype))
        if bias is not None:
            bias = bias.to(stored_gradient_dtype(self.head.bias.dtype))
        return Gradients(hidden, weight, bias)

    def scatter(self, swept: Tensor) -> Tensor:
        """Per-row results of the swept rows back in the caller's order, zero elsewhere: [K, swept] -> [K, N]."""
        if self.index is None:
            return swept
        return swept.new_zeros(swept.shape[0], self.count).index_copy_(1, self.index, swept)


def policy_sweep(
    hidden: Tensor, head: Head, targets: Tensor, rows: Tensor, terms: Terms, execution: Execution, wanted: Wanted
) -> tuple[Tensor, Gradients]:
    """The fused route -> (outcome [len(Outcome), N], gradients of the summed loss).

    hidden [N, H], targets [N], rows [len(Row), N].
    6F with both gradients, 4F with a frozen head, 2F with none.
    """
    sweep = LinearSweep(hidden, head, targets, rows, execution, wanted)
    outcome = rows.new_empty(len(Outcome), sweep.swept)
    with torch.autocast(hidden.device.type, enabled=False), exact_float32():
        for chunk, with_gradient in sweep.chunks():
            x = sweep.hidden_rows(chunk)
            batch, dlogits = sweep.batch(chunk, x), sweep.dlogits(chunk) if with_gradient else None
            outcome[:, chunk], undo = policy_rows(sweep.ops, batch, head.vocab, terms, dlogits)
            if with_gradient:
                sweep.accumulate(chunk, x, dlogits, undo)
        x = batch = dlogits = None  # the last chunk's buffers must not outlive the loop
        return sweep.scatter(outcome), sweep.gradients()


def statistics_sweep(hidden: Tensor, head: Head, targets: Tensor, rows: Tensor, execution: Execution) -> Tensor:
    """The recompute route's forward, 2F: statistics [len(Stat), N]."""
    sweep = LinearSweep(hidden, head, targets, rows, execution, Wanted(False, False, False))
    statistics = rows.new_empty(len(Stat), sweep.swept)
    with torch.autocast(hidden.device.type, enabled=False), exact_float32():
        for chunk, _ in sweep.chunks():
            statistics[:, chunk] = sweep.ops.statistics(sweep.batch(chunk, sweep.hidden_rows(chunk)))
        return sweep.scatter(statistics)


def recompute_sweep(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rows: Tensor,
    statistics: Tensor,
    slopes: Tensor,
    execution: Execution,
    wanted: Wanted,
) -> Gradients:
    """The recompute route's backward, 6F: gradients of Σ slopes[0] · logprob + slopes[1] · entropy."""
    sweep = LinearSweep(hidden, head, targets, rows, execution, wanted)
    if sweep.index is not None:
        statistics, slopes = statistics[:, sweep.index], slopes[:, sweep.index]
    with torch.autocast(hidden.device.type, enabled=False), exact_float32():
        for chunk, with_gradient in sweep.chunks():
            if not with_gradient:
                continue
            x = sweep.hidden_rows(chunk)
            batch, dlogits = sweep.batch(chunk, x), sweep.dlogits(chunk)
            undo = gradient_rows(sweep.ops, batch, head.vocab, statistics[:, chunk], slopes[:, chunk], dlogits)
            sweep.accumulate(chunk, x, dlogits, undo)
        x = batch = dlogits = None  # the last chunk's buffers must not outlive the loop
        return sweep.gradients()
