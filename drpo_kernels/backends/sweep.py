"""The chunked linear path: 6F with the gradient in the forward, or 2F + 6F by recomputation.

F = T·V·H. Per chunk of rows: logits GEMM -> row operations, which write the gradient, or exponentials and a factor per
row; per window of chunks: dX and dW GEMMs. No [T, V] tensor exists unless the plan retains 16-bit dlogits on purpose:
see planning.py, which decides all that. Nothing here knows an objective or a kernel.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.backends import head_products, row_ops
from drpo_kernels.backends.devices import device_properties
from drpo_kernels.backends.fp8_head import Fp8Logits
from drpo_kernels.backends.matmul import HeadProducts
from drpo_kernels.backends.planning import ChunkPlan, Sizes, Storage, SweepPlan, Wanted, WeightGradient, plan
from drpo_kernels.backends.ready import gradient_rows, in_one, policy_rows
from drpo_kernels.backends.rows import Row, RowBatch, RowKind, RowOps, Stat, Terms, Transform
from drpo_kernels.backends.sharded import ShardedRows
from drpo_kernels.collectives import VocabShard, start_sum

# a row of a matrix starts on a 32-byte boundary for every element size: wide loads for any vocabulary
COLUMN_MULTIPLE = 16
# (rows of a chunk, its batch, where its dlogits go or None, where their factors go or None) -> the 0-d factor that
# undoes a float16 scale, or None
RowFunction = Callable[[slice, RowBatch, Tensor | None, Tensor | None], Tensor | None]


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
    sparse_grad: float = 0.0  # the share of 1 - p_y that a row's gradient may leave out: see sparse.py


class Head(NamedTuple):
    """The output head: weight [V, H], bias [V] or None, the real vocabulary (V' <= V), and the transform after it.

    Of a sharded head, this rank's rows and how many of them are real, perhaps none. dW is added to `main_grad` [V, H]
    float32 where it is given, and is then none of the gradients.
    """

    weight: Tensor
    bias: Tensor | None
    vocab: int
    transform: Transform
    main_grad: Tensor | None = None


class Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def stored_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 gradients wait in float32 for the upstream scale: a GradScaler acts only in the backward."""
    return torch.float32 if dtype == torch.float16 else dtype


def _nothing() -> None:
    pass


def _as_rows(hidden: Tensor) -> Tensor | None:
    """[..., H] as [N, H], or None where that would be a copy of it all."""
    try:
        return hidden.view(-1, hidden.shape[-1])
    except RuntimeError:
        return None


class LinearSweep:
    """The chunk loop of one call, shared by the fused and the recompute route.

    With `terms`, whose row operations may leave dlogits as a factor v of each row and exponentials E:
        dX = v ⊙ (E W)    dW = Eᵀ (v ⊙ X)    db = Eᵀ v
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        rows: Tensor,
        execution: Execution,
        wanted: Wanted,
        terms: Terms | None = None,
    ):
        self.hidden, self.head, self.execution, self.wanted = hidden, head, execution, wanted
        self._hidden_view = _as_rows(hidden)
        self.shard = execution.shard if execution.shard is not None and len(execution.shard.sizes) > 1 else None
        ops = row_ops(execution.backend)
        ops = ops.invariant() if execution.batch_invariant else ops
        self.ops: RowOps = ops if self.shard is None else ShardedRows(ops, self.shard)
        weight = head.weight[: head.vocab]
        self.matmul: HeadProducts = head_products(weight, execution.compute_dtype, execution.batch_invariant)
        quantized = execution.head_dtype is not None
        self.head_product = Fp8Logits(self.matmul, execution.head_dtype) if quantized else self.matmul
        self.bias = None if head.bias is None else head.bias[: head.vocab].contiguous()
        self._order(targets, rows, any(wanted))
        logits_dtype = execution.logits_dtype or self.matmul.accumulator
        self._factored = terms is not None and self.ops.factors(terms, logits_dtype, self.matmul.operand_dtype)
        self.plan = self._planned(logits_dtype)
        self._allocate()

    def _order(self, targets: Tensor, rows: Tensor, with_gradient: bool) -> None:
        """Rows to sweep, those with a gradient first. Compaction reads two counts back: the only synchronisation."""
        count = rows.shape[1]
        self.count, self.index = count, None
        if self.execution.every_row:
            self.active, self.swept = (count if with_gradient else 0), count
        else:
            kinds = rows[Row.KIND]
            levels = torch.arange(RowKind.FORWARD, RowKind.ACTIVE + 1, device=kinds.device)
            forward, active = (kinds == levels[:, None]).sum(1).tolist()
            self.swept = active + forward
            self.active = active if with_gradient else 0
            if max(active, forward) < count:
                self.index = kinds.argsort(descending=True, stable=True)[: self.swept]
        self.targets = targets if self.index is None else targets[self.index]
        self.rows = rows if self.index is None else rows[:, self.index]

    @property
    def _copies(self) -> bool:
        """Whether `hidden_rows` are a copy of the caller's."""
        moved = self.index is not None or self._hidden_view is None or self.execution.every_row
        return moved or self.matmul.cast_bytes(self.hidden.dtype) > 0

    def _planned(self, logits_dtype: torch.dtype) -> SweepPlan:
        matmul, hidden = self.matmul, self.hidden
        device, vocab = device_properties(hidden.device), self.head.vocab
        if self.shard is not None:  # every rank must cut the rows into the same chunks, whatever its share and its GPU
            device, vocab = replace(device, multiprocessors=0), self.shard.largest
        copied = hidden.dtype.itemsize if self.index is not None or self._hidden_view is None else 0
        copied += matmul.cast_bytes(hidden.dtype)
        copied += matmul.operand_dtype.itemsize * self.execution.every_row  # `hidden_rows` zeroes a copy
        if self._factored and device.type != "cpu" and not self._copies:  # a copy is scaled where it is
            copied += matmul.operand_dtype.itemsize
        return plan(
            device,
            Sizes(self.active, self.swept - self.active, hidden.shape[-1], vocab),
            Storage(
                logits_dtype,
                matmul.operand_dtype,
                matmul.accumulator,
                self.head.weight.dtype,
                copied,
            ),
            self.wanted,
            workspace=self.execution.workspace_bytes,
            row_multiple=matmul.row_multiple,
            main_grad=self.head.main_grad is not None,
            sparse=self.execution.sparse_grad > 0,
        )

    def _allocate(self) -> None:
        storage = self.plan.storage
        self._factors = self.rows.new_empty(self.plan.windows.largest) if self._factored else None
        self._logits = self._rows_buffer(self.plan.logits_rows, storage.logits)
        self._dlogits = None if self.plan.in_place else self._rows_buffer(self.plan.dlogits_rows, storage.dlogits)
        self._gradients = self._gradient_buffers()

    def _rows_buffer(self, count: int, dtype: torch.dtype) -> Tensor:
        padded = -(-self.head.vocab // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        return torch.empty(count, padded, dtype=dtype, device=self.hidden.device)[:, : self.head.vocab]

    def _gradient_buffers(self) -> Gradients:
        accumulator, weight = self.matmul.accumulator, self.head.weight
        hidden_dtype = stored_gradient_dtype(self.hidden.dtype)
        hidden_gradient = weight_gradient = bias_gradient = None
        if self.wanted.hidden:
            written = self.active == self.count and not self.execution.sparse_grad  # no product writes a SKIPPED row
            make = torch.empty_like if written else torch.zeros_like
            hidden_gradient = make(self.hidden, dtype=hidden_dtype, memory_format=torch.contiguous_format)
            hidden_gradient = hidden_gradient.view(-1, self.hidden.shape[-1])
        if self.wanted.weight and self.head.main_grad is None:
            make = torch.empty if self.active else torch.zeros
            dtype = weight.dtype if self.plan.weight_gradient is WeightGradient.PRODUCT else accumulator
            weight_gradient = make(weight.shape, dtype=dtype, device=weight.device)
            if self.head.vocab < weight.shape[0]:
                weight_gradient[self.head.vocab :] = 0
        if self.wanted.bias:
            shape = self.head.bias.shape if self._factors is None else (*self.head.bias.shape, 2)
            bias_gradient = torch.zeros(shape, dtype=accumulator, device=weight.device)
        return Gradients(hidden_gradient, weight_gradient, bias_gradient)

    def run(self, compute: RowFunction, forward_rows: bool = True) -> None:
        """Call `compute` on every chunk and add up the gradients; `forward_rows`: those without a gradient too."""
        for chunk in self.plan.forward if forward_rows else ():
            rows = slice(self.active + chunk.start, self.active + chunk.stop)
            compute(rows, self._batch(rows, self._logits[: chunk.stop - chunk.start]), None, None)
        for window in self.plan.windows:
            undo = self._fill(window, compute)
            if self._dlogits is not None and window.stop == self.active:
                self._logits = None  # copies of the hidden rows may take its room
            self._accumulate(window, undo)

    def _fill(self, window: slice, compute: RowFunction) -> Tensor | None:
        """The window's dlogits, chunk by chunk; -> the last chunk's factor, which with float16 is the only one."""
        undo = None
        for chunk in self.plan.chunks(window):
            rows = slice(window.start + chunk.start, window.start + chunk.stop)
            logits = self._logits[: chunk.stop - chunk.start]
            dlogits = logits if self._dlogits is None else self._dlogits[chunk]
            factors = None if self._factors is None else self._factors[chunk]
            undo = compute(rows, self._batch(rows, logits), dlogits, factors)
        return undo

    def hidden_rows(self, rows: slice | Tensor) -> Tensor:
        """Hidden states as GEMM operands, [n, H]; SKIPPED rows become 0, for 0 · NaN would reach dW."""
        x = self.matmul.operand(self._selected(rows))
        if self.execution.every_row:
            x = torch.where((self.rows[Row.KIND, rows] > RowKind.SKIPPED)[:, None], x, 0)
        return x

    def _selected(self, rows: slice | Tensor) -> Tensor:
        """Hidden states as they are, [n, H]: a view where rows follow each other, or a copy of these alone."""
        if self._hidden_view is not None:
            return self._hidden_view[rows if self.index is None else self.index[rows]]
        positions = rows
        if isinstance(rows, slice):
            positions = torch.arange(rows.start, rows.stop, device=self.hidden.device)
        if self.index is not None:
            positions = self.index[positions]
        places = []
        for size in reversed(self.hidden.shape[:-1]):  # torch.unravel_index would send the shape to the device
            places.insert(0, positions % size)
            positions = positions // size
        return self.hidden[tuple(places)]

    def _batch(self, rows: slice, logits: Tensor) -> RowBatch:
        """The chunk's logits, in the shared buffer, with what its rows carry in."""
        logits = self.head_product.logits(self.hidden_rows(rows), logits)
        return RowBatch(logits, self.targets[rows], self.rows[:, rows], self.head.transform, self.bias)

    def _accumulate(self, window: slice, undo: Tensor | None) -> None:
        """Add the window's dX, dW and db; `undo` is the 0-d factor that takes the float16 scale back, or None."""
        first, count = window.start == 0, window.stop - window.start
        dlogits = (self._logits if self._dlogits is None else self._dlogits)[:count]
        factors = None if self._factors is None else self._factors[:count, None]
        complete = self._add_hidden_gradient(window, dlogits, undo, factors) if self.wanted.hidden else _nothing
        if self.wanted.weight:
            x = self.hidden_rows(window)
            if factors is not None:
                x = torch.mul(x, factors, out=x if self._copies else torch.empty_like(x))
            self._add_weight_gradient(dlogits, x, undo, first=first)
        if self.wanted.bias:
            bias = self._gradients.bias[: self.head.vocab]
            if factors is None:
                self.matmul.add_bias_gradient(dlogits, bias, first=first, undo=undo)
            else:  # the factors in two parts: both rounded to 16 bits, their sum is off by 2^-17
                high = factors.to(dlogits.dtype)
                parts = torch.cat([high, (factors - high).to(dlogits.dtype)], 1)
                self.matmul.add_weight_gradient(dlogits, parts, bias, first=first, undo=None)
        complete()

    @property
    def _weight_out(self) -> Tensor:
        """What dW [V', H] is added to."""
        return (self._gradients.weight if self.head.main_grad is None else self.head.main_grad)[: self.head.vocab]

    def _add_weight_gradient(self, dlogits: Tensor, hidden: Tensor, undo: Tensor | None, first: bool) -> None:
        first = first and self.head.main_grad is None
        self.matmul.add_weight_gradient(dlogits, hidden, self._weight_out, first=first, undo=undo)

    def _add_hidden_gradient(
        self, window: slice | Tensor, dlogits: Tensor, undo: Tensor | None, factors: Tensor | None = None
    ) -> Callable[[], None]:
        """dX of a window, at its place where the product can write it there; call the result to complete the last sum.

        Sums over a shard's group are in the accumulator's precision, and under way while dW is computed. `factors`
        [n, 1] scale the rows of a product in that precision, before it is rounded.
        """
        gradient, accumulator = self._gradients.hidden, self.matmul.accumulator
        sums = self.shard is not None and not self.shard.partial_hidden_gradient
        direct = not sums and gradient.dtype in self.matmul.hidden_gradient_dtypes
        direct &= factors is None or gradient.dtype == accumulator

        def place(rows: slice | Tensor, dx: Tensor, factors: Tensor | None, complete_sum: Callable[[], object]) -> None:
            complete_sum()
            if factors is None:
                gradient[rows if self.index is None else self.index[rows]] = dx.to(gradient.dtype)
            elif self.index is None:
                torch.mul(dx, factors, out=gradient[rows])
            else:
                gradient[self.index[rows]] = dx.mul_(factors).to(gradient.dtype)

        complete = _nothing
        ranged = isinstance(window, slice)
        if direct and self.index is None and ranged:
            self._hidden_gradient(dlogits, gradient[window], undo, factors)
            return complete
        for piece in ChunkPlan(len(dlogits), self.plan.piece_rows):
            complete()
            rows = slice(window.start + piece.start, window.start + piece.stop) if ranged else window[piece]
            dtype = gradient.dtype if direct else accumulator
            dx = gradient.new_empty(piece.stop - piece.start, gradient.shape[1], dtype=dtype)
            self._hidden_gradient(dlogits[piece], dx, undo)
            part = None if factors is None else factors[piece]
            complete = partial(place, rows, dx, part, start_sum(dx, self.shard.group) if sums else _nothing)
        return complete

    def _hidden_gradient(self, dlogits: Tensor, out: Tensor, *factors: Tensor | None) -> None:
        self.matmul.hidden_gradient(dlogits, out)
        for factor in factors:
            if factor is not None:
                out.mul_(factor)

    def gradients(self) -> Gradients:
        """The finished gradients, in the dtype they are stored in until the backward."""
        self._logits = self._dlogits = None  # the casts need the room
        hidden, weight, bias = self._gradients
        bias = bias if bias is None or self._factors is None else bias.sum(1)
        hidden = hidden if hidden is None else hidden.view(self.hidden.shape)
        pairs = zip((hidden, weight, bias), (self.hidden, self.head.weight, self.head.bias), strict=True)
        return Gradients(*(g if g is None else g.to(stored_gradient_dtype(x.dtype)) for g, x in pairs))

    def scatter(self, swept: Tensor) -> Tensor:
        """Per-row results of the swept rows back in the caller's order, zero elsewhere: [K, swept] -> [K, N]."""
        if self.index is None:
            return swept
        return swept.new_zeros(swept.shape[0], self.count).index_copy_(1, self.index, swept)


def exact_products() -> contextlib.AbstractContextManager:
    """No autocast; `product` sees to the rest. In C, unlike `torch.autocast`, so that no Ctrl-C cuts its end off.

    A sweep is made inside: making it reads a count from the device, which is idle from then until the first product, so
    nothing slow may come between.
    """
    return torch._C._DisableAutocast()


def policy_sweep(
    hidden: Tensor, head: Head, targets: Tensor, rows: Tensor, terms: Terms, execution: Execution, wanted: Wanted
) -> tuple[Tensor, Gradients]:
    """The fused route -> (outcome [len(Outcome), N], gradients of the summed loss).

    hidden [..., H] of N rows, with any strides; targets [N], rows [len(Row), N].
    6F with both gradients, 4F with a frozen head, 2F with none.
    """
    outcomes: dict[int, Tensor] = {}  # by the first row of the chunk

    def compute(chunk: slice, batch: RowBatch, dlogits: Tensor | None, factors: Tensor | None) -> Tensor | None:
        outcomes[chunk.start], undo = policy_rows(sweep.ops, batch, head.vocab, terms, dlogits, factors)
        return undo

    with exact_products():
        sweep = LinearSweep(hidden, head, targets, rows, execution, wanted, terms)
        sweep.run(compute)
        outcome = in_one([outcomes[start] for start in sorted(outcomes)], rows)
        return sweep.scatter(outcome), sweep.gradients()


def statistics_sweep(hidden: Tensor, head: Head, targets: Tensor, rows: Tensor, execution: Execution) -> Tensor:
    """The recompute route's forward, 2F: statistics [len(Stat), N]."""
    with exact_products():
        sweep = LinearSweep(hidden, head, targets, rows, execution, Wanted(False, False, False))
        statistics = rows.new_empty(len(Stat), sweep.swept)

        def compute(chunk: slice, batch: RowBatch, *_: Tensor | None) -> None:
            statistics[:, chunk] = sweep.ops.statistics(batch)

        sweep.run(compute)
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
    """The recompute route's backward, 6F: gradients of Σ slopes · (logprob, logsumexp, entropy)."""
    with exact_products():
        sweep = LinearSweep(hidden, head, targets, rows, execution, wanted)
        if sweep.index is not None:
            statistics, slopes = statistics[:, sweep.index], slopes[:, sweep.index]

        def compute(chunk: slice, batch: RowBatch, dlogits: Tensor, _: None) -> Tensor | None:
            return gradient_rows(sweep.ops, batch, head.vocab, statistics[:, chunk], slopes[:, chunk], dlogits)

        sweep.run(compute, forward_rows=False)
        return sweep.gradients()
