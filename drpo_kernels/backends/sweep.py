"""The chunked linear path: 6F with the gradient in the forward, or 2F + 6F by recomputation.

F = T·V·H. For each chunk a product gives the logits, and row operations write dlogits, or exponentials and a factor for
each row. For each window one product gives dX and one adds to dW. No [T, V] tensor exists, unless all rows fit into the
workspace or the plan retains all dlogits in 16 bits (planning.py). Nothing here knows an objective or a kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from drpo_kernels.backends import head_products, row_ops
from drpo_kernels.backends.devices import device_properties
from drpo_kernels.backends.fp8_head import Fp8Logits
from drpo_kernels.backends.matmul import HeadProducts, exact_products
from drpo_kernels.backends.planning import ChunkPlan, NeedsGrad, Sizes, Storage, SweepPlan, WeightGradient, plan
from drpo_kernels.backends.ready import gradient_rows, policy_rows
from drpo_kernels.backends.rows import Field, Outcome, RowBatch, RowKind, RowOps, Stat, Terms, Transform
from drpo_kernels.backends.sharded import ShardedRows
from drpo_kernels.backends.spec import Execution, Spec
from drpo_kernels.collectives import start_sum

# Rows are padded to a multiple of so many columns. Each starts on a 32-byte boundary, so that its loads are wide.
COLUMN_MULTIPLE = 16
# A sweep calls a `RowFunction` for each chunk, with its batch, further tensors of its rows, and the places for dlogits
# (`out`) and for their `factors`, or None. The function returns what the rows report [K, n], or None.
Report = TypeVar("Report")
RowFunction = Callable[..., Report]


class Head(NamedTuple):
    """The output head: weight [V, H], bias [V] or None, the real vocabulary (V' <= V), and the transform after it.

    A sharded head holds this rank's rows, of which perhaps none is real. If `main_grad` [V, H] float32 is given, dW is
    added to it and is not among the gradients.
    """

    weight: Tensor
    bias: Tensor | None
    vocab: int
    transform: Transform
    main_grad: Tensor | None = None

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, spec: Spec, main_grad: Tensor | None = None) -> "Head":
        return Head(weight, bias, spec.vocab, spec.transform, main_grad)


class Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def as_tensors(self, like: Tensor) -> tuple[Tensor, ...]:
        """The gradients as a custom op returns them: an empty tensor stands for one that is not needed."""
        return tuple(like.new_empty(0) if gradient is None else gradient for gradient in self)


def stored_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 gradients wait in float32 for the upstream scale: a GradScaler acts only in the backward."""
    return torch.float32 if dtype == torch.float16 else dtype


def _nothing() -> None:
    pass


def _as_rows(hidden: Tensor) -> Tensor | None:
    """A view [N, H] of hidden states [..., H], or None if only a copy has that shape."""
    try:
        return hidden.view(-1, hidden.shape[-1])
    except RuntimeError:
        return None


class LinearSweep:
    """The chunk loop of one call, shared by the fused and the recompute route.

    With `terms`, row operations may leave dlogits as exponentials E and a factor v for each row. Then
        dX = v ⊙ (E W)    dW = Eᵀ (v ⊙ X)    db = Eᵀ v
    """

    make_plan = staticmethod(plan)
    writes_every_row = True  # products write dX of every row that has a gradient

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        rows: Tensor,
        execution: Execution,
        needs_grad: NeedsGrad,
        terms: Terms | None = None,
    ):
        self.hidden, self.head, self.execution, self.needs_grad = hidden, head, execution, needs_grad
        # This 0-d factor undoes a float16 scale of the dlogits. A window of float16 dlogits has one chunk.
        self.unscale: Tensor | None = None
        self._hidden_view = _as_rows(hidden)
        shard = execution.vocab_shard
        self.shard = shard if shard is not None and len(shard.sizes) > 1 else None
        ops = row_ops("triton").invariant() if execution.batch_invariant else row_ops(execution.backend)
        self.ops: RowOps = ops if self.shard is None else ShardedRows(ops, self.shard)
        weight = head.weight[: head.vocab]
        self.matmul: HeadProducts = head_products(weight, execution.compute_dtype, execution.batch_invariant)
        form = execution.head_dtype
        self.head_product = self.matmul if form is None else Fp8Logits(self.matmul, form)
        self.bias = None if head.bias is None else head.bias[: head.vocab].contiguous()
        self._order(targets, rows, any(needs_grad))
        logits_dtype = execution.logits_dtype or self.matmul.accumulator
        self._factored = terms is not None and self.ops.factors(terms, logits_dtype, self.matmul.operand_dtype)
        self.plan = self._planned(logits_dtype)
        self._allocate()

    def _order(self, targets: Tensor, rows: Tensor, with_gradient: bool) -> None:
        """Order the rows to sweep, those with a gradient first. It synchronises once, to read two counts back."""
        count = rows.shape[1]
        self.count, self.index = count, None
        if self.execution.every_row:
            self.active, self.swept = (count if with_gradient else 0), count
        else:
            kinds = rows[Field.KIND]
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
        """Whether `hidden_rows` returns a copy of the caller's hidden states."""
        moved = self.index is not None or self._hidden_view is None or self.execution.every_row
        return moved or self.matmul.cast_bytes(self.hidden.dtype) > 0

    def _planned(self, logits_dtype: torch.dtype) -> SweepPlan:
        matmul, hidden = self.matmul, self.hidden
        device, vocab = device_properties(hidden.device), self.head.vocab
        if self.shard is not None:  # every rank must cut the rows into the same chunks, whatever its share and its GPU
            device, vocab = replace(device, multiprocessors=0), self.shard.largest
        copied = hidden.dtype.itemsize if self.index is not None or self._hidden_view is None else 0
        copied += matmul.cast_bytes(hidden.dtype)
        copied += matmul.operand_dtype.itemsize * self.execution.every_row  # `hidden_rows` makes a copy with zeros
        if self._factored and device.type != "cpu" and not self._copies:  # a copy is scaled in place
            copied += matmul.operand_dtype.itemsize
        return self.make_plan(
            device,
            Sizes(self.active, self.swept - self.active, hidden.shape[-1], vocab),
            Storage(logits_dtype, matmul.operand_dtype, matmul.accumulator, self.head.weight.dtype, copied),
            self.needs_grad,
            workspace=self.execution.workspace_bytes,
            row_multiple=matmul.row_multiple,
            main_grad=self.head.main_grad is not None,
        )

    def _allocate(self) -> None:
        storage = self.plan.storage
        self._factors = self.rows.new_empty(self.plan.windows.largest) if self._factored else None
        self._logits: Tensor | None = self._rows_buffer(self.plan.logits_rows, storage.logits)
        self._dlogits = None if self.plan.in_place else self._rows_buffer(self.plan.dlogits_rows, storage.dlogits)
        self._gradients = self._gradient_buffers()

    def _rows_buffer(self, count: int, dtype: torch.dtype) -> Tensor:
        padded = -(-self.head.vocab // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        return torch.empty(count, padded, dtype=dtype, device=self.hidden.device)[:, : self.head.vocab]

    def _gradient_buffers(self) -> Gradients:
        accumulator, weight = self.matmul.accumulator, self.head.weight
        hidden_dtype = stored_gradient_dtype(self.hidden.dtype)
        hidden_gradient = weight_gradient = bias_gradient = None
        if self.needs_grad.hidden:
            written = self.active == self.count and self.writes_every_row  # no product writes a SKIPPED row
            make_like = torch.empty_like if written else torch.zeros_like
            hidden_gradient = make_like(self.hidden, dtype=hidden_dtype, memory_format=torch.contiguous_format)
            hidden_gradient = hidden_gradient.view(-1, self.hidden.shape[-1])
        if self.needs_grad.weight and self.head.main_grad is None:
            make = torch.empty if self.active else torch.zeros
            dtype = weight.dtype if self.plan.weight_gradient is WeightGradient.PRODUCT else accumulator
            weight_gradient = make(weight.shape, dtype=dtype, device=weight.device)
            if self.head.vocab < weight.shape[0]:
                weight_gradient[self.head.vocab :] = 0
        if self.needs_grad.bias:
            parts = () if self._factors is None else (2,)
            bias_gradient = torch.zeros(weight.shape[0], *parts, dtype=accumulator, device=weight.device)
        return Gradients(hidden_gradient, weight_gradient, bias_gradient)

    def run(self, compute: RowFunction[Report], *per_row: Tensor, forward_rows: bool = True) -> list[Report]:
        """Call `compute` on every chunk, with the chunk's columns of the tensors [K, swept] `per_row`, and add up the
        gradients. With `forward_rows`, rows without a gradient are computed too. -> the chunks' reports, in row order.
        """
        forward, reports = [], []
        for chunk in self.plan.forward if forward_rows else ():
            rows = slice(self.active + chunk.start, self.active + chunk.stop)
            forward.append(compute(self._multiplied(rows), out=None, factors=None))
        for window in self.plan.windows:
            for chunk in self.plan.chunks(window):
                rows = slice(window.start + chunk.start, window.start + chunk.stop)
                dlogits = self._logits_of(chunk) if self._dlogits is None else self._dlogits[chunk]
                factors = None if self._factors is None else self._factors[chunk]
                parts = (x[:, rows] for x in per_row)
                reports.append(compute(self._multiplied(rows), *parts, out=dlogits, factors=factors))
            if self._dlogits is not None and window.stop == self.active:
                self._logits = None  # copies of the hidden rows may take their memory
            self._accumulate(window)
        return reports + forward

    def hidden_rows(self, rows: slice | Tensor) -> Tensor:
        """Hidden states as operands of a product, [n, H]. SKIPPED rows become 0, because 0 · NaN would reach dW."""
        x = self.matmul.operand(self._selected(rows))
        if self.execution.every_row:
            x = torch.where((self.rows[Field.KIND, rows] > RowKind.SKIPPED)[:, None], x, 0)
        return x

    def _selected(self, rows: slice | Tensor) -> Tensor:
        """Hidden states in the caller's dtype, [n, H]: a view if the rows are consecutive, or else a copy of them."""
        if self._hidden_view is not None:
            return self._hidden_view[rows if self.index is None else self.index[rows]]
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self.hidden.device)
        positions = rows if self.index is None else self.index[rows]
        places: list[Tensor] = []
        for size in reversed(self.hidden.shape[:-1]):  # torch.unravel_index would send the shape to the device
            places.insert(0, positions % size)
            positions = positions // size
        return self.hidden[tuple(places)]

    def _logits_of(self, rows: slice, start: int = 0) -> Tensor:
        """Where the logits of these rows lie in the shared buffer, from its row `start`."""
        assert self._logits is not None
        return self._logits[start : start + rows.stop - rows.start]

    def _multiplied(self, rows: slice, start: int = 0) -> RowBatch:
        """Multiply the hidden states of these rows by the head -> the batch of their logits, which lie in the shared
        buffer from its row `start`.
        """
        logits = self.head_product.logits(self.hidden_rows(rows), self._logits_of(rows, start))
        return RowBatch(logits, self.targets[rows], self.rows[:, rows], self.head.transform, self.bias)

    def _accumulate(self, window: slice) -> None:
        """Write the window's dX, and add its dW and db."""
        first, count, unscale = window.start == 0, window.stop - window.start, self.unscale
        dlogits = self._logits_of(window) if self._dlogits is None else self._dlogits[:count]
        factors = None if self._factors is None else self._factors[:count, None]
        complete = self._add_hidden_gradient(window, dlogits, unscale, factors) if self.needs_grad.hidden else _nothing
        if self.needs_grad.weight:
            x = self.hidden_rows(window)
            if factors is not None:
                x = torch.mul(x, factors, out=x if self._copies else torch.empty_like(x))
            self._add_weight_gradient(dlogits, x, unscale, first=first)
        if self._gradients.bias is not None:
            bias = self._gradients.bias[: self.head.vocab]
            if factors is None:
                self.matmul.add_bias_gradient(dlogits, bias, first=first, unscale=unscale)
            else:  # each factor is split into two 16-bit numbers, whose sum is off by 2^-17
                high = factors.to(dlogits.dtype)
                split = torch.cat([high, (factors - high).to(dlogits.dtype)], 1)
                self.matmul.add_weight_gradient(dlogits, split, bias, first=first, unscale=None)
        complete()

    @property
    def _weight_out(self) -> Tensor:
        """The tensor [V', H] that dW is added to."""
        out = self._gradients.weight if self.head.main_grad is None else self.head.main_grad
        assert out is not None
        return out[: self.head.vocab]

    def _add_weight_gradient(self, dlogits: Tensor, hidden: Tensor, unscale: Tensor | None, first: bool) -> None:
        first = first and self.head.main_grad is None
        self.matmul.add_weight_gradient(dlogits, hidden, self._weight_out, first=first, unscale=unscale)

    def _add_hidden_gradient(
        self, window: slice | Tensor, dlogits: Tensor, unscale: Tensor | None, factors: Tensor | None = None
    ) -> Callable[[], None]:
        """Compute dX of a window: at its place if a product can write there, or else in pieces. The function that is
        returned completes the last piece.

        A sum over a shard's group has the accumulator's precision and runs while dW is computed. `factors` [n, 1] scale
        the rows of a product in that precision, before it is rounded.
        """
        gradient, accumulator = self._gradients.hidden, self.matmul.accumulator
        assert gradient is not None
        shard = None if self.shard is None or self.shard.partial_hidden_gradient else self.shard
        direct = shard is None and gradient.dtype in self.matmul.hidden_gradient_dtypes
        direct &= factors is None or gradient.dtype == accumulator
        if direct and self.index is None and isinstance(window, slice):
            self._hidden_gradient(dlogits, gradient[window], unscale, factors)
            return _nothing
        complete: Callable[[], None] = _nothing
        for piece in ChunkPlan(len(dlogits), self.plan.piece_rows):
            complete()
            if isinstance(window, slice):
                rows: slice | Tensor = slice(window.start + piece.start, window.start + piece.stop)
            else:
                rows = window[piece]
            dtype = gradient.dtype if direct else accumulator
            dx = gradient.new_empty(piece.stop - piece.start, gradient.shape[1], dtype=dtype)
            self._hidden_gradient(dlogits[piece], dx, unscale)
            wait = _nothing if shard is None else start_sum(dx, shard.group)
            complete = partial(self._place_hidden_gradient, rows, dx, None if factors is None else factors[piece], wait)
        return complete

    def _place_hidden_gradient(
        self, rows: slice | Tensor, dx: Tensor, factors: Tensor | None, wait: Callable[[], object]
    ) -> None:
        """Write a piece of dX, multiplied by `factors` [n, 1], to its place once `wait` has returned."""
        gradient = self._gradients.hidden
        assert gradient is not None
        wait()
        if factors is not None and self.index is None:
            torch.mul(dx, factors, out=gradient[rows])
            return
        dx = dx if factors is None else dx.mul_(factors)
        gradient[rows if self.index is None else self.index[rows]] = dx.to(gradient.dtype)

    def _hidden_gradient(self, dlogits: Tensor, out: Tensor, *factors: Tensor | None) -> None:
        self.matmul.hidden_gradient(dlogits, out)
        for factor in factors:
            if factor is not None:
                out.mul_(factor)

    def gradients(self) -> tuple[Tensor, ...]:
        """The finished gradients, in the dtype in which they wait for the backward. One that is not needed is empty."""
        self._logits = self._dlogits = None  # the casts need their memory
        hidden, weight, bias = self._gradients
        bias = bias if bias is None or self._factors is None else bias.sum(1)
        hidden = hidden if hidden is None else hidden.view(self.hidden.shape)
        pairs = zip((hidden, weight, bias), (self.hidden, self.head.weight, self.head.bias), strict=True)
        stored = (None if g is None or x is None else g.to(stored_gradient_dtype(x.dtype)) for g, x in pairs)
        return Gradients(*stored).as_tensors(self.hidden)

    def scatter(self, reports: list[Tensor], fields: int) -> Tensor:
        """Bring the chunks' reports, [fields, n] each, into the caller's order: [fields, N], 0 for rows not swept."""
        if len(reports) == 1:
            swept = reports[0]
        else:
            swept = torch.cat([self.rows.new_empty(fields, 0), *reports], 1)
        if self.index is None:
            return swept
        return swept.new_zeros(swept.shape[0], self.count).index_copy_(1, self.index, swept)


