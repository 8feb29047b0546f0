"""The soft-cap cap · tanh(v) with v = x / cap, and its slope: in PyTorch and, beside it, as Triton twins.

The slope is 1 - tanh²(v) = 4e / (1 + e)² with e = exp(-2|v|). The subtraction would lose all digits for the logits of
real models (raw logits of 124 under a cap of 30).
"""

import torch
from torch import Tensor

from drpo_kernels.tokens import expm1
from drpo_kernels.triton_support import jit, tl


def tanh_slope(v: Tensor) -> Tensor:
    """d tanh(v)/dv, in a new tensor."""
    e = v.abs().mul_(-2).exp_()
    return (e / (1 + e).square_()).mul_(4)


class _Tanh(torch.autograd.Function):
    """tanh whose backward uses `tanh_slope`."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v.tanh()

    @staticmethod
    def backward(ctx, grad):
        return grad * tanh_slope(*ctx.saved_tensors)


def softcapped(x: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(x / cap), differentiable; x itself if cap is None."""
    return x if cap is None else cap * _Tanh.apply(x / cap)


@jit
def tanh(v):
    """tanh(v) as -expm1(-2|v|) / (2 + expm1(-2|v|)) with the sign of v, which does not cancel near 0."""
    decay = expm1(-2 * tl.abs(v))
    return tl.where(v < 0, decay, -decay) / (2 + decay)


@jit
def tanh_slope_twin(v):
    e = tl.exp(-2 * tl.abs(v))
    return 4 * e / ((1 + e) * (1 + e))
