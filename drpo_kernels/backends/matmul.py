"""The three matrix products of the head, with float32 accumulation and without ever copying the whole weight.

On CUDA and ROCm the tensor cores take 16-bit operands and return float32. Elsewhere 16-bit operands are upcast one
block of the vocabulary at a time, as are float32 master weights under autocast.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from drpo_kernels.backends.devices import MIB

# of a temporary: enough for a full GEMM, and little beside the workspace
CPU_CAST_BYTES, DEVICE_CAST_BYTES = 8 * MIB, 64 * MIB
# PyTorch's defaults let a 16-bit product add its partial sums in 16 bits
NARROW_SUMS = (
    "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation",
)  # fmt: skip
# what `exact_float32` has changed, and for how many
_settings, _inside, _lock = contextlib.ExitStack(), 0, threading.Lock()


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Products of float32 are float32, no TF32 on CUDA, no bf16 in oneDNN, and those of 16-bit operands add in float32,
    whatever the process has set. The settings are the process's: of several threads inside, the first changes them and
    the last one out restores them.
    """
    global _inside
    with _lock:
        if not _inside:
            _settings.enter_context(_no_narrow_products())
            _settings.enter_context(_no_narrow_sums())
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _settings.close()


@contextlib.contextmanager
def _no_narrow_sums() -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    allowed = [name for name in NARROW_SUMS if getattr(settings, name)]
    try:
        for name in allowed:
            setattr(settings, name, False)
        yield
    finally:
        for name in allowed:
            setattr(settings, name, True)


@contextlib.contextmanager
def _no_narrow_products() -> Iterator[None]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.8
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    changed = []
    try:
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            if backend.fp32_precision not in ("ieee", "none"):
                changed.append((backend, backend.fp32_precision))
                backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in changed:
            backend.fp32_precision = "none"  # which reads as the parent's setting where there is one
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


