"""Checks of values: they read the data, so they run on a CPU by default and elsewhere only with `validate=True`.

Every tensor here is shaped like targets unless its check says otherwise. Where `valid` is False (masked tokens, and
tokens without an old log-prob) a tensor may hold anything.
"""

import torch
from torch import Tensor

from drpo_kernels.aggregation import TokenCoefficients
from drpo_kernels.graphs import traced
from drpo_kernels.options import LogprobOptions, PolicyOptions
from drpo_kernels.validation import EMPTY_BATCH, LARGEST_SCALE, SMALLEST_SCALE, comparable

# Rounding to bf16 may add this much to a log-prob of 0.
POSITIVE_LOGPROB = 1e-2
# A reference may all but ban a token, so its log-probs may be much lower than a sampler's. Engines write -9999 for a
# log-prob that they do not have.
LEAST_REFERENCE = -1000.0
# A (r - 1)² / (2 ε) with r = e^20 stays finite in float32 up to this advantage.
LARGEST_ADVANTAGE = 1e12
_LOGPROBS = f"log-probabilities of at most {POSITIVE_LOGPROB:g}, 0 and what rounding adds"
_NO_LOGPROBS = ": are these probabilities, or negated? Pass their logarithms, or their negatives"


def wants_values(options: LogprobOptions, targets: Tensor) -> bool:
    """Whether to read the data: by default only on a CPU, where reading waits for nothing, and never inside a graph."""
    if traced(targets):
        return False
    return targets.device.type == "cpu" if options.validate is None else options.validate


def _require(name: str, requirement: str, values: Tensor, good: Tensor, hint: str = "") -> None:
    if not good.all():
        index = tuple((~good).nonzero()[0].tolist())
        where = f" at index {index}" if index else ""
        raise ValueError(f"{name} must be {requirement}, got {values[index].item()}{where}{hint}")


def check_mask_values(mask: Tensor | None) -> None:
    if mask is not None and mask.dtype != torch.bool:
        mask = comparable(mask)
        _require("mask", "bool or 0 and 1 (use token_weights for other factors)", mask, (mask == 0) | (mask == 1))


def check_logprob_values(
    targets: Tensor, temperature: Tensor | None, valid: Tensor, vocab: int, from_logits: bool
) -> None:
    """Check targets and temperatures; `vocab` is the number of real entries, and `from_logits` only adds a hint."""
    wanted = f"in [0, {vocab}), or masked (mask=targets != -100 where -100 stands for none)"
    hint = ": where logits are hidden states, call linear_policy_loss or linear_token_logprobs" if from_logits else ""
    _require("targets", wanted, targets, ~valid | (targets < vocab), hint)
    _require("targets", wanted, targets, ~valid | (targets >= 0))
    if temperature is not None:
        inside = (temperature >= SMALLEST_SCALE) & (temperature <= LARGEST_SCALE)
        _require("temperature", f"in [{SMALLEST_SCALE:g}, {LARGEST_SCALE:g}]", temperature, ~valid | inside)


def check_kept_values(kept_ids: Tensor, targets: Tensor, valid: Tensor, vocab: int) -> None:
    """Check kept_ids [..., K] against targets and valid [...]."""
    ids = comparable(kept_ids)
    inside = ~valid[..., None] | (ids < vocab)
    _require("kept_ids", f"below {vocab}, the vocabulary, or negative where there are no more", ids, inside)
    wanted = "among the kept_ids of its own token: do they belong to the next or the previous token?"
    _require("targets", wanted, targets, ~valid | (ids == targets[..., None]).any(-1))


def check_policy_values(options: PolicyOptions, old_logprobs: Tensor | None, valid: Tensor) -> None:
    """Check the log-probs and every tensor among `PolicyOptions`."""
    if old_logprobs is not None:
        good = ~(old_logprobs > POSITIVE_LOGPROB)
        _require("old_logprobs", _LOGPROBS, old_logprobs, ~valid | good, _NO_LOGPROBS)
    if options.token_weights is not None:
        weights = comparable(options.token_weights)
        _require("token_weights", "finite", weights, ~valid | weights.isfinite())
    ref = options.ref_logprobs
    if ref is not None:
        good = (ref > LEAST_REFERENCE) & (ref <= POSITIVE_LOGPROB)
        wanted = f"{_LOGPROBS}, and above {LEAST_REFERENCE:g}, which stands for a missing one"
        _require("ref_logprobs", wanted, ref, ~valid | good, _NO_LOGPROBS)
    if isinstance(options.reduction, TokenCoefficients):
        for field, value in options.reduction._asdict().items():
            if value is not None:
                value = comparable(value)
                _require(f"reduction.{field}", "finite", value, ~valid | value.isfinite())
    if isinstance(options.normalizer, Tensor):
        normalizer = comparable(options.normalizer)
        good = (normalizer > 0) & normalizer.isfinite()
        _require("normalizer", "positive and finite", normalizer, good, EMPTY_BATCH)


def check_packing_values(cu_seqlens: Tensor, valid: Tensor) -> None:
    """Check offsets [S + 1]. Masked tokens may lie beyond the last sequence, as padding."""
    offsets, count = cu_seqlens.to(torch.int64), valid.numel()  # a difference of unsigned integers would wrap
    last = int(offsets[-1])
    if offsets[0] != 0 or last > count or (offsets.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to at most the {count} tokens, got {offsets.tolist()}")
    beyond = valid.reshape(-1)[last:].nonzero()
    if len(beyond):
        stray = last + int(beyond[0])
        raise ValueError(f"cu_seqlens must cover every token in the mask, got its end {last} and a token at {stray}")


def check_advantage_values(advantages: Tensor, valid: Tensor) -> None:
    """Check that every valid token's advantage is finite and at most LARGEST_ADVANTAGE in size."""
    advantages = comparable(advantages)
    good = advantages.isfinite() & (advantages.abs() <= LARGEST_ADVANTAGE)  # in float16 the bound itself is inf
    _require("advantages", f"finite and at most {LARGEST_ADVANTAGE:g} in size", advantages, ~valid | good)
