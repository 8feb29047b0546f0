"""What the metrics of a batch say about it, as sentences that name the likely cause and what to do about it."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels import mismatch
from drpo_kernels.evidence import EVIDENCE, EVIDENCE_METRICS, FAR_BELOW_ONE
from drpo_kernels.metrics import FAR_BELOW, METRICS
from drpo_kernels.mismatch import MANY_TOKENS, Values
from drpo_kernels.objective import Objective
from drpo_kernels.reductions import PREFIX
from drpo_kernels.value_checks import POSITIVE_LOGPROB

LARGEST_RATIO = 1e3
COLLAPSED_ENTROPY = 0.01  # nats per token; a trained model samples at 0.1 to 1
UNSCORABLE_SHARE = 0.05
# Every source of metrics has these; verl's has neither of the other two.
REQUIRED = METRICS.keys() - {"entropy_mean", "active_share"}
FEW_TOKENS = 12  # the spread of fewer tokens says nothing, so no condition that `judges` is tried on them


class Condition(NamedTuple):
    """A sentence about a batch, and when it is true.

    kind      the name of the condition
    holds     whether the sentence is true of these metrics
    sentence  a format string for the metrics
    hides     kinds that need not be said if this one is
    judges    True if the sentence follows from statistics of the tokens, which need `evidence_metrics`
    """

    kind: str
    holds: Callable[[Values], bool]
    sentence: str
    hides: tuple[str, ...] = ()
    judges: bool = False


# Kinds that follow from any cause of a mismatch.
MISMATCHES = ("mismatch", "shift", "explosion", "collapse")
# Kinds that follow if what was passed as old log-probs is something else.
NOT_OLD_LOGPROBS = (
    "repeated", "cumulative", "shifted", "base", "filtered", "unfiltered", "temperature", "raw", "placeholder",
    "not sampled", "sharper", "hotter", "unrelated", "overtrained", "unsynchronised", *MISMATCHES,
)  # fmt: skip

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
        mismatch.softmaxed,
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
        mismatch.repeated,
        "The old log-prob is the same as the token's before on nearly all of {computed:.0f} tokens, and not the "
        "policy's: a sequence's mean or sum, or a constant, stands in place of each token's log-prob. Ask the "
        "rollout engine for log-probs per token.",
        ("sentinel", "unscorable", *NOT_OLD_LOGPROBS),
        judges=True,
    ),
    Condition(
        "cumulative",
        mismatch.cumulative,
        "The old log-probs are running sums: what each adds to the one before it is the policy's log-prob. Pass each "
        "token's own log-prob (their differences along a sequence).",
        ("sentinel", "unscorable", *NOT_OLD_LOGPROBS),
        judges=True,
    ),
    Condition(
        "shifted",
        mismatch.shifted,
        "old_logprobs are shifted by one: log π of a token agrees with log μ of the token {neighbour} it, and not with "
        "its own. Align them with targets (with targets = tokens[:, 1:], log μ of tokens[:, 1:]).",
        ("not sampled", *NOT_OLD_LOGPROBS),
        judges=True,
    ),
    Condition(
        "base",
        mismatch.another_base,
        "old_logprobs are logarithms to base {base:.0f}: the log-ratio is {factor:+.2f} times log π on every token. "
        "Multiply them by ln {base:.0f} = {ln_base:.4f}.",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "filtered",
        mismatch.filtered,
        "The old log-probs are above the policy's by {below:.2f} nats on average, and hardly ever below: they are "
        "those after top-p, top-k or min-p filtering, which the policy does not apply. Pass the ids that the engine "
        "kept as kept_ids=, or sample without a filter.",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "unfiltered",
        mismatch.unfiltered,
        "The old log-probs are below the policy's by {above:.2f} nats on average, and hardly ever above: they are over "
        "the whole vocabulary, and the policy is a softmax over fewer ids (kept_ids=, or a filter of the trainer's). "
        "Ask the engine for log-probs after its filter (vLLM: logprobs_mode=processed_logprobs).",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "temperature",
        mismatch.temperature_differs,
        "Temperatures differ: the engine sampled at about {heat:.2f} times the temperature that was passed, by how log "
        "μ differs from log π. Pass temperature= what was sampled with; if it is the same already, the engine's "
        "log-probs are those before its temperature.",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "raw",
        mismatch.scored_before_temperature,
        "Temperatures differ: log μ is at about {heat:.2f} times the temperature that was passed, at which the tokens "
        "were sampled. The engine's log-probs are probably those before its temperature: ask for processed ones (vLLM: "
        "logprobs_mode=processed_logprobs).",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "not sampled",
        mismatch.not_sampled,
        "The mean log π of {computed:.0f} tokens is {logprob_mean:.2f}, where the entropy {entropy_mean:.2f} says "
        "-{entropy_mean:.2f} of tokens that the policy sampled: targets are not aligned with hidden states or logits, "
        "the mask covers tokens that nobody sampled (prompt), or the engine's weights are another model's. Nothing is "
        "shifted inside: hidden[i] must predict targets[i] (hidden[:, :-1] with tokens[:, 1:]).",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "unrelated",
        mismatch.of_other_tokens,
        "old_logprobs belong to other tokens: log μ has nothing to do with log π, which is what it should be on "
        "tokens that the policy sampled. Check that they are in the order of targets (sequences shuffled, padding on "
        "the other side, shifted by several).",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "placeholder",
        mismatch.placeholders,
        f"The old log-prob is exactly 0 on {{zero_old_share:.0%}} of {{computed:.0f}} tokens whose log-prob is below "
        f"-{FAR_BELOW_ONE:g} now: these are placeholders, not log-probs. Where they are those of tokens that nobody "
        "sampled (prompt, tool output), leave these out of the mask; else pass what the rollout engine sampled with, "
        "or old_logprobs=None for an on-policy batch.",
        NOT_OLD_LOGPROBS,
    ),
    Condition(
        "overtrained",
        mismatch.overtrained,
        "The policy is far from its samples: the mean log-ratio log π - log μ is {log_ratio:+.2f}, the ratio up to "
        "{ratio_max:.3g}, and log π has risen where A > 0 and fallen where A < 0. Train on fresher samples, lower the "
        "learning rate, or use an objective that bounds the weight (DPPO, CISPO).",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "unsynchronised",
        mismatch.of_other_weights,
        "The mean log-ratio log π - log μ is {log_ratio:+.2f} over {computed:.0f} tokens, and no single mistake "
        "explains it: the engine probably samples with other weights than the trainer's. Check that weights are "
        "synchronised after each step, all of them and to each engine, and that both load the same checkpoint; else "
        "the policy is too far ahead of its samples.",
        NOT_OLD_LOGPROBS,
        judges=True,
    ),
    Condition(
        "sharper",
        mismatch.sampled_colder,
        "The tokens are likelier than their own distribution says, by {centred:.2f} nats on average, though log μ "
        "agrees with log π: they were sampled at a lower temperature, or after top-p or top-k filtering, and the "
        "engine's log-probs are those before it. If the temperature was lower, pass it as temperature=. If top-p or "
        "top-k was on, pass kept_ids= with the engine's processed log-probs, or sample without a filter.",
        judges=True,
    ),
    Condition(
        "hotter",
        mismatch.sampled_hotter,
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
        mismatch.unexplained,
        "The mean log-ratio log π - log μ is {log_ratio:+.2f} over {computed:.0f} tokens, far from 0: rollout and "
        "trainer probably score differently. Likely causes: another temperature (pass temperature= what was sampled "
        "with), log-probs after top-p or top-k filtering (pass kept_ids=), targets misaligned with the "
        "logits, or weights not synchronised to the rollout engine.",
    ),
    Condition(
        "explosion",
        lambda m: m["ratio_max"] > LARGEST_RATIO,
        "The largest ratio π/μ is {ratio_max:.3g}: single tokens dominate the gradient of an objective without a cap. "
        "Train on fresher samples, lower the learning rate, or use an objective that bounds the weight (DPPO, "
        "CISPO). Ratios above 1000 on a fresh batch mean that rollout and trainer compute different numbers.",
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
        mismatch.log_softmaxed,
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
    """Plain sentences about what is wrong with a batch, from `out.metrics`; an empty list for a healthy one.

    metrics    `out.metrics`, or `reduce_metrics` of several: 0-d tensors or floats. Tensors on a GPU are read in one
               synchronisation, so call this where you log
    objective  adds its own remark, such as that DRPO's boundary is never reached with δ >= 1
    loss       `out.loss`; if only the coefficients made it infinite, a sentence says so
    seen       the kinds that were reported before. Their sentences are left out, and new kinds are added to the set.
               Keep one set per run to be told each thing once

    The likeliest cause comes first and hides what follows from it. These are covered: another temperature than the
    engine's, with an estimate of it; old log-probs that are shifted by one, of other tokens, in another base, after
    top-p or top-k, sequence means or running sums, positive, placeholders or missing; targets not aligned with the
    logits; logits that are probabilities or log-probs; weights not synchronised; an empty mask, advantages all 0,
    values that are not finite, a normalizer of 0, exploding ratios and collapsed entropy.

    Most causes are told apart by the metrics under "drpo/evidence/" (`drpo_kernels.evidence.evidence_metrics`). Without
    them, as in an old log, one sentence names all causes of a mismatch. Bf16 and fp8 engines and policies some steps
    ahead of their samples count as healthy, and so do temperatures that differ by less than a tenth. To see a cause
    takes about 256 tokens at a mean entropy of 0.2 nat, and more at a lower entropy. A sentence from fewer than 256
    tokens says so, and from fewer than 12 no such cause is named.
    Raises TypeError or ValueError for metrics that are not `out.metrics`.
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be out.metrics or what reduce_metrics returns, got {type(metrics).__name__}")
    every = REQUIRED | (EVIDENCE_METRICS.keys() if PREFIX + EVIDENCE + "misfit" in metrics else set())
    if missing := sorted(PREFIX + name for name in every if PREFIX + name not in metrics):
        raise ValueError(f"metrics must be out.metrics with all of its keys, got some without {', '.join(missing[:3])}")
    values = _on_host(metrics)
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
    if loss is not None and not torch.as_tensor(loss).isfinite().all() and "not finite" not in found:
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
    tensors = [value.detach().float() for value in values if isinstance(value, Tensor)]
    if len(tensors) == len(values):
        values = torch.stack(tensors).tolist()
    read = {name.removeprefix(PREFIX): float(value) for name, value in zip(names, values, strict=True)}
    read["log_ratio"] = -read["kl_k1"]
    return read | mismatch.statistics(read) if EVIDENCE + "misfit" in read else read
