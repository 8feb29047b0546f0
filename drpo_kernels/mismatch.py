"""What the metrics under "drpo/evidence/" say together about a mismatch between the sampling engine and the trainer.

`statistics` combines them. Each predicate tells whether a batch shows one cause; `diagnosis.py` has the sentences. A
predicate takes the metrics without their prefixes, and the statistics. Its thresholds lie between the values of healthy
batches (`tests/support/diagnosis_batches.py`, and entropies of 0.05 to 4 nats) and those of batches with the cause.
"""

import math
from collections.abc import Mapping
from typing import Any

from drpo_kernels.evidence import EVIDENCE

Values = Mapping[str, float]

MANY_TOKENS = 256  # a sentence about fewer tokens says that it may be chance
MISMATCH = 0.2  # nats of mean log-ratio; a policy a few steps ahead of its samples is at 0.001 to 0.05
HEALTHY_KL = 0.05  # nats of mean log-ratio; a policy a few steps ahead of its samples has at most this
TOO_FAR = 0.4  # nats of mean log-ratio; in 16 large steps on one batch a policy learns 0.1 to 0.4
CERTAIN = 5.0  # standard errors, for sums over tokens with heavy tails
SIGNIFICANT = 4.0  # standard errors, for sums whose heavy tail is on the other side
TINY = 1e-12  # a scale below this counts as 0, and nothing is divided by it
# If log μ is a logarithm to base b, the log-ratio divided by log π is BASES[b]. Rounding and noise may change that by
# BASE_SLACK.
BASES = {2: 1 - 1 / math.log(2), 10: 1 - 1 / math.log(10)}
BASE_SLACK = 0.04
TILT_ERROR = 0.25  # largest standard error of a tilt, which is 0 or, for an engine 1.5 times as hot, 0.4
LEFT_OVER = 0.4  # largest share of the misfit that remains if old log-probs are corrected for its true cause
FEW_MISFITS = 3.0  # a sum of min(|d|, 1) over tokens up to this may be chance


def statistics(read: Values) -> dict[str, Any]:
    """Statistics from the means of `evidence_metrics`, together with these means, whose names lose their prefix."""
    m = {name.removeprefix(EVIDENCE): value for name, value in read.items()}
    n, p, d, centred = max(m["computed"], 1.0), m["logprob"], m["log_ratio_mean"], m["logprob"] + m["entropy_mean"]

    def over(value: float, scale: float) -> float:
        return value / scale if abs(scale) > TINY else 0.0

    def t(mean: float, square: float) -> float:
        scale = math.sqrt(max(square - mean**2, 0.0) / n)
        return mean / scale if scale > 0 else math.copysign(math.inf, mean) if mean else 0.0

    p_square, d_square, pd = m["logprob_square"], m["log_ratio_square"], m["logprob_log_ratio"]
    p_variance, covariance = p_square - p**2, p_square - p**2 - (pd - p * d)
    old_variance = p_variance - 2 * (pd - p * d) + d_square - d**2
    # This is the least-squares fit of d by c after the part that e explains has been removed from both.
    by_e, r_by_e = over(m["fit_ce"], m["fit_ee"]), over(m["fit_er"], m["fit_ee"])
    cc, cr = m["fit_cc"] - by_e * m["fit_ce"], m["fit_cr"] - by_e * m["fit_er"]
    rr, slope = m["fit_rr"] - r_by_e * m["fit_er"], over(cr, cc)
    factor = over(pd, p_square)
    base = next((b for b, expected in BASES.items() if abs(factor - expected) < BASE_SLACK), 0)
    # The tilt is E c divided by the value it would have if the tokens had been sampled with log μ. It is 0 if the
    # policy sampled them. If the engine did, it is about 1, or about 1/T² for normal logits at T > 1 times the
    # temperature.
    tilt = over(centred, -slope * m["centred_square"])
    tilt_error = over(math.sqrt(max(m["centred_square"] - centred**2, 0.0) / n), abs(slope) * m["centred_square"])
    engine_tilt = min(1.0, (1 - slope) ** 2)
    agreement = over(covariance, math.sqrt(max(p_variance, 0.0) * max(old_variance, 0.0)))
    return m | {
        "centred": centred,
        "centred_t": t(centred, m["centred_square"]),
        "centred_sum": n * centred,
        "log_ratio_t": t(d, d_square),
        "variance": p_variance,
        "old_variance": old_variance,
        "agreement": agreement,
        "misfit_nearest": min(m["misfit_previous"], m["misfit_next"]),
        "slope": slope,
        "explained": over(cr**2, cc * rr),
        "informative": n * cc,
        "heat": over(1.0, 1 - slope),
        "sampled_by_policy": tilt < engine_tilt / 2 and tilt_error < TILT_ERROR,
        "factor": factor,
        "proportional": over(pd**2, p_square * d_square),
        "base": base,
        "ln_base": math.log(max(base, 1)),
        "neighbour": "before" if m["misfit_previous"] < m["misfit_next"] else "after",
        "misfit_sum": n * m["misfit"],
        "misfit_beside_zeros": over(m["misfit"] - m["misfit_zero"], 1 - m["zero_old_share"]),
        "below": -d,
        "above": d,
        "below_entropy": -centred,
        "follows_advantage": m["toward_advantage"] - m["advantage_sign"] * (2 * m["misfit_above"] - m["misfit"]),
    }