def policy_sweep(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, main_grad: Tensor | None,
    spec: Spec, needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fused route. It takes 6F with both gradients, 4F with a frozen head and 2F with none.

    hidden [..., H] of N rows, with any strides; targets [N]; rows [len(Field), N].
    -> (outcome [len(Outcome), N], gradients of the summed loss for hidden, weight and bias). An empty tensor stands for
    a gradient that is not needed, and for the weight's where it was added to `main_grad` [V, H].
    """
    head, needs_grad, terms = Head.of(weight, bias, spec, main_grad), NeedsGrad(*needs_grad), spec.terms
    assert terms is not None
    with exact_products():
        sweep = LinearSweep(hidden, head, targets, rows, spec.execution, needs_grad, terms)

        def in_steps(batch: RowBatch, out: Tensor | None, factors: Tensor | None) -> Tensor:
            assert factors is None  # they come from `policy` alone
            outcome, sweep.unscale = policy_rows(sweep.ops, head.vocab, terms, batch, out)
            return outcome

        fused = sweep.ops.fuses(terms) and sweep.matmul.operand_dtype != torch.float16
        reports = sweep.run(partial(sweep.ops.policy, terms=terms) if fused else in_steps)
        return sweep.scatter(reports, len(Outcome)), *sweep.gradients()


def statistics_sweep(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, spec: Spec
) -> Tensor:
    """The recompute route's forward, in 2F -> statistics [len(Stat), N]."""
    with exact_products():
        head, no_gradient = Head.of(weight, bias, spec), NeedsGrad(False, False, False)
        sweep = LinearSweep(hidden, head, targets, rows, spec.execution, no_gradient)
        return sweep.scatter(sweep.run(lambda batch, **_: sweep.ops.statistics(batch)), len(Stat))


def recompute_sweep(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, statistics: Tensor,
    slopes: Tensor, main_grad: Tensor | None, spec: Spec, needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The recompute route's backward, in 6F -> the gradients of Σ slopes · (logprob, logsumexp, entropy), returned as
    `policy_sweep` returns its gradients.
    """
    head, needs_grad = Head.of(weight, bias, spec, main_grad), NeedsGrad(*needs_grad)
    with exact_products():
        sweep = LinearSweep(hidden, head, targets, rows, spec.execution, needs_grad)
        if sweep.index is not None:
            statistics, slopes = statistics[:, sweep.index], slopes[:, sweep.index]

        def compute(batch: RowBatch, statistics: Tensor, slopes: Tensor, out: Tensor, factors: None) -> None:
            sweep.unscale = gradient_rows(sweep.ops, batch, head.vocab, statistics, slopes, out)

        sweep.run(compute, statistics, slopes, forward_rows=False)
        return sweep.gradients()
