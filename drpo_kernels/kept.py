"""`kept_ids`: a policy that is a softmax over the vocabulary entries that top-p or top-k sampling kept.

A call with `kept_ids` [..., K] is the same call on ready logits [..., K], those of the entries alone: the loss, its
gradient, the entropy and every metric follow. Source: "Keep Sampling Mask", arXiv 2512.02556, section 3.1.
"""

import dataclasses

import torch
from torch import Tensor

from drpo_kernels import validation
from drpo_kernels.inputs import Problem, ReadySource, Source
from drpo_kernels.options import LogprobOptions
from drpo_kernels.softcap import tanh_slope
from drpo_kernels.tokens import scorable

# what is done to the logits is done before the second call, and belongs to the first
DONE = {"kept_ids": None, "logit_scale": 1.0, "softcap": None, "vocab_size": None, "vocab_shard": None}

NOTHING = torch.iinfo(torch.int64).max  # sorts behind every id


class _Tanh(torch.autograd.Function):
    """tanh with a slope that keeps its digits where the tanh is close to 1."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        return grad * tanh_slope(*ctx.saved_tensors)


def on_kept_ids(
    source: Source, targets: Tensor, mask: Tensor | None, options: LogprobOptions, old_logprobs: Tensor | None = None
) -> tuple[Source, Tensor, LogprobOptions]:
    """The arguments of a call as they came -> (source, targets, options) of the call on what `kept_ids` keeps.

    Raises TypeError or ValueError for malformed arguments and, where values are checked, for a token that its own set
    does not hold; where they are not, such a token's log-prob is NaN.
    """
    if options.kept_ids is None:
        return source, targets, options
    problem = Problem.checked(source, targets, mask, options)
    valid = problem.unmasked
    if old_logprobs is not None and old_logprobs.shape == valid.shape:
        valid = valid & scorable(old_logprobs)
    if problem.wants_values:
        from_logits = isinstance(source, ReadySource)
        validation.check_logprob_values(problem.targets, problem.temperature, valid, problem.vocab, from_logits)
        validation.check_kept_values(options.kept_ids, problem.targets, valid, problem.vocab)
    ids, place, lost = _sets(problem, valid.reshape(-1))
    z = _transformed(source.kept_logits(ids, problem.spec()), options)
    z = z.masked_fill(ids < 0, -torch.inf).masked_fill(lost[:, None], torch.nan)
    z = z.view(*problem.targets.shape, ids.shape[1])
    return ReadySource(z), place.view(problem.targets.shape), dataclasses.replace(options, **DONE)


def _sets(problem: Problem, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's set [N, K] int64, ascending and without repetitions, -1 where there is nothing; where the target lies
    in it [N]; and which valid rows have no such place, or an id outside the vocabulary [N].
    """
    given = problem.options.kept_ids
    given = validation.comparable(given).to(torch.int64).reshape(len(valid), given.shape[-1])
    ids = torch.where(valid[:, None] & (given >= 0), given, NOTHING).sort(-1).values
    repeated = torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
    inside = ids < problem.vocab
    lost = (~inside & (ids < NOTHING)).any(-1)
    ids = ids.masked_fill(repeated | ~inside, -1)
    is_target = ids == problem.flat_targets[:, None]
    return ids, is_target.to(torch.int8).argmax(-1), valid & (lost | ~is_target.any(-1))


def _transformed(x: Tensor, options: LogprobOptions) -> Tensor:
    x = x * options.logit_scale
    return x if options.softcap is None else options.softcap * _Tanh.apply(x / options.softcap)
