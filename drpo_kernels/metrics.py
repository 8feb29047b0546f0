"""What a dashboard needs to see trouble coming: 0-d detached tensors computed from the per-row outcome, for any
objective.

The gradient weight is w = (dℓ/dlogπ) / (-A r): 1 for an unregularised surrogate, 0 where a loss drops a token, negative
where it pushes back.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.kl import clamped
from drpo_kernels.objectives import Objective
from drpo_kernels.tokens import LEAST_LOGPROB, Tokens, clamped_log_ratio, expm1, prob_shift
from drpo_kernels.triton_support import jit, tl

PREFIX = "drpo/"
# w of a token that an objective left alone differs from 1 by rounding only
UNCLIPPED = 1 - 1e-5
# nats: a token this far below its old log-prob was hardly scored on the text it was sampled from
FAR_BELOW = 5.0
# nats: a token whose old log-prob is exactly 0, so that nothing else could be sampled, is not this far below 0 now
FAR_BELOW_ONE = 0.05


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
    "zero_old_share": Metric("mean", "computed"),
    "active_share": Metric("mean", "tokens"),
    "unscorable": Metric("sum", "unscorable"),
    "sentinels": Metric("sum", "sentinels"),
    "nonfinite": Metric("sum", "nonfinite"),
    "tokens": Metric("sum", "tokens"),
    "computed": Metric("sum", "computed"),
    "weighted": Metric("sum", "weighted"),
}
# the counts come last, and are integers
COUNTS = sum(metric.how == "sum" for metric in METRICS.values())
MEASURES = len(METRICS) - COUNTS
# What tells the causes of a mismatch apart, for `diagnose`: no numbers to look at, so dashboards leave them out
EVIDENCE = "evidence/"
EVIDENCE_METRICS = {
    EVIDENCE + name: Metric("mean", "computed")
    for name in (
        "logprob", "log_ratio_mean", "logprob_square", "log_ratio_square", "logprob_log_ratio", "centred_square",
        "fit_cc", "fit_ce", "fit_ee", "fit_cr", "fit_er", "fit_rr", "misfit", "misfit_above", "misfit_previous",
        "misfit_next", "misfit_cumulative", "misfit_zero", "unsure_share", "repeated_share", "advantage_sign",
        "toward_advantage",
    )
}  # fmt: skip
EVIDENCE_METRICS |= {EVIDENCE + f"logsumexp_{how}": Metric(how, "computed") for how in ("max", "min")}
# what log-probs of a reference add to them
REFERENCE_METRICS = {"ref_kl": Metric("mean", "computed")}
# and what `sparse_grad` does
SPARSITY_METRICS = {
    "sparse_share": Metric("mean", "with_gradient"),
    "sparse_entries": Metric("mean", "sparse_rows"),
    "left_out_mean": Metric("mean", "sparse_rows"),
    "left_out_share_max": Metric("max", "sparse_rows"),
    "with_gradient": Metric("sum", "with_gradient"),
    "sparse_rows": Metric("sum", "sparse_rows"),
}
EVERY_METRIC = METRICS | REFERENCE_METRICS | EVIDENCE_METRICS | SPARSITY_METRICS


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
    sentinels: Tensor,
    ref_kl: Tensor | None = None,
) -> dict[str, Tensor]:
    """Means and extremes over computed rows, all inputs [N]; 0 where no row qualifies.

    Weights are over computed rows with A ≠ 0, under a sequence-level objective relative to the token's own ratio.
    beyond_trust_region  their share with w <= 0 that moved in the harmful direction: up with A > 0, down with A < 0
    clip_share           their share whose gradient a clipping objective cut; 0 for other objectives
    active_share         computed rows over valid ones
    logprob_mean, old_logprob_max  log π of the tokens; log μ above 0 is not a log-prob
    far_below_share      computed rows with log π < log μ - 5: near 1 where targets are not aligned
    zero_old_share       computed rows with log μ = 0 exactly and log π < -0.05: placeholders for log-probs
    ref_kl               KL(π‖π_ref) by the estimator of the loss, without `kl_importance`; only with log-probs of a
                         reference
    unscorable           tokens in the mask whose old log-prob was NaN, -inf, or -100 and below, treated as masked
    sentinels            those among them that were finite: -9999 and the like
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
    flags = {"tokens": valid, "computed": computed, "weighted": weighted, "nonfinite": nonfinite}
    flags |= {"unscorable": unscorable, "sentinels": sentinels}
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
        "zero_old_share": ((old_logprobs == 0) & (logprobs < -FAR_BELOW_ONE)).to(weight.dtype),
        "active_share": computed.to(weight.dtype),
    }
    metrics = _reduced(METRICS, values, flags)
    return metrics if ref_kl is None else metrics | _reduced(REFERENCE_METRICS, {"ref_kl": ref_kl}, flags)


