"""fp8 as inference engines use it: 8-bit floats times a float32 scale of a tensor, a row or a block of 128 columns.

    scale = max|x| / largest finite value of the format        x ≈ scale · fp8(x / scale)

x / scale is divided in float32 and rounded once, to nearest with ties to even. The largest entry under a scale becomes
the largest value of the format, so nothing saturates. Scales are at least 2^-126, so a row of zeros stays zeros. A NaN
or an infinity makes every dot product with values of its scale NaN.
Formats: Micikevicius et al., arXiv 2209.05433; blocks: DeepSeek-V3, arXiv 2412.19437.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Their largest finite values are 448 and 57344.
FORMATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32; a smaller scale would lose bits, and a scale of 0 give NaN
BLOCK = 128


class Quantized(NamedTuple):
    """values [R, C] in fp8, and float32 scales: [1, 1], [R, 1], or one per block of rows and columns."""

    values: Tensor
    scales: Tensor


def scale_of(largest: Tensor, form: torch.dtype) -> Tensor:
    """max|x| -> float32 scale of the same shape, bitwise the same on every device.

    The divisor is a tensor, because a GPU replaces division by a Python number with a product by a rounded reciprocal.
    If x / scale is a tie between two fp8 numbers, the last bit of the scale decides which one it becomes.
    """
    most = largest.new_full((), torch.finfo(form).max, dtype=torch.float32)
    return (largest.to(torch.float32) / most).clamp(min=SMALLEST_SCALE)


def per_tensor(x: Tensor, form: torch.dtype) -> Quantized:
    """Quantise the matrix x [R, C] with one scale, [1, 1]."""
    scale = scale_of(x.abs().amax().reshape(1, 1), form)
    return Quantized((x.to(torch.float32) / scale).to(form), scale)


def per_row(x: Tensor, form: torch.dtype) -> Quantized:
    """Quantise x [R, C] with one scale per row, [R, 1]: per token for hidden states, per output channel for weights."""
    scale = scale_of(x.abs().amax(1, keepdim=True), form)
    return Quantized(x.to(torch.float32).div(scale).to(form), scale)


def per_block(x: Tensor, form: torch.dtype, rows: int) -> Quantized:
    """Quantise x [R, C] with one scale per block of `rows` x 128 entries, [⌈R / rows⌉, ⌈C / 128⌉].

    DeepSeek-V3 and the engines that follow it take rows = 1 for activations and 128 for weights.
    """
    count, width = x.shape
    padded = torch.nn.functional.pad(x.abs(), (0, -width % BLOCK, 0, -count % rows))
    largest = padded.unflatten(1, (-1, BLOCK)).amax(2).unflatten(0, (-1, rows)).amax(1)
    scale = scale_of(largest, form)
    return Quantized((x.to(torch.float32) / _spread(scale, x.shape, rows)).to(form), scale)


def dequantized(quantized: Quantized, rows: int = 1) -> Tensor:
    """scale · value in float32, [R, C]; `rows` is what `per_block` was given."""
    values, scales = quantized
    if scales.shape[1] > 1 or scales.shape[0] not in (1, values.shape[0]):
        scales = _spread(scales, values.shape, rows)
    return values.to(torch.float32) * scales


def _spread(scales: Tensor, shape: torch.Size, rows: int) -> Tensor:
    return scales.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]
