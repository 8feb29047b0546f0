"""Regimes of the precision study: the distributions on which a recipe may fail, each made once from a seed.

hidden and weight are bfloat16, as a model's are: every recipe starts from the same values, and the exact result is that
of these values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.workloads import Shape, peaked, zipf
from drpo_kernels import DRPO, Tokens
from drpo_kernels.objectives import Objective

OBJECTIVE = DRPO(delta=0.2)
ENTROPY = 0.3  # of the trained-looking regimes, in nats
MISS = 1e-7  # 1 - p of the peaked regime
RARE = 1e-6  # μ of the long-tailed one
OFFSET = 1e4
SPREAD = 2.5  # standard deviation of the logits of the moderate regime
NOISE = 0.2  # of log μ around log π, in nats
ROWS = 256  # float64 logits at a time


@dataclass(frozen=True)
class Case:
    """hidden [T, H], weight [V, H] and bias [V] or None in bf16; targets [T]; old_logprobs, advantages [T] in fp32."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    temperature: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None

    @property
    def transform(self) -> dict:
        """How hidden @ weight.T becomes z, as keywords of the linear functions."""
        return {"temperature": self.temperature, "softcap": self.softcap, "bias": self.bias}

    def biased(self, logits: Tensor) -> Tensor:
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def scaled(self, logits: Tensor) -> Tensor:
        """z = softcap(logits) / temperature, in the dtype of the logits."""
        z = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return z / self.temperature


class Operands(NamedTuple):
    """What a recipe multiplies, [T, H] and [V, H] in float64: for the logits, and for the gradients."""

    hidden: Tensor
    weight: Tensor
    gradient_hidden: Tensor
    gradient_weight: Tensor


class Result(NamedTuple):
    """logprobs [T], the mean token loss, its gradients [T, H] and [V, H]; None for what a peer does not report."""

    logprobs: Tensor | None
    loss: Tensor
    hidden: Tensor | None
    weight: Tensor | None


class Exact(NamedTuple):
    """A result in float64, and what an error is measured against."""

    result: Result
    loss_scale: float  # Σ |terms of the loss|
    largest_logit: float
    largest_sum: float  # of the absolute products of a logit, with the bias
    entropy: float


def exact_result(case: Case, operands: Operands, objective: Objective = OBJECTIVE) -> Exact:
    """Everything in float64, in blocks of rows, from the formulas."""
    hidden, weight, gradient_hidden, gradient_weight = operands
    count = hidden.shape[0]
    logprobs, terms = hidden.new_empty(count), hidden.new_empty(count)
    dx, dw = torch.empty_like(hidden), torch.zeros_like(weight)
    largest = largest_sum = entropy = 0.0
    for rows in (slice(start, start + ROWS) for start in range(0, count, ROWS)):
        logits = case.biased(hidden[rows] @ weight.T)
        largest = max(largest, logits.abs().max().item())
        bias = 0.0 if case.bias is None else case.bias.double().abs()
        largest_sum = max(largest_sum, (hidden[rows].abs() @ weight.abs().T + bias).max().item())
        logp = case.scaled(logits).log_softmax(-1)
        target = case.targets[rows, None]
        leaf = logp.gather(1, target)[:, 0].requires_grad_()
        tokens = Tokens(leaf, case.old_logprobs[rows].double(), case.advantages[rows].double())
        terms[rows] = objective.token_loss(tokens) / count
        slope = torch.autograd.grad(objective.token_loss(tokens).sum() / count, leaf)[0]
        logprobs[rows] = leaf.detach()
        p = logp.exp()
        entropy -= (p * logp).sum().item() / count
        dlogits = p.neg_().scatter_(1, target, -torch.expm1(leaf.detach())[:, None]).mul_(slope[:, None])
        if case.softcap is not None:
            dlogits *= 1 - torch.tanh(logits / case.softcap) ** 2
        dlogits /= case.temperature
        dx[rows] = dlogits @ gradient_weight
        dw += dlogits.T @ gradient_hidden[rows]
    terms = terms.detach()
    return Exact(Result(logprobs, terms.sum(), dx, dw), terms.abs().sum().item(), largest, largest_sum, entropy)