def softmaxed(m: Values) -> bool:
    """Whether the logits are probabilities: every row has the log Σ exp z of a flat row, but targets stand out."""
    flat = m["logsumexp_max"] - m["logsumexp_min"] < 0.15  # Σ exp p is V + 1 to V + 1.72
    as_entropy = abs(m["logsumexp_max"] - m["entropy_mean"]) < 0.5 < m["logsumexp_min"]
    # Logits near 0, as at random initialisation, have the same log Σ exp z, but their targets do not stand out.
    return flat and as_entropy and m["centred_t"] > 3 and m["centred"] > 0.3 * math.sqrt(m["centred_square"])


def log_softmaxed(m: Values) -> bool:
    """Whether the logits are log-probs: log Σ exp z is 0 on all rows, up to a rounding to 16 bits."""
    return max(abs(m["logsumexp_max"]), abs(m["logsumexp_min"])) < 0.02 and m["computed"] > 8


def repeated(m: Values) -> bool:
    """Whether old log-probs stay the same from token to token."""
    return m["repeated_share"] > 0.6 * m["unsure_share"] and m["misfit"] > 0.05 and m["computed"] > 8


def cumulative(m: Values) -> bool:
    """Whether old log-probs are running sums."""
    return m["misfit_cumulative"] < LEFT_OVER * m["misfit"] and m["misfit_sum"] > FEW_MISFITS


def shifted(m: Values) -> bool:
    """Whether old log-probs are those of the token before or after."""
    return m["misfit_nearest"] < LEFT_OVER * m["misfit"] and m["misfit_sum"] > FEW_MISFITS


def another_base(m: Values) -> bool:
    """Whether log μ is proportional to log π, by the factor between two bases of a logarithm."""
    return m["base"] > 0 and m["proportional"] > 0.98 and m["informative"] > 1


def learnt(m: Values) -> bool:
    """Whether the log-ratio is small and has the sign of the advantage, as after healthy steps on these very tokens."""
    # With 16 sequences, an engine's mismatch has the signs of their advantages so often only in 1 batch of 200.
    return m["kl_k1"] < HEALTHY_KL and m["toward_advantage"] > 0.65 * m["misfit"]


def filtered(m: Values) -> bool:
    """Whether log μ is above log π on many tokens and hardly ever below it, as after a filter."""
    one_sided = m["misfit_above"] < 0.15 * (m["misfit"] - m["misfit_above"]) and m["explained"] < 0.4
    # Outliers, such as tokens for which a router chose another expert, are fewer than 1 in 50.
    common = m["log_ratio_mean"] ** 2 > 0.02 * m["log_ratio_square"] and m["far_below_share"] < 0.01
    certain = m["log_ratio_t"] < (-3 if m["computed"] >= MANY_TOKENS else -CERTAIN)
    # Placeholders of 0 are no filter: where a filter leaves a single token, π is not far below 1.
    zeros = m["misfit_zero"] > max(0.3 * m["zero_old_share"] + 0.1 * m["misfit"], 0.5 * m["misfit"])
    # 1 - E r is the probability that the filter cut. Rounding logits to bf16 can look like 0.0025 of it on 256 tokens.
    return one_sided and common and certain and not zeros and 1 - m["ratio_mean"] > 0.005 and not learnt(m)


def unfiltered(m: Values) -> bool:
    """Whether log μ is below log π on many tokens and hardly ever above it: π is a softmax over fewer tokens."""
    below = m["misfit"] - m["misfit_above"]
    one_sided = below < 0.15 * m["misfit_above"] and m["explained"] < 0.4
    # A few tokens with a log-prob of -40, or tokens of which the policy is certain, are no sign of a filter.
    common = 0.02 * m["log_ratio_square"] < min(m["log_ratio_mean"] ** 2, 0.02) and m["unsure_share"] > 0.1
    certain = m["log_ratio_t"] > (3 if m["computed"] >= MANY_TOKENS else CERTAIN)
    return one_sided and common and certain and m["ratio_mean"] - 1 > 0.005 and not learnt(m)


def of_another_temperature(m: Values) -> bool:
    """Whether the log-ratio is what another temperature makes of it."""
    strength = m["explained"] / max(1 - m["explained"], 1e-3) * m["informative"]
    within = 0.1 < abs(m["slope"]) < (0.7 if m["slope"] > 0 else 3)  # 1 - 1/T for T from 1/4 to 3
    likely = m["explained"] > 0.5 and m["informative"] > 2 and strength > 7 and m["agreement"] > 0.8
    return within and likely and not learnt(m)


def temperature_differs(m: Values) -> bool:
    """Whether the engine sampled at another temperature, as far as the tokens tell."""
    return of_another_temperature(m) and not m["sampled_by_policy"]


