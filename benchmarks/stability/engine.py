"""The rollout engine: a copy of the policy with the numbers of an fp8 inference engine.

The weights of the transformer's linear layers are E4M3 with a scale per output channel, and their inputs E4M3 with a
scale per token. The embedding, the head, the head's inputs and the logits are bf16, as engines leave them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.harness.quantization import dequantized
from drpo_kernels.backends.quantize import FORMATS, per_row

PRECISIONS = ("float32", "fp8")


def rounded(x: Tensor) -> Tensor:
    """Return x rounded to bf16, as float32."""
    return x.bfloat16().float()


def quantised(x: Tensor) -> Tensor:
    """Return x rounded to E4M3 with a scale for each row of the last axis, as float32."""
    return dequantized(per_row(x.reshape(-1, x.shape[-1]), FORMATS["fp8_e4m3"])).reshape(x.shape)


def rollout_engine(policy: PreTrainedModel, precision: str) -> PreTrainedModel:
    """Return the model that samples: the policy itself for "float32", a copy that rounds for "fp8"."""
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
            _lower(module, rounded if module is engine.lm_head else quantised)
    engine.lm_head.register_forward_hook(lambda module, inputs, logits: rounded(logits))
    return engine


@torch.no_grad()
def _lower(linear: nn.Linear, lower) -> None:
    linear.weight.copy_(lower(linear.weight))
    linear.register_forward_pre_hook(lambda module, inputs: (lower(inputs[0]),))
