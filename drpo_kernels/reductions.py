"""How metrics are formed over the rows of a batch, in PyTorch and, beside it, by Triton lanes."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.triton_support import jit, tl

PREFIX = "drpo/"


class Metric(NamedTuple):
    """How a metric is formed over rows, and from the same metric of several batches: by a function of REDUCE over the
    rows (or the batches) that `count`, itself a metric, counts.
    """

    how: str
    count: str


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    if counts.dtype == torch.bool:
        return values.masked_fill(~counts, 0).sum(-1) / counts.sum(-1).clamp(min=1)
    return torch.where(counts > 0, values * counts, 0).sum(-1) / counts.sum(-1).clamp(min=1)


def _extreme(values: Tensor, counts: Tensor, largest: bool) -> Tensor:
    if not values.numel():
        return values.new_zeros(values.shape[:-1])
    nothing = counts == 0
    bound = values.masked_fill(nothing, -torch.inf if largest else torch.inf)
    bound = bound.amax(-1) if largest else bound.amin(-1)
    return bound.masked_fill(nothing.all(-1), 0)


# (values [..., M], how many rows each stands for [M], or bool) -> [...]; what stands for no row may be anything
REDUCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "max": lambda values, counts: _extreme(values, counts, largest=True),
    "min": lambda values, counts: _extreme(values, counts, largest=False),
    "sum": lambda values, counts: values.sum(-1),
}


def reduced(
    metrics: Mapping[str, Metric], values: Mapping[str, Tensor], flags: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Values and flags, of one shape, under the metrics' names -> 0-d: one reduction for all that are formed alike."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, (how, count) in metrics.items():
        alike.setdefault((how, "" if how == "sum" else count), []).append(name)
    found = {}
    for (how, count), names in alike.items():
        counted = flags[count].flatten() if count else None
        results = REDUCE[how](torch.stack([values[name] for name in names]).flatten(1), counted)
        # each of its own: a trainer may change one in place, and autograd does not take it for a view of the others
        found |= dict(zip(names, torch.unbind_copy(results), strict=True))
    return {PREFIX + name: found[name] for name in metrics}


@jit
def add(total, flag, value):
    return total + tl.where(flag, value, 0.0)


@jit
def mean(total, count):
    """Of all lanes, rounded as IEEE's division is: n times 1 over n is 1."""
    return tl.div_rn(tl.sum(total, 0), tl.maximum(count, 1.0))


@jit
def larger(most, flag, value):
    """The larger of the two where the flag is set; a NaN, once seen, stays."""
    return tl.where(flag & ((value > most) | (value != value)), value, most)


@jit
def largest(most, count):
    """Of all lanes, 0 where nothing was counted; a NaN in one is the result."""
    found = tl.where(tl.sum((most != most).to(tl.int32), 0) > 0, float("nan"), tl.max(most, 0))
    return tl.where(count > 0, found, 0.0)
