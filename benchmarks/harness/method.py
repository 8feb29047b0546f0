"""What an implementation is to the benchmark: the contract between `methods`, `peers` and `measure`.

A method is a function that takes `Inputs` and returns a step; a step runs one forward and backward and returns a
`Result`. An adapter:

    def theirs(inputs: Inputs) -> Step:
        from some_package import fused_logprobs  # imported here: absent, the method is a row that says so

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            return mean_token_loss(fused_logprobs(hidden, weight, inputs.targets, softcap=inputs.softcap), inputs)

        return differentiated(inputs, loss)

    PEERS = {"theirs": Method(theirs, "their head", package="some_package", rounds="bf16 logits")}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.workloads import Inputs
from drpo_kernels import DRPO, Tokens

OBJECTIVE = DRPO()
# The inputs' tensors by which a step differentiates.
HEAD, FROZEN_HEAD, LOGITS = ("hidden", "weight"), ("hidden",), ("logits",)
DTYPES = ("float32", "bfloat16")


class Unsupported(Exception):
    """`prepare` raises this where the implementation has no such feature. The message becomes the row's status."""


class Result(NamedTuple):
    """The loss, 0-d, and its gradients: [T, H], [V, H], [T, V]; None where the method does not differentiate.

    metrics   what the method reports of itself and the record should say, 0-d each
    """

    loss: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    logits: Tensor | None = None
    metrics: dict[str, Tensor] | None = None


Step = Callable[[], Result | None]


@dataclass(frozen=True)
class Method:
    """prepare    inputs -> one forward and backward; a floor's returns None. ModuleNotFoundError of `package` and
               `Unsupported` become the row's status
    label      what tables call it
    wrt        what it differentiates: HEAD, FROZEN_HEAD (the weight needs no gradient: 4F) or LOGITS
    package    the module that a peer needs installed, or None for what comes with this repository
    held_to    the floor whose work it cannot avoid. None makes it a floor itself: bare work with no loss, so that there
               is nothing to compare and no memory to measure
    gpu        True: it has compiled GPU kernels only, so that on a CPU it is a row without numbers
    same_loss  False: "same cost, other loss": the mean of -log π over all rows, whose gradient is compared with the
               exact one of that loss
    rounds     None: its gradients must be exact to `exact.TOLERANCE`. Else what it rounds away, in a few words ("bf16
               logits", "gradient filter"): up to `exact.LARGEST` its error is recorded and shown, not refused
    dtypes     of `DTYPES`, those it takes
    reuses     those of `wrt` whose gradient is written into memory that it was given: not part of its peak
    """

    prepare: Callable[[Inputs], Step]
    label: str = ""
    wrt: tuple[str, ...] = HEAD
    package: str | None = None
    held_to: str | None = "gemms_whole"
    gpu: bool = False
    same_loss: bool = True
    rounds: str | None = None
    dtypes: tuple[str, ...] = DTYPES
    reuses: tuple[str, ...] = ()

    @property
    def floor(self) -> bool:
        return self.held_to is None

    @property
    def takes(self) -> str:
        """What the method starts from: "hidden" or "logits"."""
        return "logits" if self.wrt == LOGITS else "hidden"


def sparsity_of(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the metrics that tell what `sparse_grad` did."""
    return {name: value for name, value in metrics.items() if "sparse" in name or "left_out" in name}


def mean_token_loss(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """Return Σ_t ℓ_t / T of the log-probs [T] of the targets; rows with A = 0 count in T."""
    return OBJECTIVE.token_loss(Tokens(logprobs, inputs.old_logprobs, inputs.advantages)).mean()


def differentiated(inputs: Inputs, loss: Callable[..., Tensor], wrt: tuple[str, ...] = HEAD) -> Step:
    """Return a step from a function of the tensors named by `wrt`, in that order, to a 0-d loss."""

    def step() -> Result:
        leaves = [getattr(inputs, name).detach().requires_grad_() for name in wrt]
        value = loss(*leaves)
        gradients = torch.autograd.grad(value, leaves)
        return Result(value.detach(), **dict(zip(wrt, gradients, strict=True)))

    return step


def without_softcap(inputs: Inputs) -> None:
    if inputs.softcap is not None:
        raise Unsupported("no soft-cap")
