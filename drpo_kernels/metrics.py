"""What a dashboard needs to see trouble coming: 0-d detached tensors computed from the per-row outcome, for any
objective.

The gradient weight is w = (dℓ/dlogπ) / (-A r): 1 for an unregularised surrogate, 0 where a loss drops a token, negative
where it pushes back.
"""

import torch
from torch import Tensor

from drpo_kernels.objectives import Objective
from drpo_kernels.tokens import Tokens

# w of a token that an objective left alone differs from 1 by rounding only
UNCLIPPED = 1 - 1e-5


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
) -> dict[str, Tensor]:
    """Means and extremes over computed rows, all inputs [N]; 0 where no row qualifies.

    Weights are over computed rows with A ≠ 0, under a sequence-level objective relative to the token's own ratio.
    beyond_trust_region  their share with w <= 0 that moved in the harmful direction: up with A > 0, down with A < 0
    clip_share           their share whose gradient a clipping objective cut; 0 for other objectives
    active_share         computed rows over valid ones
    unscorable           tokens in the mask whose old log-prob was NaN, treated as masked
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
    values = {
        "ratio_mean": _mean(tokens.ratio, computed),
        "ratio_max": _extreme(tokens.ratio, computed, largest=True),
        "kl_k1": _mean(-tokens.log_ratio, computed),
        "kl_k3": _mean(tokens.ratio_minus_one - tokens.log_ratio, computed),
        "prob_shift_mean": _mean(shift, computed),
        "prob_shift_max": _extreme(shift, computed, largest=True),
        "weight_mean": _mean(weight, weighted),
        "weight_min": _extreme(weight, weighted, largest=False),
        "weight_max": _extreme(weight, weighted, largest=True),
        "beyond_trust_region": _mean(beyond.to(weight.dtype), weighted),
        "clip_share": _mean(clipped.to(weight.dtype), weighted),
        "entropy_mean": _mean(entropy, computed),
        "active_share": computed.sum() / valid.sum().clamp(min=1),
        "unscorable": unscorable.sum(),
    }
    return {f"drpo/{name}": value.detach() for name, value in values.items()}


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, 0).sum() / where.sum().clamp(min=1)


def _extreme(values: Tensor, where: Tensor, largest: bool) -> Tensor:
    if not values.numel():
        return values.new_zeros(())
    bound = torch.where(where, values, -torch.inf if largest else torch.inf)
    bound = bound.amax() if largest else bound.amin()
    return torch.where(where.any(), bound, 0)
