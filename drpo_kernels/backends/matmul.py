"""The three matrix products of the head. They accumulate in float32 and never copy the whole weight.

On CUDA and ROCm the tensor cores take 16-bit operands and return float32. Elsewhere 16-bit operands are upcast, one
block of the vocabulary at a time. Float32 master weights under autocast are cast in the same way.
"""

import collections
import contextlib
import functools
import itertools
import operator
import os
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from drpo_kernels.backends.devices import MIB

# The size of a temporary for casts: enough for an efficient GEMM, and little beside the workspace.
CPU_CAST_BYTES, DEVICE_CAST_BYTES = 8 * MIB, 64 * MIB
# The side of the tiles that are multiplied in float64. At most four tiles, 8 MiB, exist at a time.
DOUBLE_TILE = 512
# By default PyTorch lets a 16-bit product add its partial sums in 16 bits.
NARROW_SUMS = (
    "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation",
)  # fmt: skip
PER_BACKEND = hasattr(torch._C, "_get_fp32_precision_getter")  # torch >= 2.9 has a precision for each backend
# This lock is held while a setting of the process is changed. A fork waits for it, so that a child process inherits
# neither a changed setting nor a held lock.
_changing = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_changing.acquire, after_in_parent=_changing.release, after_in_child=_changing.release)

_cpu_precision: Callable[[], str] = (
    functools.partial(torch._C._get_fp32_precision_getter, "mkldnn", "matmul")
    if PER_BACKEND
    else torch._C._get_float32_matmul_precision
)


class Setting(NamedTuple):
    """A setting of the process, read and written by PyTorch's own functions in C."""

    read: Callable[[], object]
    write: Callable[..., object]
    exact: object  # the value that makes products exact
    paired: bool = False  # True if `read` returns and `write` takes a second value, which stays as it is

    def steps(self) -> tuple[list[Iterator], Iterator]:
        """-> (two iterators that read and change the setting, one that writes back what was read), all of them in C."""
        found: list = []
        read = map(found.append, itertools.starmap(self.read, [()]))
        if self.paired:
            second = map(operator.itemgetter(1), found)
            return [read, map(self.write, [self.exact], second)], itertools.starmap(self.write, found)
        return [read, map(self.write, [self.exact])], map(self.write, found)


def _sums(name: str) -> Setting:
    read, write = (getattr(torch._C, f"_{verb}_cublas_{name}") for verb in ("get", "set"))
    return Setting(read, write, False, paired=isinstance(read(), tuple))  # with whether split-K is allowed


def _float32_settings() -> tuple[Setting, ...]:
    """The settings that allow TF32 on CUDA, parents first. A level without a precision of its own reads as its parent.
    Once the parent is changed, the value that is read is the level's own and can be written back.
    """
    if not PER_BACKEND:
        return (Setting(torch._C._get_float32_matmul_precision, torch._C._set_float32_matmul_precision, "highest"),)
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    levels = ("generic", "all"), ("cuda", "all"), ("cuda", "matmul")
    return tuple(Setting(functools.partial(read, *x), functools.partial(write, *x), "none") for x in levels)


_BF16_SUMS, *_FP16_SUMS = map(_sums, NARROW_SUMS)
# The settings that a product on CUDA or ROCm depends on, by the dtypes of operands and result.
CUDA_SETTINGS: dict[tuple[torch.dtype, torch.dtype], tuple[Setting, ...]] = {
    (torch.float32, torch.float32): _float32_settings(),
    (torch.bfloat16, torch.bfloat16): (_BF16_SUMS,),
    (torch.float16, torch.float16): tuple(_FP16_SUMS),
    (torch.float16, torch.float32): tuple(_FP16_SUMS[1:]),  # PyTorch refuses the product if float16 sums are allowed
}


def settings_of(device: torch.device, operand: torch.dtype, result: torch.dtype) -> tuple[Setting, ...]:
    """The settings of the process that must be `exact` while a product is launched; none on a CPU."""
    return CUDA_SETTINGS.get((operand, result), ()) if device.type == "cuda" else ()


