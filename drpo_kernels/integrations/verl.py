"""verl 0.9: `drpo` and `spo` among its policy losses, and a fused head in place of its `linear_cross_entropy`.

Importing this module registers the losses; verl imports it through the entry point "verl.plugins" of the package.
`use_fused_head` puts the head in place, and so does importing `drpo_kernels.integrations.verl_fused_head`.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from drpo_kernels.backends.row_loss import derivative
from drpo_kernels.distributed import VocabShard
from drpo_kernels.integrations import needs
from drpo_kernels.logprobs import linear_token_logprobs
from drpo_kernels.metrics import policy_metrics
from drpo_kernels.objective import Objective
from drpo_kernels.objectives import DRPO, SPO
from drpo_kernels.token_losses import token_losses
from drpo_kernels.tokens import Tokens, scorable

with needs("verl", "verl>=0.9"):
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, register_policy_loss
    from verl.utils.kernel import linear_cross_entropy as verl_kernel
    from verl.workers.config import ActorConfig, PolicyLossConfig

VERL_HEAD = verl_kernel.linear_cross_entropy
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda logprobs: logprobs,
    "sum": torch.sum,
    "mean": torch.mean,
}


@dataclass
class DRPOPolicyLossConfig(PolicyLossConfig):
    """verl's `actor.policy_loss` with the hyper-parameters of our losses; choose it with `policy_loss._target_`.

    drpo_delta   δ of `loss_mode: drpo`, see `drpo_kernels.DRPO`
    spo_epsilon  ε of `loss_mode: spo`, see `drpo_kernels.SPO`

    Raises TypeError or ValueError if one of them is not a positive number. Raises ValueError if `loss_mode` is or
    becomes "bypass_mode": that is verl's PPO on the rollout engine's log-probs, which some of its trainers set by
    themselves.
    """

    drpo_delta: float = DRPO.delta
    spo_epsilon: float = SPO.epsilon

    def __setattr__(self, name: str, value: object):
        if name == "loss_mode" and value == "bypass_mode":
            raise ValueError(
                "policy_loss.loss_mode must be 'drpo', 'spo' or another loss than verl's 'bypass_mode', which is PPO, "
                "got 'bypass_mode'. algorithm.rollout_correction.bypass_mode=true writes it over loss_mode in trainers "
                "of verl.experimental and with trainer.use_v1=false: write trainer.use_v1=true, where bypass_mode=true "
                "makes μ the rollout engine's log-probs and leaves loss_mode as it is"
            )
        super().__setattr__(name, value)

    def __post_init__(self):
        for objective_from in OBJECTIVES.values():
            objective_from(self)


# The objective of each `loss_mode`. verl's own PolicyLossConfig lacks the hyper-parameters, so each has a default.
OBJECTIVES: dict[str, Callable[[Mapping], Objective]] = {
    "drpo": lambda settings: DRPO(settings.get("drpo_delta", DRPO.delta)),
    "spo": lambda settings: SPO(settings.get("spo_epsilon", SPO.epsilon)),
}


def policy_loss_function(objective_from: Callable[[Mapping], Objective]) -> Callable:
    """A policy loss for verl's registry. `objective_from(config.policy_loss)` returns its token-level objective."""

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: ActorConfig | None = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The objective's loss, aggregated by verl's `agg_loss` with the normalisers in `config.global_batch_info`.

        old_log_prob        [B, L], log μ
        log_prob            [B, L], log π, which carries the gradient
        advantages          [B, L]
        response_mask       [B, L] bool or 0/1; masked positions may carry anything, and a token whose old log-prob is
                            NaN, or -100 and below, is treated as masked
        rollout_is_weights  [B, L], a factor per token, or None

        -> (0-d loss in float32, or float64 for float64 log-probs; metrics as floats, read from the device at once: the
        ones of `drpo_kernels.metrics`, and verl's "actor/..." that have a meaning here). Raises TypeError without a
        config.
        """
        if config is None:
            raise TypeError("config must be verl's ActorConfig, got None")
        objective = objective_from(config.policy_loss)
        unmasked = response_mask.bool()
        valid = unmasked & scorable(old_log_prob)
        unscorable = unmasked & ~valid
        sentinels = unscorable & old_log_prob.isfinite()
        dtype = torch.promote_types(log_prob.dtype, torch.float32)
        # The gradient of `where` is exactly 0 at the places that it replaces.
        logprobs, old, adv = (torch.where(valid, x, 0).to(dtype) for x in (log_prob, old_log_prob, advantages))
        losses = token_losses(objective, Tokens(logprobs, old, adv))
        if rollout_is_weights is not None:
            losses = losses * torch.where(valid, rollout_is_weights, 0)
        loss = agg_loss(loss_mat=losses, loss_mask=valid, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
        return loss, _metrics(objective, logprobs.detach(), old, adv, valid, unscorable, sentinels)

    return policy_loss


def _metrics(
    objective: Objective,
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    valid: Tensor,
    unscorable: Tensor,
    sentinels: Tensor,
) -> dict[str, float]:
    with torch.enable_grad():  # verl may evaluate a loss under no_grad
        leaf = logprobs.requires_grad_()
        slope = derivative(token_losses(objective, Tokens(leaf, old, advantages)), leaf, objective)
    with torch.no_grad():
        entropy = torch.zeros_like(old)
        metrics = policy_metrics(
            objective, leaf.detach(), entropy, slope, old, advantages, valid, valid, unscorable, sentinels
        )
        # verl logs the entropy itself, and it computes every token, so these two say nothing here.
        del metrics["drpo/entropy_mean"], metrics["drpo/active_share"]
        # verl's shares are over all valid tokens, ours over valid tokens with A ≠ 0.
        weighted_share = (valid & (advantages != 0)).sum() / valid.sum().clamp(min=1)
        metrics["actor/pg_clipfrac"] = metrics["drpo/beyond_trust_region"] * weighted_share
        metrics["actor/ppo_kl"] = metrics["drpo/kl_k1"]
        values = torch.stack([value.to(old.dtype) for value in metrics.values()])
    return dict(zip(metrics, values.tolist(), strict=True))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: "torch.distributed.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """verl's `linear_cross_entropy` on `drpo_kernels.linear_token_logprobs`: any device, dtype and hidden size.

    hidden [..., H], weight [V, H], labels [...] integer and aligned with hidden, temperature > 0; reduction is "none",
    "sum" or "mean" and acts on the log-probs.

    -> (log-probs of the N labels, [N] or 0-d after a reduction; entropy [N] in nats, never reduced). Both are
    differentiable and float32, or float64 for float64 inputs. They are log-probs, not their negatives.

    In a group of several ranks, weight is this rank's [V / ranks, H] and labels are ids of the whole vocabulary. The
    gradient of hidden is then only this rank's part of the sum over ranks, as with verl's kernel.

    Raises ValueError for another reduction, and what `linear_token_logprobs` raises.
    """
    if not isinstance(reduction, str) or reduction.lower() not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    logprobs, entropy = linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        **_vocabulary_shard(weight, dist_process_group),
    )
    return REDUCTIONS[reduction.lower()](logprobs), entropy


def _vocabulary_shard(weight: Tensor, group: "torch.distributed.ProcessGroup | None") -> dict:
    """The keywords of `linear_token_logprobs` for a weight of which each rank of the group holds V / ranks rows.

    The gradient of hidden stays a part of the sum on each rank, as with verl's kernel: the caller has gathered hidden
    from Megatron's sequence-parallel region, and the backward of that gather adds the parts.
    """
    if group is None or (ranks := torch.distributed.get_world_size(group)) == 1:
        return {}
    return {"vocab_shard": VocabShard(group, (weight.shape[0],) * ranks, partial_hidden_gradient=True)}


def use_fused_head() -> None:
    """Put `linear_cross_entropy` in place of verl's in every verl module of this process, loaded now or later.

    verl calls it if `model.use_fused_kernels` is on and `model.fused_kernel_options.impl_backend` is "triton". Calling
    this again changes nothing; `use_verl_head` undoes it.
    """
    _replace(VERL_HEAD, linear_cross_entropy)


def use_verl_head() -> None:
    """Undo `use_fused_head`."""
    _replace(linear_cross_entropy, VERL_HEAD)


def _replace(head: Callable, replacement: Callable) -> None:
    # Megatron's modules copy the name when they are loaded; other modules look it up in verl_kernel at each call.
    for name, module in list(sys.modules.items()):
        if name.startswith("verl.") and vars(module).get("linear_cross_entropy") is head:
            vars(module)["linear_cross_entropy"] = replacement


def _register() -> None:
    for name, objective_from in OBJECTIVES.items():
        if name in POLICY_LOSS_REGISTRY:
            warnings.warn(f"verl has a policy loss {name!r} already: drpo_kernels leaves it in place", stacklevel=2)
        else:
            register_policy_loss(name)(policy_loss_function(objective_from))


_register()
