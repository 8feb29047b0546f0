"""An fp64 oracle for every loss of the package, written from the formulas of the specification alone.

It shares no code with ``drpo_kernels``: plain PyTorch in float64 with autograd over the full logits. It is slow and
says every formula the long way on purpose. A *spec* is ``(name, hyper-parameters)`` -- the name of a public
objective and its keyword arguments -- or ``(callable, {})`` for an objective a user writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULTS = {
    "DRPO": {"delta": 12.5},
    "DPPO": {"delta_low": 0.15, "delta_high": 0.15, "divergence": "tv", "ratio_cap": 20.0},
    "SPO": {"epsilon": 0.2},
    "PPO": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None},
    "CISPO": {"ratio_cap": 5.0},
    "PolicyGradient": {"ratio_cap": None},
    "GSPO": {"clip_low": 3e-4, "clip_high": 4e-4, "token_level": False},
}
LOG_RATIO_LIMIT = 20.0
SEQUENCE_OBJECTIVES = ("GSPO",)
KEEPS_ZERO_ADVANTAGE_ROWS = ("GSPO",)


@dataclass
class OracleOutput:
    """`loss` carries a gradient; everything else is detached and has the leading shape of the targets."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    valid: Tensor
    scale: Tensor  # the sum of the absolute values of the terms of the loss, which says how they cancel
    metrics: dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------------
# logits and statistics


def as_f64(value, device="cpu"):
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=torch.float64)
    return None if value is None else torch.as_tensor(value, dtype=torch.float64)


def transform(raw: Tensor, temperature, *, logit_scale=1.0, softcap=None, vocab_size=None) -> Tensor:
    """Return softcap(logit_scale * raw) / temperature over the real entries of the vocabulary."""
    z = raw if vocab_size is None else raw[..., :vocab_size]
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def kept_only(z: Tensor, kept_ids: Tensor | None) -> Tensor:
    """Return z [n, V] with -inf for what is not among a row's ids [n, K]. Ids below 0 are padding."""
    if kept_ids is None:
        return z
    kept = torch.zeros(len(z), z.shape[1] + 1, dtype=torch.bool)
    kept = kept.scatter(1, torch.where(kept_ids < 0, z.shape[1], kept_ids).long(), True)[:, :-1]
    return z.masked_fill(~kept, -torch.inf)


