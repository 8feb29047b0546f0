"""Reductions of the loss as coefficients: loss = Σ_t c_t ℓ_t, with every c_t known from the mask before the forward."""

from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.tokens import Sequences

REDUCTIONS = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


class TokenCoefficients(NamedTuple):
    """A reduction of your own: one coefficient per token for each term of the loss, each shaped like targets.

    loss = Σ_t [policy_t · token_weight_t · ℓ_t + kl_coef · kl_t · KL_t - entropy_coef · entropy_t · H_t
                + z_loss_coef · z_loss_t · (log Σ exp z_t)²]

    A field that is None takes the values of `policy`. Masked tokens do not count, whatever their coefficient.
    """

    policy: Tensor
    kl: Tensor | None = None
    entropy: Tensor | None = None
    z_loss: Tensor | None = None


def reduction_coefficients(
    reduction: str,
    valid: Tensor,
    sequences: Sequences | None,
    normalizer: float | Tensor | None,
    horizon: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """The coefficients c [N] of a named reduction or of "none"; `valid` is bool [N].

    `normalizer` replaces the count of tokens or of non-empty sequences; it also divides a "token-sum". Without a valid
    token every c is 0.
    """
    ones = valid.to(dtype)
    if reduction == "token-mean":
        return ones / (_count(valid, dtype) if normalizer is None else normalizer)
    if reduction in ("token-sum", "none"):
        return ones if normalizer is None else ones / normalizer
    assert sequences is not None, reduction
    lengths = sequences.sum(valid.to(torch.int64))
    count = _count(lengths > 0, dtype) if normalizer is None else normalizer
    if reduction == "seq-mean-token-mean":
        return ones / (sequences.expand(lengths).clamp(min=1).to(dtype) * count)
    if reduction == "seq-mean-token-sum-norm":
        assert horizon is not None, reduction
        return ones / (count * horizon)
    return ones / count


def _count(flags: Tensor, dtype: torch.dtype) -> Tensor:
    # A sum of integers is exact beyond 2^24 tokens and the same on every device.
    return flags.sum().clamp(min=1).to(dtype)
