"""Kernels that move or compute too much, and one that does not, for the tests of `python -m drpo_kernels compile`."""

import triton
import triton.language as tl

from drpo_kernels.aot.cases import Bounds, Expected, KernelCase


@triton.jit
def _row_sum(x, again, out, n, TWICE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Sum something of x [n] into out [BLOCK] by blocks. TWICE reads `again` as well, and MASKED masks for an odd n."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        if MASKED:
            value = tl.load(x + start + lanes, mask=start + lanes < n, other=0.0)
        else:
            value = tl.load(x + start + lanes)
        if TWICE:
            value += tl.load(again + start + lanes)
        step = value - total  # this chain is too long for a compiler to unroll the loop
        total = tl.where(step > 0, tl.exp2(-step) * total + tl.exp2(tl.exp2(value)), total + tl.log2(tl.exp2(step) + 1))
    tl.store(out + lanes, total)


def _case(name: str, twice: bool = False, masked: bool = False, bounds: Bounds | None = None) -> list[KernelCase]:
    signature = {"x": "*fp32", "again": "*fp32", "out": "*fp32", "n": "i32"}
    signature |= dict.fromkeys(("TWICE", "MASKED", "BLOCK"), "constexpr")
    values = {"TWICE": twice, "MASKED": masked, "BLOCK": 1024}
    # A thread loads 8 elements of 4 bytes if there are 128 threads, and 4 if there are 256.
    loaded = {"sm_": 32, "gfx": 16}
    pointers = ("x", "again", "out")
    return [
        KernelCase(
            name,
            _row_sum,
            signature,
            values,
            pointers,
            targets=(vendor,),
            expected=Expected(128, 128, loop_load_bytes, element_bytes=4, bounds=bounds),
        )
        for vendor, loop_load_bytes in loaded.items()
    ]


def cases() -> list[KernelCase]:
    return [
        *_case("right", bounds=Bounds(reading=60, special=5, registers=64)),
        *_case("twice", twice=True, bounds=Bounds(reading=60, special=5, registers=64)),
        *_case("narrow", masked=True),
        *_case("slow", bounds=Bounds(reading=1, special=1, registers=8)),
    ]
