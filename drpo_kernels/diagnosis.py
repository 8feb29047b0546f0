"""What the metrics of a batch say about it, in sentences a person can act on: likely cause first, then what to do."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.metrics import EVIDENCE, FAR_BELOW, FAR_BELOW_ONE, PREFIX
from drpo_kernels.objectives import Objective
from drpo_kernels.validation import POSITIVE_LOGPROB

MANY_TOKENS = 256  # of fewer, what a sentence says of them may be chance, and it says so
FEW_TOKENS = 12  # of fewer, their spread says nothing, and neither does a sentence that is judged by it
MISMATCH = 0.2  # nats of mean log-ratio; a policy a few steps ahead of its samples is at 0.001 to 0.05
LARGEST_RATIO = 1e3
COLLAPSED_ENTROPY = 0.01  # nats per token; a trained model samples at 0.1 to 1
UNSCORABLE_SHARE = 0.05
PLACEHOLDER_SHARE = 0.1  # of the tokens that were not certain
CERTAIN = 5.0  # standard errors; sums over tokens have heavy tails
# the log-ratio over log π where log μ is a logarithm to that base
BASES = {2: 1 - 1 / math.log(2), 10: 1 - 1 / math.log(10)}
# nats: the logsumexp of log-probs that were rounded to 16 bits
ROUNDED_LOGSUMEXP = 0.02
# a scale below this is 0, and nothing is divided by it
TINY = 1e-12

Values = Mapping[str, float]


class Condition(NamedTuple):
    """A sentence, formatted with the metrics, and when it is true; `hides` names what it explains already. `judges`: it
    is about a sample's statistics, for which metrics need the evidence of `evidence_metrics`.
    """

    kind: str
    holds: Callable[[Values], bool]
    sentence: str
    hides: tuple[str, ...] = ()
    judges: bool = False


# what any cause of a mismatch explains
MISMATCHES = ("mismatch", "shift", "explosion", "collapse")
# and what makes old log-probs none
NOT_OLD_LOGPROBS = (
    "repeated", "cumulative", "shifted", "base", "filtered", "temperature", "raw", "placeholder", "not sampled",
    "sharper", "hotter", "unrelated", "overtrained", "unsynchronised", *MISMATCHES,
)  # fmt: skip


def _learnt(m: Values) -> bool:
    """Whether the log-ratio is small and has the sign of the advantage, as after healthy steps on these very tokens."""
    return m["kl_k1"] < 0.05 and m["toward_advantage"] > 0.65 * m["misfit"]


def _fits(m: Values) -> bool:
    """Whether the log-ratio is what another temperature makes of it."""
    strength = m["explained"] / max(1 - m["explained"], 1e-3) * m["informative"]
    within = 0.1 < abs(m["slope"]) < (0.7 if m["slope"] > 0 else 3)  # 1 - 1/T for T from 1/4 to 3
    likely = m["explained"] > 0.5 and m["informative"] > 2 and strength > 7 and m["agreement"] > 0.8
    return within and likely and not _learnt(m)


def _placeholders(m: Values) -> bool:
    """Whether old log-probs of 0 are what is wrong: nothing else is, or the policy is certain of no token."""
    if "misfit" not in m:
        return m["computed"] > 0 and m["zero_old_share"] > PLACEHOLDER_SHARE
    # a filter that leaves one token makes its log-prob 0 too, but then π is not far below 1
    far = m["misfit_zero"] > 0.3 * m["zero_old_share"] or abs(m["old_variance"]) < 1e-5 * m["logprob_square"]
    alone = (m["misfit_zero"] > 0.7 * m["misfit"] and m["misfit_rest"] < 0.3) or m["unsure_share"] > 0.99
    return far and alone and m["zero_old_share"] > PLACEHOLDER_SHARE * m["unsure_share"]


def _filtered(m: Values) -> bool:
    """Whether log μ is above log π on many tokens and hardly ever below it, as after a filter."""
    one_sided = m["misfit_above"] < 0.15 * (m["misfit"] - m["misfit_above"]) and m["explained"] < 0.4
    # outliers, such as tokens of which another expert was chosen, are fewer than 1 in 50
    common = m["log_ratio_mean"] ** 2 > 0.02 * m["log_ratio_square"] and m["far_below_share"] < 0.01
    certain = m["log_ratio_t"] < (-3 if m["computed"] >= MANY_TOKENS else -CERTAIN)
    # placeholders of 0 are not what a filter leaves: where one token is left, π is not far below 1
    zeros = m["misfit_zero"] > max(0.3 * m["zero_old_share"] + 0.1 * m["misfit"], 0.5 * m["misfit"])
    return one_sided and common and certain and not zeros and 1 - m["ratio_mean"] > 0.005 and not _learnt(m)


def _far_off(m: Values) -> bool:
    """Whether the log-ratio varies as the log-probs do, and not by a rule."""
    unruly = m["agreement"] < 0.95 and (m["explained"] < 0.5 or m["slope"] > 0.7)
    large = m["misfit"] > 0.05 and m["misfit_off"] > 8 and m["kl_k1"] > 0.05
    return unruly and large and m["log_ratio_square"] > 0.2 * m["old_variance"]


CONDITIONS = (
    Condition(
        "no old log-probs",
        lambda m: m["tokens"] == 0 < m["unscorable"],
        "None of the {unscorable:.0f} tokens in the mask has an old log-prob (all are NaN, -inf, or -100 and below), "
        "so all are treated as masked: ask the rollout engine for the sampled tokens' log-probs, each token's own, or "
        "pass old_logprobs=None for an on-policy batch.",
        ("mask empty", "unscorable", "sentinel"),
    ),
    Condition(
        "mask empty",
        lambda m: m["tokens"] == 0,
        "The mask is empty, so the loss is 0: check that it is 1 on completion tokens and aligned with targets, and "
        "that truncation has not left prompts alone.",
    ),
    Condition(
        "not finite",
        lambda m: m["nonfinite"] > 0,
        "{nonfinite:.0f} computed tokens have a log-prob or a slope that is not finite: a NaN or inf among their "
        "logits, a target outside the vocabulary, such as -100 without a mask (validate=True names it on a GPU), or a "
        "target whose logit is -inf. Mask tokens that the trainer's own filter bans; for the rest look at the "
        "backbone's last hidden states.",
        ("softmaxed", "log-softmaxed", *NOT_OLD_LOGPROBS),
    ),
    Condition(
        "softmaxed",
        lambda m: (
            m["logsumexp_max"] - m["logsumexp_min"] < 0.15
            and abs(m["logsumexp_max"] - m["entropy_mean"]) < 0.5 < m["logsumexp_min"]
            and m["centred_t"] > 3
            and m["centred"] > 0.3 * math.sqrt(m["centred_square"])
        ),
        "The logits are probably probabilities: log Σ exp z is {logsumexp_max:.2f} on all of {computed:.0f} rows, the "
        "entropy {entropy_mean:.2f}, as on a flat row, and yet the targets stand out. Pass the logits before softmax.",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "positive",
        lambda m: m["old_logprob_max"] > POSITIVE_LOGPROB,
        "An old log-prob is {old_logprob_max:.3g}, above 0: are these probabilities, or negated? old_logprobs are "
        "natural logarithms of the sampled tokens' probabilities, at most 0.",
        NOT_OLD_LOGPROBS,
    ),
    Condition(
        "repeated",
        lambda m: m["repeated_share"] > 0.6 * m["unsure_share"] and m["misfit"] > 0.05 and m["computed"] > 8,
        "The old log-prob is the same as the token's before on nearly all of {computed:.0f} tokens, and not the "
        "policy's: a sequence's mean or sum, or a constant, stands in place of each token's log-prob. Ask the "
        "rollout engine for log-probs per token.",
        ("sentinel", "unscorable", *NOT_OLD_LOGPROBS),
        judges=True,
    ),
    Condition(
        "cumulative",
        lambda m: m["misfit_cumulative"] < 0.4 * m["misfit"] and m["misfit_off"] > 3,
        "The old log-probs are running sums: what each adds to the one before it is the policy's log-prob. Pass each "
        "token's own log-prob (their differences along a sequence).",
        ("sentinel", "unscorable", *NOT_OLD_LOGPROBS),
        judges=True,
    ),
    Condition(
        "shifted",
        lambda m: min(m["misfit_previous"], m["misfit_next"]) < 0.4 * m["misfit"] and m["misfit_off"] > 3,
        "old_logprobs are shifted by one: log π of a token agrees with log μ of the token {neighbour} it, and not with "
        "its own. Align them with targets (with targets = tokens[:, 1:], log μ of tokens[:, 1:]).",
        ("not sampled", *NOT_OLD_LOGPROBS),
        judges=True,
    ),
    Condition(
        "base",
        lambda m: m["base"] > 0 and m["proportional"] > 0.98 and m["informative"] > 1,
        "old_logprobs are logarithms to base {base:.0f}: the log-ratio is {factor:+.2f} times log π on every token. "
        "Multiply them by ln {base:.0f} = {ln_base:.4f}.",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "filtered",
        _filtered,
        "The old log-probs are above the policy's by {below:.2f} nats on average, and hardly ever below: they are "
        "those after top-p, top-k or min-p filtering, which the policy does not apply. Pass the ids that the engine "
        "kept as kept_ids=, or sample without a filter.",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "temperature",
        lambda m: _fits(m) and not m["sampled_by_policy"],
        "Temperatures differ: the engine sampled at about {heat:.2f} times the temperature that was passed, by how log "
        "μ differs from log π. Pass temperature= what was sampled with; if it is the same already, the engine's "
        "log-probs are those before its temperature.",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "raw",
        _fits,
        "Temperatures differ: log μ is at about {heat:.2f} times the temperature that was passed, at which the tokens "
        "were sampled. The engine's log-probs are probably those before its temperature: ask for processed ones (vLLM: "
        "logprobs_mode=processed_logprobs).",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "not sampled",
        lambda m: m["centred_t"] < -CERTAIN and (
            (m["centred"] < -0.5 and m["unaligned"])
            or (m["centred"] < -1 - 0.5 * m["entropy_mean"] and m["misfit"] < 0.05)
        ),
        "The mean log π of {computed:.0f} tokens is {logprob_mean:.2f}, where the entropy {entropy_mean:.2f} says "
        "-{entropy_mean:.2f} of tokens that the policy sampled: targets are not aligned with hidden states or logits, "
        "the mask covers tokens that nobody sampled (prompt), or the engine's weights are another model's. Nothing is "
        "shifted inside: hidden[i] must predict targets[i] (hidden[:, :-1] with tokens[:, 1:]).",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "unrelated",
        lambda m: (
            m["misfit"] > 0.8 * min(m["misfit_previous"], m["misfit_next"])
            and m["misfit_off"] > 4
            and m["misfit"] > 0.02
            and m["misfit_above"] > 0.3 * m["misfit"]
            and m["agreement"] < 0.5
            and m["variance"] < 3 * m["old_variance"]
        ),
        "old_logprobs belong to other tokens: log μ has nothing to do with log π, which is what it should be on "
        "tokens that the policy sampled. Check that they are in the order of targets (sequences shuffled, padding on "
        "the other side, shifted by several).",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "placeholder",
        _placeholders,
        f"The old log-prob is exactly 0 on {{zero_old_share:.0%}} of {{computed:.0f}} tokens whose log-prob is below "
        f"-{FAR_BELOW_ONE:g} now: these are placeholders, not log-probs. Where they are those of tokens that nobody "
        "sampled (prompt, tool output), leave these out of the mask; else pass what the rollout engine sampled with, "
        "or old_logprobs=None for an on-policy batch.",
        NOT_OLD_LOGPROBS,
    ),
    Condition(
        "overtrained",
        # |d| within 1: its square is no larger on average than it is, and so bounds the standard error
        lambda m: _far_off(m) and m["follows_advantage"] > max(
            0.12 * m["misfit"], 2 * math.sqrt(m["misfit"] / m["computed"])
        ),
        "The policy has exploded away from its samples: the ratio π/μ is up to {ratio_max:.3g}, and log π has risen "
        "where A > 0 and fallen where A < 0. Train on fresher samples, lower the learning rate, or use an objective "
        "that bounds the weight (DRPO with δ < 1, DPPO, CISPO).",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "unsynchronised",
        lambda m: (
            m["centred"] < 0  # a lower temperature makes tokens likelier
            and ((_far_off(m) and m["log_ratio_t"] < -2)
                 or (m["kl_k1"] > MISMATCH and m["misfit"] > 0.2 and m["log_ratio_t"] < -4))
        ),
        "The mean log-ratio log π - log μ is {log_ratio:+.2f} over {computed:.0f} tokens, and no single mistake "
        "explains it: the engine probably samples with other weights than the trainer's. Check that weights are "
        "synchronised after each step, all of them and to each engine, and that both load the same checkpoint; else "
        "the policy is too far ahead of its samples.",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "sharper",
        lambda m: (
            m["centred_t"] > CERTAIN
            and m["centred"] > 0.15 * m["centred_square"]
            and m["centred_sum"] > 40  # more than rare tokens that chance did not draw can make up
            and m["misfit"] < 0.05
        ),
        "The tokens are likelier than their own distribution says, by {centred:.2f} nats on average, though log μ "
        "agrees with log π: they were sampled at a lower temperature, or after top-p or top-k filtering, and the "
        "engine's log-probs are those before it. If the temperature was lower, pass it as temperature=. If top-p or "
        "top-k was on, pass kept_ids= with the engine's processed log-probs, or sample without a filter.",
        judges=True,
    ),
    Condition(
        "hotter",
        lambda m: m["centred_t"] < -4 and m["centred"] < -0.1 * m["centred_square"] and m["misfit"] < 0.05,
        "The tokens are less likely than their own distribution says, by {below_entropy:.2f} nats on average, though "
        "log μ agrees with log π: they were sampled at a higher temperature, and the engine's log-probs are those "
        "before it. Pass temperature= what was sampled with, and ask the engine for processed log-probs (vLLM: "
        "logprobs_mode=processed_logprobs).",
        judges=True,
    ),
    Condition(
        "sentinel",
        lambda m: m["sentinels"] > 0,
        "{sentinels:.0f} old log-probs are -100 or below, such as the -9999 that servers write for a log-prob that "
        "they do not have: no sampled token has one, and they are treated as masked like NaN. Ask the server for the "
        "log-probs of the sampled tokens themselves.",
    ),
    Condition(
        "unscorable",
        lambda m: m["unscorable"] - m["sentinels"] > UNSCORABLE_SHARE * (m["tokens"] + m["unscorable"]),
        "{unscorable:.0f} tokens in the mask have no old log-prob (NaN, -inf, or -100 and below), beside "
        "{tokens:.0f} that have one, "
        "and are treated as masked: the mask may cover tokens that the rollout engine did not sample (prompt, tool "
        "output).",
    ),
    Condition(
        "no advantage",
        lambda m: m["tokens"] > 0 == m["weighted"],
        "All advantages are 0 on the {tokens:.0f} valid tokens, so the policy term learns nothing: groups whose "
        "rewards are all equal give A = 0. Check the reward, the group size, and the dtype in which advantages are "
        "computed.",
    ),
    Condition(
        "shift",
        lambda m: m["computed"] >= MANY_TOKENS and m["far_below_share"] > 0.5,
        f"The policy's log-prob is more than {FAR_BELOW:g} nats below the old one on {{far_below_share:.0%}} of "
        "{computed:.0f} tokens: targets are probably not aligned with hidden states or logits. Nothing is shifted "
        "inside: hidden[i] must predict targets[i] (hidden[:, :-1] with tokens[:, 1:]).",
        ("mismatch", "explosion"),
    ),
    Condition(
        "mismatch",
        lambda m: m["computed"] >= MANY_TOKENS and abs(m["kl_k1"]) > MISMATCH and m.get("misfit", 1.0) > 0.1,
        "The mean log-ratio log π - log μ is {log_ratio:+.2f} over {computed:.0f} tokens, far from 0: rollout and "
        "trainer probably score differently. Likely causes: another temperature (pass temperature= what was sampled "
        "with), log-probs after top-p or top-k filtering (pass kept_ids=), targets misaligned with the "
        "logits, or weights not synchronised to the rollout engine.",
    ),
    Condition(
        "explosion",
        lambda m: m["ratio_max"] > LARGEST_RATIO,
        "The largest ratio π/μ is {ratio_max:.3g}: single tokens dominate the gradient of an objective without a cap. "
        "Train on fresher samples, lower the learning rate, or use an objective that bounds the weight (DRPO with δ < "
        "1, DPPO, CISPO). Ratios above 1000 on a fresh batch mean that rollout and trainer compute different numbers.",
    ),
    Condition(
        "collapse",
        lambda m: m["computed"] >= MANY_TOKENS and m.get("entropy_mean", 1.0) < COLLAPSED_ENTROPY,
        "The mean entropy is {entropy_mean:.2g} nats over {computed:.0f} tokens: the policy has collapsed and samples "
        "the same answers. Lower the learning rate, add an entropy bonus (entropy_coef), a KL term (kl_coef), or "
        "sample hotter.",
    ),
    Condition(
        "log-softmaxed",
        lambda m: max(abs(m["logsumexp_max"]), abs(m["logsumexp_min"])) < ROUNDED_LOGSUMEXP and m["computed"] > 8,
        "The logits are log-probs already: log Σ exp z is 0 on all of {computed:.0f} rows. The loss is right, but a "
        "log-softmax costs one more pass over [N, V] and as much memory: pass the logits themselves, or hidden states "
        "to linear_policy_loss.",
        judges=True,
    ),
)


def diagnose(
    metrics: Mapping[str, Tensor | float],
    *,
    objective: Objective | None = None,
    loss: Tensor | float | None = None,
    seen: set[str] | None = None,
) -> list[str]:
    """Plain sentences about what is wrong with a batch, from `out.metrics`; none for a healthy one.

    metrics    `out.metrics`, or `reduce_metrics` of several: 0-d tensors or floats. Tensors on a GPU are read in one
               synchronisation, so call this where you log
    objective  adds its own remark, such as that with δ >= 1 DRPO's boundary is never reached
    loss       `out.loss`: says so where only the coefficients made it infinite
    seen       what was said already: those sentences are left out, and new kinds are added to the set. Keep one per run
               to be told each thing once

    The likeliest cause comes first, and hides what follows from it. Covers: another temperature than the engine's, with
    an estimate of it; old log-probs that are shifted by one, of other tokens, in another base, after top-p or top-k,
    sequence means or running sums, positive, placeholders or missing; targets not aligned with the logits; logits that
    are probabilities or log-probs; weights not synchronised; an empty mask, advantages all 0, values that are not
    finite, a normalizer of 0, exploding ratios and collapsed entropy.

    Most are told apart by the metrics under "drpo/evidence/" (`drpo_kernels.metrics.evidence_metrics`); without those,
    as in an old log, a mismatch has one sentence with all its causes. Bf16 and fp8 engines and policies some steps
    ahead of their samples are healthy; so is a mismatch of temperatures below a tenth. How many tokens a cause needs
    depends on how much they tell: 256 at a mean entropy of 0.2 nat, more where there was hardly anything to choose.
    What is said of fewer than 256 says so. Raises ValueError for metrics that are not `out.metrics`.
    """
    values = _on_host(metrics)
    if "log_ratio" not in values:
        raise ValueError(f"metrics must be out.metrics, with keys such as '{PREFIX}kl_k1', got {sorted(metrics)[:3]}")
    found, hidden = {}, set()
    for condition in CONDITIONS:
        if condition.kind in hidden:
            continue
        if condition.judges and ("misfit" not in values or values["computed"] < FEW_TOKENS):
            continue
        if condition.holds(values):
            found[condition.kind] = condition.sentence.format(**values)
            hidden |= set(condition.hides)
            if condition.judges and values["computed"] < MANY_TOKENS:
                found[condition.kind] += f" (From {values['computed']:.0f} tokens only: see whether it stays.)"
    if loss is not None and not torch.as_tensor(loss).isfinite() and "not finite" not in found:
        found["coefficients"] = (
            "The loss is not finite though every token's log-prob is: normalizer is probably 0 (a batch without a "
            "valid token counts as 1), or a coefficient or token weight is not finite. validate=True names it."
        )
    remark = None if objective is None else objective.remark
    if remark is not None:
        found["objective"] = remark
    if seen is not None:
        found = {kind: sentence for kind, sentence in found.items() if kind not in seen}
        seen.update(found)
    return list(found.values())


def _on_host(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    names = [name for name in metrics if name.startswith(PREFIX)]
    values = [metrics[name] for name in names]
    if values and isinstance(values[0], Tensor):
        values = torch.stack([value.detach().float() for value in values]).tolist()
    read = {name.removeprefix(PREFIX): float(value) for name, value in zip(names, values, strict=True)}
    read |= {"log_ratio": -read["kl_k1"]} if "kl_k1" in read else {}
    return read | _statistics(read) if EVIDENCE + "misfit" in read else read


def _statistics(read: Values) -> dict[str, float]:
    """What the means of `evidence_metrics` say together, and those means themselves, without their prefix."""
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
    # the fit of d by c, after e has taken what it explains of both
    by_e, r_by_e = over(m["fit_ce"], m["fit_ee"]), over(m["fit_er"], m["fit_ee"])
    cc, cr = m["fit_cc"] - by_e * m["fit_ce"], m["fit_cr"] - by_e * m["fit_er"]
    rr, slope = m["fit_rr"] - r_by_e * m["fit_er"], over(cr, cc)
    factor, nearest = over(pd, p_square), min(m["misfit_previous"], m["misfit_next"])
    base = next((b for b, expected in BASES.items() if abs(factor - expected) < 0.04), 0)
    # E c over what it would be if log μ were the tokens' own: 0 where the policy sampled them; where the engine did,
    # about 1, and for normally distributed logits at T > 1 times the temperature about 1/T²
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
        "unaligned": (
            max(m["misfit"], m["unsure_share"] - 0.07) > 0.88
            and m["misfit"] > 0.93 * nearest
            and agreement < max(0.2, 3 / math.sqrt(n))
        ),
        "slope": slope,
        "explained": over(cr**2, cc * rr),
        "informative": n * cc,
        "heat": over(1.0, 1 - slope),
        "sampled_by_policy": tilt < engine_tilt / 2 and tilt_error < 0.25,
        "factor": factor,
        "proportional": over(pd**2, p_square * d_square),
        "base": base,
        "ln_base": math.log(max(base, 1)),
        "neighbour": "before" if m["misfit_previous"] < m["misfit_next"] else "after",
        "misfit_off": n * m["misfit"],
        "misfit_rest": over(m["misfit"] - m["misfit_zero"], 1 - m["zero_old_share"]),
        "below": -d,
        "below_entropy": -centred,
        "follows_advantage": m["toward_advantage"] - m["advantage_sign"] * (2 * m["misfit_above"] - m["misfit"]),
    }