def statistics(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return (logprob of the target, entropy) of each row of z [N, V]. Banned tokens (-inf) count nothing."""
    logp_all = torch.log_softmax(z, dim=-1)
    logp = logp_all.gather(-1, targets.reshape(-1, 1)).squeeze(-1)
    banned = torch.isneginf(logp_all)
    finite = logp_all.masked_fill(banned, 0.0)
    entropy = -(finite.exp().masked_fill(banned, 0.0) * finite).sum(-1)
    return logp, entropy


# ---------------------------------------------------------------------------------------------------------------
# objectives: per-token loss


@dataclass
class Rows:
    """This is what an objective sees, with one entry per valid token."""

    logp: Tensor
    old: Tensor
    adv: Tensor
    seq: Tensor | None  # the index of each row's sequence
    n_seq: int = 0

    @property
    def log_ratio(self) -> Tensor:
        return (self.logp - self.old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    @property
    def ratio(self) -> Tensor:
        return self.log_ratio.exp()

    @property
    def shift(self) -> Tensor:
        return self.logp.exp() - self.old.exp()


def _clipped_surrogate(ratio, adv, low, high):
    return -torch.minimum(ratio * adv, ratio.clamp(1 - low, 1 + high) * adv)


def drpo(x: Rows, delta):
    r = x.ratio
    return -(r * x.adv - x.adv.abs() * x.old.exp() * (r - 1) ** 2 / (2 * delta))


def dppo_divergence(x: Rows, divergence):
    logp = x.logp.detach()
    pi, mu = logp.exp(), x.old.exp()
    if divergence == "tv":
        return (pi - mu).abs()
    miss = (1 - mu).clamp(min=0)  # rounding may put mu above 1
    other = miss * torch.log((miss + 1e-8) / (1 - pi + 1e-8))
    return torch.where(mu > 0, mu * (x.old - logp), torch.zeros_like(mu)) + other


def dppo_dropped(x: Rows, delta_low, delta_high, divergence):
    d, r = dppo_divergence(x, divergence), x.ratio.detach()
    return ((x.adv > 0) & (r > 1) & (d > delta_high)) | ((x.adv < 0) & (r < 1) & (d > delta_low))


def _score(coefficient, logp):
    """Return coefficient * logp, and 0 where the coefficient is 0, also at logp = -inf."""
    return torch.where(coefficient == 0, torch.zeros_like(logp), coefficient * logp)


def dppo(x: Rows, delta_low, delta_high, divergence, ratio_cap):
    keep = (~dppo_dropped(x, delta_low, delta_high, divergence)).double()
    return _score(-x.adv * x.ratio.detach().clamp(max=ratio_cap) * keep, x.logp)


def spo(x: Rows, epsilon):
    r = x.ratio
    return -(r * x.adv - x.adv.abs() * (r - 1) ** 2 / (2 * epsilon))


def ppo(x: Rows, clip_low, clip_high, dual_clip):
    loss = _clipped_surrogate(x.ratio, x.adv, clip_low, clip_high)
    if dual_clip is None:
        return loss
    return torch.where(x.adv < 0, torch.minimum(loss, -x.adv * dual_clip), loss)


def cispo(x: Rows, ratio_cap):
    return _score(-x.ratio.detach().clamp(max=ratio_cap) * x.adv, x.logp)


def policy_gradient(x: Rows, ratio_cap):
    return -x.adv * x.ratio if ratio_cap is None else cispo(x, ratio_cap)


def gspo(x: Rows, clip_low, clip_high, token_level):
    """Return PPO's loss with the ratio exp(mean of the sequence's log-ratios). The gradient flows through that mean, or
    with `token_level` through each token's own ratio.
    """
    total = torch.zeros(x.n_seq, dtype=torch.float64).index_add(0, x.seq, x.log_ratio)
    count = torch.zeros(x.n_seq, dtype=torch.float64).index_add(0, x.seq, torch.ones_like(x.logp))
    ratio = (total / count.clamp(min=1)).exp()[x.seq]
    if token_level:
        ratio = (ratio / x.ratio).detach() * x.ratio
    return _clipped_surrogate(ratio, x.adv, clip_low, clip_high)


FORMULAS = {
    "DRPO": drpo,
    "DPPO": dppo,
    "SPO": spo,
    "PPO": ppo,
    "CISPO": cispo,
    "PolicyGradient": policy_gradient,
    "GSPO": gspo,
}


def token_loss(spec, x: Rows) -> Tensor:
    name, params = spec
    if callable(name):
        return name(x, **params)
    return FORMULAS[name](x, **{**DEFAULTS[name], **params})


def kl_term(logp, ref, estimator):
    if estimator == "k1":
        return logp - ref
    if estimator == "k2":
        return (logp - ref) ** 2 / 2
    return torch.exp(ref - logp) - (ref - logp) - 1


# ---------------------------------------------------------------------------------------------------------------
# aggregation


def sequence_ids(shape, cu_seqlens) -> Tensor | None:
    """Return the sequence of each token, flattened: by cu_seqlens for packed [T], else one per leading row."""
    if cu_seqlens is not None:
        lengths = torch.as_tensor(cu_seqlens).cpu().long().diff()
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    if len(shape) < 2:
        return None
    n = 1
    for size in shape[:-1]:
        n *= size
    return torch.arange(n).repeat_interleave(shape[-1])


def coefficients(valid: Tensor, seq, reduction: str, horizon=None, normalizer=None) -> Tensor:
    """Return c_t, flattened and 0 on invalid rows. `normalizer` replaces the count of tokens or non-empty sequences."""
    c = valid.double()
    if reduction == "token-mean":
        return c / (normalizer if normalizer is not None else max(int(valid.sum()), 1))
    if reduction == "token-sum":
        return c / (normalizer if normalizer is not None else 1)
    lengths = torch.bincount(seq, weights=valid.double(), minlength=int(seq.max()) + 1 if len(seq) else 0)
    count = normalizer if normalizer is not None else max(int((lengths > 0).sum()), 1)
    if reduction == "seq-mean-token-mean":
        return c / lengths.clamp(min=1)[seq] / count
    if reduction == "seq-mean-token-sum":
        return c / count
    if reduction == "seq-mean-token-sum-norm":
        return c / (count * horizon)
    raise AssertionError(reduction)


def term_coefficients(reduction, valid, seq, horizon, normalizer):
    """Return the coefficients of the policy, KL, entropy and z-loss terms, from a name or a tensor for each term."""
    if isinstance(reduction, str):
        c = coefficients(valid, seq, reduction, horizon, None if normalizer is None else float(normalizer))
        return c, c, c, c
    given = [*reduction, None, None][:4]
    given = [given[0] if c is None else c for c in given]
    return tuple(torch.where(valid, as_f64(c).reshape(-1), torch.zeros((), dtype=torch.float64)) for c in given)


def spread(value, shape) -> Tensor | None:
    """Flatten a per-token or per-sequence tensor to one entry per token."""
    value = as_f64(value)
    if value is None:
        return None
    if value.dim() == len(shape) - 1 and tuple(value.shape) == tuple(shape[:-1]) and tuple(value.shape) != shape:
        value = value.unsqueeze(-1)
    return value.expand(shape).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a policy loss, by the package's names and with its defaults."""

    temperature: float | Tensor = 1.0
    reduction: object = "token-mean"
    normalizer: float | Tensor | None = None
    horizon: float | None = None
    cu_seqlens: Tensor | None = None
    ref_logprobs: Tensor | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_importance: bool = False
    entropy_coef: float = 0.0
    z_loss_coef: float = 0.0
    token_weights: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    kept_ids: Tensor | None = None


