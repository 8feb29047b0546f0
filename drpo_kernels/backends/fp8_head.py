"""Logits with the numerics of an fp8 inference engine's head: `head_dtype` of the linear functions.

    logits = (Q(hidden) @ Q(weight).T) · s_hidden · s_weight        in float32, the product accumulated in float32

Each row of hidden and each row of weight (output channel) has a scale of its own, see quantize.py. Every route below
computes this formula; the routes differ in the order of the additions. The gradient treats the quantisation as the
identity (straight-through), so its products in `HeadMatmul` take the unquantised operands.
"""

import functools

import torch
from torch import Tensor

from drpo_kernels.backends.matmul import HeadProducts, cast_rows, float32_outputs, product
from drpo_kernels.backends.quantize import FORMATS, Quantized, per_row

# fp8 GEMMs want V and H in multiples of this.
MULTIPLE = 16


@functools.cache
def scaled_mm_route(device: torch.device, form: torch.dtype) -> str | None:
    """How `torch._scaled_mm` multiplies this format into float32 on this device.

    "rowwise" takes the scales of the rows (cuBLAS >= 12.9 on sm_90). "unit" takes scales of 1, and we multiply by the
    true ones afterwards (sm_89 and later). None means that it does not multiply this format.
    """
    if device.type != "cuda":
        return None
    values = torch.zeros(MULTIPLE, MULTIPLE, dtype=form, device=device)
    ones = Quantized(values, torch.ones(MULTIPLE, 1, device=device))
    for route in ("rowwise", "unit"):
        try:
            _scaled_mm(ones, ones, route)
        except (RuntimeError, ValueError):
            continue
        return route
    return None


def _scaled_mm(a: Quantized, b: Quantized, route: str) -> Tensor:
    """(a.values @ b.values.T) · a.scales · b.scales.T in float32 on the fp8 tensor cores."""
    rowwise = route == "rowwise"
    one = a.scales.new_ones(())
    scales = (a.scales, b.scales.T) if rowwise else (one, one)
    out = torch._scaled_mm(
        a.values, b.values.T, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.float32, use_fast_accum=False
    )
    return out if rowwise else out.mul_(a.scales).mul_(b.scales.T)


def _padded(b: Quantized) -> Quantized:
    missing = -b.values.shape[0] % MULTIPLE
    if not missing:
        return b
    bits = torch.nn.functional.pad(b.values.view(torch.uint8), (0, 0, 0, missing))
    return Quantized(bits.view(b.values.dtype), torch.nn.functional.pad(b.scales, (0, 0, 0, missing)))


def quantized_product(a: Quantized, b: Quantized, out: Tensor) -> None:
    """out [n, m] = (a.values [n, H] @ b.values [m, H].T) · a.scales · b.scales.T, rounded to out's dtype at the end.

    If the tensor cores do not multiply the format, the values are multiplied in a wider format, which holds them and
    their products exactly.
    """
    device, columns = out.device, b.values.shape[0]
    route = scaled_mm_route(device, a.values.dtype) if a.values.shape[1] % MULTIPLE == 0 else None
    if route is not None:
        out.copy_(_scaled_mm(a, _padded(b), route)[:, :columns])
        return
    wide = torch.bfloat16 if float32_outputs(device, torch.bfloat16)[0] else torch.float32
    part = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=device)
    product(a.values.to(wide), b.values.to(wide).T, part)
    part.mul_(a.scales).mul_(b.scales.T)
    if part is not out:
        out.copy_(part)


class Fp8Logits:
    """The logits of a head quantised to `head_dtype`, a name in `FORMATS`.

    On a CPU the weight is quantised block by block for every chunk. Elsewhere it is quantised once per sweep and kept,
    which takes V·H bytes, half of a bf16 weight.
    """

    def __init__(self, matmul: HeadProducts, head_dtype: str):
        self.matmul, self.form = matmul, FORMATS[head_dtype]
        weight = matmul.weight
        step = max(cast_rows(weight) // MULTIPLE, 1) * MULTIPLE
        self.blocks = [slice(s, min(s + step, weight.shape[0])) for s in range(0, weight.shape[0], step)]
        keep = weight.device.type != "cpu"
        self.kept = [self._quantized(weight[block]) for block in self.blocks] if keep else None

    def _quantized(self, x: Tensor) -> Quantized:
        return per_row(self.matmul.operand(x), self.form)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """out [n, V] = the quantised product of hidden [n, H], an operand of `HeadProducts`, and the weight."""
        rows = self._quantized(hidden)
        for i, block in enumerate(self.blocks):
            weight = self._quantized(self.matmul.weight[block]) if self.kept is None else self.kept[i]
            quantized_product(rows, weight, out[:, block])
        return out
