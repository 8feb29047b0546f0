"""The numbers that are measured at every update, over its valid tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from drpo_kernels import Objective, PolicyLossOutput, Tokens
from drpo_kernels.backends.row_loss import derivative
from drpo_kernels.demo.rollout import Rollout

# DPPO and PPO, at their defaults, stop a token that moves the harmful way beyond this |π - μ| or this |r - 1|.
SHIFT_BOUNDARY, RATIO_BOUNDARY = 0.15, 0.2
RARE = 0.01  # A token is rare if its μ is below this.


def gradient_weight(objective: Objective, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Return w [N] in dℓ/dlogπ = -A r w of tokens with A ≠ 0, by autograd through the objective's formula: 1 if the
    loss leaves the policy gradient alone, 0 if it drops the token.
    """
    with torch.enable_grad():
        logprobs = logprobs.detach().requires_grad_()
        tokens = Tokens(logprobs, old_logprobs, advantages)
        slope = derivative(objective.token_loss(tokens), logprobs, objective)
    return -slope / (advantages * tokens.ratio.detach())


def token_measures(objective: Objective, out: PolicyLossOutput, batch: Rollout) -> dict[str, float]:
    """Return means over the valid tokens, or over those that a measure is about; NaN if there are none of those.

    A token is beyond a boundary if it moved past it in the direction in which its advantage pushes. Weights and shares
    beyond a boundary are of tokens with A ≠ 0.
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
    means = {
        "entropy": out.entropy[valid],
        "prob_shift": shift,
        "log_ratio_rare": log_ratio.abs()[rare],
        "rare": rare.float(),
        "pushed": pushed.float(),
        "beyond_shift": beyond_shift[pushed].float(),
        "beyond_ratio": beyond_ratio[pushed].float(),
        "beyond_ratio_rare": rare[beyond_ratio].float(),
        "weight_beyond_shift": weight[beyond_shift],
        "weight_beyond_ratio": weight[beyond_ratio],
        "weight_within": weight[pushed & ~beyond_shift & ~beyond_ratio],
    }
    return {name: values.mean().item() for name, values in means.items()} | {"log_ratio_std": log_ratio.std().item()}
