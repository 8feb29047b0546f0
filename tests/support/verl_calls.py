"""Calls of verl's losses on batches as verl pads them, and the formulas in float64 to compare them with."""

import math

import torch

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
GLOBAL = {"dp_size": 4, "batch_num_tokens": 57, "global_batch_size": 12, "loss_scale_factor": 31}
DELTA, EPSILON = 0.2, 0.3
BATCH, LENGTH = 6, 9

# In fp32, |Δ| < 4 is rounded by 2^-23. So are exp, expm1, a few products and the sum of at most 54 tokens. The scale
# below is that of the terms, so no rounding is amplified: 40 roundings of 2^-24 are 2.4e-6.
# In fp64, verl divides "seq-mean-token-mean" by length + 1e-8.
LOSS_BOUND = {torch.float32: 2.4e-6, torch.float64: 1.1e-8}


def actor_config(verl, name="drpo", mode="token-mean", info=None, **policy_loss):
    settings = {"drpo_delta": DELTA, "spo_epsilon": EPSILON, **policy_loss}
    return verl.config.FSDPActorConfig(
        rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode, global_batch_info=dict(info or {}),
        loss_scale_factor=(info or {}).get("loss_scale_factor"),
        policy_loss=verl.ours.DRPOPolicyLossConfig(loss_mode=name, **settings),
    )  # fmt: skip


def batch(dtype, *, seed=0, poison=math.nan):
    """Return [B, L] tensors as verl pads them. Responses have 0 to L tokens and `poison` behind them; A has both signs
    and zeros.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(BATCH, LENGTH, generator=generator, dtype=torch.float64)

    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 5, 0, 1, 7, 4])[:, None]
    old = -normal().abs()
    log_prob = (old + 0.7 * normal()).clamp(max=-1e-3)
    log_prob[0, 0], old[0, 0] = -30.0, -2.0  # beyond the clamp of the log-ratio, where there is no gradient
    advantages = normal()
    advantages[1] = 0
    weights = normal().exp()
    tensors = {"old_log_prob": old, "log_prob": log_prob, "advantages": advantages, "rollout_is_weights": weights}
    return {name: torch.where(mask, x, poison).to(dtype) for name, x in tensors.items()} | {"response_mask": mask}


def call(verl, name, data, config, weighted=True):
    """Call the function that verl finds under the name, and return (loss, gradient of log_prob, metrics)."""
    data = dict(data, log_prob=data["log_prob"].clone().requires_grad_())
    if not weighted:
        data["rollout_is_weights"] = None
    loss, metrics = verl.core.get_policy_loss_fn(name)(loss_agg_mode=config.loss_agg_mode, config=config, **data)
    loss.backward()
    return loss.detach(), data["log_prob"].grad, metrics


def formula(name, logp, old, adv):
    """Return (r A, penalty) of each token. The loss is penalty - r A."""
    ratio = (logp - old).clamp(-20, 20).exp()
    penalty = adv.abs() * (ratio - 1) ** 2
    return ratio * adv, penalty * old.exp() / (2 * DELTA) if name == "drpo" else penalty / (2 * EPSILON)


def aggregated(mode, rows, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None):
    """Aggregate the losses of the sequences, which have no padding, as verl documents the mode."""
    sums = torch.stack([row.sum() for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    sequences = global_batch_size or int((lengths > 0).sum())
    if mode == "token-mean":
        return dp_size * sums.sum() / (batch_num_tokens or lengths.sum())
    if mode == "token-sum":
        return dp_size * sums.sum()
    if mode == "seq-mean-token-mean":
        return dp_size * (sums / lengths.clamp(min=1)).sum() / sequences
    horizon = (loss_scale_factor or LENGTH) if mode == "seq-mean-token-sum-norm" else 1
    return dp_size * sums.sum() / sequences / horizon


def expected(name, data, mode, info, weighted=True):
    """Return (loss, gradient, sum of the absolute terms) in float64, without reading what is masked."""
    mask = data["response_mask"]
    logp = torch.where(mask, data["log_prob"], -1).double().requires_grad_()
    weights = data["rollout_is_weights"].double() if weighted else torch.ones(BATCH, LENGTH, dtype=torch.float64)
    losses, sizes = [], []
    for i in range(BATCH):
        old, adv, weight = (x[i][mask[i]].double() for x in (data["old_log_prob"], data["advantages"], weights))
        gain, penalty = formula(name, logp[i][mask[i]], old, adv)
        losses.append(weight * (penalty - gain))
        sizes.append(weight * (penalty + gain.abs()).detach())
    loss = aggregated(mode, losses, **info)
    loss.backward()
    return loss.detach(), logp.grad, aggregated(mode, sizes, **info)


def relative(x, reference):
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()