def exactly(settings: tuple[Setting, ...], multiply: Callable[[], object]) -> None:
    """Call `multiply`, a function in C, with the settings exact, then restore them. Raises what `multiply` raises.

    No Ctrl-C may leave the settings changed. Python raises KeyboardInterrupt between two steps of Python code, never
    inside a call of a C function that runs no Python. So a single call of `deque` takes the lock, changes the settings,
    multiplies and restores: it consumes iterators written in C, each of which does one step when it is asked for an
    element. After an error, the `deque` in the handler does the steps that are left.

    Our threads wait for each other. If another thread changes such a setting while `multiply` runs, its change is lost
    and its products are exact until `multiply` returns: on a GPU, the time of a launch.
    """
    if not settings:
        multiply()
        return
    locked: list[bool] = []  # [True] once the lock is held
    change: list[Iterator] = [map(locked.append, itertools.starmap(_changing.acquire, [()]))]
    # `__exit__`, written in C, takes any arguments: they need not be an exception's three.
    restore: list[Iterator] = [map(_changing.__exit__, locked)]  # type: ignore[arg-type]
    for setting in settings:
        changing, restoring = setting.steps()
        change += changing
        restore.insert(0, restoring)
    rest = itertools.chain.from_iterable(restore)
    try:
        collections.deque(itertools.chain(*change, itertools.starmap(multiply, [()]), rest), 0)
    finally:
        collections.deque(rest, 0)


