"""fp8 as inference engines use it: 8-bit floats times a float32 scale for each row.

    scale = max|x| / largest finite value of the format        x ≈ scale · fp8(x / scale)

x / scale is divided in float32 and rounded once, to nearest with ties to even. The largest entry under a scale becomes
the largest value of the format, so nothing saturates. Scales are at least 2^-126, so a row of zeros stays zeros. A NaN
or an infinity makes every dot product with values of its scale NaN.
Source of the formats: Micikevicius et al., arXiv 2209.05433.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# The largest finite values of these formats are 448 and 57344.
FORMATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32; a smaller scale would lose bits, and a scale of 0 give NaN


class Quantized(NamedTuple):
    """values [R, C] in fp8, and their float32 scales, [R, 1] from `per_row`."""

    values: Tensor
    scales: Tensor


def scale_of(largest: Tensor, form: torch.dtype) -> Tensor:
    """max|x| -> float32 scale of the same shape, bitwise the same on every device.

    The divisor is a tensor, because a GPU replaces division by a Python number with a product by a rounded reciprocal.
    If x / scale is a tie between two fp8 numbers, the last bit of the scale decides which one it becomes.
    """
    most = largest.new_full((), torch.finfo(form).max, dtype=torch.float32)
    return (largest.to(torch.float32) / most).clamp(min=SMALLEST_SCALE)


def per_row(x: Tensor, form: torch.dtype) -> Quantized:
    """Quantise x [R, C] with one scale per row, [R, 1]: per token for hidden states, per output channel for weights."""
    scale = scale_of(x.abs().amax(1, keepdim=True), form)
    return Quantized(x.to(torch.float32).div(scale).to(form), scale)
