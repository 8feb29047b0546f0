"""What the metrics of a batch say about it, in sentences a person can act on: likely cause first, then what to do."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.metrics import FAR_BELOW, FAR_BELOW_ONE, PREFIX
from drpo_kernels.objectives import Objective
from drpo_kernels.validation import POSITIVE_LOGPROB

MANY_TOKENS = 256  # fewer say nothing about a mean
MISMATCH = 0.2  # nats of mean log-ratio; a policy a few steps ahead of its samples is at 0.001 to 0.05
LARGEST_RATIO = 1e3
COLLAPSED_ENTROPY = 0.01  # nats per token; a trained model samples at 0.1 to 1
UNSCORABLE_SHARE = 0.05
PLACEHOLDER_SHARE = 0.1


class Condition(NamedTuple):
    """A sentence, formatted with the metrics, and when it is true; `hides` names what it explains already."""

    kind: str
    holds: Callable[[Mapping[str, float]], bool]
    sentence: str
    hides: tuple[str, ...] = ()


CONDITIONS = (
    Condition(
        "no old log-probs",
        lambda m: m["tokens"] == 0 < m["unscorable"],
        "None of the {unscorable:.0f} tokens in the mask has an old log-prob (all are NaN, -inf, or -100 and below), "
        "so all are treated as masked: ask the rollout engine for the sampled tokens' log-probs, or pass "
        "old_logprobs=None for an on-policy batch.",
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
        ("mismatch", "shift", "explosion", "collapse"),
    ),
    Condition(
        "positive",
        lambda m: m["old_logprob_max"] > POSITIVE_LOGPROB,
        "An old log-prob is {old_logprob_max:.3g}, above 0: are these probabilities, or negated? old_logprobs are "
        "natural logarithms of the sampled tokens' probabilities, at most 0.",
        ("mismatch", "shift", "explosion"),
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
        "placeholder",
        lambda m: m["computed"] > 0 and m["zero_old_share"] > PLACEHOLDER_SHARE,
        f"The old log-prob is exactly 0 on {{zero_old_share:.0%}} of {{computed:.0f}} tokens whose log-prob is below "
        f"-{FAR_BELOW_ONE:g} now: these are placeholders, not log-probs. Pass what the rollout engine sampled with, or "
        "old_logprobs=None for an on-policy batch.",
        ("mismatch", "shift", "explosion"),
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
        lambda m: m["computed"] >= MANY_TOKENS and abs(m["kl_k1"]) > MISMATCH,
        "The mean log-ratio log π - log μ is {log_ratio:+.2f} over {computed:.0f} tokens, far from 0: rollout and "
        "trainer probably score differently. Likely causes: another temperature (pass temperature= what was sampled "
        "with), log-probs after top-p or top-k filtering (ask for unfiltered ones), targets misaligned with the "
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

    Covers: rollout and trainer that score differently (temperature, top-p or top-k, alignment), targets not shifted,
    positive old log-probs, old log-probs missing, an empty mask, advantages all 0, values that are not finite, a
    normalizer of 0, exploding ratios and collapsed entropy. Raises ValueError for metrics that are not `out.metrics`.
    """
    values = _on_host(metrics)
    if "log_ratio" not in values:
        raise ValueError(f"metrics must be out.metrics, with keys such as '{PREFIX}kl_k1', got {sorted(metrics)[:3]}")
    found, hidden = {}, set()
    for condition in CONDITIONS:
        if condition.kind not in hidden and condition.holds(values):
            found[condition.kind] = condition.sentence.format(**values)
            hidden |= set(condition.hides)
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
    return read | ({"log_ratio": -read["kl_k1"]} if "kl_k1" in read else {})
