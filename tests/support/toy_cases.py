"""Toy kernels for the tests of `python -m drpo_kernels compile`; Triton wants kernels in a file, not in a string."""

import triton
import triton.language as tl

from drpo_kernels.aot.cases import KernelCase


@triton.jit
def _scaled_square(x, hyper):
    return hyper[0] * x * x


@triton.jit
def _row_kernel(x_ptr, bias_ptr, out_ptr, n, hyper, FN: tl.constexpr, BLOCK: tl.constexpr):
    """Compute out = FN(x) rounded to bf16, with a constexpr function, a tuple of run-time floats and an optional
    pointer.
    """
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(out_ptr + offsets, FN(x, hyper).to(tl.bfloat16), mask=offsets < n)


@triton.jit
def _register_hog(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Divide a row by its sum while all of it is in registers: 512 values per thread at BLOCK = 65536."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, x / tl.sum(x))


def good() -> list[KernelCase]:
    signature = {"x_ptr": "*fp32", "bias_ptr": "constexpr", "out_ptr": "*bf16", "n": "i32"}
    signature |= {"hyper": ("fp32",), "FN": "constexpr", "BLOCK": "constexpr"}
    constexprs = {"bias_ptr": None, "FN": _scaled_square, "BLOCK": 1024}
    return [KernelCase("row", _row_kernel, signature, constexprs, divisible=("x_ptr", "out_ptr", "n"))]


def _hog(name: str, block: int) -> KernelCase:
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "BLOCK": "constexpr"}
    return KernelCase(name, _register_hog, signature, {"BLOCK": block}, divisible=("x_ptr", "out_ptr"))


def bad() -> list[KernelCase]:
    """Return one case that spills to local memory on NVIDIA, and one that no compiler takes."""
    return [_hog("hog", 65536), _hog("not-a-power-of-two", 1000)]
