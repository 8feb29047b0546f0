"""The gradients every method is compared with before its time is taken: naive autograd in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.methods import OBJECTIVE, Result
from benchmarks.workloads import Inputs
from drpo_kernels import Tokens

# norm-wise; float32 rounding over thousands of additions stays well below
TOLERANCE = 1e-4
# at once: float64 logits of the whole batch would fill the memory
ROWS = 256


def exact_result(inputs: Inputs) -> Result:
    """Loss and gradients in float64."""
    hidden, weight = inputs.hidden.double(), inputs.weight.double().requires_grad_()
    count = hidden.shape[0]
    total, hidden_gradient, weight_gradient = hidden.new_zeros(()), torch.empty_like(hidden), torch.zeros_like(weight)
    for rows in (slice(start, start + ROWS) for start in range(0, count, ROWS)):
        part = hidden[rows].requires_grad_()
        logprobs = torch.log_softmax(part @ weight.T, -1).gather(-1, inputs.targets[rows, None])[:, 0]
        tokens = Tokens(logprobs, inputs.old_logprobs[rows].double(), inputs.advantages[rows].double())
        loss = OBJECTIVE.token_loss(tokens).sum() / count
        hidden_gradient[rows], added = torch.autograd.grad(loss, (part, weight))
        weight_gradient += added
        total += loss.detach()
    return Result(total, hidden_gradient, weight_gradient)


def gradient_errors(found: Result, exact: Result) -> dict[str, float]:
    """|found - exact| / |exact| of both gradients, in norm."""
    return {name: _relative(getattr(found, name), getattr(exact, name)) for name in ("hidden", "weight")}


def agrees(errors: dict[str, float]) -> bool:
    return all(error <= TOLERANCE for error in errors.values())  # False for a NaN


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()
