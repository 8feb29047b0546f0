"""Estimators of KL(π‖π_ref) from one sampled token: in PyTorch and, beside it, as a Triton twin.

With d = log π - log π_ref the estimators are k1 = d, k2 = d²/2 and k3 = exp(-d) + d - 1. Each function returns
(kl, dkl/dlogπ, kl + dkl/dlogπ). The third is the derivative of r·kl divided by r. It is written out, because in the sum
of the first two the exponentials of k3 would cancel. A cap clamps d to ±cap; beyond it kl has no slope.
Sources: J. Schulman, "Approximating KL divergence", 2020; for r·kl, DeepSeek-V3.2, arXiv 2512.02556.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo_kernels.tokens import between, expm1, ratio_terms
from drpo_kernels.triton_support import jit, tl


@jit
def k1_twin(d):
    return d, d * 0 + 1, d + 1


def k1(d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return d, torch.ones_like(d), d + 1


@jit
def k2_twin(d):
    return d * d / 2, d, d * d / 2 + d


def k2(d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return d.square() / 2, d, d.square() / 2 + d


@jit
def k3_twin(d):
    d = tl.where(d < -60.0, -60.0, d)
    excess = expm1(-d)
    return excess + d, -excess, d


def k3(d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Below this bound value and slope stay what they are at the bound: r · exp(60) <= exp(80) is finite in fp32, also
    # after weighting. The bounds are literals for the reason that `Tokens.log_ratio` gives.
    d = d.clamp(min=-60.0 if d.dtype == torch.float32 else -680.0)
    excess = d.neg().expm1()
    return excess + d, -excess, d


@jit
def clamped(d, cap):
    """-> (d clamped to ±cap, whether the clamp changed it). It keeps a NaN, which tl.minimum would drop."""
    far = tl.abs(d) > cap
    return tl.where(far, tl.where(d > 0, cap, -cap), d), far


@jit
def importance_weighted(kl, slope, total, logp, old):
    """-> (r·kl, d(r·kl)/dlogπ). The derivative of r is 0 beyond the clamp on Δ."""
    ratio, _, ratio_slope = ratio_terms(logp, old)
    return ratio * kl, ratio * tl.where(ratio_slope > 0, total, slope)


@dataclass(frozen=True)
class KLEstimator:
    """One estimator: `terms(d) -> (kl, dkl/dlogπ, their sum)`, [N] each, and its Triton twin."""

    terms: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    twin: Callable


KL_ESTIMATORS = {"k1": KLEstimator(k1, k1_twin), "k2": KLEstimator(k2, k2_twin), "k3": KLEstimator(k3, k3_twin)}


def kl_term(
    estimator: str, logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, importance: bool, cap: float | Tensor
) -> tuple[Tensor, Tensor]:
    """-> (kl, dkl/dlogπ), [N] each. With `importance` r·kl takes the place of kl. `cap` may be inf."""
    d = logprobs - ref_logprobs
    far = d.abs() > cap
    kl, slope, total = KL_ESTIMATORS[estimator].terms(between(d, -cap, cap))
    slope, total = torch.where(far, 0, slope), torch.where(far, kl, total)
    if not importance:
        return kl, slope
    difference = logprobs - old_logprobs
    ratio = difference.clamp(-20.0, 20.0).exp()
    return ratio * kl, ratio * torch.where(difference.abs() <= 20.0, total, slope)


class _KLLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, old_logprobs, ref_logprobs, cap, estimator, importance):
        ctx.save_for_backward(logprobs, old_logprobs, ref_logprobs, cap)
        ctx.how = estimator, importance
        return kl_term(estimator, logprobs, old_logprobs, ref_logprobs, importance, cap)[0]

    @staticmethod
    def backward(ctx, upstream):
        logprobs, old_logprobs, ref_logprobs, cap = ctx.saved_tensors
        estimator, importance = ctx.how
        slope = kl_term(estimator, logprobs, old_logprobs, ref_logprobs, importance, cap)[1]
        return upstream * slope, None, None, None, None, None


def kl_loss(
    estimator: str, logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, importance: bool, cap: float
) -> Tensor:
    """`kl_term` as a loss [N] for autograd, whose backward may run more than once."""
    # The cap is a tensor, because the function of a graph cannot keep a number that changes.
    cap_tensor = logprobs.new_ones(()) * cap
    return _KLLoss.apply(logprobs, old_logprobs, ref_logprobs, cap_tensor, estimator, importance)
