"""SmolLM2 as rollout engines run it: the same weights in fewer bits, and activations in bf16 or fp8.

The engines are emulated. A number is rounded to the engine's format and multiplied as the nearest bf16 number. Weights
are rounded to the nearest value of the format, without calibration. As in vLLM, norms, embeddings, the head and its
logits are bf16, and the angles of rotary embeddings are float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from drpo_kernels.backends.quantize import FORMATS, per_row

GROUP = 64  # number of weights of a row that share a scale in int4


def fp8(x: Tensor) -> Tensor:
    """Round to E4M3 with a scale per row: per output channel of a weight, per token of activations."""
    values, scales = per_row(x.flatten(0, -2), FORMATS["fp8_e4m3"])
    return (values.float() * scales).view(x.shape).to(x.dtype)


def int4(weight: Tensor) -> Tensor:
    """Round to 16 values from the least to the largest of each `GROUP` weights of a row, evenly spaced."""
    groups = weight.unflatten(1, (-1, GROUP))
    least, largest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((largest - least) / 15).clamp(min=torch.finfo(weight.dtype).tiny)  # all weights of a group may be equal
    return (((groups - least) / step).round() * step + least).flatten(1)


def engine(name: str, model: Any) -> Any:
    """Return a copy of a float32 model as the engine called `name` in `recording.ENGINES` computes it."""
    made = copy.deepcopy(model)
    weights = {"bf16": None, "fp8": fp8, "int4": int4}[name]
    for module in made.model.modules():
        if isinstance(module, nn.Linear) and weights is not None:
            module.weight.data = weights(module.weight.data)
            if name == "fp8":
                module.register_forward_pre_hook(_in(fp8))
    for parameter in made.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return made


def _in(rounding: Callable[[Tensor], Tensor]) -> Callable:
    return lambda _, inputs: (rounding(inputs[0]), *inputs[1:])
