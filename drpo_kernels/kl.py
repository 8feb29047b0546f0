"""Estimators of KL(π‖π_ref) from one sampled token: PyTorch and, beside it, the Triton twin.

d = log π - log π_ref;  k1 = d,  k2 = d²/2,  k3 = exp(-d) + d - 1. Each gives (kl, dkl/dlogπ, kl + dkl/dlogπ): the sum,
written out, is the slope of r·kl over r, in which the exponentials of k3 would cancel. A cap clamps d to ±cap, beyond
which kl has no slope.
Source: J. Schulman, "Approximating KL divergence", 2020; r·kl: DeepSeek-V3.2, arXiv 2512.02556.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo_kernels.tokens import LOG_RATIO_LIMIT, expm1, ratio_terms
from drpo_kernels.triton_support import jit, tl

# beyond this many nats below the reference k3 keeps its value and its slope: r · exp(60) <= exp(80) is finite in fp32,
# also after weighting
EXPONENT_LIMITS = {torch.float32: 60.0, torch.float64: 680.0}


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
    d = d.clamp(min=-EXPONENT_LIMITS[d.dtype])
    excess = d.neg().expm1()
    return excess + d, -excess, d


@jit
def clamped(d, cap):
    """-> (d within ±cap, whether it was beyond); a NaN stays one, which tl.minimum would drop."""
    far = tl.abs(d) > cap
    return tl.where(far, tl.where(d > 0, cap, -cap), d), far


@jit
def importance_weighted(kl, slope, total, logp, old):
    """-> (r·kl, d(r·kl)/dlogπ); the derivative of r is 0 beyond its clamp."""
    ratio, _, ratio_slope = ratio_terms(logp, old)
    return ratio * kl, ratio * tl.where(ratio_slope > 0, total, slope)


@dataclass(frozen=True)
class KLEstimator:
    """One estimator: `terms(d) -> (kl, dkl/dlogπ, their sum)`, [N] each, and its Triton twin."""

    terms: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    twin: Callable


KL_ESTIMATORS = {"k1": KLEstimator(k1, k1_twin), "k2": KLEstimator(k2, k2_twin), "k3": KLEstimator(k3, k3_twin)}


def kl_term(
    estimator: str, logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, importance: bool, cap: float
) -> tuple[Tensor, Tensor]:
    """(kl, dkl/dlogπ), or of r·kl with `importance`, [N] each; `cap` may be inf."""
    d = logprobs - ref_logprobs
    far = d.abs() > cap
    kl, slope, total = KL_ESTIMATORS[estimator].terms(d.clamp(-cap, cap))
    slope, total = torch.where(far, 0, slope), torch.where(far, kl, total)
    if not importance:
        return kl, slope
    difference = logprobs - old_logprobs
    ratio = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return ratio * kl, ratio * torch.where(difference.abs() <= LOG_RATIO_LIMIT, total, slope)


class _KLLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, old_logprobs, ref_logprobs, estimator, importance, cap):
        ctx.save_for_backward(logprobs, old_logprobs, ref_logprobs)
        ctx.how = estimator, importance, cap
        return kl_term(estimator, logprobs, old_logprobs, ref_logprobs, importance, cap)[0]

    @staticmethod
    def backward(ctx, upstream):
        estimator, importance, cap = ctx.how
        return upstream * kl_term(estimator, *ctx.saved_tensors, importance, cap)[1], None, None, None, None, None


def kl_loss(
    estimator: str, logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, importance: bool, cap: float
) -> Tensor:
    """The same as a loss [N] that autograd differentiates, as often as asked, with the slope above."""
    return _KLLoss.apply(logprobs, old_logprobs, ref_logprobs, estimator, importance, cap)
