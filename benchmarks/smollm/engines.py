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

from benchmarks.harness.quantization import fp8, int4


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