@functools.cache
def float32_outputs(device: torch.device, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether mm and addmm multiply this 16-bit dtype into float32 on this device. Some builds and all CPUs do not."""
    operand, out = (torch.zeros(16, 16, dtype=kind, device=device) for kind in (dtype, torch.float32))

    def works(function: Callable, *operands: Tensor) -> bool:
        multiply = functools.partial(function, *operands, out_dtype=torch.float32, out=out)
        try:
            exactly(settings_of(device, dtype, torch.float32), multiply)
        except (RuntimeError, TypeError):  # PyTorch 2.11 raises TypeError for tensors without storage
            return False
        return True

    return works(torch.mm, operand, operand), works(torch.addmm, out, operand, operand)


def cpu_rounds_float32() -> bool:
    """Whether oneDNN may round float32 operands to bf16 or TF32 under the current settings of the process."""
    precision = _cpu_precision()
    if precision in ("tf32", "high"):  # only CPUs with Intel's matrix instructions for float16 have TF32
        return getattr(torch.cpu, "_is_amx_fp16_supported", lambda: True)()
    return precision in ("bf16", "medium")


def cast_rows(matrix: Tensor, itemsize: int = 4, width: int = 0) -> int:
    """How many rows of a matrix fit into a temporary with `itemsize` bytes per element and at least `width` columns."""
    most = CPU_CAST_BYTES if matrix.device.type == "cpu" else DEVICE_CAST_BYTES
    return max(most // max(max(matrix.shape[1], width) * itemsize, 1), 1)


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b, under any settings of the process. Float32 operands are not rounded. Products of
    16-bit operands are added in float32, and a float32 `out` receives that sum unrounded.
    """
    if not out.numel():
        return  # this shard holds only padding
    if a.dtype == torch.float32 and a.device.type == "cpu" and cpu_rounds_float32():
        _product_in_float64(a, b, out, accumulate)
        return
    if a.dtype == out.dtype:
        multiply = functools.partial(out.addmm_, a, b) if accumulate else functools.partial(torch.mm, a, b, out=out)
    elif not accumulate:
        multiply = functools.partial(torch.mm, a, b, out_dtype=out.dtype, out=out)
    elif float32_outputs(out.device, a.dtype)[1]:
        multiply = functools.partial(torch.addmm, out, a, b, out_dtype=out.dtype, out=out)
    else:
        for rows, operand in zip(out.split(cast_rows(out)), a.split(cast_rows(out)), strict=True):
            part = torch.empty_like(rows)
            product(operand, b, part)
            rows.add_(part)
        return
    exactly(settings_of(out.device, a.dtype, out.dtype), multiply)


def _product_in_float64(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """`product` of float32 operands in float64, tile by tile. It takes two to three times as long as in float32, but
    depends on no setting, which another thread might change during a long product on a CPU.
    """
    for rows, left in zip(out.split(DOUBLE_TILE), a.split(DOUBLE_TILE), strict=True):
        for tile, right in zip(rows.split(DOUBLE_TILE, 1), b.split(DOUBLE_TILE, 1), strict=True):
            total = tile.double() if accumulate else None
            for x, y in zip(left.split(DOUBLE_TILE, 1), right.split(DOUBLE_TILE), strict=True):
                x, y = x.double(), y.double()
                total = torch.mm(x, y) if total is None else total.addmm_(x, y)
            assert total is not None  # a split has at least one part
            tile.copy_(total)


def exact_products() -> contextlib.AbstractContextManager:
    """A context without autocast; `product` makes other settings exact. It is written in C, unlike `torch.autocast`,
    so that a Ctrl-C cannot prevent its end.

    A sweep is made inside it, because making one reads counts from the device. The device is then idle until the first
    product, so nothing slow may come between the two.
    """
    return torch._C._DisableAutocast()


class HeadProducts(Protocol):
    """The products with the head's weight [V, H] that a sweep needs: `HeadMatmul`, or the Triton backend's
    `InvariantMatmul`.

    accumulator             float32, or float64 for float64 inputs
    operand_dtype           the dtype in which dlogits must be given
    row_multiple            every window but the last must hold a multiple of this many rows
    hidden_gradient_dtypes  the dtypes in which dX may be written
    """

    weight: Tensor
    accumulator: torch.dtype
    operand_dtype: torch.dtype
    row_multiple: int
    hidden_gradient_dtypes: tuple[torch.dtype, ...]

    def operand(self, x: Tensor) -> Tensor:
        """Hidden states [n, H], cast to what the products below take."""
        ...

    def cast_bytes(self, dtype: torch.dtype) -> int:
        """How many bytes `operand` allocates for each element of an x of that dtype, intermediate copies included."""
        ...

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """out [n, V] = hidden [n, H] @ weight.T. `out` has the accumulator's dtype, or a narrower one on request."""
        ...

    def hidden_gradient(self, dlogits: Tensor, out: Tensor) -> None:
        """out [n, H] = dlogits [n, V] @ weight, added up in the accumulator's precision and rounded once."""
        ...

    def add_weight_gradient(
        self, dlogits: Tensor, hidden: Tensor, out: Tensor, first: bool, unscale: Tensor | None
    ) -> None:
        """out [V, H] += unscale · dlogits.T @ hidden, or = for the first chunk; `unscale` is 0-d, or None for 1."""
        ...

    def add_bias_gradient(self, dlogits: Tensor, out: Tensor, first: bool, unscale: Tensor | None) -> None:
        """out [V] += unscale · Σ_rows dlogits, or = for the first chunk."""
        ...


class HeadMatmul:
    """`HeadProducts` by PyTorch's GEMMs.

    compute_dtype  the dtype that operands are rounded to (autocast's, or the inputs' own)
    operand_dtype  the dtype that is multiplied: `compute_dtype` if the hardware accumulates it in float32, else float32
    """

    row_multiple = 1

    def __init__(self, weight: Tensor, compute_dtype: torch.dtype):
        self.weight = weight
        self.compute_dtype = compute_dtype
        self.accumulator = torch.float64 if compute_dtype == torch.float64 else torch.float32
        narrow = compute_dtype.itemsize < 4 and float32_outputs(weight.device, compute_dtype)[0]
        self.operand_dtype = compute_dtype if narrow else self.accumulator
        # If the weight must be cast, the products of its blocks are added in `out`, which must then be wide.
        self.hidden_gradient_dtypes: tuple[torch.dtype, ...] = (self.accumulator,)
        if not self.casts:
            self.hidden_gradient_dtypes += (self.operand_dtype,)

    @property
    def casts(self) -> bool:
        return self.weight.dtype != self.operand_dtype

    def operand(self, x: Tensor) -> Tensor:
        return x.to(self.compute_dtype).to(self.operand_dtype)

    def cast_bytes(self, dtype: torch.dtype) -> int:
        steps = dtype, self.compute_dtype, self.operand_dtype
        return sum(after.itemsize for before, after in itertools.pairwise(steps) if before != after)

    def _blocks(self, always: bool = False, width: int = 0) -> Iterator[slice]:
        """Blocks of the vocabulary that are small enough for a temporary, or one block if none is needed.

        With `always` each block needs a temporary in the accumulator's dtype, with the larger of H and `width` elements
        for every entry of the vocabulary.
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
            out.zero_()  # this shard holds only padding
        for i, block in enumerate(self._blocks()):
            product(dlogits[:, block], self.operand(self.weight[block]), out, accumulate=i > 0)

    def add_weight_gradient(
        self, dlogits: Tensor, hidden: Tensor, out: Tensor, first: bool, unscale: Tensor | None
    ) -> None:
        if unscale is None:
            product(dlogits.T, hidden, out, accumulate=not first)
            return
        for block in self._blocks(always=True):
            part = torch.empty(out[block].shape, dtype=out.dtype, device=out.device)
            product(dlogits[:, block].T, hidden, part)
            torch.mul(part, unscale, out=out[block]) if first else out[block].addcmul_(part, unscale)

    def add_bias_gradient(self, dlogits: Tensor, out: Tensor, first: bool, unscale: Tensor | None) -> None:
        db = dlogits.sum(0, dtype=self.accumulator)
        db = db if unscale is None else db.mul_(unscale)
        out.copy_(db) if first else out.add_(db)