def evidence_metrics(
    logprobs: Tensor,
    entropy: Tensor,
    logsumexp: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    computed: Tensor,
    valid: Tensor,
) -> dict[str, Tensor]:
    """What tells the causes of a mismatch apart, all inputs [N] in the order of the text; means over computed rows, 0
    where there are none.

    With p = log π and m = log μ, neither taken below -100, d = p - m, H the entropy, and the *centred* log-prob
    c = p + H, whose mean is 0 on tokens that π sampled.
    logprob, log_ratio_mean  p, d; logprob_square, log_ratio_square, logprob_log_ratio, centred_square  p², d², p d, c²
    fit_cc to fit_rr     products of two of c, e = H / (1 + H) and r = d, over max(1, c²), so that no token decides:
                         the least-squares fit of d by c and e. To second order the log-prob at T times the temperature
                         is p + (1/T - 1) c - (1/T - 1)² v / 2, with v the variance of log π in the row, of which e
                         takes the place: the slope over c is 1 - 1/T, whatever the entropies of the rows are
    misfit               min(|d|, 1), so that a few tokens do not decide; misfit_above counts d > 0 alone
    misfit_previous, misfit_next  the same with m of the row before or after, where that row is valid, else as misfit,
                         so also at either end of a batch: small where the old log-probs are shifted by one
    misfit_cumulative    the same with m minus that of the row before: small where old log-probs are running sums
    misfit_zero          the same, counted where m is exactly 0 alone
    unsure_share         rows with p < -0.05: the others hardly bear on a mean
    repeated_share       those whose m is that of the row before, and not 0
    advantage_sign, toward_advantage  the sign of A; that times d within ±1: together, whether d follows A, as it does
                         where the policy has learnt from these very tokens
    logsumexp_min, logsumexp_max  log Σ exp z of a row: 0 on all of them where the logits are log-probs
    """
    p, m = (torch.where(x < LEAST_LOGPROB, LEAST_LOGPROB, x) for x in (logprobs, old_logprobs))
    log_ratio = p - m
    centred, evenness = p + entropy, entropy / (1 + entropy)
    c, e, r = torch.stack([centred, evenness, log_ratio]) / torch.where(centred.abs() > 1, centred.abs(), 1)
    before, after = m.roll(1), m.roll(-1)
    has_before, has_after = valid.roll(1), valid.roll(-1)
    has_before[:1], has_after[-1:] = False, False
    sign = (advantages > 0).to(p.dtype) - (advantages < 0).to(p.dtype)
    misfit, unsure = log_ratio.abs().clamp(max=1), p < -FAR_BELOW_ONE
    values = {
        "logprob": p,
        "log_ratio_mean": log_ratio,
        "logprob_square": p.square(),
        "log_ratio_square": log_ratio.square(),
        "logprob_log_ratio": p * log_ratio,
        "centred_square": centred.square(),
        "fit_cc": c * c,
        "fit_ce": c * e,
        "fit_ee": e * e,
        "fit_cr": c * r,
        "fit_er": e * r,
        "fit_rr": r * r,
        "misfit": misfit,
        "misfit_above": log_ratio.clamp(0, 1),
        "misfit_previous": torch.where(has_before, (p - before).abs().clamp(max=1), misfit),
        "misfit_next": torch.where(has_after, (p - after).abs().clamp(max=1), misfit),
        "misfit_cumulative": torch.where(has_before, (log_ratio + before).abs().clamp(max=1), misfit),
        "misfit_zero": torch.where(m == 0, misfit, 0),
        "unsure_share": unsure.to(p.dtype),
        "repeated_share": (unsure & has_before & (m == before) & (m != 0)).to(p.dtype),
        "advantage_sign": sign,
        "toward_advantage": log_ratio.clamp(-1, 1) * sign,
    }
    # one reduction for all of them: a graph, and PyTorch outside of one, would else take several operations for each
    means = torch.where(computed, torch.stack(list(values.values())), 0).sum(1) / computed.sum().clamp(min=1)
    found = {PREFIX + EVIDENCE + name: means[i].detach() for i, name in enumerate(values)}
    extremes = {name: kind for name, kind in EVIDENCE_METRICS.items() if kind.how != "mean"}
    return found | _reduced(extremes, dict.fromkeys(extremes, logsumexp), {"computed": computed})


