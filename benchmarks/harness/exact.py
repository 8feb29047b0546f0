"""The gradients every method is compared with before its time is taken: naive autograd in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness.method import OBJECTIVE, Method, Result
from benchmarks.harness.workloads import Inputs, capped
from drpo_kernels import Tokens

# norm-wise, of what claims to be exact: float32 rounding over thousands of additions stays well below; from bf16
# operands, rounding dlogits to bf16 alone costs 0.18 %
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-3}
# of what rounds on purpose: more is a wrong formula, not rounding
LARGEST = 0.25
# float64 logits held at once: those of the whole batch would fill the memory
BLOCK = {"cpu": 1 << 23, "cuda": 1 << 27}
WRONG = "wrong gradients"


class Exact:
    """float64 gradients of the loss of `inputs`, or of the mean of -log π where the method has another loss."""

    def __init__(self, inputs: Inputs, same_loss: bool = True):
        self.inputs, self.same_loss = inputs, same_loss
        self._head: Result | None = None

    def errors(self, found: Result, method: Method) -> dict[str, float]:
        """|found - exact| / |exact| in norm, for each gradient that the method computes."""
        if method.takes == "logits":
            return {"logits": self._logits_error(found.logits)}
        exact = self.head()
        return {name: _relative(getattr(found, name), getattr(exact, name)) for name in method.wrt}

    def head(self) -> Result:
        """Loss and gradients of hidden states and weight; computed once."""
        if self._head is None:
            hidden, weight = self.inputs.hidden.double(), self.inputs.weight.double()
            total, d_hidden, d_weight = hidden.new_zeros(()), torch.empty_like(hidden), torch.zeros_like(weight)
            for rows in self._blocks():
                loss, d_logits = self._logits_gradient(hidden[rows] @ weight.T, rows, self.inputs.softcap)
                d_hidden[rows] = d_logits @ weight
                d_weight.addmm_(d_logits.T, hidden[rows])
                total += loss
            self._head = Result(total, d_hidden, d_weight)
        return self._head

    def _logits_error(self, found: Tensor) -> float:
        """Block by block: the exact gradient of all the logits would not fit."""
        difference, size = found.new_zeros((2,), dtype=torch.float64)
        for rows in self._blocks():
            _, exact = self._logits_gradient(self.inputs.logits[rows].double(), rows, softcap=None)
            difference += (found[rows] - exact).square().sum()
            size += exact.square().sum()
        return (difference / size).sqrt().item()

    def _logits_gradient(self, logits: Tensor, rows: slice, softcap: float | None) -> tuple[Tensor, Tensor]:
        """Of a block of rows -> (its part of the loss, the gradient of its float64 logits)."""
        inputs, leaf = self.inputs, logits.requires_grad_()
        logprobs = torch.log_softmax(capped(leaf, softcap), -1).gather(-1, inputs.targets[rows, None])[:, 0]
        losses = -logprobs
        if self.same_loss:
            old, advantages = inputs.old_logprobs[rows].double(), inputs.advantages[rows].double()
            losses = OBJECTIVE.token_loss(Tokens(logprobs, old, advantages))
        loss = losses.sum() / inputs.targets.numel()
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def _blocks(self) -> Iterator[slice]:
        count, vocab = self.inputs.targets.numel(), self.inputs.weight.shape[0]
        step = max(BLOCK[self.inputs.targets.device.type] // vocab, 1)
        return (slice(start, start + step) for start in range(0, count, step))


def verdict(errors: dict[str, float], method: Method, dtype: torch.dtype) -> str:
    """A row's status: "ok", "ok, gradient error 4 %" for what rounds on purpose, or `WRONG`."""
    largest = max(errors.values(), key=lambda error: (error != error, error))  # a NaN is the largest
    if largest <= TOLERANCE[dtype]:
        return "ok"
    if method.rounds is not None and largest <= LARGEST:
        return f"ok, gradient error {100 * largest:.2g} %"
    return WRONG


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()
