"""The results that every method is compared with: naive autograd in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness.method import OBJECTIVE, Method, Result
from benchmarks.harness.workloads import Inputs
from drpo_kernels import Tokens
from drpo_kernels.objectives import Objective

# The bound, norm-wise, for methods that claim to be exact. Float32 rounding over thousands of additions stays well
# below it; from bf16 operands, rounding dlogits to bf16 alone costs 0.18 %.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-3}
# The bound for methods that round on purpose. A larger error is a wrong formula, not rounding.
LARGEST = 0.25
# The number of float64 logits that are held at once, because those of the whole batch would fill the memory.
BLOCK = {"cpu": 1 << 23, "cuda": 1 << 27}
WRONG = "wrong gradients"


def blocks(inputs: Inputs) -> Iterator[slice]:
    """Return slices of rows whose float64 logits are held at a time."""
    count, vocab = inputs.targets.numel(), inputs.weight.shape[0]
    step = max(BLOCK[inputs.targets.device.type] // vocab, 1)
    return (slice(start, start + step) for start in range(0, count, step))


def differentiated(
    logits: Tensor, inputs: Inputs, rows: slice, objective: Objective | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (the targets' log-probs, their terms of the mean loss, the gradient of the logits) from the float64 logits
    of a block of rows. Without an objective a token's loss is -log π.
    """
    leaf = logits.detach().requires_grad_()
    logprobs = inputs.scaled(leaf).log_softmax(-1).gather(-1, inputs.targets[rows, None])[:, 0]
    losses = -logprobs
    if objective is not None:
        old, advantages = inputs.old_logprobs[rows].double(), inputs.advantages[rows].double()
        losses = objective.token_loss(Tokens(logprobs, old, advantages))
    terms = losses / inputs.targets.numel()
    return logprobs.detach(), terms.detach(), torch.autograd.grad(terms.sum(), leaf)[0]


def head(
    inputs: Inputs, operands: tuple[Tensor, Tensor] | None = None, objective: Objective | None = OBJECTIVE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (log-probs [T], terms of the loss [T], gradients of hidden states and weight), a block of rows at a time.

    `operands`, hidden and weight by default, are multiplied to logits. The gradients are products of hidden and weight
    even where the operands are others: what is rounded for the logits is differentiated straight-through.
    """
    own = inputs.hidden.double(), inputs.weight.double()
    hidden, weight = own if operands is None else (x.double() for x in operands)
    logprobs, terms = hidden.new_empty(2, hidden.shape[0])
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for rows in blocks(inputs):
        logits = inputs.product(hidden[rows], weight)
        logprobs[rows], terms[rows], d_logits = differentiated(logits, inputs, rows, objective)
        d_hidden[rows] = d_logits @ own[1]
        d_weight.addmm_(d_logits.T, own[0][rows])
    return logprobs, terms, d_hidden, d_weight


class Exact:
    """The gradients of the loss of `inputs`, or of the mean of -log π where the method has another loss."""

    def __init__(self, inputs: Inputs, same_loss: bool = True):
        self.inputs, self._objective = inputs, OBJECTIVE if same_loss else None
        self._head: dict[str, Tensor] = {}

    def errors(self, found: Result, method: Method) -> dict[str, float]:
        """Return |found - exact| / |exact| in norm, for each gradient that the method computes."""
        if method.takes == "logits":
            return {"logits": self._logits_error(found.logits)}
        if not self._head:
            _, _, d_hidden, d_weight = head(self.inputs, objective=self._objective)
            self._head = {"hidden": d_hidden, "weight": d_weight}
        exact = self._head
        return {name: ((getattr(found, name) - exact[name]).norm() / exact[name].norm()).item() for name in method.wrt}

    def _logits_error(self, found: Tensor) -> float:
        """Return the error of the gradient of the logits. It is summed over blocks, because the whole exact gradient
        would not fit.
        """
        ready = dataclasses.replace(self.inputs, softcap=None)
        difference, size = found.new_zeros((2,), dtype=torch.float64)
        for rows in blocks(ready):
            *_, exact = differentiated(ready.logits[rows].double(), ready, rows, self._objective)
            difference += (found[rows] - exact).square().sum()
            size += exact.square().sum()
        return (difference / size).sqrt().item()


def verdict(errors: dict[str, float], method: Method, dtype: torch.dtype) -> str:
    """Return a row's status: "ok", "ok, gradient error 4 %" for what rounds on purpose, or `WRONG`."""
    largest = max(errors.values(), key=lambda error: (error != error, error))  # a NaN is the largest
    if largest <= TOLERANCE[dtype]:
        return "ok"
    if method.rounds is not None and largest <= LARGEST:
        return f"ok, gradient error {100 * largest:.2g} %"
    return WRONG