# --- the regimes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regime:
    """make   (shape, generator) -> (hidden, weight, targets) in float32
    shape  its own shape where the study's does not fit
    """

    label: str
    make: Callable[[Shape, torch.Generator], tuple[Tensor, Tensor, Tensor]]
    temperature: float = 1.0
    softcap: float | None = None
    shape: Shape | None = None
    rare: bool = False  # targets of probability RARE in place of the likely ones
    bias: float | None = None  # on every logit

    def case(self, shape: Shape, seed: int = 0, device: torch.device | str = "cpu") -> Case:
        """Drawn by the device's own generator."""
        with torch.device(device):
            return self._drawn(shape, torch.Generator(device).manual_seed(seed))

    def _drawn(self, shape: Shape, generator: torch.Generator) -> Case:
        hidden, weight, targets = self.make(shape, generator)
        blank = torch.zeros(shape.tokens)
        bias = None if self.bias is None else torch.full((shape.vocab,), self.bias, dtype=torch.bfloat16)
        operands = hidden.bfloat16(), weight.bfloat16()
        case = Case(*operands, targets, blank, blank, self.temperature, self.softcap, bias)
        logp = case.scaled(operands[0].double() @ operands[1].double().T).log_softmax(-1)
        if self.rare:
            targets = (logp - math.log(RARE)).abs().argmin(-1)
        old = logp.gather(1, targets[:, None])[:, 0] + NOISE * torch.randn(shape.tokens, generator=generator)
        advantages = torch.randn(shape.tokens, generator=generator)
        # on a peaked row the noise is of 1 - p
        certain = logp.gather(1, targets[:, None])[:, 0] * torch.rand(shape.tokens, generator=generator) * 2
        old = torch.where(old < 0, old, certain)
        return dataclasses.replace(case, targets=targets, old_logprobs=old.float(), advantages=advantages)


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
    """Logits as a language model's: a spread of SPREAD over the vocabulary, and targets that stand out to different
    degrees, on average as far as gives the entropy.
    """
    weight, targets = _weight(shape, generator), zipf(shape, generator)
    noise = SPREAD * torch.randn(shape.tokens, shape.hidden, generator=generator)
    pull = (0.5 + torch.rand(shape.tokens, 1, generator=generator)) * weight[targets]
    base, lift = noise @ weight.T, pull @ weight.T
    low, high = 0.0, 100.0
    for _ in range(40):
        level = (low + high) / 2
        nats = torch.distributions.Categorical(logits=base + level * lift).entropy().mean()
        low, high = (level, high) if nats > ENTROPY else (low, level)
    return noise + high * pull, weight, targets


def certain(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states along their targets' rows, each as long as gives p = 1 - MISS."""
    weight, targets = _weight(shape, generator), zipf(shape, generator)
    aim = weight[targets] + 0.1 * torch.randn(shape.tokens, shape.hidden, generator=generator) / shape.hidden**0.5
    logits = (aim @ weight.T).double()
    low, high = torch.zeros(shape.tokens, 1).double(), torch.full((shape.tokens, 1), 1e3).double()
    for _ in range(50):
        middle = (low + high) / 2
        logp = (middle * logits).log_softmax(-1).gather(1, targets[:, None])
        short = -torch.expm1(logp) > MISS
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (high * aim).float(), weight, targets


def offset(shape: Shape, generator: torch.Generator, by: float, make=trained) -> tuple[Tensor, Tensor, Tensor]:
    """One channel adds about `by` to every logit: an outlier of hidden times one of the weight."""
    hidden, weight, targets = make(shape, generator)
    channel = torch.tensor(abs(by)).sqrt().bfloat16().float()
    hidden[:, 0], weight[:, 0] = channel, math.copysign(channel, by)
    return hidden, weight, targets


REGIMES = {
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
