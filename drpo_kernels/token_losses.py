"""`token_losses`: an objective's `token_loss`, held to its contract of one loss per token, from that token alone.

What breaks it would be silent: a mean makes every gradient N times too small, a detached loss trains on nothing, and a
loss that mixes tokens depends on how many of them fit into a chunk.
"""

import torch
from torch import Tensor

from drpo_kernels.graphs import own_graph, traced
from drpo_kernels.objectives import Objective
from drpo_kernels.tokens import Tokens

# (log π, log μ, A, coefficient of the loss) of each token that an objective is tried on: ratios far on both sides of 1
# and beyond the clamp on Δ, advantages of both signs
SAMPLE = (
    (-0.1, -0.3, 1.0, 1.0), (-1.3, -1.0, -0.5, 0.7), (-9.0, -3.5, 2.0, 1.2), (-0.6, -0.61, -10.0, 0.9),
    (-2.0, -8.0, 10.0, 0.5), (-0.3, -40.0, 0.3, 1.5),
)  # fmt: skip
# of float32 results from a token alone and beside others, where vectorised functions may round in another way
SAMPLE_TOLERANCE = 1e-4
# classes and settings that have been tried; so many of them are remembered
MOST_TRIED = 1000
_tried: set[tuple] = set()


def token_losses(objective: Objective, tokens: Tokens) -> Tensor:
    """ℓ of each token [N] in the dtype of its log-prob, differentiable in `tokens.logprobs` where those require grad.

    The first time that an objective of this class and these settings is met, it is also tried on a few tokens alone and
    together. Raises TypeError or ValueError, naming the objective, for a result that is not one differentiable loss per
    token, or that mixes tokens without `sequence_level`.
    """
    if not (objective.sequence_level or traced(tokens.logprobs)):
        _require_no_mixing(objective, tokens.logprobs)
    losses, wanted = objective.token_loss(tokens), tokens.logprobs
    name = f"{type(objective).__name__}.token_loss"
    if not isinstance(losses, Tensor) or not losses.dtype.is_floating_point:
        kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"{name} must return a tensor of float losses, got {kind}")
    if losses.shape != wanted.shape:
        raise ValueError(
            f"{name} must return one loss per token, of shape {tuple(wanted.shape)}, got {tuple(losses.shape)}: means "
            "and sums over tokens are the business of `reduction`"
        )
    if wanted.requires_grad and not losses.requires_grad:
        raise not_differentiable(objective)
    return losses.to(wanted.dtype)


def not_differentiable(objective: Objective) -> ValueError:
    name = type(objective).__name__
    return ValueError(f"{name}.token_loss must be differentiable in tokens.logprobs, got a loss detached from them")


def _require_no_mixing(objective: Objective, like: Tensor) -> None:
    key = _settings(objective)
    if key in _tried:
        return
    sample = torch.tensor(SAMPLE, dtype=like.dtype, device=like.device).T
    count = sample.shape[1]
    try:
        # the run's random numbers stay what they are
        with torch.random.fork_rng([like.device] if like.is_cuda else []):
            together, again = (_loss_and_slope(objective, sample) for _ in range(2))
            alone = [_loss_and_slope(objective, sample[:, i : i + 1]) for i in range(count)]
    except Exception:
        together = None  # It may ask of tokens what these do not have. What fails for the real ones raises there
    if together is not None and torch.equal(together, again):  # of random numbers nothing can be told
        alone = torch.cat(alone, 1)
        if not torch.allclose(together, alone, rtol=SAMPLE_TOLERANCE, atol=SAMPLE_TOLERANCE, equal_nan=True):
            raise ValueError(
                f"{type(objective).__name__}.token_loss must give a token the same loss and gradient whatever tokens "
                f"are beside it, got losses {together[0].tolist()} for {count} tokens together and "
                f"{alone[0].tolist()} one by one: its result would depend on the size of a chunk. An objective that "
                "needs other tokens declares sequence_level = True"
            )
    if len(_tried) >= MOST_TRIED:
        _tried.clear()
    _tried.add(key)


def _loss_and_slope(objective: Objective, sample: Tensor) -> Tensor:
    """[2, n] of tokens [4, n]; raises whatever the objective raises, or for what is no loss per token."""
    with own_graph():
        logprobs, old, advantages, coefficients = (row.clone() for row in sample)
        losses = objective.token_loss(Tokens(logprobs.requires_grad_(), old, advantages))
        (slope,) = torch.autograd.grad(losses, logprobs, coefficients)
        return torch.stack([losses.detach(), slope])


def _settings(objective: Objective) -> tuple:
    """Its class, and its attributes as far as they may choose another formula: a coefficient may be annealed, to 0."""

    def chosen(value: object) -> object:
        if isinstance(value, float):
            return value == 0
        return value if isinstance(value, str | int | None) else type(value)

    attributes = getattr(objective, "__dict__", {})
    return (type(objective), *((name, chosen(value)) for name, value in attributes.items()))
