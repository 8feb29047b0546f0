"""Shapes and inputs, made once from a seed: random ones, and ones that look like a trained model's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from drpo_kernels import linear_token_logprobs

KINDS = ("random", "trained")
# of a trained model on its own samples: most tokens are certain, a few are not
TRAINED_ENTROPY = 0.5
# rows on which the trained-looking inputs are calibrated
SAMPLE = 256


@dataclass(frozen=True)
class Shape:
    """tokens T, hidden size H, vocabulary V."""

    tokens: int
    hidden: int
    vocab: int


@dataclass(frozen=True)
class Inputs:
    """hidden [T, H], weight [V, H], targets [T], old_logprobs [T], advantages [T]; `entropy` is the mean, in nats."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    entropy: float

    def with_active_share(self, share: float) -> Inputs:
        """A = 0 in all rows but a share of them, scattered as the completions of a batch are."""
        count = self.advantages.numel()
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
        advantages = self.advantages.clone()
        advantages[order[round(share * count) :]] = 0
        return dataclasses.replace(self, advantages=advantages)

    def save(self, path: Path) -> None:
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> Inputs:
        return cls(**torch.load(path))


def make_inputs(kind: str, shape: Shape, seed: int = 0) -> Inputs:
    """Inputs of one of `KINDS`, float32 on the CPU; the behaviour policy is the current one with noise of 0.2 nat."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape.vocab, shape.hidden, generator=generator) / shape.hidden**0.5
    hidden = torch.randn(shape.tokens, shape.hidden, generator=generator)
    if kind == "random":
        targets = torch.randint(shape.vocab, (shape.tokens,), generator=generator)
    else:
        targets = zipf(shape, generator)
        hidden = peaked(hidden, weight, targets, generator)
    with torch.no_grad():
        logprobs, entropy = linear_token_logprobs(hidden, weight, targets)
    noise = 0.2 * torch.randn(shape.tokens, generator=generator)
    advantages = torch.randn(shape.tokens, generator=generator)
    return Inputs(hidden, weight, targets, (logprobs + noise).clamp(max=0), advantages, entropy.mean().item())


def zipf(shape: Shape, generator: torch.Generator) -> Tensor:
    """Token ranks with p ∝ 1 / (rank + 2.7), Mandelbrot's fit to natural language."""
    weights = 1 / (torch.arange(1, shape.vocab + 1) + 2.7)
    return torch.multinomial(weights, shape.tokens, replacement=True, generator=generator)


def peaked(
    hidden: Tensor, weight: Tensor, targets: Tensor, generator: torch.Generator, nats: float = TRAINED_ENTROPY
) -> Tensor:
    """Hidden states pulled towards their targets' rows to different degrees, scaled to a mean entropy of `nats`."""
    pull = 2 + 8 * torch.rand(hidden.shape[0], 1, generator=generator)
    hidden = hidden + pull * weight[targets]
    logits = hidden[:SAMPLE] @ weight.T
    low, high = 0.0, 100.0
    for _ in range(30):  # the entropy falls as the scale rises
        scale = (low + high) / 2
        entropy = torch.distributions.Categorical(logits=scale * logits).entropy().mean()
        low, high = (scale, high) if entropy > nats else (low, scale)
    return high * hidden
