"""What is compared. Each method prepares from the inputs a function that runs one forward and backward of the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.workloads import Inputs
from drpo_kernels import DRPO, Tokens, linear_policy_loss, linear_token_logprobs
from drpo_kernels.backends import planning

OBJECTIVE = DRPO()
# TRL's vocabulary tile
TRL_CHUNK = 32_768


class Result(NamedTuple):
    """The loss and its gradients: 0-d, [T, H], [V, H]."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor


Step = Callable[[], Result | None]


@dataclass(frozen=True)
class Method:
    """prepare  inputs -> one forward and backward; a floor's returns None
    package  what a peer needs installed, or None for what comes with this repository
    floor    True: bare work with no loss, so there is nothing to compare and no memory to measure
    gpu      True: it has compiled Triton kernels only, so that on a CPU it is a row without numbers
    """

    prepare: Callable[[Inputs], Step]
    package: str | None = None
    floor: bool = False
    gpu: bool = False


@dataclass(frozen=True)
class Case:
    """A method on inputs of which a share of the rows has an advantage."""

    method: str
    active_share: float = 1.0

    @property
    def label(self) -> str:
        return self.method if self.active_share == 1 else f"{self.method}, {self.active_share:.0%} of rows active"


def mean_token_loss(logprobs: Tensor, inputs: Inputs) -> Tensor:
    return OBJECTIVE.token_loss(Tokens(logprobs, inputs.old_logprobs, inputs.advantages)).mean()


def differentiated(inputs: Inputs, loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """A step from a function (hidden, weight) -> loss."""

    def step() -> Result:
        leaves = [leaf.detach().requires_grad_() for leaf in (inputs.hidden, inputs.weight)]
        value = loss(*leaves)
        return Result(value.detach(), *torch.autograd.grad(value, leaves))

    return step


def eager(inputs: Inputs) -> Step:
    """All the logits, `log_softmax`, `gather`, the objective's formula, autograd."""

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        # no name holds the logits: they are freed as soon as log_softmax has read them
        logprobs = torch.log_softmax(hidden @ weight.T, -1).gather(-1, inputs.targets[:, None])[:, 0]
        return mean_token_loss(logprobs, inputs)

    return differentiated(inputs, loss)


def trl(inputs: Inputs) -> Step:
    """TRL's fused head (8F), called as its GRPO trainer does, and the objective's formula."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        arguments = (hidden, weight, None, inputs.targets, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
        return mean_token_loss(ChunkedLogProbFunction.apply(*arguments)[0], inputs)

    return differentiated(inputs, loss)


def gemms(inputs: Inputs) -> Step:
    """The three products alone, in the chunks that `linear_policy_loss` takes, into buffers that exist already."""
    hidden, weight = inputs.hidden, inputs.weight
    (rows, width), vocab = hidden.shape, weight.shape[0]
    budget = planning.workspace_bytes(hidden.device, vocab, hidden.element_size(), None)
    plan = planning.plan_chunks(rows, vocab, hidden.element_size(), budget)
    logits = hidden.new_empty(min(plan.chunk_rows, rows), vocab)
    hidden_gradient, weight_gradient = hidden.new_empty(rows, width), weight.new_empty(vocab, width)

    def step() -> None:
        for chunk in plan:
            part = logits[: chunk.stop - chunk.start]
            torch.mm(hidden[chunk], weight.T, out=part)
            torch.mm(part, weight, out=hidden_gradient[chunk])
            if chunk.start == 0:
                torch.mm(part.T, hidden[chunk], out=weight_gradient)
            else:
                weight_gradient.addmm_(part.T, hidden[chunk])

    return step


def fused(inputs: Inputs, **options) -> Step:
    """Ours, 6F: the gradient is formed in the forward."""

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        targets, old, advantages = inputs.targets, inputs.old_logprobs, inputs.advantages
        return linear_policy_loss(hidden, weight, targets, old, advantages, objective=OBJECTIVE, **options).loss

    return differentiated(inputs, loss)


def batch_invariant(inputs: Inputs) -> Step:
    """Ours, 6F, with products in one fixed order."""
    return fused(inputs, batch_invariant=True)


def recompute(inputs: Inputs) -> Step:
    """Ours, 8F: differentiable log-probs, and the loss is the caller's own."""

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return mean_token_loss(linear_token_logprobs(hidden, weight, inputs.targets)[0], inputs)

    return differentiated(inputs, loss)


METHODS = {
    "gemms": Method(gemms, floor=True),
    "eager": Method(eager),
    "trl": Method(trl, package="trl"),
    "linear_policy_loss": Method(fused),
    "linear_token_logprobs": Method(recompute),
    "batch_invariant": Method(batch_invariant, gpu=True),
}
