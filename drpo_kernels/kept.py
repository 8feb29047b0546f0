"""`kept_ids`: a policy that is a softmax over the ids that top-p or top-k sampling kept.

A call with `kept_ids` [..., K] is the same call on ready logits [..., K], those of the kept ids alone: the loss, its
gradient, the entropy and every metric follow. Source: "Keep Sampling Mask", arXiv 2512.02556, section 3.1.
"""

import dataclasses

import torch
from torch import Tensor

from drpo_kernels import validation, value_checks
from drpo_kernels.inputs import Problem, ReadySource, Source
from drpo_kernels.options import LogprobOptions
from drpo_kernels.softcap import softcapped
from drpo_kernels.tokens import scorable

# options that the first call has applied to the logits, at the values that change nothing in the second
APPLIED = {"kept_ids": None, "logit_scale": 1.0, "softcap": None, "vocab_size": None, "vocab_shard": None}
NO_ID = torch.iinfo(torch.int64).max  # sorts behind every id


def on_kept_ids(
    source: Source, targets: Tensor, mask: Tensor | None, options: LogprobOptions, old_logprobs: Tensor | None = None
) -> tuple[Source, Tensor, LogprobOptions]:
    """The arguments of a call as they came -> (source, targets, options) of the call on the kept ids' logits.

    Raises TypeError or ValueError for malformed arguments and, where values are checked, for a token that is not among
    its own kept ids; where they are not, such a token's log-prob is NaN.
    """
    if options.kept_ids is None:
        return source, targets, options
    problem = Problem.checked(source, targets, mask, options)
    valid = problem.unmasked
    if isinstance(old_logprobs, Tensor) and old_logprobs.is_floating_point() and old_logprobs.shape == valid.shape:
        valid = valid & scorable(old_logprobs)  # else the second call refuses it
    if problem.wants_values:
        from_logits = isinstance(source, ReadySource)
        value_checks.check_logprob_values(problem.targets, problem.temperature, valid, problem.vocab, from_logits)
        value_checks.check_kept_values(options.kept_ids, problem.targets, valid, problem.vocab)
    ids, place, without_target = _sorted_ids(problem, valid.reshape(-1))
    z = softcapped(source.kept_logits(ids, problem.spec()) * options.logit_scale, options.softcap)
    z = z.masked_fill(ids < 0, -torch.inf).masked_fill(without_target[:, None], torch.nan)
    z = z.view(*problem.targets.shape, ids.shape[1])
    return ReadySource(z), place.view(problem.targets.shape), dataclasses.replace(options, **APPLIED)


def _sorted_ids(problem: Problem, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's kept ids [N, K] int64, ascending and without repetitions, -1 where there is none; where the target is
    among them [N]; and which valid rows lack it, or have an id outside the vocabulary [N].
    """
    given = problem.options.kept_ids
    given = validation.comparable(given).to(torch.int64).reshape(len(valid), given.shape[-1])
    ids = torch.where(valid[:, None] & (given >= 0), given, NO_ID).sort(-1).values
    repeated = torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
    inside = ids < problem.vocab
    outside = (~inside & (ids < NO_ID)).any(-1)
    ids = ids.masked_fill(repeated | ~inside, -1)
    is_target = (ids == problem.flat_targets[:, None]) & (ids >= 0)
    return ids, is_target.to(torch.int8).argmax(-1), valid & (outside | ~is_target.any(-1))
