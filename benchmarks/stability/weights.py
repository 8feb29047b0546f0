"""The gradient weight w in dℓ/dlogπ = -A r w, which says what a loss does to a token, from the objective's formula."""

from __future__ import annotations

import torch
from torch import Tensor

from drpo_kernels import Objective, Tokens
from drpo_kernels.backends.row_loss import derivative


def gradient_weight(objective: Objective, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """w [N] of tokens with A ≠ 0: 1 if the loss leaves the policy gradient alone, 0 if it drops the token."""
    with torch.enable_grad():
        logprobs = logprobs.detach().requires_grad_()
        tokens = Tokens(logprobs, old_logprobs, advantages)
        slope = derivative(objective.token_loss(tokens), logprobs, objective)
    return -slope / (advantages * tokens.ratio.detach())
