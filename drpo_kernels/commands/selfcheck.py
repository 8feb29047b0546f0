"""A check that takes seconds: a backend against the fp64 reference on a small problem with every kind of row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drpo_kernels import CISPO, DPPO, DRPO, PPO, linear_policy_loss

MEASURES = ("loss", "logprob", "dhidden", "dweight")
# The error of the loss is relative, or absolute below 1. The error of log-probs is the largest one. The error of a
# gradient is the norm of the difference over the norm.
BUDGETS = {torch.float32: (1e-4, 1e-4, 5e-5, 5e-5), torch.bfloat16: (1e-4, 1e-4, 4e-3, 4e-3)}
CASES = {  # with these hyper-parameters the problem has rows on both sides of every branch
    "DRPO": (DRPO(delta=0.2), {}),
    "DRPO+KL+entropy": (DRPO(), {"kl_coef": 0.05, "entropy_coef": 0.01}),
    "DPPO": (DPPO(delta_low=0.05, delta_high=0.05), {}),
    "PPO": (PPO(), {}),
    "CISPO": (CISPO(ratio_cap=1.2), {}),
}
BATCH, LENGTH, HIDDEN, VOCAB = 3, 5, 48, 777  # no block size divides this vocabulary


@dataclass(frozen=True)
class Check:
    """Errors of one comparison, in the order of MEASURES."""

    objective: str
    dtype: torch.dtype
    errors: tuple[float, ...]

    @property
    def passed(self) -> bool:
        return all(error <= budget for error, budget in zip(self.errors, BUDGETS[self.dtype], strict=True))


def run_checks(backend: str, device: torch.device) -> Iterator[Check]:
    """Compare every case in every dtype with the reference on an fp64 copy of the same inputs."""
    for dtype in BUDGETS:
        inputs = _problem(dtype, device)
        for name, (objective, options) in CASES.items():
            given: dict[str, Any] = dict(options, objective=objective)
            if "kl_coef" in options:
                given["ref_logprobs"] = inputs["old_logprobs"].nan_to_num(0.0) - 0.1
            want = _evaluate({key: _double(value) for key, value in inputs.items()}, given, "reference")
            got = _evaluate(inputs, given, backend)
            yield Check(name, dtype, _errors(got, want))


def _problem(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Peaked logits, ratios around 1, both signs of the advantage and zero, and a masked row that carries NaN."""
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(VOCAB, (BATCH, LENGTH), generator=g)
    weight = torch.randn(VOCAB, HIDDEN, generator=g).to(dtype)
    pull = torch.rand(BATCH, LENGTH, 1, generator=g)
    hidden = (pull * weight[targets].float() / 4 + torch.randn(BATCH, LENGTH, HIDDEN, generator=g) / 8).to(dtype)
    logprobs = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(-1, targets[..., None])[..., 0]
    old_logprobs = (logprobs + 0.6 * torch.randn(BATCH, LENGTH, generator=g)).clamp(max=0.0).float()
    advantages = torch.randn(BATCH, LENGTH, generator=g)
    advantages[0, 0] = 0.0
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, 3:] = False
    old_logprobs[1, 3:], targets[1, 3:] = torch.nan, -100
    names = ("hidden", "weight", "targets", "old_logprobs", "advantages", "mask")
    tensors = (hidden, weight, targets, old_logprobs, advantages, mask)
    return {name: tensor.to(device) for name, tensor in zip(names, tensors, strict=True)}


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _evaluate(inputs: dict[str, Tensor], options: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
    """(loss, logprobs of the rows that contribute, dhidden, dweight) in fp64 on the CPU."""
    hidden = inputs["hidden"].clone().requires_grad_()
    weight = inputs["weight"].clone().requires_grad_()
    given: dict[str, Any] = {**inputs, **options, "hidden": hidden, "weight": weight}
    out = linear_policy_loss(**given, backend=backend)
    out.loss.backward()
    contributes = inputs["mask"] & (inputs["advantages"] != 0)
    assert hidden.grad is not None and weight.grad is not None
    results = (out.loss, out.logprobs[contributes], hidden.grad, weight.grad)
    return tuple(result.detach().cpu().double() for result in results)


def _errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> tuple[float, ...]:
    loss = (got[0] - want[0]).abs() / want[0].abs().clamp(min=1.0)
    logprob = (got[1] - want[1]).abs().max()
    gradients = ((g - w).norm() / w.norm() for g, w in zip(got[2:], want[2:], strict=True))
    return tuple(float(error) for error in (loss, logprob, *gradients))
