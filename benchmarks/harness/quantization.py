"""Roundings that drpo_kernels itself does not need: fp8 by tensor and by block, and the numbers of rollout engines."""

import torch
from torch import Tensor

from drpo_kernels.backends.quantize import FORMATS, Quantized, per_row, scale_of

BLOCK = 128
GROUP = 64  # number of weights of a row that share a scale in int4


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


def bf16(x: Tensor) -> Tensor:
    """Round to bf16, and back to the dtype of x."""
    return x.bfloat16().to(x.dtype)


def fp8(x: Tensor) -> Tensor:
    """Round to E4M3 with a scale per row: per output channel of a weight, per token of activations."""
    return dequantized(per_row(x.flatten(0, -2), FORMATS["fp8_e4m3"])).view(x.shape).to(x.dtype)


def int4(weight: Tensor) -> Tensor:
    """Round to 16 values from the least to the largest of each `GROUP` weights of a row, evenly spaced."""
    groups = weight.unflatten(1, (-1, GROUP))
    least, largest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((largest - least) / 15).clamp(min=torch.finfo(weight.dtype).tiny)  # all weights of a group may be equal
    return (((groups - least) / step).round() * step + least).flatten(1)
