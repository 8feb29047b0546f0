"""fp8 with one scale per tensor or per block, and back to float32, which drpo_kernels itself does not need."""

import torch
from torch import Tensor

from drpo_kernels.backends.quantize import Quantized, scale_of

BLOCK = 128


def per_tensor(x: Tensor, form: torch.dtype) -> Quantized:
    """Quantise the matrix x [R, C] with one scale, [1, 1]."""
    scale = scale_of(x.abs().amax().reshape(1, 1), form)
    return Quantized((x.to(torch.float32) / scale).to(form), scale)


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
    """Return scale · value in float32, [R, C]; `rows` is what `per_block` was given."""
    values, scales = quantized
    if scales.shape[1] > 1 or scales.shape[0] not in (1, values.shape[0]):
        scales = _spread(scales, values.shape, rows)
    return values.to(torch.float32) * scales


def _spread(scales: Tensor, shape: torch.Size, rows: int) -> Tensor:
    return scales.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]
