"""Differentiable log-probs and entropy of tokens, for trainers with a loss of their own.

They take 2·T·V·H FLOP forward and 6·T·V·H backward, and never hold the logits [T, V].
"""

import torch
from torch import Tensor
from typing_extensions import Unpack

from drpo_kernels.backends.rows import Field, RowKind
from drpo_kernels.inputs import LinearSource, Problem, ReadySource, Source
from drpo_kernels.kept import on_kept_ids
from drpo_kernels.options import LinearLogprobKeywords, LogprobKeywords, LogprobOptions, takes
from drpo_kernels.policy_loss import reference_logprobs_of


@takes(LogprobOptions)
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    return_logsumexp: bool = False,
    **keywords: Unpack[LinearLogprobKeywords],
) -> tuple[Tensor, ...]:
    """-> (logprobs, entropy), both shaped like targets, float32 (float64 for float64 inputs) and differentiable. With
    `return_logsumexp` it returns (logprobs, entropy, logsumexp), where logsumexp is log Σ exp z, for a z-loss.

    hidden [..., H], weight [V, H], bias [V] or None, targets [...] integer and aligned with hidden. Masked positions
    (mask 0) may carry anything, are not computed, and report 0. The backward recomputes the logits of each chunk and
    may run more than once. The bounds on errors are those of `linear_policy_loss`; no gradient waits in 16 bits here.
    hidden, weight and bias get gradients; a mask or temperature that requires grad is an error.

    Raises TypeError or ValueError, naming the argument, for anything malformed, and RuntimeError for a backend that
    cannot run.
    """
    options = LogprobOptions(**keywords)
    source = LinearSource(hidden, weight, bias, options.main_grad)
    return _token_logprobs(source, targets, mask, return_logsumexp, options)


@takes(LogprobOptions)
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    return_logsumexp: bool = False,
    **keywords: Unpack[LogprobKeywords],
) -> tuple[Tensor, ...]:
    """`linear_token_logprobs` from logits [..., V] of any float dtype and any strides that exist already."""
    return _token_logprobs(ReadySource(logits), targets, mask, return_logsumexp, LogprobOptions(**keywords))


def _token_logprobs(
    source: Source, targets: Tensor, mask: Tensor | None, return_logsumexp: bool, options: LogprobOptions
) -> tuple[Tensor, ...]:
    if not isinstance(return_logsumexp, bool):
        raise TypeError(f"return_logsumexp must be True or False, got {return_logsumexp!r}")
    if options.kept_ids is not None:
        source, targets, options = on_kept_ids(source, targets, mask, options)
    problem = Problem.checked(source, targets, mask, options)
    rows = problem.logprob_rows()
    if problem.backend == "reference":
        results = reference_logprobs_of(problem, rows, rows[Field.KIND] > RowKind.SKIPPED)
    else:
        # Without a mask every row is computed, so no count has to be read back from the device.
        arguments = problem.flat_targets, rows, problem.spec(every_row=mask is None)
        if torch.compiler.is_compiling() and options.vocab_shard is not None:
            # The import stands here because torch.compiler.disable loads all of torch._dynamo.
            from drpo_kernels.uncompiled import outside_graph

            results = outside_graph(source.logprobs, *arguments)
        else:
            results = source.logprobs(*arguments)
    logprobs, logsumexp, entropy = (x.reshape(targets.shape) for x in results)
    return (logprobs, entropy, logsumexp) if return_logsumexp else (logprobs, entropy)
