"""What a dashboard needs to see trouble coming: 0-d detached tensors computed from the per-row outcome, for any
objective.

The gradient weight is w = (dℓ/dlogπ) / (-A r): 1 for an unregularised surrogate, 0 where a loss drops a token, negative
where it pushes back.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.objectives import Objective
from drpo_kernels.tokens import Tokens

# w of a token that an objective left alone differs from 1 by rounding only
UNCLIPPED = 1 - 1e-5
PREFIX = "drpo/"
# nats: a token this far below its old log-prob was hardly scored on the text it was sampled from
FAR_BELOW = 5.0


class Metric(NamedTuple):
    """How a metric is formed over rows, and from the same metric of several batches: by a function of REDUCE over the
    rows (or the batches) that `count`, itself a metric, counts.
    """

    how: str
    count: str


METRICS = {
    "ratio_mean": Metric("mean", "computed"),
    "ratio_max": Metric("max", "computed"),
    "kl_k1": Metric("mean", "computed"),
    "kl_k3": Metric("mean", "computed"),
    "prob_shift_mean": Metric("mean", "computed"),
    "prob_shift_max": Metric("max", "computed"),
    "weight_mean": Metric("mean", "weighted"),
    "weight_min": Metric("min", "weighted"),
    "weight_max": Metric("max", "weighted"),
    "beyond_trust_region": Metric("mean", "weighted"),
    "clip_share": Metric("mean", "weighted"),
    "entropy_mean": Metric("mean", "computed"),
    "logprob_mean": Metric("mean", "computed"),
    "old_logprob_max": Metric("max", "computed"),
    "far_below_share": Metric("mean", "computed"),
    "active_share": Metric("mean", "tokens"),
    "unscorable": Metric("sum", "unscorable"),
    "nonfinite": Metric("sum", "nonfinite"),
    "tokens": Metric("sum", "tokens"),
    "computed": Metric("sum", "computed"),
    "weighted": Metric("sum", "weighted"),
}
# what `sparse_grad` adds to them
SPARSITY_METRICS = {
    "sparse_share": Metric("mean", "with_gradient"),
    "sparse_entries": Metric("mean", "sparse_rows"),
    "left_out_mean": Metric("mean", "sparse_rows"),
    "left_out_share_max": Metric("max", "sparse_rows"),
    "with_gradient": Metric("sum", "with_gradient"),
    "sparse_rows": Metric("sum", "sparse_rows"),
}


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts > 0, values * counts, 0).sum() / counts.sum().clamp(min=1)


def _extreme(values: Tensor, counts: Tensor, largest: bool) -> Tensor:
    if not values.numel():
        return values.new_zeros(())
    bound = torch.where(counts > 0, values, -torch.inf if largest else torch.inf)
    bound = bound.amax() if largest else bound.amin()
    return torch.where((counts > 0).any(), bound, 0)


# (values [M], how many rows each stands for [M]) -> 0-d; what stands for no row may be anything
REDUCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "max": lambda values, counts: _extreme(values, counts, largest=True),
    "min": lambda values, counts: _extreme(values, counts, largest=False),
    "sum": lambda values, counts: values.sum(),
}


def policy_metrics(
    objective: Objective,
    logprobs: Tensor,
    entropy: Tensor,
    slope: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    computed: Tensor,
    valid: Tensor,
    unscorable: Tensor,
) -> dict[str, Tensor]:
    """Means and extremes over computed rows, all inputs [N]; 0 where no row qualifies.

    Weights are over computed rows with A ≠ 0, under a sequence-level objective relative to the token's own ratio.
    beyond_trust_region  their share with w <= 0 that moved in the harmful direction: up with A > 0, down with A < 0
    clip_share           their share whose gradient a clipping objective cut; 0 for other objectives
    active_share         computed rows over valid ones
    logprob_mean, old_logprob_max  log π of the tokens; log μ above 0 is not a log-prob
    far_below_share      computed rows with log π < log μ - 5: near 1 where targets are not aligned
    unscorable           tokens in the mask whose old log-prob was NaN or -inf, treated as masked
    nonfinite            computed rows whose log-prob or slope is NaN or infinite
    tokens, computed, weighted  counts: valid tokens, computed rows, those with A ≠ 0. `METRICS` names the one that each
                         mean and extreme is over, so that batches and ranks combine (`distributed.reduce_metrics`)
    """
    tokens = Tokens(logprobs, old_logprobs, advantages)
    weighted = computed & (advantages != 0)
    weight = -slope / torch.where(weighted, advantages * tokens.ratio, 1)
    shift = tokens.prob_shift.abs()
    beyond = (weight <= 0) & (advantages * tokens.log_ratio > 0)
    clipped = torch.zeros_like(weighted)
    if objective.clips:
        # a sequence's ratio is not its tokens', so only a gradient of exactly 0 tells
        clipped = slope == 0 if objective.sequence_level else weight < UNCLIPPED
    nonfinite = computed & ~(logprobs.isfinite() & slope.isfinite())
    flags = {"tokens": valid, "computed": computed, "weighted": weighted, "unscorable": unscorable}
    flags["nonfinite"] = nonfinite
    values = flags | {
        "ratio_mean": tokens.ratio,
        "ratio_max": tokens.ratio,
        "kl_k1": -tokens.log_ratio,
        "kl_k3": tokens.ratio_minus_one - tokens.log_ratio,
        "prob_shift_mean": shift,
        "prob_shift_max": shift,
        "weight_mean": weight,
        "weight_min": weight,
        "weight_max": weight,
        "beyond_trust_region": beyond.to(weight.dtype),
        "clip_share": clipped.to(weight.dtype),
        "entropy_mean": entropy,
        "logprob_mean": logprobs,
        "old_logprob_max": old_logprobs,
        "far_below_share": (tokens.log_ratio < -FAR_BELOW).to(weight.dtype),
        "active_share": computed.to(weight.dtype),
    }
    return _reduced(METRICS, values, flags)


def sparsity_metrics(entries: Tensor, left_out: Tensor, logprobs: Tensor, active: Tensor) -> dict[str, Tensor]:
    """What `sparse_grad` did, all inputs [N]; 0 where no row qualifies.

    sparse_share     rows whose gradient is sparse over rows with a gradient
    sparse_entries   their mean number of vocabulary entries with a gradient of their own, the target among them
    left_out_mean    their mean probability mass without one; left_out_share_max the largest over 1 - p_y, at most τ
    with_gradient, sparse_rows  counts
    """
    sparse = active & (entries > 0)
    miss = -torch.expm1(logprobs)
    flags = {"with_gradient": active, "sparse_rows": sparse}
    values = flags | {
        "sparse_share": sparse.to(entries.dtype),
        "sparse_entries": entries,
        "left_out_mean": left_out,
        "left_out_share_max": left_out / torch.where(miss > 0, miss, 1),
    }
    return _reduced(SPARSITY_METRICS, values, flags)


def _reduced(
    metrics: Mapping[str, Metric], values: Mapping[str, Tensor], flags: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return {
        PREFIX + name: REDUCE[how](values[name], flags[count]).detach() for name, (how, count) in metrics.items()
    }


def combined_metrics(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The metrics of M batches, [M] under each name, as those of their union, 0-d."""
    return {
        PREFIX + name: REDUCE[how](metrics[PREFIX + name], metrics[PREFIX + count])
        for name, (how, count) in (METRICS | SPARSITY_METRICS).items()
        if PREFIX + name in metrics
    }
