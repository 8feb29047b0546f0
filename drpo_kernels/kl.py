"""Estimators of KL(π‖π_ref) from one sampled token: PyTorch and, beside it, the Triton twin.

d = log π - log π_ref;  k1 = d,  k2 = d²/2,  k3 = exp(-d) + d - 1. Twins return (kl, dkl/dlogπ).
Source: J. Schulman, "Approximating KL divergence", 2020.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo_kernels.tokens import expm1
from drpo_kernels.triton_support import jit, tl

# beyond this many nats below the reference k3 keeps its value and its slope: exp(80) is finite in fp32 after weighting
EXPONENT_LIMITS = {torch.float32: 80.0, torch.float64: 700.0}


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
    d = tl.where(logp - ref < -80.0, -80.0, logp - ref)
    excess = expm1(-d)
    return excess + d, -excess


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    d = (logprobs - ref_logprobs).clamp(min=-EXPONENT_LIMITS[logprobs.dtype])
    excess = d.neg().expm1()
    # the derivative, -excess, written out: autograd's would be 0 beyond the limit
    finite = logprobs.nan_to_num()  # inf - inf is not 0
    return (excess + d).detach() - excess.detach() * (finite - finite.detach())


@dataclass(frozen=True)
class KLEstimator:
    """One estimator: `loss(logprobs, ref_logprobs) -> [N]` and its Triton twin."""

    loss: Callable[[Tensor, Tensor], Tensor]
    twin: Callable


KL_ESTIMATORS = {"k1": KLEstimator(k1, k1_twin), "k2": KLEstimator(k2, k2_twin), "k3": KLEstimator(k3, k3_twin)}
