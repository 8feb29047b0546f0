"""Inputs whose rows have given entropies: this is what a policy's tokens look like, from decided to open.

A row's hidden state is noise, which gives its logits a standard deviation of `spread`, plus a pull to its target's row
of the weight, as strong as the entropy needs. A row more open than its noise alone allows has less noise and no pull.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SPREAD = 8.0  # standard deviation of the logits; that of the trained-looking inputs is 7.5
MOST = 200.0  # a stronger pull than any that is needed
# number of logits held at a time
BLOCK = 1 << 24


@dataclass(frozen=True)
class Mix:
    """knots   (share of the rows below, nats), interpolated in the logarithm of the nats"""

    label: str
    knots: tuple[tuple[float, float], ...]
    spread: float = SPREAD

    def entropies(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw entropies [count] in nats."""
        shares, nats = torch.tensor(self.knots, device=generator.device).T.contiguous()
        share = torch.rand(count, generator=generator, device=generator.device)
        upper = torch.searchsorted(shares, share, right=True).clamp(1, len(shares) - 1)
        low, high = shares[upper - 1], shares[upper]
        return torch.lerp(nats[upper - 1].log(), nats[upper].log(), (share - low) / (high - low)).exp()


def _constant(nats: float) -> Mix:
    return Mix(f"{nats:g} nat", ((0, nats), (1, nats)))


MIXED = ((0, 1e-3), (0.55, 0.1), (0.8, 0.7), (1, 3))
MIXES = {
    "mixed": Mix("mixed entropies", MIXED),
    # Wang et al., "Beyond the 80/20 rule", arXiv 2506.01939: of a million tokens of Qwen3-8B's chains of thought over
    # half are below 0.01 nat and 80 % below 0.672. Where they begin and end is our choice
    "reasoning": Mix("entropies of a reasoning model", ((0, 1e-4), (0.5, 1e-2), (0.8, 0.672), (1, 3))),
    "mixed_6": Mix("mixed entropies, logits of spread 6", MIXED, 6.0),
    "mixed_4": Mix("mixed entropies, logits of spread 4", MIXED, 4.0),
    **{f"nats_{nats:g}": _constant(nats) for nats in (0.05, 0.3, 1.0, 3.0)},
}


def entropy_of(logits: Tensor) -> Tensor:
    """Return the entropy of every row, in nats."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def least(low: Tensor, high: Tensor, too_low: Callable[[Tensor], Tensor], steps: int = 40) -> Tensor:
    """Find the least value between two that is not too low, by bisection and entry by entry."""
    for _ in range(steps):
        middle = (low + high) / 2
        below = too_low(middle)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def hidden_states(noise: Tensor, weight: Tensor, targets: Tensor, nats: Tensor, spread: float) -> Tensor:
    """Return hidden states [T, H] from noise [T, H] of unit variance, weight [V, H] with rows of unit length, targets
    [T] and entropies [T] in nats.
    """
    step = max(BLOCK // weight.shape[0], 1)
    parts = zip(noise.split(step), targets.split(step), nats.split(step), strict=True)
    return torch.cat([_block(spread * part, weight, weight[rows], wanted) for part, rows, wanted in parts])


def _block(noise: Tensor, weight: Tensor, aim: Tensor, nats: Tensor) -> Tensor:
    base, lift = noise @ weight.T, aim @ weight.T

    def mixed(level: Tensor, noise: Tensor, aim: Tensor) -> Tensor:
        """Mix a row's noise and aim. Level -1 is flat, 0 is the noise alone, and above it the aim is added so many
        times.
        """
        return ((1 + level).clamp(0, 1)[:, None] * noise).addcmul_(level.clamp(min=0)[:, None], aim)

    low, high = torch.full_like(nats, -1.0), torch.full_like(nats, MOST)
    level = least(low, high, lambda level: entropy_of(mixed(level, base, lift)) > nats)
    return mixed(level, noise, aim)


def quantiles(entropies: Tensor, at: Sequence[float] = (0.5, 0.8, 1.0)) -> list[float]:
    return [round(x, 4) for x in torch.quantile(entropies.float(), torch.tensor(at, device=entropies.device)).tolist()]
