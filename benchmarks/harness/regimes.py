"""Regimes are inputs on which a numerical recipe may fail, with their exact results and ours.

One of them is recorded from a real model, and all others are made from a seed.

Hidden states and weight are bfloat16, as a model's are. Every recipe starts from these values, and a result is exact if
it is that of these values in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import exact
from benchmarks.harness.method import sparsity_of
from benchmarks.harness.mixes import entropy_of, least
from benchmarks.harness.workloads import KINDS, MODELS, Inputs, Shape, make_inputs, peaked, zipf
from drpo_kernels import DRPO, linear_policy_loss, policy_loss
from drpo_kernels.objectives import Objective

OBJECTIVE = DRPO(delta=0.2)
ENTROPY = 0.3  # mean entropy of the trained-looking regimes, in nats
MISS = 1e-7  # 1 - p of the peaked regime
RARE = 1e-6  # μ of the regime with rare targets
OFFSET = 1e4  # what the regimes with large logits add to each of them
SPREAD = 2.5  # standard deviation of the logits of the moderate regime
NOISE = 0.2  # standard deviation of log μ - log π, in nats


class Result(NamedTuple):
    """logprobs [T], the mean token loss, its gradients [T, H] and [V, H]; None for what a recipe does not compute."""

    logprobs: Tensor | None
    loss: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    sparsity: dict[str, float] | None = None  # what `sparse_grad` reports


class Exact(NamedTuple):
    """A result in float64, and what an error is measured against."""

    result: Result
    loss_scale: float  # the sum of |term of the loss| over the tokens
    largest_logit: float
    largest_sum: float  # the largest sum of |products| and |bias| of a logit
    entropy: float


def exact_result(
    case: Inputs, operands: tuple[Tensor, Tensor] | None = None, objective: Objective = OBJECTIVE
) -> Exact:
    """Return the exact result in float64; `operands` as in `exact.head`."""
    logprobs, terms, dx, dw = exact.head(case, operands, objective)
    hidden, weight = (x.double() for x in operands or (case.hidden, case.weight))
    bias = 0.0 if case.bias is None else case.bias.double().abs()
    largest = largest_sum = entropy = 0.0
    for rows in exact.blocks(case):
        logits = case.product(hidden[rows], weight)
        entropy += entropy_of(case.scaled(logits)).sum().item() / len(hidden)
        largest = max(largest, logits.abs().max().item())
        largest_sum = max(largest_sum, (hidden[rows].abs() @ weight.abs().T + bias).max().item())
    return Exact(Result(logprobs, terms.sum(), dx, dw), terms.abs().sum().item(), largest, largest_sum, entropy)


def ours(case: Inputs, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, **options) -> Result:
    """Run `linear_policy_loss` on inputs of this dtype. Gradients are those of `scale` times the loss, divided by it in
    float64.
    """
    leaves = [x.detach().to(dtype).requires_grad_() for x in (case.hidden, case.weight)]
    out = linear_policy_loss(
        *leaves, case.targets, case.old_logprobs, case.advantages, objective=OBJECTIVE, **case.transform, **options
    )
    gradients = torch.autograd.grad(out.loss * scale, leaves)
    sparsity = {name: value.item() for name, value in sparsity_of(out.metrics).items()}
    return Result(
        out.logprobs, out.loss.detach(), *(g if scale == 1 else g.double() / scale for g in gradients), sparsity
    )


def bf16_dlogits(case: Inputs, logits: Tensor | None = None) -> tuple[Result, Tensor]:
    """Return (the result without gradients, dlogits rounded to bf16) from float32 logits, by
    default those of the case.
    """
    leaf = (case.product(case.hidden.float(), case.weight.float()) if logits is None else logits).requires_grad_()
    out = policy_loss(
        leaf, case.targets, case.old_logprobs, case.advantages, objective=OBJECTIVE, temperature=case.temperature,
        softcap=case.softcap,
    )  # fmt: skip
    return Result(out.logprobs, out.loss.detach()), torch.autograd.grad(out.loss, leaf)[0].bfloat16()


# --- the regimes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regime:
    """make   (shape, generator) -> (hidden, weight, targets), the first two in float32
    shape  what the regime needs where the study's own shape does not fit
    rare   True: the targets are tokens of a probability near RARE
    bias   added to every logit
    """

    label: str
    make: Callable[[Shape, torch.Generator], tuple[Tensor, Tensor, Tensor]]
    temperature: float = 1.0
    softcap: float | None = None
    shape: Shape | None = None
    rare: bool = False
    bias: float | None = None

    def case(self, shape: Shape, seed: int = 0, device: torch.device | str = "cpu") -> Inputs:
        """Return inputs drawn by the device's own generator."""
        with torch.device(device):
            return self._drawn(shape, torch.Generator(device).manual_seed(seed))

    def _drawn(self, shape: Shape, generator: torch.Generator) -> Inputs:
        hidden, weight, targets = self.make(shape, generator)
        blank = torch.zeros(shape.tokens)
        bias = None if self.bias is None else torch.full((shape.vocab,), self.bias, dtype=torch.bfloat16)
        case = Inputs(
            hidden.bfloat16(), weight.bfloat16(), targets, blank, blank,
            temperature=self.temperature, softcap=self.softcap, bias=bias,
        )  # fmt: skip
        # The bias shifts all logits of a row alike, which leaves the log-probs as they are.
        logp = case.scaled(case.hidden.double() @ case.weight.double().T).log_softmax(-1)
        if self.rare:
            targets = (logp - math.log(RARE)).abs().argmin(-1)
        chosen = logp.gather(1, targets[:, None])[:, 0]
        old = chosen + NOISE * torch.randn(shape.tokens, generator=generator)
        advantages = torch.randn(shape.tokens, generator=generator)
        # A log-prob is at most 0. Where the noise leads beyond, it scales the log-prob instead.
        old = torch.where(old < 0, old, chosen * torch.rand(shape.tokens, generator=generator) * 2)
        return dataclasses.replace(case, targets=targets, old_logprobs=old.float(), advantages=advantages)


