"""The loss of a row in PyTorch, written once: for the routes that autograd differentiates, and for a backend that needs
the loss and its slopes as numbers.

loss_t = c_t · ℓ_t + c_kl · KL_t + c_z · (log Σ exp z_t)² - c_entropy · H_t, the coefficients packed in `rows`.
"""

import torch
from torch import Tensor

from drpo_kernels.backends.rows import Field, RowKind, Stat, Terms
from drpo_kernels.graphs import own_graph
from drpo_kernels.kl import kl_loss
from drpo_kernels.objective import Objective
from drpo_kernels.token_losses import not_differentiable, token_losses
from drpo_kernels.tokens import Sequences, Tokens


def row_tokens(
    logprobs: Tensor, rows: Tensor, valid: Tensor | None = None, sequences: Sequences | None = None
) -> Tokens:
    """The rows as an objective sees them. A row without an old log-prob gets its own detached log-prob."""
    old = torch.where(rows[Field.OLD_LOGPROB].isnan(), logprobs.detach(), rows[Field.OLD_LOGPROB])
    return Tokens(logprobs, old, rows[Field.ADVANTAGE], valid=valid, sequences=sequences)


def other_terms(tokens: Tokens, logsumexp: Tensor, entropy: Tensor, rows: Tensor, terms: Terms) -> Tensor | None:
    """The terms beside that of the objective, with their coefficients, [N], or None if there are none. They are
    differentiable in `tokens.logprobs`, logsumexp and entropy.
    """
    found = None
    if terms.kl_estimator is not None:
        # A row without a KL term may be infinitely far from its reference, or have none, and 0 · inf is NaN.
        has_kl = rows[Field.KL] != 0
        compared = torch.where(has_kl, tokens.logprobs, 0)
        reference = torch.where(has_kl, rows[Field.REF_LOGPROB], 0)
        kl = kl_loss(terms.kl_estimator, compared, tokens.old_logprobs, reference, terms.kl_importance, terms.kl_cap)
        found = rows[Field.KL] * kl
    if terms.z_loss:
        z_loss = rows[Field.Z_LOSS] * logsumexp.square()
        found = z_loss if found is None else found + z_loss
    if terms.entropy_bonus:
        penalty = -rows[Field.ENTROPY] * entropy
        found = penalty if found is None else found + penalty
    return found


def row_loss(policy: Tensor, others: Tensor | None, rows: Tensor) -> Tensor:
    """The loss of each row from the objective's ℓ and its other terms, [N]; 0 where the row is SKIPPED."""
    loss = rows[Field.POLICY] * policy
    loss = loss if others is None else loss + others
    return torch.where(rows[Field.KIND] > RowKind.SKIPPED.value, loss, 0)


def row_losses(statistics: Tensor, rows: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """`RowOps.losses` by autograd: statistics [len(Stat), N] -> (outcome [len(Outcome), N], slopes [1 to 3, N])."""
    with own_graph():
        rows = recordable(rows)
        logprobs, logsumexp, entropy = values = [
            recordable(statistics[stat]).detach() for stat in (Stat.LOGPROB, Stat.LOGSUMEXP, Stat.ENTROPY)
        ]
        leaves = [x.requires_grad_() for x in values[: 3 if terms.entropy_bonus else 1 + terms.z_loss]]
        tokens = row_tokens(logprobs, rows)
        policy = token_losses(terms.objective, tokens)
        others = other_terms(tokens, logsumexp, entropy, rows, terms)
        slope = derivative(policy, leaves[0], terms.objective)
        loss = row_loss(policy, others, rows)
        slopes = [rows[Field.POLICY] * slope, *(torch.zeros_like(slope) for _ in leaves[1:])]
        if others is not None:
            found = torch.autograd.grad(others.sum(), leaves, allow_unused=True)
            slopes = [a if b is None else a + b for a, b in zip(slopes, found, strict=True)]
    return torch.stack([logprobs, entropy, logsumexp, loss, slope]).detach(), torch.stack(slopes)


def policy_slope(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    valid: Tensor | None,
    sequences: Sequences | None,
    objective: Objective,
) -> Tensor:
    """∂(Σ ℓ)/∂logπ of each token, [N], of a loss that the caller's autograd differentiates."""
    with own_graph():
        leaf = recordable(logprobs).detach().requires_grad_()
        valid = None if valid is None else recordable(valid)
        tokens = Tokens(leaf, recordable(old_logprobs), recordable(advantages), valid=valid, sequences=sequences)
        return derivative(token_losses(objective, tokens), leaf, objective)


def recordable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it if it was made in inference mode, because autograd cannot record such a tensor."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def derivative(losses: Tensor, logprobs: Tensor, objective: Objective) -> Tensor:
    """∂(Σ losses)/∂logprobs, [N]. Raises ValueError if the losses do not depend on `logprobs`."""
    (slope,) = torch.autograd.grad(losses.sum(), logprobs, allow_unused=True)
    if slope is None:
        raise not_differentiable(objective)
    return slope
