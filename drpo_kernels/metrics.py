"""The metrics of a batch for any objective, as 0-d detached tensors: in PyTorch and, beside it, as a Triton twin.

The weight of a token is w = (dℓ/dlogπ) / (-A r): 1 for an unregularised surrogate, 0 where the loss drops the token,
and negative where the loss pushes the ratio back.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drpo_kernels.evidence import EVIDENCE_METRICS, FAR_BELOW_ONE, evidence
from drpo_kernels.kl import clamped
from drpo_kernels.objective import Objective
from drpo_kernels.reductions import (
    OUT_SLOPE,
    PREFIX,
    REDUCE,
    REF_LOGPROB,
    Metric,
    add,
    larger,
    largest,
    load_tokens,
    mean,
    reduced,
)
from drpo_kernels.tokens import LEAST_LOGPROB, Tokens, clamped_log_ratio, expm1, prob_shift
from drpo_kernels.triton_support import jit, tl

# The weight of a token that was not clipped differs from 1 by rounding only.
UNCLIPPED = 1 - 1e-5
# A token whose log-prob is this many nats below its old one was hardly scored on the text that it was sampled from.
FAR_BELOW = 5.0
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
    "zero_old_share": Metric("mean", "computed"),
    "active_share": Metric("mean", "tokens"),
    "unscorable": Metric("sum", "unscorable"),
    "sentinels": Metric("sum", "sentinels"),
    "nonfinite": Metric("sum", "nonfinite"),
    "tokens": Metric("sum", "tokens"),
    "computed": Metric("sum", "computed"),
    "weighted": Metric("sum", "weighted"),
}
# The counts are the last entries of METRICS, and are integers.
COUNTS = sum(metric.how == "sum" for metric in METRICS.values())
MEASURES = len(METRICS) - COUNTS
# `metrics_of_rows` stores so many: the measures with `ref_kl`, and the counts.
STORED_VALUES, STORED_COUNTS = tl.constexpr(MEASURES + 1), tl.constexpr(COUNTS)
# A call with log-probs of a reference has this metric too.
REFERENCE_METRICS = {"ref_kl": Metric("mean", "computed")}
# A call with `sparse_grad` has these metrics too.
SPARSITY_METRICS = {
    "sparse_share": Metric("mean", "with_gradient"),
    "sparse_entries": Metric("mean", "sparse_rows"),
    "left_out_mean": Metric("mean", "sparse_rows"),
    "left_out_share_max": Metric("max", "sparse_rows"),
    "with_gradient": Metric("sum", "with_gradient"),
    "sparse_rows": Metric("sum", "sparse_rows"),
}
EVERY_METRIC = METRICS | REFERENCE_METRICS | EVIDENCE_METRICS | SPARSITY_METRICS


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
    sentinels: Tensor,
    ref_kl: Tensor | None = None,
) -> dict[str, Tensor]:
    """Means and extremes over computed rows; all inputs are [N]. A metric over no row is 0.

    Metrics of weights are over computed rows with A ≠ 0. Under a sequence-level objective the weight is relative to the
    token's own ratio.
    beyond_trust_region  share of those rows with w <= 0 that moved in the harmful direction: up if A > 0, down if A < 0
    clip_share           share of those rows whose gradient a clipping objective cut; 0 for other objectives
    active_share         computed rows divided by valid tokens
    logprob_mean         mean of log π
    old_logprob_max      largest log μ; above 0 it is not a log-prob
    far_below_share      share of computed rows with log π < log μ - 5; near 1 if targets are not aligned
    zero_old_share       share of computed rows with log μ exactly 0 and log π < -0.05, which are placeholders
    ref_kl               KL(π‖π_ref) by the estimator of the loss, without `kl_importance`; absent without a reference
    unscorable           tokens in the mask whose old log-prob was NaN, -inf, or -100 and below; treated as masked
    sentinels            unscorable tokens whose old log-prob was finite, such as -9999
    nonfinite            computed rows whose log-prob or slope is NaN or infinite
    tokens, computed, weighted  counts of valid tokens, of computed rows, and of computed rows with A ≠ 0. `METRICS`
                         says which count each mean and extreme is over; `distributed.reduce_metrics` needs it
    """
    tokens = Tokens(logprobs, old_logprobs, advantages)
    log_ratio, shift = tokens.log_ratio, tokens.prob_shift.abs()
    ratio = log_ratio.exp()
    weighted = computed & (advantages != 0)
    weight = -slope / torch.where(weighted, advantages * ratio, 1)
    beyond = (weight <= 0) & (advantages * log_ratio > 0)
    clipped = torch.zeros_like(weighted)
    if objective.clips:
        # The weight is relative to the token's ratio, not the sequence's, so only a slope of exactly 0 shows clipping.
        clipped = slope == 0 if objective.sequence_level else weight < UNCLIPPED
    nonfinite = computed & ~(logprobs.isfinite() & slope.isfinite())
    flags = {"tokens": valid, "computed": computed, "weighted": weighted, "nonfinite": nonfinite}
    flags |= {"unscorable": unscorable, "sentinels": sentinels}
    values = flags | {
        "ratio_mean": ratio,
        "ratio_max": ratio,
        "kl_k1": -log_ratio,
        "kl_k3": log_ratio.expm1() - log_ratio,
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
        "far_below_share": (log_ratio < -FAR_BELOW).to(weight.dtype),
        "zero_old_share": ((old_logprobs == 0) & (logprobs < -FAR_BELOW_ONE)).to(weight.dtype),
        "active_share": computed.to(weight.dtype),
    }
    metrics = reduced(METRICS, values, flags)
    return metrics if ref_kl is None else metrics | reduced(REFERENCE_METRICS, {"ref_kl": ref_kl}, flags)


# Clipping by an objective shows not at all, in the weight, or in a slope of 0.
NO_CLIPS, WEIGHT_CLIPS, SLOPE_CLIPS = 0, 1, 2
BY_WEIGHT, BY_SLOPE = tl.constexpr(WEIGHT_CLIPS), tl.constexpr(SLOPE_CLIPS)


def clips_of(objective: Objective) -> int:
    if not objective.clips:
        return NO_CLIPS
    return SLOPE_CLIPS if objective.sequence_level else WEIGHT_CLIPS


class MetricTerms(NamedTuple):
    """What the Triton twins need besides tensors. All fields but `kl_cap` are compile-time constants."""

    kl: Any  # twin of the KL estimator, or None
    kl_cap: Any
    clips: Any
    unclipped: Any
    far_below: Any
    far_below_one: Any
    least_logprob: Any
    evidence_at: Any  # the place of the first value of `evidence_metrics`


def metric_constants(objective: Objective) -> dict[str, float]:
    """The fields of `MetricTerms` other than `kl` and `kl_cap`."""
    return {
        "clips": clips_of(objective),
        "unclipped": UNCLIPPED,
        "far_below": FAR_BELOW,
        "far_below_one": FAR_BELOW_ONE,
        "least_logprob": LEAST_LOGPROB,
        "evidence_at": MEASURES + 1,
    }


@jit
def is_clipped(weight, slope, inside, terms):
    """Whether the objective has cut the gradient of a token, by `clips_of`."""
    clipped = inside & False
    if terms.clips == BY_WEIGHT:
        clipped = weight < terms.unclipped
    if terms.clips == BY_SLOPE:
        clipped = slope == 0
    return clipped


@jit
def metrics_of_rows(
    rows, rows_stride, outcome, outcome_stride, valid, unscorable, given, values, counts, count, terms,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The twin of `policy_metrics`; `policy_metrics_kernel` describes the arguments."""
    nothing = tl.zeros([BLOCK], tl.float32)
    none = tl.full([BLOCK], float("-inf"), tl.float32)
    ratio_sum, k1_sum, k3_sum, shift_sum, weight_sum = nothing, nothing, nothing, nothing, nothing
    beyond_sum, clipped_sum, entropy_sum, logp_sum, below_sum = nothing, nothing, nothing, nothing, nothing
    zero_sum, kl_sum, sentinel_count, nonfinite_count = nothing, nothing, nothing, nothing
    ratio_most, shift_most, weight_least, weight_most, old_most = none, none, none, none, none
    token_count, computed_count, weighted_count, unscorable_count = nothing, nothing, nothing, nothing
    for start in range(0, count, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < count
        logp, entropy, old, advantage, computed = load_tokens(rows, rows_stride, outcome, outcome_stride, t, inside)
        slope = tl.load(outcome + outcome_stride * OUT_SLOPE + t, mask=inside, other=0.0)
        weighted = computed & (advantage != 0)
        log_ratio, shift = clamped_log_ratio(logp, old), tl.abs(prob_shift(logp, old))
        ratio = tl.exp(log_ratio)
        weight = -slope / tl.where(weighted, advantage * ratio, 1.0)
        clipped = is_clipped(weight, slope, inside, terms)
        ratio_sum, ratio_most = add(ratio_sum, computed, ratio), larger(ratio_most, computed, ratio)
        k1_sum, k3_sum = add(k1_sum, computed, -log_ratio), add(k3_sum, computed, expm1(log_ratio) - log_ratio)
        shift_sum, shift_most = add(shift_sum, computed, shift), larger(shift_most, computed, shift)
        weight_sum = add(weight_sum, weighted, weight)
        weight_least = larger(weight_least, weighted, -weight)
        weight_most = larger(weight_most, weighted, weight)
        beyond_sum = add(beyond_sum, weighted & (weight <= 0) & (advantage * log_ratio > 0), 1.0)
        clipped_sum = add(clipped_sum, weighted & clipped, 1.0)
        entropy_sum, logp_sum = add(entropy_sum, computed, entropy), add(logp_sum, computed, logp)
        old_most = larger(old_most, computed, old)
        below_sum = add(below_sum, computed & (log_ratio < -terms.far_below), 1.0)
        zero_sum = add(zero_sum, computed & (old == 0) & (logp < -terms.far_below_one), 1.0)
        if terms.kl is not None:
            reference = tl.load(rows + rows_stride * REF_LOGPROB + t, mask=inside, other=0.0)
            d, _ = clamped(logp - reference, terms.kl_cap)
            kl, _, _ = terms.kl(d)
            kl_sum = add(kl_sum, computed, kl)
        finite = (tl.abs(logp) < float("inf")) & (tl.abs(slope) < float("inf"))
        token_count = add(token_count, tl.load(valid + t, mask=inside, other=0) != 0, 1.0)
        unscored = tl.load(unscorable + t, mask=inside, other=0) != 0
        unscorable_count = add(unscorable_count, unscored, 1.0)
        if given is not None:
            number = tl.abs(tl.load(given + t, mask=inside, other=0.0).to(tl.float32)) < float("inf")
            sentinel_count = add(sentinel_count, unscored & number, 1.0)
        nonfinite_count = add(nonfinite_count, computed & ~finite, 1.0)
        computed_count, weighted_count = add(computed_count, computed, 1.0), add(weighted_count, weighted, 1.0)
    n, w, all_tokens = tl.sum(computed_count, 0), tl.sum(weighted_count, 0), tl.sum(token_count, 0)
    results = (
        mean(ratio_sum, n), largest(ratio_most, n), mean(k1_sum, n), mean(k3_sum, n), mean(shift_sum, n),
        largest(shift_most, n), mean(weight_sum, w), 0.0 - largest(weight_least, w), largest(weight_most, w),
        mean(beyond_sum, w), mean(clipped_sum, w), mean(entropy_sum, n), mean(logp_sum, n), largest(old_most, n),
        mean(below_sum, n), mean(zero_sum, n), mean(computed_count, all_tokens), mean(kl_sum, n),
    )  # fmt: skip
    for i in tl.static_range(STORED_VALUES):  # pyright: ignore[reportGeneralTypeIssues]  # the compiler unrolls it
        tl.store(values + i, results[i])
    totals = (tl.sum(unscorable_count, 0), tl.sum(sentinel_count, 0), tl.sum(nonfinite_count, 0), all_tokens, n, w)
    for i in tl.static_range(STORED_COUNTS):  # pyright: ignore[reportGeneralTypeIssues]  # the compiler unrolls it
        tl.store(counts + i, totals[i].to(tl.int64))


@jit(do_not_specialize=["rows_stride", "outcome_stride", "count"])
def policy_metrics_kernel(
    rows, rows_stride, outcome, outcome_stride, valid, unscorable, given, values, counts, count, terms: MetricTerms,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The twins of `policy_metrics` and `evidence_metrics`, one program each.

    rows [9, N] (`Field`), outcome [5, N] (`Outcome`), valid and unscorable uint8 [N], given (the old log-probs as the
    caller gave them, [N] of any float dtype, or None) -> values fp32 [42], counts int64 [6].
    values holds the means and extremes of `METRICS`, then `ref_kl`, then `EVIDENCE_METRICS`; counts holds the counts of
    `METRICS`. Sums are in fp32, in which counts are exact up to 2^24 tokens.
    """
    if tl.program_id(0) == 0:
        metrics_of_rows(
            rows, rows_stride, outcome, outcome_stride, valid, unscorable, given, values, counts, count, terms, BLOCK
        )
    else:
        evidence(rows, rows_stride, outcome, outcome_stride, valid, values + terms.evidence_at, count, terms, BLOCK)


def sparsity_metrics(entries: Tensor, left_out: Tensor, logprobs: Tensor, active: Tensor) -> dict[str, Tensor]:
    """What `sparse_grad` did; all inputs are [N]. A metric over no row is 0.

    sparse_share        rows with a sparse gradient, divided by rows with a gradient
    sparse_entries      mean number of entries with a gradient in a sparse row, its target among them
    left_out_mean       mean probability of the entries without a gradient in a sparse row
    left_out_share_max  the largest such probability divided by 1 - p_y; at most τ
    with_gradient, sparse_rows  counts of rows with a gradient, and of sparse ones
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
    return reduced(SPARSITY_METRICS, values, flags)


def named_metrics(values: Tensor, counts: Tensor, with_reference: bool) -> dict[str, Tensor]:
    """The output of `policy_metrics_kernel`, as `policy_metrics` and `evidence_metrics` return it.

    Each metric is taken by `.data`: a trainer may change one in place, which autograd would refuse for a view.
    """
    measures, (ref_kl, *evidence) = values[:MEASURES].unbind(), values[MEASURES:].unbind()
    named = dict(zip(METRICS, (*measures, *counts.unbind()), strict=True))
    named |= {"ref_kl": ref_kl} if with_reference else {}
    named |= zip(EVIDENCE_METRICS, evidence, strict=True)
    return {PREFIX + name: value.data for name, value in named.items()}


def combined_metrics(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The metrics of M batches, [M] under each name -> the metrics of their union, 0-d."""
    return {
        PREFIX + name: REDUCE[how](metrics[PREFIX + name], metrics[PREFIX + count])
        for name, (how, count) in EVERY_METRIC.items()
        if PREFIX + name in metrics
    }