def policy_loss(raw, targets, old_logprobs, advantages, mask=None, *, spec, bias=None, **options) -> OracleOutput:
    """Return the loss of `raw`, which is fp64 logits [..., V] or a pair (hidden [..., H], weight [V, H])."""
    chosen, shape = Options(**options), tuple(targets.shape)
    valid = torch.ones(shape) if mask is None else mask.detach().cpu()
    valid = (valid != 0).reshape(-1)
    if old_logprobs is not None:
        # neither NaN nor so low that no sample has it
        valid = valid & (as_f64(old_logprobs).expand(shape).reshape(-1) > -100)
    keep = valid.nonzero().squeeze(-1)
    seq = sequence_ids(shape, chosen.cu_seqlens)

    def rows(value):
        value = spread(value, shape)
        return None if value is None else value[keep]

    logits = logits_of(raw, bias, keep)
    hot = isinstance(chosen.temperature, Tensor) and chosen.temperature.dim()
    heat = rows(chosen.temperature).unsqueeze(-1) if hot else chosen.temperature
    scaling = {"logit_scale": chosen.logit_scale, "softcap": chosen.softcap, "vocab_size": chosen.vocab_size}
    kept = None if chosen.kept_ids is None else chosen.kept_ids.flatten(0, -2)[keep]
    z = kept_only(transform(logits, heat, **scaling), kept)
    logp, entropy = statistics(z, targets.detach().cpu().expand(shape).reshape(-1)[keep].long())
    logsumexp = torch.logsumexp(z, 1)
    old = logp.detach() if old_logprobs is None else rows(old_logprobs)
    n_seq = 0 if seq is None or not len(seq) else int(seq.max()) + 1
    x = Rows(logp, old, rows(advantages), None if seq is None else seq[keep], n_seq)
    factors = term_coefficients(chosen.reduction, valid, seq, chosen.horizon, chosen.normalizer)
    terms = terms_of(spec, x, entropy, logsumexp, [c[keep] for c in factors], chosen, rows)

    def scatter(value):
        return torch.zeros(shape, dtype=torch.float64).reshape(-1).index_copy(0, keep, value.detach()).reshape(shape)

    return OracleOutput(
        loss=sum(term.sum() for term in terms) + logits[:0].sum(),  # an empty selection still belongs to the graph
        logprobs=scatter(logp),
        entropy=scatter(entropy),
        logsumexp=scatter(logsumexp),
        valid=valid.reshape(shape),
        scale=sum(term.detach().abs().sum() for term in terms),
        metrics=metrics(spec, x, entropy),
    )


