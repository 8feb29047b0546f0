"""The oracle: naive autograd over full logits, in any dtype up to float64. Optimised code never imports this module."""

import torch
from torch import Tensor

from drpo_kernels.backends.rows import Transform


def transformed(logits: Tensor, transform: Transform, inv_temperature: Tensor) -> Tensor:
    """z = softcap(logit_scale · x) / temperature, [n, V]; at least float32."""
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
    """x rounded to `narrow`, in `wide`. Its gradient is not: a float16 one could overflow or vanish."""
    return _Rounded.apply(x, narrow, wide)


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """hidden [n, H] @ weight.T + bias in `dtype`: the inputs' values, none of their rounding."""
    logits = hidden.to(dtype) @ weight.to(dtype).T
    return logits if bias is None else logits + bias.to(dtype)


def reference_logprobs(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z [n, V], targets [n] -> (logprobs, logsumexp, entropy), all differentiable."""
    logp = torch.log_softmax(z, dim=-1)
    # p log p is 0 for a banned token, and so is its gradient
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    logprobs = logp.gather(1, targets[:, None])[:, 0]
    # a row without log-probs (a logit of +inf, every token banned) has no log-sum-exp either
    logsumexp = torch.logsumexp(z, dim=-1).masked_fill(logprobs.isnan(), torch.nan)
    return logprobs, logsumexp, entropy
