"""Metrics that tell apart why the log-probs of engine and trainer differ: in PyTorch and, beside it, as a Triton twin.

`mismatch.py` says what they mean together.
"""

import torch
from torch import Tensor

from drpo_kernels.reductions import OUT_LOGSUMEXP, Metric, add, larger, largest, load_tokens, mean, reduced
from drpo_kernels.tokens import LEAST_LOGPROB
from drpo_kernels.triton_support import jit, tl

# If a token's old log-prob is truly 0, nothing else could be sampled, and its log-prob now is less than this many nats
# below 0.
FAR_BELOW_ONE = 0.05
# These metrics are for `diagnose`. People cannot read them, so dashboards leave them out.
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
MEANS = tl.constexpr(len(EVIDENCE_METRICS))
EVIDENCE_METRICS |= {EVIDENCE + f"logsumexp_{how}": Metric(how, "computed") for how in ("max", "min")}


def evidence_metrics(
    logprobs: Tensor,
    entropy: Tensor,
    logsumexp: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    computed: Tensor,
    valid: Tensor,
) -> dict[str, Tensor]:
    """Means over computed rows, 0 if there are none. All inputs are [N], the rows in the order of the text.

    p = log π and m = log μ, both raised to -100 if they are lower; d = p - m; H is the entropy; c = p + H is the
    *centred* log-prob, whose mean is 0 on tokens that π sampled.
    logprob, log_ratio_mean  p and d
    logprob_square, log_ratio_square, logprob_log_ratio, centred_square  p², d², p d and c²
    fit_cc to fit_rr     products of two of c, e = H / (1 + H) and r = d, divided by max(1, c²) so that no single token
                         decides. They are the sums of the least-squares fit of d by c and e. To second order the
                         log-prob at T times the temperature is p + (1/T - 1) c - (1/T - 1)² v / 2, where v is the
                         variance of log π in the row. e stands in for v, so the slope over c is 1 - 1/T whatever the
                         entropies of the rows are
    misfit               min(|d|, 1), bounded so that a few tokens do not decide
    misfit_above         the same where d > 0, else 0
    misfit_previous, misfit_next  the misfit with m of the row before or after, or `misfit` if that row is not valid or
                         does not exist; small if the old log-probs are shifted by one
    misfit_cumulative    the misfit with m minus the m of the row before; small if old log-probs are running sums
    misfit_zero          the misfit where m is exactly 0, else 0
    unsure_share         share of rows with p < -0.05; the other rows hardly change a mean
    repeated_share       share of rows with p < -0.05 whose m is not 0 and equals the m of the row before
    advantage_sign       the sign of A
    toward_advantage     the sign of A times d clamped to ±1. With advantage_sign it shows whether d follows A, as it
                         does after the policy has learnt from these tokens
    logsumexp_min, logsumexp_max  log Σ exp z of a row, which is 0 on all rows if the logits are log-probs
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
        "logsumexp_max": logsumexp,
        "logsumexp_min": logsumexp,
    }
    values = {EVIDENCE + name: value for name, value in values.items()}
    return reduced(EVIDENCE_METRICS, values, {"computed": computed})


@jit
def bounded(difference):
    """min(|difference|, 1), the size of a misfit. It keeps a NaN."""
    size = tl.abs(difference)
    return tl.where(size > 1, 1.0, size)


@jit
def floored(logp, LEAST: tl.constexpr):
    return tl.where(logp < LEAST, LEAST, logp)


@jit
def neighbour(rows, outcome, valid, t, count, LEAST: tl.constexpr):
    """-> (old log-prob of row t, whether that row is valid)"""
    inside = (t >= 0) & (t < count)
    old = tl.load(rows + t, mask=inside, other=0.0)
    old = tl.where(old == old, old, tl.load(outcome + t, mask=inside, other=0.0))  # on-policy
    return floored(old, LEAST), tl.load(valid + t, mask=inside, other=0) != 0


@jit
def evidence(
    rows, rows_stride, outcome, outcome_stride, valid, values, count, terms, BLOCK: tl.constexpr
):  # fmt: skip
    """The twin of `evidence_metrics` -> values fp32 in the order of EVIDENCE_METRICS, added in fp32.

    `policy_metrics_kernel` describes the arguments.
    """
    nothing = tl.zeros([BLOCK], tl.float32)
    none = tl.full([BLOCK], float("-inf"), tl.float32)
    computed_count = nothing
    floored_sum, d_sum, pp_sum, dd_sum, pd_sum, centred_sum = nothing, nothing, nothing, nothing, nothing, nothing
    cc_sum, ce_sum, ee_sum, cr_sum, er_sum, rr_sum = nothing, nothing, nothing, nothing, nothing, nothing
    misfit_sum, above_sum, before_sum, after_sum = nothing, nothing, nothing, nothing
    cumulative_sum, misfit_zero_sum, unsure_sum, repeated_sum = nothing, nothing, nothing, nothing
    sign_sum, toward_sum = nothing, nothing
    logsumexp_most, logsumexp_least = none, none
    for start in range(0, count, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < count
        logp, entropy, old, advantage, computed = load_tokens(rows, rows_stride, outcome, outcome_stride, t, inside)
        p, m = floored(logp, terms.least_logprob), floored(old, terms.least_logprob)
        d, centred, evenness = p - m, p + entropy, entropy / (1 + entropy)
        size = tl.where(tl.abs(centred) > 1, tl.abs(centred), 1.0)
        c, e, r = centred / size, evenness / size, d / size
        before, has_before = neighbour(rows, outcome, valid, t - 1, count, terms.least_logprob)
        after, has_after = neighbour(rows, outcome, valid, t + 1, count, terms.least_logprob)
        misfit, unsure = bounded(d), p < -terms.far_below_one
        sign = tl.where(advantage > 0, 1.0, tl.where(advantage < 0, -1.0, 0.0))
        logsumexp = tl.load(outcome + outcome_stride * OUT_LOGSUMEXP + t, mask=inside, other=0.0)
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
        computed_count = add(computed_count, computed, 1.0)
    n = tl.sum(computed_count, 0)
    sums = (
        floored_sum, d_sum, pp_sum, dd_sum, pd_sum, centred_sum, cc_sum, ce_sum, ee_sum, cr_sum, er_sum, rr_sum,
        misfit_sum, above_sum, before_sum, after_sum, cumulative_sum, misfit_zero_sum, unsure_sum, repeated_sum,
        sign_sum, toward_sum,
    )  # fmt: skip
    for i in tl.static_range(MEANS):  # pyright: ignore[reportGeneralTypeIssues]  # the compiler unrolls it
        tl.store(values + i, mean(sums[i], n))
    tl.store(values + MEANS, largest(logsumexp_most, n))
    tl.store(values + MEANS + 1, 0.0 - largest(logsumexp_least, n))
