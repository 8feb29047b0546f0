"""The formula of every policy loss: once in PyTorch and, beside it, once as a Triton function returning (ℓ, dℓ/dlogπ).

Notation: μ = exp(old_logprobs), π = exp(logprobs), r = exp(clamp(log π - log μ, ±20)), A is the advantage and sg the
stop-gradient. A new objective is a frozen dataclass with a `token_loss`. Its Triton twin is optional: without one,
PyTorch's autograd differentiates the formula on the [N] tokens of a chunk, and the matrix products cost the same.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo_kernels.objective import Objective, built_in, register_objective
from drpo_kernels.tokens import Tokens, between, clamped_shift, expm1, prob_shift, ratio_terms
from drpo_kernels.triton_support import jit, tl


def _require_positive(objective: Objective, *names: str, optional: bool = False) -> None:
    for name in names:
        value = getattr(objective, name)
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{type(objective).__name__}: {name} must be a number, got {value!r}")
        if not 0 < value < math.inf:  # math.isfinite cannot be traced in a graph
            raise ValueError(f"{type(objective).__name__}: {name} must be positive and finite, got {value}")


# --- quadratic regularisers: DRPO, SPO --------------------------------------------------------------------------------


@jit
def drpo(logp, old, adv, hyper):
    """-> (ℓ, dℓ/dlogπ = -dr/dlogπ · (A - |A| (π - μ) / δ)). The shift is μ (r - 1), and dr/dlogπ is r, or 0 beyond the
    clamp on Δ.
    """
    ratio, excess, ratio_slope = ratio_terms(logp, old)
    shift = clamped_shift(logp, old)
    loss = tl.abs(adv) * shift * excess / (2 * hyper[0]) - adv * ratio
    return loss, ratio_slope * (tl.abs(adv) * shift / hyper[0] - adv)


@register_objective
@dataclass(frozen=True)
class DRPO(Objective):
    """ℓ = -(r A - |A| μ (r - 1)² / (2δ)), so dℓ/dlogπ = -A r w with w = 1 - sign(A)(π - μ)/δ  (arXiv 2606.09821).

    w is bounded in [1 - 1/δ, 1 + 1/δ], is 0 on DPPO's boundary |π - μ| = δ, and turns corrective beyond it.
    Leave δ at the default of 12.5, the paper's: w is then in [0.92, 1.08]. Since |π - μ| <= 1, no token reaches the
    boundary of a δ >= 1. In our experiment 0.5 cost no reward, and 0.2 and less did (docs/stability.md).
    """

    delta: float = 12.5
    zero_if_no_advantage: ClassVar[bool] = True

    def __post_init__(self):
        _require_positive(self, "delta")

    @built_in(lambda self: drpo)
    def token_loss(self, tokens: Tokens) -> Tensor:
        penalty = tokens.advantages.abs() * tokens.clamped_shift * tokens.ratio_minus_one / (2 * self.delta)
        return penalty - tokens.advantages * tokens.ratio

    @property
    def remark(self) -> str | None:
        if self.delta < 1:
            return None
        return (
            f"For information: |π - μ| is at most 1, so DRPO's boundary at δ = {self.delta:g} is never active and the "
            f"weight stays within 1 ± {1 / self.delta:.2g}: it trains nearly like the policy gradient. What a smaller "
            "δ did in an experiment is in docs/stability.md."
        )


@jit
def spo(logp, old, adv, hyper):
    ratio, excess, slope = ratio_terms(logp, old)
    loss = tl.abs(adv) * excess * excess / (2 * hyper[0]) - adv * ratio
    return loss, slope * (tl.abs(adv) * excess / hyper[0] - adv)


@register_objective
@dataclass(frozen=True)
class SPO(Objective):
    """ℓ = -(r A - |A| (r - 1)² / (2ε)), so w = 1 - sign(A)(r - 1)/ε, unbounded in r  (arXiv 2401.16025)."""

    epsilon: float = 0.2
    zero_if_no_advantage: ClassVar[bool] = True

    def __post_init__(self):
        _require_positive(self, "epsilon")

    @built_in(lambda self: spo)
    def token_loss(self, tokens: Tokens) -> Tensor:
        penalty = tokens.advantages.abs() * tokens.ratio_minus_one.square() / (2 * self.epsilon)
        return penalty - tokens.advantages * tokens.ratio


# --- clipped surrogates: PPO, GSPO ------------------------------------------------------------------------------------


@jit
def ppo(logp, old, adv, hyper):
    ratio, _, slope = ratio_terms(logp, old)
    clipped = tl.minimum(tl.maximum(ratio, 1 - hyper[0]), 1 + hyper[1]) * adv
    loss = -tl.minimum(ratio * adv, clipped)
    dlogp = tl.where(ratio * adv <= clipped, -adv * slope, 0.0)
    capped = (adv < 0) & (loss > -adv * hyper[2])
    return tl.where(capped, -adv * hyper[2], loss), tl.where(capped, 0.0, dlogp)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A)."""
    return -torch.minimum(ratio * advantages, between(ratio, 1 - low, 1 + high) * advantages)