def logits_of(raw, bias, keep) -> Tensor:
    """Return the logits of the rows to keep."""
    if not isinstance(raw, tuple):
        return raw.reshape(-1, raw.shape[-1])[keep]
    logits = raw[0].reshape(-1, raw[0].shape[-1])[keep] @ raw[1].T
    return logits if bias is None else logits + bias


def terms_of(spec, x: Rows, entropy, logsumexp, factors, chosen: Options, rows) -> list[Tensor]:
    """Return the terms of the loss, each [N] with its coefficients; `rows` selects the rows of a per-token tensor."""
    c_pol, c_kl, c_ent, c_z = factors
    if chosen.token_weights is not None:
        c_pol = c_pol * rows(chosen.token_weights)
    terms = [c_pol * token_loss(spec, x)]
    if chosen.kl_coef:
        ratio = x.log_ratio.exp() if chosen.kl_importance else 1
        terms.append(chosen.kl_coef * c_kl * ratio * kl_term(x.logp, rows(chosen.ref_logprobs), chosen.kl_estimator))
    if chosen.entropy_coef:
        terms.append(-chosen.entropy_coef * c_ent * entropy)
    if chosen.z_loss_coef:
        terms.append(chosen.z_loss_coef * c_z * logsumexp**2)
    return terms


# ---------------------------------------------------------------------------------------------------------------
# metrics, over the given rows


def beyond_trust_region(spec, x: Rows) -> Tensor | None:
    """Return the rows past the objective's boundary on the side the advantage pushes to; None if it has no boundary."""
    name, params = spec
    if callable(name):
        return None
    p = {**DEFAULTS[name], **params}
    if name == "DRPO":
        return x.adv.sign() * x.shift > p["delta"]
    if name == "DPPO":
        return dppo_dropped(x, p["delta_low"], p["delta_high"], p["divergence"])
    if name == "SPO":
        return x.adv.sign() * (x.ratio - 1) > p["epsilon"]
    if name == "PPO":
        return ((x.adv > 0) & (x.ratio > 1 + p["clip_high"])) | ((x.adv < 0) & (x.ratio < 1 - p["clip_low"]))
    return None


def metrics(spec, x: Rows, entropy: Tensor) -> dict[str, Tensor]:
    """Return the metrics of the rows of x, all of which are computed. The weight (dl/dlogp) / (-A r) and the shares are
    over the rows with A != 0.
    """
    if x.logp.numel() == 0:
        return {}
    with torch.enable_grad():
        leaf = x.logp.detach().clone().requires_grad_()
        y = Rows(leaf, x.old, x.adv, x.seq, x.n_seq)
        (slope,) = torch.autograd.grad(token_loss(spec, y).sum(), leaf)
    ratio, shift = y.ratio.detach(), y.shift.detach().abs()
    moving = x.adv != 0
    out = {
        "drpo/ratio_mean": ratio.mean(),
        "drpo/ratio_max": ratio.max(),
        "drpo/kl_k1": (x.old - leaf.detach()).mean(),
        "drpo/kl_k3": (ratio - 1 - y.log_ratio.detach()).mean(),
        "drpo/prob_shift_mean": shift.mean(),
        "drpo/prob_shift_max": shift.max(),
        "drpo/entropy_mean": entropy.detach().mean(),
        "drpo/tokens": torch.tensor(len(ratio)),
        "drpo/computed": torch.tensor(len(ratio)),
        "drpo/weighted": moving.sum(),
    }
    if bool(moving.any()) and not (isinstance(spec[0], str) and spec[0] in SEQUENCE_OBJECTIVES):
        weight = (slope / (-x.adv * ratio))[moving]
        out |= {
            "drpo/weight_mean": weight.mean(),
            "drpo/weight_min": weight.min(),
            "drpo/weight_max": weight.max(),
        }
    beyond = beyond_trust_region(spec, y)
    if beyond is not None and bool(moving.any()):
        out["drpo/beyond_trust_region"] = beyond[moving].double().mean()
    return out
