"""Estimators of KL(π‖π_ref) from one sampled token (Schulman, "Approximating KL divergence", 2020): PyTorch and, beside
it, the Triton twin.

d = log π - log π_ref;  k1 = d,  k2 = d²/2,  k3 = exp(-d) + d - 1. Twins return (kl, dkl/dlogπ).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from drpo_kernels.tokens import expm1
from drpo_kernels.triton_support import jit, tl

# exp(80) is the largest round power that stays finite in fp32 after weighting: k3 never overflows to inf and then NaN
EXPONENT_LIMIT = 80.0


@jit
def k1_twin(logp, ref):
    return logp - ref, logp * 0 + 1


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return logprobs - ref_logprobs


@jit
def k2_twin(logp, ref):
    d = logp - ref
    return d * d / 2, d


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return (logprobs - ref_logprobs).square() / 2


@jit
def k3_twin(logp, ref):
    d = logp - ref
    excess = expm1(tl.minimum(-d, 80.0))
    return excess + d, tl.where(-d <= 80.0, -excess, 1.0)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    d = logprobs - ref_logprobs
    return (-d).clamp(max=EXPONENT_LIMIT).expm1() + d


@dataclass(frozen=True)
class KLEstimator:
    """One estimator: `loss(logprobs, ref_logprobs) -> [N]` and its Triton twin."""

    loss: Callable[[Tensor, Tensor], Tensor]
    twin: Callable


KL_ESTIMATORS = {"k1": KLEstimator(k1, k1_twin), "k2": KLEstimator(k2, k2_twin), "k3": KLEstimator(k3, k3_twin)}
