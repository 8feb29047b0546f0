"""Means, extremes and counts over the rows of a batch: in PyTorch and, beside it, in Triton.

In the Triton functions, each lane of a program keeps a partial result of its own until the last block has been read.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.backends.rows import Field, Outcome
from drpo_kernels.triton_support import constants, jit, tl

_, ADVANTAGE, _, _, _, REF_LOGPROB, _, KIND, _ = constants(Field)
_, OUT_ENTROPY, OUT_LOGSUMEXP, _, OUT_SLOPE = constants(Outcome)

PREFIX = "drpo/"


class Metric(NamedTuple):
    """How a metric is formed over rows, and how the same metric of several batches is combined.

    how    key of REDUCE
    count  the metric that counts the rows (or, for several batches, weighs the batches) that this one is formed over
    """

    how: str
    count: str  # type: ignore[assignment]  # hides the method of tuples


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


# (values [..., M], counts [M]) -> [...]. A count says how many rows a value stands for; a bool says whether it is a row
# that counts. A value with a count of 0 may be anything.
REDUCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "max": lambda values, counts: _extreme(values, counts, largest=True),
    "min": lambda values, counts: _extreme(values, counts, largest=False),
    "sum": lambda values, counts: values.sum(-1),
}


def reduced(
    metrics: Mapping[str, Metric], values: Mapping[str, Tensor], flags: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Reduce values to 0-d metrics. Values and flags share one shape and are named like the metrics. Metrics that are
    formed in the same way are stacked and reduced together.
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for name, (how, count) in metrics.items():
        alike.setdefault((how, "" if how == "sum" else count), []).append(name)
    found: dict[str, Tensor] = {}
    for (how, count), names in alike.items():
        counted = flags[count].flatten() if count else None
        results = REDUCE[how](torch.stack([values[name] for name in names]).flatten(1), counted)  # type: ignore[arg-type]  # a sum counts nothing
        # Each metric gets memory of its own, because a trainer may change one of them in place.
        found |= dict(zip(names, torch.unbind_copy(results), strict=True))  # type: ignore  # PyTorch's stub of unbind_copy has no result
    return {PREFIX + name: found[name] for name in metrics}


@jit
def load_tokens(rows, rows_stride, outcome, outcome_stride, t, inside):
    """-> (log π, entropy, log μ, advantage, whether it was computed) of the tokens t, from their packed rows (`Field`)
    and from what the rows have reported (`Outcome`).
    """
    logp = tl.load(outcome + t, mask=inside, other=0.0)
    entropy = tl.load(outcome + outcome_stride * OUT_ENTROPY + t, mask=inside, other=0.0)
    old = tl.load(rows + t, mask=inside, other=0.0)
    old = tl.where(old == old, old, logp)  # on-policy
    advantage = tl.load(rows + rows_stride * ADVANTAGE + t, mask=inside, other=0.0)
    computed = tl.load(rows + rows_stride * KIND + t, mask=inside, other=0.0) > 0
    return logp, entropy, old, advantage, computed


@jit
def add(total, flag, value):
    return total + tl.where(flag, value, 0.0)


@jit
def mean(total, count):
    """The sum over all lanes, divided by count. The division rounds as IEEE's does, so that n / n is exactly 1."""
    return tl.div_rn(tl.sum(total, 0), tl.maximum(count, 1.0))


@jit
def larger(most, flag, value):
    """The larger of `most` and `value` where the flag is set, else `most`. A NaN stays once it has been seen."""
    return tl.where(flag & ((value > most) | (value != value)), value, most)


@jit
def largest(most, count):
    """The largest value of all lanes: NaN if one lane has a NaN, 0 if nothing was counted."""
    nans = tl.sum((most != most).to(tl.int32), 0)
    found = tl.where(nans > 0, float("nan"), tl.max(most, 0))  # pyright: ignore[reportOperatorIssue]
    return tl.where(count > 0, found, 0.0)
