"""`token_losses`: an objective's `token_loss`, held to its contract of one loss per token, from that token alone.

What breaks it would be silent: a mean makes every gradient N times too small, a detached loss trains on nothing, and a
loss that mixes tokens depends on how many of them fit into a chunk.
"""

import dataclasses

import torch
from torch import Tensor

from drpo_kernels.objectives import Objective
from drpo_kernels.tokens import Tokens
from drpo_kernels.tracing import traced

# log π, log μ and A of the tokens that an objective is tried on: ratios on both sides of 1, advantages of both signs
SAMPLE = ((-0.1, -1.3, -2.9, -0.6), (-0.3, -1.0, -3.5, -0.61), (1.0, -0.5, 2.0, -1.5))
# of float32 results from a token alone and beside others, where vectorised functions may round in another way
SAMPLE_TOLERANCE = 1e-4

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
        raise ValueError(f"{name} must be differentiable in tokens.logprobs, got a loss that is detached from them")
    return losses.to(wanted.dtype)


def _require_no_mixing(objective: Objective, like: Tensor) -> None:
    key = _settings(objective)
    if key in _tried:
        return
    with torch.inference_mode(False), torch.no_grad():
        sample = torch.tensor(SAMPLE, dtype=like.dtype, device=like.device)
        count = sample.shape[1]
        try:
            together, again = (objective.token_loss(Tokens(*sample)) for _ in range(2))
            alone = [objective.token_loss(Tokens(*sample[:, i : i + 1])) for i in range(count)]
        except Exception as error:
            raise ValueError(
                f"{type(objective).__name__}.token_loss fails on {count} tokens, and is called on as many as fit into "
                f"a chunk: {type(error).__name__}: {error}. An objective that reads tokens.sequences declares "
                "sequence_level = True"
            ) from error
        if not _per_token([together, again, *alone], count):
            return  # which is reported of the real tokens
        repeatable = torch.equal(together, again)  # of one that draws random numbers nothing can be told
        if repeatable and not torch.allclose(
            together, torch.cat(alone), rtol=SAMPLE_TOLERANCE, atol=SAMPLE_TOLERANCE, equal_nan=True
        ):
            raise ValueError(
                f"{type(objective).__name__}.token_loss must give a token the same loss whatever tokens are beside "
                f"it, got {together.tolist()} for {count} tokens together and {torch.cat(alone).tolist()} one by one: "
                "its result would depend on the size of a chunk. An objective that needs other tokens declares "
                "sequence_level = True"
            )
    _tried.add(key)


def _per_token(losses: list, count: int) -> bool:
    shapes = [(count,)] * 2 + [(1,)] * count
    return all(isinstance(x, Tensor) and x.shape == shape for x, shape in zip(losses, shapes, strict=True))


def _settings(objective: Objective) -> tuple:
    """Its class and what is no float in it: a coefficient may be annealed, and is no other formula."""
    fields = [(field.name, getattr(objective, field.name)) for field in dataclasses.fields(objective)]
    key = (type(objective), *((name, value) for name, value in fields if not isinstance(value, float)))
    try:
        hash(key)
    except TypeError:
        return (type(objective),)
    return key