@dataclass(frozen=True)
class Real:
    """Tokens of a real model, which has a shape of its own: a `Regime` that is recorded and not drawn."""

    label: str
    shape: Shape

    def case(self, shape: Shape, seed: int = 0, device: torch.device | str = "cpu") -> Inputs:
        return make_inputs("real", shape, seed, dtype=torch.bfloat16, device=device)


def _weight(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape.vocab, shape.hidden, generator=generator) / shape.hidden**0.5


def random(shape: Shape, generator: torch.Generator, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    weight = _weight(shape, generator)
    hidden = scale * torch.randn(shape.tokens, shape.hidden, generator=generator)
    return hidden, weight, torch.randint(shape.vocab, (shape.tokens,), generator=generator)


def trained(shape: Shape, generator: torch.Generator, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    weight, targets = _weight(shape, generator), zipf(shape, generator)
    hidden = torch.randn(shape.tokens, shape.hidden, generator=generator)
    return scale * peaked(hidden, weight, targets, generator, ENTROPY), weight, targets


def moderate(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Make logits like a language model's: they have a standard deviation of SPREAD over the vocabulary, and targets
    stand out to different degrees, so far that the mean entropy is ENTROPY.
    """
    weight, targets = _weight(shape, generator), zipf(shape, generator)
    noise = SPREAD * torch.randn(shape.tokens, shape.hidden, generator=generator)
    pull = (0.5 + torch.rand(shape.tokens, 1, generator=generator)) * weight[targets]
    base, lift = noise @ weight.T, pull @ weight.T
    level = least(torch.tensor(0.0), torch.tensor(100.0), lambda x: entropy_of(base + x * lift).mean() > ENTROPY)
    return noise + level * pull, weight, targets


def certain(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Make hidden states along their targets' rows of the weight, each so long that its target has p = 1 - MISS."""
    weight, targets = _weight(shape, generator), zipf(shape, generator)
    aim = weight[targets] + 0.1 * torch.randn(shape.tokens, shape.hidden, generator=generator) / shape.hidden**0.5
    logits = (aim @ weight.T).double()
    low, high = torch.zeros(shape.tokens, 1).double(), torch.full((shape.tokens, 1), 1e3).double()

    def uncertain(length: Tensor) -> Tensor:
        return -torch.expm1((length * logits).log_softmax(-1).gather(1, targets[:, None])) > MISS

    return (least(low, high, uncertain, 50) * aim).float(), weight, targets


def offset(shape: Shape, generator: torch.Generator, by: float, make=trained) -> tuple[Tensor, Tensor, Tensor]:
    """Make inputs in which one channel adds about `by` to every logit: an outlier of hidden times one of the weight."""
    hidden, weight, targets = make(shape, generator)
    channel = torch.tensor(abs(by)).sqrt().bfloat16().float()
    hidden[:, 0], weight[:, 0] = channel, math.copysign(channel, by)
    return hidden, weight, targets


REGIMES: dict[str, Regime | Real] = {
    "random": Regime("random", random),
    "trained": Regime("trained-looking, large logits", trained),
    "moderate": Regime("trained-looking", moderate),
    "peaked": Regime("p = 1 - 1e-7", certain),
    "flat": Regime("flat", lambda shape, g: random(shape, g, 1e-3)),
    "rare": Regime("rare targets, μ = 1e-6", trained, rare=True),
    "bias+1e4": Regime("logits + 1e4 (bias)", trained, bias=OFFSET),
    "bias-1e4": Regime("logits - 1e4 (bias)", trained, bias=-OFFSET),
    "outlier+1e4": Regime("logits + 1e4 (outlier channel)", lambda shape, g: offset(shape, g, OFFSET)),
    "outlier-1e4": Regime("logits - 1e4 (outlier channel)", lambda shape, g: offset(shape, g, -OFFSET)),
    "softcap": Regime("soft-capped at 30", lambda shape, g: trained(shape, g, 2.0), softcap=30.0),
    "temperature0.1": Regime("temperature 0.1", random, temperature=0.1),
    "temperature10": Regime("temperature 10", trained, temperature=10.0),
    "H8192": Regime("H = 8192", trained, shape=Shape(32, 8192, 1024)),
    "V151936": Regime("V = 151936", trained, shape=Shape(16, 64, 151_936)),
}
# What is run unless it is asked for something else: the real regime has files of its own.
SYNTHETIC = tuple(REGIMES)
REGIMES["real"] = Real(KINDS["real"], Shape(512, MODELS["SmolLM2-135M"].hidden, MODELS["SmolLM2-135M"].vocab))
