"""`kept_ids`: a policy that is a softmax over the ids that top-p or top-k sampling kept.

A call with `kept_ids` [..., K] becomes a call on ready logits [..., K], one for each kept id. The loss, its gradient,
the entropy and every metric follow from that. Source: "Keep Sampling Mask", arXiv 2512.02556, section 3.1.
"""

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor

from drpo_kernels import validation, value_checks
from drpo_kernels.inputs import Problem, ReadySource, Source
from drpo_kernels.options import LogprobOptions
from drpo_kernels.softcap import softcapped
from drpo_kernels.tokens import scorable

Options = TypeVar("Options", bound=LogprobOptions)

NO_ID = torch.iinfo(torch.int64).max  # sorts behind every id


def on_kept_ids(
    source: Source, targets: Tensor, mask: Tensor | None, options: Options, old_logprobs: Tensor | None = None
) -> tuple[Source, Tensor, Options]:
    """The arguments of a call -> (source, targets, options) of the call on the logits of its kept ids.

    Raises TypeError or ValueError for malformed arguments. A target that is not among its own kept ids is a ValueError
    if values are checked (see `validate`); otherwise its log-prob is NaN.
    """
    assert options.kept_ids is not None
    problem = Problem.checked(source, targets, mask, options)
    valid = problem.unmasked
    if isinstance(old_logprobs, Tensor) and old_logprobs.is_floating_point() and old_logprobs.shape == valid.shape:
        valid = valid & scorable(old_logprobs)  # the call on the kept ids refuses any other old_logprobs
    if problem.wants_values:
        from_logits = isinstance(source, ReadySource)
        value_checks.check_logprob_values(problem.targets, problem.temperature, valid, problem.vocab, from_logits)
        value_checks.check_kept_values(options.kept_ids, problem.targets, valid, problem.vocab)
    ids, place, without_target = _sorted_ids(options.kept_ids, problem, valid.reshape(-1))
    z = softcapped(source.kept_logits(ids, problem.spec()) * options.logit_scale, options.softcap)
    z = z.masked_fill(ids < 0, -torch.inf).masked_fill(without_target[:, None], torch.nan)
    z = z.view(*problem.targets.shape, ids.shape[1])
    # The logits of the kept ids already contain these options, so the call on them gets the values that change nothing.
    options = dataclasses.replace(
        options, kept_ids=None, logit_scale=1.0, softcap=None, vocab_size=None, vocab_shard=None
    )
    return ReadySource(z), place.view(problem.targets.shape), options


def _sorted_ids(given: Tensor, problem: Problem, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> (ids [N, K] int64, places [N], bad [N]).

    ids are each row's kept ids in ascending order without repetitions; -1 fills the other places. A target lies at
    ids[n, places[n]]. A valid row is bad if its target is missing, or if an id lies outside the vocabulary.
    """
    given = validation.comparable(given).to(torch.int64).reshape(len(valid), given.shape[-1])
    ids = torch.where(valid[:, None] & (given >= 0), given, NO_ID).sort(-1).values
    repeated = torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
    inside = ids < problem.vocab
    outside = (~inside & (ids < NO_ID)).any(-1)
    ids = ids.masked_fill(repeated | ~inside, -1)
    is_target = (ids == problem.flat_targets[:, None]) & (ids >= 0)
    return ids, is_target.to(torch.int8).argmax(-1), valid & (outside | ~is_target.any(-1))