# how an objective's clipping shows: not at all, in the weight, or in a slope of 0
NO_CLIPS, WEIGHT_CLIPS, SLOPE_CLIPS = 0, 1, 2


def clips_of(objective: Objective) -> int:
    if not objective.clips:
        return NO_CLIPS
    return SLOPE_CLIPS if objective.sequence_level else WEIGHT_CLIPS


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


@jit
def bounded(difference):
    """min(|difference|, 1), the twin of what a misfit is; a NaN stays one."""
    size = tl.abs(difference)
    return tl.where(size > 1, 1.0, size)


@jit
def floored(logp, LEAST: tl.constexpr):
    return tl.where(logp < LEAST, LEAST, logp)


@jit
def neighbour(rows, outcome, valid, t, count, LEAST: tl.constexpr):
    """-> (old log-prob of row t, whether it is a valid row)"""
    inside = (t >= 0) & (t < count)
    old = tl.load(rows + t, mask=inside, other=0.0)
    old = tl.where(old == old, old, tl.load(outcome + t, mask=inside, other=0.0))  # on-policy
    return floored(old, LEAST), tl.load(valid + t, mask=inside, other=0) != 0


@jit(do_not_specialize=["rows_stride", "outcome_stride", "count"])
def policy_metrics_kernel(
    rows, rows_stride, outcome, outcome_stride, valid, unscorable, given, values, counts, count, kl_cap,
    CLIPS: tl.constexpr, KL: tl.constexpr, UNCLIPPED: tl.constexpr, FAR_BELOW: tl.constexpr,
    FAR_BELOW_ONE: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The twin of `policy_metrics` and `evidence_metrics`, one launch of one program: rows [9, N] (`Row`), outcome
    [5, N] (`Outcome`), valid and unscorable uint8 [N], old log-probs as given [N] of any float dtype or None -> values
    fp32 [42], counts int64 [6], in the order of `METRICS` and `EVIDENCE_METRICS`, `ref_kl` between the two; KL is the
    twin of its estimator or None. Sums are in fp32, in which counts are exact up to 2^24 tokens.
    """
    nothing = tl.zeros([BLOCK], tl.float32)
    none = tl.full([BLOCK], float("-inf"), tl.float32)
    ratio_sum, k1_sum, k3_sum, shift_sum, weight_sum = nothing, nothing, nothing, nothing, nothing
    beyond_sum, clipped_sum, entropy_sum, logp_sum, below_sum = nothing, nothing, nothing, nothing, nothing
    zero_sum, kl_sum, sentinel_count = nothing, nothing, nothing
    ratio_most, shift_most, weight_least, weight_most, old_most = none, none, none, none, none
    token_count, computed_count, weighted_count = nothing, nothing, nothing
    unscorable_count, nonfinite_count = nothing, nothing
    floored_sum, d_sum, pp_sum, dd_sum, pd_sum, centred_sum = nothing, nothing, nothing, nothing, nothing, nothing
    cc_sum, ce_sum, ee_sum, cr_sum, er_sum, rr_sum = nothing, nothing, nothing, nothing, nothing, nothing
    misfit_sum, above_sum, before_sum, after_sum = nothing, nothing, nothing, nothing
    cumulative_sum, misfit_zero_sum, unsure_sum, repeated_sum = nothing, nothing, nothing, nothing
    sign_sum, toward_sum = nothing, nothing
    logsumexp_most, logsumexp_least = none, none
    for start in range(0, count, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < count
        logp = tl.load(outcome + t, mask=inside, other=0.0)
        entropy = tl.load(outcome + outcome_stride + t, mask=inside, other=0.0)
        slope = tl.load(outcome + 4 * outcome_stride + t, mask=inside, other=0.0)
        old = tl.load(rows + t, mask=inside, other=0.0)
        old = tl.where(old == old, old, logp)  # on-policy
        advantage = tl.load(rows + rows_stride + t, mask=inside, other=0.0)
        computed = tl.load(rows + 7 * rows_stride + t, mask=inside, other=0.0) > 0
        weighted = computed & (advantage != 0)
        log_ratio = clamped_log_ratio(logp, old)
        ratio = tl.exp(log_ratio)
        shift = tl.abs(prob_shift(logp, old))
        weight = -slope / tl.where(weighted, advantage * ratio, 1.0)
        clipped = inside & False
        if CLIPS == 1:
            clipped = weight < UNCLIPPED
        if CLIPS == 2:
            clipped = slope == 0
        ratio_sum = add(ratio_sum, computed, ratio)
        ratio_most = larger(ratio_most, computed, ratio)
        k1_sum = add(k1_sum, computed, -log_ratio)
        k3_sum = add(k3_sum, computed, expm1(log_ratio) - log_ratio)
        shift_sum = add(shift_sum, computed, shift)
        shift_most = larger(shift_most, computed, shift)
        weight_sum = add(weight_sum, weighted, weight)
        weight_least = larger(weight_least, weighted, -weight)
        weight_most = larger(weight_most, weighted, weight)
        beyond_sum = add(beyond_sum, weighted & (weight <= 0) & (advantage * log_ratio > 0), 1.0)
        clipped_sum = add(clipped_sum, weighted & clipped, 1.0)
        entropy_sum = add(entropy_sum, computed, entropy)
        logp_sum = add(logp_sum, computed, logp)
        old_most = larger(old_most, computed, old)
        below_sum = add(below_sum, computed & (log_ratio < -FAR_BELOW), 1.0)
        zero_sum = add(zero_sum, computed & (old == 0) & (logp < -FAR_BELOW_ONE), 1.0)
        if KL is not None:
            d, _ = clamped(logp - tl.load(rows + 5 * rows_stride + t, mask=inside, other=0.0), kl_cap)
            kl, _, _ = KL(d)
            kl_sum = add(kl_sum, computed, kl)
        p, m = floored(logp, LEAST), floored(old, LEAST)
        d, centred, evenness = p - m, p + entropy, entropy / (1 + entropy)
        size = tl.where(tl.abs(centred) > 1, tl.abs(centred), 1.0)
        c, e, r = centred / size, evenness / size, d / size
        before, has_before = neighbour(rows, outcome, valid, t - 1, count, LEAST)
        after, has_after = neighbour(rows, outcome, valid, t + 1, count, LEAST)
        misfit, unsure = bounded(d), p < -FAR_BELOW_ONE
        sign = tl.where(advantage > 0, 1.0, tl.where(advantage < 0, -1.0, 0.0))
        logsumexp = tl.load(outcome + 2 * outcome_stride + t, mask=inside, other=0.0)
        floored_sum, d_sum = add(floored_sum, computed, p), add(d_sum, computed, d)
        pp_sum, pd_sum = add(pp_sum, computed, p * p), add(pd_sum, computed, p * d)
        dd_sum = add(dd_sum, computed, d * d)
        centred_sum = add(centred_sum, computed, centred * centred)
        cc_sum, ce_sum = add(cc_sum, computed, c * c), add(ce_sum, computed, c * e)
        ee_sum, er_sum = add(ee_sum, computed, e * e), add(er_sum, computed, e * r)
        cr_sum, rr_sum = add(cr_sum, computed, c * r), add(rr_sum, computed, r * r)
        misfit_sum, above_sum = add(misfit_sum, computed, misfit), add(above_sum, computed & ~(d < 0), misfit)
        before_sum = add(before_sum, computed, tl.where(has_before, bounded(p - before), misfit))
        after_sum = add(after_sum, computed, tl.where(has_after, bounded(p - after), misfit))
        cumulative_sum = add(cumulative_sum, computed, tl.where(has_before, bounded(d + before), misfit))
        misfit_zero_sum = add(misfit_zero_sum, computed & (m == 0), misfit)
        unsure_sum = add(unsure_sum, computed & unsure, 1.0)
        repeated_sum = add(repeated_sum, computed & unsure & has_before & (m == before) & (m != 0), 1.0)
        sign_sum = add(sign_sum, computed, sign)
        toward_sum = add(toward_sum, computed, tl.where(d < 0, -misfit, misfit) * sign)
        logsumexp_most = larger(logsumexp_most, computed, logsumexp)
        logsumexp_least = larger(logsumexp_least, computed, -logsumexp)
        finite = (tl.abs(logp) < float("inf")) & (tl.abs(slope) < float("inf"))
        token_count = add(token_count, tl.load(valid + t, mask=inside, other=0) != 0, 1.0)
        unscored = tl.load(unscorable + t, mask=inside, other=0) != 0
        unscorable_count = add(unscorable_count, unscored, 1.0)
        if given is not None:
            number = tl.abs(tl.load(given + t, mask=inside, other=0.0).to(tl.float32)) < float("inf")
            sentinel_count = add(sentinel_count, unscored & number, 1.0)
        nonfinite_count = add(nonfinite_count, computed & ~finite, 1.0)
        computed_count = add(computed_count, computed, 1.0)
        weighted_count = add(weighted_count, weighted, 1.0)
    n, w = tl.sum(computed_count, 0), tl.sum(weighted_count, 0)
    all_tokens = tl.sum(token_count, 0)
    tl.store(values, mean(ratio_sum, n))
    tl.store(values + 1, largest(ratio_most, n))
    tl.store(values + 2, mean(k1_sum, n))
    tl.store(values + 3, mean(k3_sum, n))
    tl.store(values + 4, mean(shift_sum, n))
    tl.store(values + 5, largest(shift_most, n))
    tl.store(values + 6, mean(weight_sum, w))
    tl.store(values + 7, 0.0 - largest(weight_least, w))
    tl.store(values + 8, largest(weight_most, w))
    tl.store(values + 9, mean(beyond_sum, w))
    tl.store(values + 10, mean(clipped_sum, w))
    tl.store(values + 11, mean(entropy_sum, n))
    tl.store(values + 12, mean(logp_sum, n))
    tl.store(values + 13, largest(old_most, n))
    tl.store(values + 14, mean(below_sum, n))
    tl.store(values + 15, mean(zero_sum, n))
    tl.store(values + 16, mean(computed_count, all_tokens))
    tl.store(values + 17, mean(kl_sum, n))
    tl.store(values + 18, mean(floored_sum, n))
    tl.store(values + 19, mean(d_sum, n))
    tl.store(values + 20, mean(pp_sum, n))
    tl.store(values + 21, mean(dd_sum, n))
    tl.store(values + 22, mean(pd_sum, n))
    tl.store(values + 23, mean(centred_sum, n))
    tl.store(values + 24, mean(cc_sum, n))
    tl.store(values + 25, mean(ce_sum, n))
    tl.store(values + 26, mean(ee_sum, n))
    tl.store(values + 27, mean(cr_sum, n))
    tl.store(values + 28, mean(er_sum, n))
    tl.store(values + 29, mean(rr_sum, n))
    tl.store(values + 30, mean(misfit_sum, n))
    tl.store(values + 31, mean(above_sum, n))
    tl.store(values + 32, mean(before_sum, n))
    tl.store(values + 33, mean(after_sum, n))
    tl.store(values + 34, mean(cumulative_sum, n))
    tl.store(values + 35, mean(misfit_zero_sum, n))
    tl.store(values + 36, mean(unsure_sum, n))
    tl.store(values + 37, mean(repeated_sum, n))
    tl.store(values + 38, mean(sign_sum, n))
    tl.store(values + 39, mean(toward_sum, n))
    tl.store(values + 40, largest(logsumexp_most, n))
    tl.store(values + 41, 0.0 - largest(logsumexp_least, n))
    tl.store(counts, tl.sum(unscorable_count, 0).to(tl.int64))
    tl.store(counts + 1, tl.sum(sentinel_count, 0).to(tl.int64))
    tl.store(counts + 2, tl.sum(nonfinite_count, 0).to(tl.int64))
    tl.store(counts + 3, all_tokens.to(tl.int64))
    tl.store(counts + 4, n.to(tl.int64))
    tl.store(counts + 5, w.to(tl.int64))


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


def named_metrics(values: Tensor, counts: Tensor, with_reference: bool) -> dict[str, Tensor]:
    """What the kernel has written, as `policy_metrics` and `evidence_metrics` return it. `data`: a trainer may change
    one in place, and autograd does not take it for a view of the others.
    """
    measures, (ref_kl, *evidence) = values[:MEASURES].unbind(), values[MEASURES:].unbind()
    named = dict(zip(METRICS, (*measures, *counts.unbind()), strict=True))
    named |= {"ref_kl": ref_kl} if with_reference else {}
    named |= zip(EVIDENCE_METRICS, evidence, strict=True)
    return {PREFIX + name: value.data for name, value in named.items()}


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
        for name, (how, count) in EVERY_METRIC.items()
        if PREFIX + name in metrics
    }