def scored_before_temperature(m: Values) -> bool:
    """Whether log μ is at another temperature, though the tokens were sampled at the trainer's."""
    return of_another_temperature(m) and bool(m["sampled_by_policy"])


def not_sampled(m: Values) -> bool:
    """Whether tokens are less likely than any that the policy or an engine near it samples."""
    # Either hardly any token is certain, or most are far from a log μ that is no placeholder of 0. Texts repeat
    # themselves, so the target of a neighbour may also be the token's own.
    far = m["misfit"] > 0.88 or (m["misfit"] > 0.65 and m["misfit_zero"] < 0.5 * m["misfit"])
    strange = (far or m["unsure_share"] > 0.95) and m["misfit"] > 0.93 * m["misfit_nearest"]
    unaligned = strange and m["agreement"] < max(0.2, 3 / math.sqrt(max(m["computed"], 1)))
    # On-policy, log μ is log π by definition.
    on_policy = m["centred"] < -1 - 0.5 * m["entropy_mean"] and m["misfit"] < 0.05
    # Old log-probs that are 0 nearly everywhere are placeholders, whatever the targets are.
    known = m["zero_old_share"] < 0.98
    return known and m["centred_t"] < -CERTAIN and ((m["centred"] < -0.5 and unaligned) or on_policy)


def of_other_tokens(m: Values) -> bool:
    """Whether log μ has nothing to do with log π, on tokens that the policy sampled."""
    large = m["misfit_sum"] > 4 and m["misfit"] > 0.02 and m["misfit_above"] > 0.3 * m["misfit"]
    own = m["agreement"] >= 0.5 or m["misfit"] <= 0.8 * m["misfit_nearest"]
    return large and not own and m["variance"] < 3 * m["old_variance"]


def far_off(m: Values) -> bool:
    """Whether the log-ratio varies as the log-probs do, and not by a rule."""
    unruly = m["agreement"] < 0.95 and (m["explained"] < 0.5 or m["slope"] > 0.7)
    large = m["misfit"] > 0.05 and m["misfit_sum"] > 8 and m["kl_k1"] > HEALTHY_KL
    return unruly and large and m["log_ratio_square"] > 0.2 * m["old_variance"]


def follows_advantages(m: Values) -> bool:
    """Whether log π has risen where A > 0 and fallen where A < 0, as after learning from these tokens."""
    # The mean of min(|d|, 1)² is at most the mean of min(|d|, 1), which therefore bounds the standard error.
    error = math.sqrt(m["misfit"] / max(m["computed"], 1))
    return m["follows_advantage"] > max(0.12 * m["misfit"], 2 * error)


def overtrained(m: Values) -> bool:
    """Whether the policy has learnt so much from its samples that it is far from them."""
    return far_off(m) and follows_advantages(m) and m["kl_k1"] > TOO_FAR


def of_other_weights(m: Values) -> bool:
    """Whether π is far below μ on average without a rule, and not because the policy has learnt."""
    large = m["kl_k1"] > MISMATCH and m["misfit"] > 0.2 and m["log_ratio_t"] < -SIGNIFICANT
    # With c < 0 the cause is not a lower temperature, which would make the tokens likelier.
    unlikely = m["centred"] < 0 and (large or (far_off(m) and m["log_ratio_t"] < -2))
    return unlikely and not follows_advantages(m)


def unexplained(m: Values) -> bool:
    """Whether the mean log-ratio is far from 0. Without the evidence nothing else is known about it."""
    far = m["computed"] >= MANY_TOKENS and abs(m["kl_k1"]) > MISMATCH
    return far and ("misfit" not in m or (m["misfit"] > 0.1 and not follows_advantages(m)))


def sampled_colder(m: Values) -> bool:
    """Whether tokens are likelier than log π says, though log μ agrees with it."""
    # The excess, in nats over all tokens, is more than a chance lack of rare tokens can make.
    more = m["centred_t"] > CERTAIN and m["centred"] > 0.15 * m["centred_square"] and m["centred_sum"] > 40
    return more and m["misfit"] < 0.05


def sampled_hotter(m: Values) -> bool:
    """Whether tokens are less likely than log π says, though log μ agrees with it."""
    return m["centred_t"] < -SIGNIFICANT and m["centred"] < -0.1 * m["centred_square"] and m["misfit"] < 0.05


def placeholders(m: Values) -> bool:
    """Whether old log-probs of 0 are the mistake: nothing else is wrong, or the policy is certain of no token."""
    many = 0.1  # share of the tokens that were not certain
    if "misfit" not in m:
        return m["computed"] > 0 and m["zero_old_share"] > many
    # A filter that leaves one token makes its log-prob 0 too, but then π is not far below 1.
    far = m["misfit_zero"] > 0.3 * m["zero_old_share"] or abs(m["old_variance"]) < 1e-5 * m["logprob_square"]
    alone = m["misfit_zero"] > 0.7 * m["misfit"] and m["misfit_beside_zeros"] < 0.3
    return far and (alone or m["unsure_share"] > 0.99) and m["zero_old_share"] > many * m["unsure_share"]