@functools.cache
def float32_outputs(device: torch.device, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether mm and addmm multiply this 16-bit dtype into float32 here: not in every build, nor on a CPU."""
    operand, out = (torch.zeros(16, 16, dtype=kind, device=device) for kind in (dtype, torch.float32))

    def works(multiply) -> bool:
        try:
            multiply()
        except RuntimeError:
            return False
        return True

    return (
        works(lambda: torch.mm(operand, operand, out_dtype=torch.float32, out=out)),
        works(lambda: torch.addmm(out, operand, operand, out_dtype=torch.float32, out=out)),
    )


def cast_rows(matrix: Tensor, itemsize: int = 4, width: int = 0) -> int:
    """How many rows of a matrix to hold in a temporary of that many bytes per element, of at least `width` columns."""
    most = CPU_CAST_BYTES if matrix.device.type == "cpu" else DEVICE_CAST_BYTES
    return max(most // max(max(matrix.shape[1], width) * itemsize, 1), 1)


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b; a float32 `out` of 16-bit operands is accumulated and written in float32."""
    if not out.numel():
        return  # a shard of nothing but padding
    if a.dtype == out.dtype:
        out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
    elif not accumulate:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif float32_outputs(out.device, a.dtype)[1]:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        step = cast_rows(out)
        for rows in (slice(start, start + step) for start in range(0, out.shape[0], step)):
            out[rows].add_(torch.mm(a[rows], b, out_dtype=out.dtype))


class HeadProducts(Protocol):
    """What a sweep asks of the head's weight [V, H]: `HeadMatmul`, or `InvariantMatmul` of the Triton backend.

    accumulator    float32, or float64 for float64 inputs
    operand_dtype  of dlogits
    row_multiple   of which a window must hold a multiple, but for the last
    hidden_gradient_dtypes  that dX may be written in
    """

    accumulator: torch.dtype
    operand_dtype: torch.dtype
    row_multiple: int
    hidden_gradient_dtypes: tuple[torch.dtype, ...]

    def operand(self, x: Tensor) -> Tensor:
        """Hidden states [n, H] as the products below take them."""

    def cast_bytes(self, dtype: torch.dtype) -> int:
        """What `operand` allocates per element of an x of that dtype, copies on the way included."""

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """out [n, V] = hidden [n, H] @ weight.T; `out` is the accumulator's dtype, or a narrower one on request."""

    def hidden_gradient(self, dlogits: Tensor, out: Tensor) -> None:
        """out [n, H] = dlogits [n, V] @ weight, added up in the accumulator's precision and rounded once."""

    def add_weight_gradient(
        self, dlogits: Tensor, hidden: Tensor, out: Tensor, first: bool, undo: Tensor | None
    ) -> None:
        """out [V, H] += undo · dlogits.T @ hidden, or = for the first chunk; `undo` is a 0-d factor or None for 1."""

    def add_bias_gradient(self, dlogits: Tensor, out: Tensor, first: bool, undo: Tensor | None) -> None:
        """out [V] += undo · Σ_rows dlogits, or = for the first chunk."""


class HeadMatmul:
    """`HeadProducts` by PyTorch's GEMMs.

    compute_dtype  what the operands are rounded to (autocast's dtype, or the inputs' own)
    operand_dtype  what is multiplied: `compute_dtype` where the hardware accumulates it in float32, else float32
    """

    row_multiple = 1

    def __init__(self, weight: Tensor, compute_dtype: torch.dtype):
        self.weight = weight
        self.compute_dtype = compute_dtype
        self.accumulator = torch.float64 if compute_dtype == torch.float64 else torch.float32
        narrow = compute_dtype.itemsize < 4 and float32_outputs(weight.device, compute_dtype)[0]
        self.operand_dtype = compute_dtype if narrow else self.accumulator
        # blocks of a weight that must be cast add up in `out`
        self.hidden_gradient_dtypes = (self.accumulator,) if self.casts else (self.accumulator, self.operand_dtype)

    @property
    def casts(self) -> bool:
        return self.weight.dtype != self.operand_dtype

    def operand(self, x: Tensor) -> Tensor:
        return x.to(self.compute_dtype).to(self.operand_dtype)

    def cast_bytes(self, dtype: torch.dtype) -> int:
        steps = dtype, self.compute_dtype, self.operand_dtype
        return sum(after.itemsize for before, after in itertools.pairwise(steps) if before != after)

    def _blocks(self, always: bool = False, width: int = 0) -> Iterator[slice]:
        """Vocabulary blocks small enough for a temporary; one whole block where no temporary is needed.

        `always`: each makes one in the accumulator's dtype, of `width` elements per entry where that is more than H.
        """
        vocab = self.weight.shape[0]
        widest = self.accumulator if always else self.operand_dtype
        step = cast_rows(self.weight, widest.itemsize, width) if self.casts or always else max(vocab, 1)
        return (slice(start, min(start + step, vocab)) for start in range(0, vocab, step))

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        direct = out.dtype in (self.accumulator, self.operand_dtype)
        for block in self._blocks(always=not direct, width=0 if direct else len(hidden)):
            operand = self.operand(self.weight[block]).T
            part = out[:, block] if direct else out.new_empty(len(hidden), operand.shape[1], dtype=self.accumulator)
            product(hidden, operand, part)
            if not direct:
                out[:, block] = part
        return out

    def hidden_gradient(self, dlogits: Tensor, out: Tensor) -> None:
        if not self.weight.shape[0]:
            out.zero_()  # a shard of nothing but padding
        for i, block in enumerate(self._blocks()):
            product(dlogits[:, block], self.operand(self.weight[block]), out, accumulate=i > 0)

    def add_weight_gradient(
        self, dlogits: Tensor, hidden: Tensor, out: Tensor, first: bool, undo: Tensor | None
    ) -> None:
        if undo is None:
            product(dlogits.T, hidden, out, accumulate=not first)
            return
        for block in self._blocks(always=True):
            part = torch.empty(out[block].shape, dtype=out.dtype, device=out.device)
            product(dlogits[:, block].T, hidden, part)
            torch.mul(part, undo, out=out[block]) if first else out[block].addcmul_(part, undo)

    def add_bias_gradient(self, dlogits: Tensor, out: Tensor, first: bool, undo: Tensor | None) -> None:
        db = dlogits.sum(0, dtype=self.accumulator)
        db = db if undo is None else db.mul_(undo)
        out.copy_(db) if first else out.add_(db)