@register_objective
@dataclass(frozen=True)
class PPO(Objective):
    """ℓ = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); GRPO's token loss too  (arXiv 1707.06347, 2402.03300).

    `dual_clip` c > 1 bounds the loss of negative advantages by -c A (arXiv 1912.09729, as in verl).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    zero_if_no_advantage: ClassVar[bool] = True
    clips: ClassVar[bool] = True

    def __post_init__(self):
        _require_positive(self, "clip_low", "clip_high")
        _require_positive(self, "dual_clip", optional=True)
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"PPO: dual_clip must be greater than 1, got {self.dual_clip}")

    @built_in(lambda self: ppo)
    def token_loss(self, tokens: Tokens) -> Tensor:
        loss = clipped_surrogate(tokens.ratio, tokens.advantages, self.clip_low, self.clip_high)
        if self.dual_clip is None:
            return loss
        bounded = torch.minimum(loss, -self.dual_clip * tokens.advantages)
        return torch.where(tokens.advantages < 0, bounded, loss)


@register_objective
@dataclass(frozen=True)
class GSPO(Objective):
    """PPO on the sequence ratio s = exp(mean_t Δ_t); the gradient flows through the mean  (arXiv 2507.18071).

    token_level  False: a token's advantage and weight act on the gradient of its whole sequence. True: the paper's
                 GSPO-token (section 4.3), which verl computes. The loss is the same, but each token's ratio is
                 s_t = sg(s / r_t) · r_t, so that its advantage and weight act on the gradient of that token alone.
                 If all tokens of a sequence have the same advantage and weight, the gradients are the same.

    `kl_importance` multiplies by the token's own ratio r_t, where TRL and Liger multiply by s.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    token_level: bool = False
    zero_if_no_advantage: ClassVar[bool] = True
    sequence_level: ClassVar[bool] = True
    clips: ClassVar[bool] = True

    def __post_init__(self):
        _require_positive(self, "clip_low", "clip_high")
        if not isinstance(self.token_level, bool):
            raise TypeError(f"GSPO: token_level must be True or False, got {self.token_level!r}")

    @built_in()
    def token_loss(self, tokens: Tokens) -> Tensor:
        assert tokens.sequences is not None and tokens.valid is not None  # because of `sequence_level`
        lengths = tokens.sequences.sum(tokens.valid.to(tokens.logprobs.dtype)).clamp(min=1)
        log_ratio = torch.where(tokens.valid, tokens.log_ratio, 0)
        ratio = tokens.sequences.expand((tokens.sequences.sum(log_ratio) / lengths).exp())
        if self.token_level:
            ratio = ratio.detach() * (log_ratio - log_ratio.detach()).exp()
        return clipped_surrogate(ratio, tokens.advantages, self.clip_low, self.clip_high)


# --- score-function forms -A · sg(c) · logπ: DPPO, CISPO, PolicyGradient ----------------------------------------------


@jit
def _score(logp, dlogp):
    return tl.where(dlogp == 0, 0.0, dlogp * logp), dlogp  # a banned target has logp = -inf, and 0 · -inf is NaN


def score(coefficient: Tensor, logprobs: Tensor) -> Tensor:
    """sg(coefficient) · logπ. It is 0 where the coefficient is 0, even for a banned target (logπ = -inf)."""
    coefficient = coefficient.detach()
    return torch.where(coefficient == 0, 0, coefficient * logprobs)


@jit
def _masked_score(logp, ratio, adv, divergence, low, high, cap):
    masked = ((adv > 0) & (ratio > 1) & (divergence > high)) | ((adv < 0) & (ratio < 1) & (divergence > low))
    return _score(logp, tl.where(masked, 0.0, -adv * tl.minimum(ratio, cap)))


@jit
def dppo_tv(logp, old, adv, hyper):
    ratio, _, _ = ratio_terms(logp, old)
    return _masked_score(logp, ratio, adv, tl.abs(prob_shift(logp, old)), hyper[0], hyper[1], hyper[2])


def binary_kl(tokens: Tokens) -> Tensor:
    """KL(μ‖π) between the binary distributions "this token or another", with 1e-8 inside both logarithms of 1 - p."""
    mu, miss = tokens.old_probs, -tokens.old_logprobs.clamp(max=0).expm1()  # rounding may put μ above 1
    hit_term = torch.where(mu > 0, mu * (tokens.old_logprobs - tokens.logprobs), 0)
    return hit_term + miss * ((miss + 1e-8).log() - (1e-8 - tokens.logprobs.expm1()).log())


