"""The reference backend: plain autograd over all logits, in dtypes up to float64. Optimised code never imports it."""

import torch
from torch import Tensor

from drpo_kernels.backends.rows import Transform


def transformed(logits: Tensor, transform: Transform, inv_temperature: Tensor) -> Tensor:
    """z = softcap(logit_scale · x) / temperature, [n, V], in the dtype of inv_temperature [n] (float32 or float64)."""
    z = logits.to(inv_temperature.dtype) * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return z * inv_temperature[:, None]


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, narrow, wide):
        ctx.dtype = x.dtype
        return x.to(narrow).to(wide)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None, None


def rounded(x: Tensor, narrow: torch.dtype, wide: torch.dtype) -> Tensor:
    """x rounded to `narrow`, in `wide`. Its gradient is not rounded: in float16 it could overflow or vanish."""
    return _Rounded.apply(x, narrow, wide)


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """hidden [n, H] @ weight.T + bias, computed in `dtype` from the exact values of the inputs."""
    logits = hidden.to(dtype) @ weight.to(dtype).T
    return logits if bias is None else logits + bias.to(dtype)


def reference_logprobs(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z [n, V], targets [n] -> (logprobs, logsumexp, entropy), all differentiable."""
    logp = torch.log_softmax(z, dim=-1)
    # For a banned token p log p and its gradient are 0.
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    logprobs = logp.gather(1, targets[:, None])[:, 0]
    # A row without a log-prob (a logit of +inf, or every token banned) reports no log-sum-exp either.
    logsumexp = torch.logsumexp(z, dim=-1).masked_fill(logprobs.isnan(), torch.nan)
    return logprobs, logsumexp, entropy
