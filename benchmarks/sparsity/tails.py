"""What may become of the probabilities that a sparse gradient leaves out: the ways to do it, in float64, side by side.

A row's exact dlogits are s (onehot - p). Every way keeps the target and the fewest other tokens S that leave out at
most τ (1 - p_y), and differs in what it puts in the place of the probabilities of the tokens outside S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness.method import OBJECTIVE
from benchmarks.harness.records import Record
from benchmarks.harness.workloads import Inputs
from drpo_kernels import Tokens
from drpo_kernels.backends.sparse.contract import entry_limit

DRAWS = 4  # of the sampled way
# Cut-cross-entropy skips a block of dlogits if all of them are below this epsilon, which is its default for bf16.
CCE_BLOCK, CCE_EPSILON = 128, 2**-12


@dataclass(frozen=True)
class Rows:
    """All in float64: p [T, V], 0 at the target; miss = 1 - p_y and slope, the gradient of log π_y, both [T, 1]."""

    p: Tensor
    miss: Tensor
    slope: Tensor
    targets: Tensor  # [T, 1]
    hidden: Tensor
    weight: Tensor

    @staticmethod
    def of(inputs: Inputs) -> Rows:
        hidden, weight, targets = inputs.hidden.double(), inputs.weight.double(), inputs.targets[:, None]
        logp = (hidden @ weight.T).log_softmax(-1)
        leaf = logp.gather(1, targets)[:, 0].requires_grad_()
        tokens = Tokens(leaf, inputs.old_logprobs.double(), inputs.advantages.double())
        (slope,) = torch.autograd.grad(OBJECTIVE.token_loss(tokens).mean(), leaf)
        p = logp.exp_().scatter_(1, targets, 0)
        return Rows(p, p.sum(1, keepdim=True), slope[:, None], targets, hidden, weight)

    def dlogits(self, p: Tensor) -> Tensor:
        """The gradient with `p` in the place of the rows' own; what `p` has at the target is added to the target's."""
        return self.slope * (-p).scatter_add(1, self.targets, self.miss)

    def kept(self, tolerance: float) -> Tensor:
        """Which tokens are in S, [T, V] bool; all, where they are more than the package takes."""
        order = self.p.argsort(1)
        dropped = self.p.gather(1, order).cumsum(1) <= tolerance * self.miss
        kept = torch.ones_like(dropped).scatter_(1, order, ~dropped).scatter_(1, self.targets, False)
        return kept | (kept.sum(1, keepdim=True) > entry_limit(kept.shape[1], "cpu"))

    def entries(self, kept: Tensor) -> float:
        """The mean size of S where it is not everything."""
        counts = kept.sum(1)
        return counts[counts <= entry_limit(kept.shape[1], "cpu")].double().mean().item()

    def tolerance_of(self, entries: float) -> float:
        """The τ with which S has about so many tokens on average."""
        low, high = 1e-5, 1.0
        for _ in range(10):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if self.entries(self.kept(middle)) < entries else (middle, high)
        return high


def with_common_mean(inputs: Inputs) -> Inputs:
    """Add one direction, as long as a row itself, to every row of the weight, as rows of trained heads share one. The
    logits of a row all rise alike, so that its probabilities stay.
    """
    shared = torch.ones(inputs.weight.shape[1]) / inputs.weight.shape[1] ** 0.5
    return replace(inputs, weight=inputs.weight + shared)


def _renormalised(rows: Rows, kept: Tensor, generator: torch.Generator) -> Tensor:
    p = rows.p * kept
    return p * (rows.miss / p.sum(1, keepdim=True))


def _spread(rows: Rows, kept: Tensor, generator: torch.Generator) -> Tensor:
    p = rows.p * kept
    return p + (rows.miss - p.sum(1, keepdim=True)) / p.shape[1]


def _sampled(rows: Rows, kept: Tensor, generator: torch.Generator) -> Tensor:
    """Outside S, draw about as many tokens as S has, each with probability min(1, p/θ); a drawn one has max(p, θ)."""
    rest, count = rows.p * ~kept, kept.sum(1, keepdim=True).clamp(min=1)
    threshold = rest.sum(1, keepdim=True) / count
    for _ in range(20):  # until the probabilities add up to that number
        threshold = threshold * ((rest / threshold).clamp(max=1).sum(1, keepdim=True) / count)
    chance = (rest / threshold).clamp(max=1).nan_to_num(0)
    drawn = torch.rand(chance.shape, generator=generator, dtype=chance.dtype) < chance
    return rows.p * kept + torch.where(drawn, rest.maximum(threshold), 0)


WAYS: dict[str, Callable[[Rows, Tensor, torch.Generator], Tensor]] = {
    "dropped": lambda rows, kept, generator: rows.p * kept,
    "renormalised": _renormalised,
    "spread": _spread,
    "sampled": _sampled,
}


def compare(inputs: Inputs, tolerance: float) -> Iterator[Record]:
    """A record per way: its relative errors of dX, of dW and of the rows of dW that are no target's, and mean |S|."""
    rows = Rows.of(inputs)
    exact, kept = rows.dlogits(rows.p), rows.kept(tolerance)
    dx, dw = exact @ rows.weight, exact.T @ rows.hidden
    rare = torch.ones(len(dw), dtype=torch.bool).index_fill_(0, inputs.targets, False)

    def errors(found: Tensor) -> dict[str, float]:
        difference = found - exact
        lost = difference.T @ rows.hidden
        sizes = {"hidden": (difference @ rows.weight, dx), "weight": (lost, dw), "rare": (lost[rare], dw[rare])}
        return {name: (error.norm() / want.norm()).item() for name, (error, want) in sizes.items()}

    def of_way(name: str, kept: Tensor) -> dict[str, float]:
        generator, draws = torch.Generator().manual_seed(0), DRAWS if name == "sampled" else 1
        found = [errors(rows.dlogits(WAYS[name](rows, kept, generator))) for _ in range(draws)]
        return {quantity: math.sqrt(sum(f[quantity] ** 2 for f in found) / draws) for quantity in found[0]}

    yield {"way": "rounded", "errors": errors(exact.to(torch.bfloat16).double())}
    entries = rows.entries(kept)
    for name in WAYS:
        yield {"way": name, "entries": entries * (1 + (name == "sampled")), "errors": of_way(name, kept)}
    twice = rows.kept(rows.tolerance_of(2 * entries))
    yield {"way": "spread_twice", "entries": rows.entries(twice), "errors": of_way("spread", twice)}
    filtered, blocks = cce_filter(rows)
    yield {"way": "cce", "blocks": blocks, "errors": errors(exact * filtered)}


def cce_filter(rows: Rows) -> tuple[Tensor, float]:
    """(which dlogits cut-cross-entropy's default filter keeps [T, V], the share of its blocks). It sorts columns by
    their mean logits, and skips a block where |onehot - p| is below its epsilon everywhere.
    """
    count, vocab = rows.p.shape
    order = (rows.hidden.mean(0) @ rows.weight.T).argsort()
    size = rows.p.scatter(1, rows.targets, rows.miss)[:, order]
    pad = (0, -vocab % CCE_BLOCK, 0, -count % CCE_BLOCK)
    blocks = torch.nn.functional.pad(size, pad).unflatten(1, (-1, CCE_BLOCK)).unflatten(0, (-1, CCE_BLOCK))
    kept = blocks.amax((1, 3), keepdim=True) >= CCE_EPSILON
    whole = kept.expand_as(blocks).flatten(2).flatten(0, 1)[:count, :vocab]
    return torch.empty_like(whole).index_copy_(1, order, whole), kept.double().mean().item()