@jit
def dppo_kl(logp, old, adv, hyper):
    ratio, _, _ = ratio_terms(logp, old)
    mu, miss = tl.exp(old), -expm1(tl.minimum(old, 0.0))  # rounding may put μ above 1
    hit_term = tl.where(mu > 0, mu * (old - logp), 0.0)
    miss_term = miss * (tl.log(miss + 1e-8) - tl.log(1e-8 - expm1(logp)))
    return _masked_score(logp, ratio, adv, hit_term + miss_term, hyper[0], hyper[1], hyper[2])


@register_objective
@dataclass(frozen=True)
class DPPO(Objective):
    """ℓ = -A · sg(min(r, C) M) · logπ, M = 0 beyond the trust region in the harmful direction  (arXiv 2602.04879).

    M = 0 where A > 0, r > 1 and D > delta_high, or A < 0, r < 1 and D > delta_low. D is |π - μ| (`divergence="tv"`) or
    the binary KL(μ‖π) (`"kl"`), with verl's 1e-8 inside both (1 - p) logarithms.
    """

    delta_low: float = 0.15
    delta_high: float = 0.15
    divergence: str = "tv"
    ratio_cap: float = 20.0
    zero_if_no_advantage: ClassVar[bool] = True
    clips: ClassVar[bool] = True

    def __post_init__(self):
        _require_positive(self, "delta_low", "delta_high", "ratio_cap")
        if self.divergence not in ("tv", "kl"):
            raise ValueError(f"DPPO: divergence must be 'tv' or 'kl', got {self.divergence!r}")

    @built_in(lambda self: dppo_tv if self.divergence == "tv" else dppo_kl)
    def token_loss(self, tokens: Tokens) -> Tensor:
        adv, ratio = tokens.advantages, tokens.ratio
        divergence = tokens.prob_shift.abs() if self.divergence == "tv" else binary_kl(tokens)
        too_high = (adv > 0) & (ratio > 1) & (divergence > self.delta_high)
        too_low = (adv < 0) & (ratio < 1) & (divergence > self.delta_low)
        return score(torch.where(too_high | too_low, 0, -adv * between(ratio, 0.0, self.ratio_cap)), tokens.logprobs)


@jit
def cispo(logp, old, adv, hyper):
    ratio, _, _ = ratio_terms(logp, old)
    return _score(logp, -adv * tl.minimum(tl.maximum(ratio, hyper[1]), hyper[0]))


def capped_score(tokens: Tokens, cap: float, floor: float = 0.0) -> Tensor:
    """-A · sg(clip(r, c, C)) · logπ."""
    return score(-tokens.advantages * between(tokens.ratio, floor, cap), tokens.logprobs)


@register_objective
@dataclass(frozen=True)
class CISPO(Objective):
    """ℓ = -sg(clip(r, c, C)) A logπ, so the weight is bounded and no token loses its gradient  (arXiv 2506.13585).

    C = `ratio_cap` is the paper's 1 + ε_high and c = `ratio_floor` its 1 - ε_low. The paper sets no lower bound either.
    """

    ratio_cap: float = 5.0
    ratio_floor: float = 0.0
    zero_if_no_advantage: ClassVar[bool] = True
    clips: ClassVar[bool] = True

    def __post_init__(self):
        _require_positive(self, "ratio_cap")
        if self.ratio_floor != 0:
            _require_positive(self, "ratio_floor")
        if self.ratio_floor > self.ratio_cap:
            raise ValueError(f"CISPO: ratio_floor must be at most ratio_cap {self.ratio_cap}, got {self.ratio_floor}")

    @built_in(lambda self: cispo)
    def token_loss(self, tokens: Tokens) -> Tensor:
        return capped_score(tokens, self.ratio_cap, self.ratio_floor)


@jit
def capped_policy_gradient(logp, old, adv, hyper):
    ratio, _, _ = ratio_terms(logp, old)
    return _score(logp, -adv * tl.minimum(ratio, hyper[0]))


@jit
def policy_gradient(logp, old, adv, hyper):
    ratio, _, slope = ratio_terms(logp, old)
    return -adv * ratio, -adv * slope


@register_objective
@dataclass(frozen=True)
class PolicyGradient(Objective):
    """ℓ = -A r, the unregularised surrogate. With `ratio_cap` C it is ℓ = -A · sg(min(r, C)) · logπ."""

    ratio_cap: float | None = None
    zero_if_no_advantage: ClassVar[bool] = True

    def __post_init__(self):
        _require_positive(self, "ratio_cap", optional=True)

    @property
    def clips(self) -> bool:  # type: ignore[override]  # a constant of the other classes
        return self.ratio_cap is not None

    @built_in(lambda self: policy_gradient if self.ratio_cap is None else capped_policy_gradient)
    def token_loss(self, tokens: Tokens) -> Tensor:
        return -tokens.advantages * tokens.ratio if self.ratio_cap is None else capped_score(tokens, self.ratio_cap)
