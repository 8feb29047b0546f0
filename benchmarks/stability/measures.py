"""The numbers that are measured at every update, over its valid tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.stability.weights import gradient_weight
from drpo_kernels import Objective, PolicyLossOutput, Tokens
from drpo_kernels.demo.rollout import Rollout

# DPPO and PPO, at their defaults, stop a token that moves the harmful way beyond this |π - μ| or this |r - 1|.
SHIFT_BOUNDARY, RATIO_BOUNDARY = 0.15, 0.2
RARE = 0.01  # A token is rare if its μ is below this.


def token_measures(objective: Objective, out: PolicyLossOutput, batch: Rollout) -> dict[str, float]:
    """Means over the valid tokens, or over those that a measure is about; NaN if there are none of those.

    A token is beyond a boundary if it moved past it in the direction in which its advantage pushes. Weights
    and shares beyond a boundary are of tokens with A ≠ 0.
    """
    valid = batch.mask
    logprobs, old = out.logprobs[valid], batch.old_logprobs[valid]
    advantages = batch.advantages[:, None].expand_as(valid)[valid]
    tokens = Tokens(logprobs, old, advantages)
    shift, excess, log_ratio = tokens.prob_shift.abs(), tokens.ratio_minus_one.abs(), tokens.log_ratio
    pushed, rare = advantages != 0, old.exp() < RARE
    harmful = advantages * log_ratio > 0
    weight = gradient_weight(objective, logprobs, old, torch.where(pushed, advantages, 1))
    beyond_shift, beyond_ratio = harmful & (shift > SHIFT_BOUNDARY), harmful & (excess > RATIO_BOUNDARY)
    return {
        "entropy": _over(out.entropy[valid], True),
        "prob_shift": _over(shift, True),
        "log_ratio": _over(log_ratio.abs(), True),
        "log_ratio_std": log_ratio.std().item(),
        "log_ratio_rare": _over(log_ratio.abs(), rare),
        "kl": _over(tokens.ratio_minus_one - log_ratio, True),
        "rare": _over(rare.float(), True),
        "pushed": _over(pushed.float(), True),
        "beyond_shift": _over(beyond_shift.float(), pushed),
        "beyond_ratio": _over(beyond_ratio.float(), pushed),
        "beyond_ratio_rare": _over(rare.float(), beyond_ratio),
        "weight_beyond_shift": _over(weight, beyond_shift),
        "weight_beyond_ratio": _over(weight, beyond_ratio),
        "weight_within": _over(weight, pushed & ~beyond_shift & ~beyond_ratio),
    }


def _over(values: Tensor, where: Tensor | bool) -> float:
    chosen = values if where is True else values[where]
    return chosen.mean().item()
