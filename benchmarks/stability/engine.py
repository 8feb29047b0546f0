"""The rollout engine: a copy of the policy as inference engines hold it, rounded to bf16 or quantised to fp8.

In bf16 every weight, every input of a linear layer and the logits are rounded. In fp8 the weights of the transformer's
linear layers are E4M3 with a scale per output channel, and their inputs E4M3 with a scale per token. The embedding and
the head stay bf16, as engines leave them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.harness.quantization import dequantized
from drpo_kernels.backends.quantize import FORMATS, per_row

FORMAT = FORMATS["fp8_e4m3"]
PRECISIONS = ("float32", "bf16", "fp8")


def rounded(x: Tensor) -> Tensor:
    """x rounded to bf16, as float32."""
    return x.bfloat16().float()


def quantised(x: Tensor) -> Tensor:
    """x rounded to E4M3 with a scale for each row of the last axis, as float32."""
    return dequantized(per_row(x.reshape(-1, x.shape[-1]), FORMAT)).reshape(x.shape)


def rollout_engine(policy: PreTrainedModel, precision: str) -> PreTrainedModel:
    """The model that samples: the policy itself for "float32", else a copy that rounds to the precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "float32":
        return policy
    engine = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in engine.parameters():
            parameter.copy_(rounded(parameter))
    for module in engine.modules():
        if isinstance(module, nn.Linear):
            _lower(module, quantised if precision == "fp8" and module is not engine.lm_head else rounded)
    engine.lm_head.register_forward_hook(lambda module, inputs, logits: rounded(logits))
    return engine


@torch.no_grad()
def _lower(linear: nn.Linear, lower) -> None:
    linear.weight.copy_(lower(linear.weight))
    linear.register_forward_pre_hook(lambda module, inputs: (lower(inputs[0]),))
