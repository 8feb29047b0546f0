"""The policy losses: `linear_policy_loss` from hidden states and the head's weight, `policy_loss` from logits."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from drpo_kernels import ops
from drpo_kernels.backends import row_ops
from drpo_kernels.backends.row_loss import other_terms, row_loss, row_tokens
from drpo_kernels.backends.rows import Field, Outcome, RowKind
from drpo_kernels.backends.sparse.contract import Sparsity
from drpo_kernels.evidence import evidence_metrics
from drpo_kernels.graphs import positions, traced
from drpo_kernels.inputs import LinearSource, PolicyInputs, Problem, ReadySource, Source, policy_inputs
from drpo_kernels.kept import on_kept_ids
from drpo_kernels.kl import kl_term
from drpo_kernels.metrics import policy_metrics, sparsity_metrics
from drpo_kernels.objective import Objective, is_registered
from drpo_kernels.objectives import DRPO
from drpo_kernels.options import DEFAULT_OBJECTIVE, LinearLossKeywords, LossKeywords, PolicyOptions, takes
from drpo_kernels.token_losses import check_objective, token_losses


class PolicyLossOutput(NamedTuple):
    """loss        0-d float32 (float64 for float64 inputs), or shaped like targets with reduction="none"; the only
                field that carries a gradient
    logprobs    log π of each target, shaped like targets; 0 where masked, and NaN where a row of the mask was not
                computed: A = 0 with compact="active", or no old log-prob. compact="mask" computes rows with A = 0 too
    entropy     entropy of each row's distribution in nats, shaped and left out as logprobs is
    computed    bool, shaped like targets: which rows were computed
    metrics     0-d detached tensors under "drpo/...", see `drpo_kernels.metrics`; those under "drpo/evidence/..." are
                for `diagnose`, and no numbers for a dashboard
    logsumexp   log Σ exp z of each row, shaped and left out as logprobs is; z_loss_coef drives it to 0
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    computed: Tensor
    metrics: dict[str, Tensor]
    logsumexp: Tensor


@takes(PolicyOptions)
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    objective: Objective = DEFAULT_OBJECTIVE,
    **keywords: Unpack[LinearLossKeywords],
) -> PolicyLossOutput:
    """RL policy loss of a language-model head, in 6·T·V·H FLOP and without the [T, V] logits.

    hidden        [..., H] float, the backbone's last hidden states
    weight        [V, H], the head's weight as in `nn.Linear`; bias [V] or None
    targets       [...] integer, the sampled tokens, already aligned: hidden[i] predicts targets[i], nothing is shifted
                  inside
    old_logprobs  [...] log μ of the targets under the behaviour policy; None: on-policy, so that each row takes its own
                  detached log-prob. A row whose value is NaN, or -100 or less, is treated as masked and counted in
                  metrics["drpo/unscorable"]: no token that was sampled has such a μ
                  (`drpo_kernels.tokens.LEAST_LOGPROB`). Values up to 0.01 are accepted, because rounding may add as
                  much to a log-prob of 0; a larger one is an error on a CPU, and elsewhere with validate=True
    advantages    [...], or [B] or [B, 1] for targets [B, L], or one per sequence with `cu_seqlens` (if both fit, they
                  are per token); at most 1e12 in size
    mask          [...] bool or 0/1 of any dtype; masked positions may carry anything. None: all valid

    hidden, weight and bias get gradients. All other tensors, also those among the options, are constants of the loss:
    outside of torch.no_grad() one that requires grad is an error, whatever the backend and the reduction.

    loss = Σ_t c_t · [token_weight_t · ℓ_t + kl_coef · KL_t - entropy_coef · H_t + z_loss_coef · (log Σ exp z_t)²] with
    c_t from `reduction` (arXiv 2606.09821 for DRPO's ℓ). Gradients are computed in the forward, so a loss can be
    backpropagated once. Logits are float32 whatever the inputs; under autocast, products take autocast's dtype.

    A logit of -inf bans its token, which has p = 0, no gradient and no entropy. Where the *target* of a valid row is
    banned, log π = -inf and r = e^-20: losses in r stay finite, with a zero gradient beyond the clamp on Δ; objectives
    in sg(·) log π (CISPO, DPPO, capped PolicyGradient) and k1, k2 are infinite, as their formulas say, unless A = 0.
    Mask such tokens. A row with a NaN or +inf logit, or with every token banned, has no log π: it reports NaN and makes
    the loss NaN, never a number.

    Log-probs and entropy: against float64 on the same inputs, with the backends torch and triton, |Δlogprob| <=
    max(1e-4, ε), |Δlogsumexp| <= max(1e-4, ε) and |Δentropy| <= 3 max(1e-4, ε) with ε = 3 (H + 10) 2⁻²⁴ S / temperature
    for the smallest temperature. S is the largest value over the logits of logit_scale · (Σ |hidden · weight| +
    |bias|); from ready logits, H = 0 and S = logit_scale · max|logit|. This is the worst case, in which all roundings
    of a sum have the same sign; usually √H takes the place of H.

    Gradients: within (5e-5 + 4 ε) G in norm for ε <= 1, plus up to 0.4 % for each rounding to bf16, or 0.05 % for each
    rounding to fp16 above its subnormal numbers. dX and dW are the gradients of hidden and weight. G is the norm of
    |dlogits| · |weight| for dX and of |dlogits|ᵀ · |hidden| for dW; from ready logits it is the gradient's own norm. An
    entropy bonus counts in |dlogits| with p (|log p| + entropy). A soft-cap below the temperature takes its place in ε.
    These roundings happen: the finished gradient; on tensor cores dlogits, relative to G, and for dW also hidden times
    the factors of its rows; and, in the backward, a gradient that waits for it in 16 bits (bf16, and policy_loss on
    fp16 logits), if the loss was multiplied by a factor that is not a power of two, such as 1/3 for gradient
    accumulation. reduction, normalizer, token_weights and loss_scale act before any rounding. At a clip or near weight
    0, an objective's slope may depend on log π more steeply than the ratio does. The gradient then also moves by as
    much as the slope changes within max(1e-4, ε) of log π. The slope of a z-loss, 2 logsumexp, likewise moves with the
    error of logsumexp.

    Raises TypeError or ValueError, naming the argument, for anything malformed; RuntimeError for a backend that cannot
    run.
    """
    options = PolicyOptions(objective=objective, **keywords)
    source = LinearSource(hidden, weight, bias, options.main_grad, options.loss_scale)
    inputs = _prepared(source, targets, old_logprobs, advantages, mask, options)
    loss, outcome = _route(inputs)()
    return _output(inputs, loss, outcome)


@takes(PolicyOptions)
def policy_loss(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    inplace: bool = False,
    objective: Objective = DEFAULT_OBJECTIVE,
    **keywords: Unpack[LossKeywords],
) -> PolicyLossOutput:
    """The loss of `linear_policy_loss` from logits [..., V] of any float dtype and any strides. Statistics are float32,
    or float64 for float64 logits.

    inplace       True: the gradient may be written over `logits`, which saves their size in memory; they must not be
                  used afterwards

    The other arguments are those of `linear_policy_loss`, and so are the bounds on errors.
    """
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace must be True or False, got {inplace!r}")
    source, options = ReadySource(logits, inplace), PolicyOptions(objective=objective, **keywords)
    inputs = _prepared(source, targets, old_logprobs, advantages, mask, options)
    loss, outcome = _route(inputs)()
    return _output(inputs, loss, outcome)


@takes(PolicyOptions)
def linear_drpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    delta: float = 12.5,
    bias: Tensor | None = None,
    **keywords: Unpack[LinearLossKeywords],
) -> PolicyLossOutput:
    """`linear_policy_loss` with `objective=DRPO(delta)`."""
    return linear_policy_loss(
        hidden, weight, targets, old_logprobs, advantages, mask, bias=bias, objective=DRPO(delta), **keywords
    )


@takes(PolicyOptions)
def drpo_loss(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    delta: float = 12.5,
    inplace: bool = False,
    **keywords: Unpack[LossKeywords],
) -> PolicyLossOutput:
    """`policy_loss` with `objective=DRPO(delta)`."""
    return policy_loss(
        logits, targets, old_logprobs, advantages, mask, inplace=inplace, objective=DRPO(delta), **keywords
    )


def _prepared(
    source: Source,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    options: PolicyOptions,
) -> PolicyInputs:
    """Check, flatten and pack the arguments of a call."""
    if options.kept_ids is not None:
        source, targets, options = on_kept_ids(source, targets, mask, options, old_logprobs)
    return policy_inputs(Problem.checked(source, targets, mask, options), old_logprobs, advantages)


def _route(inputs: PolicyInputs) -> Callable[[], tuple[Tensor, Tensor]]:
    """Choose the cheapest route that is right for this call -> a function without arguments that returns (loss,
    outcome). The outcome has the fields of `Outcome`, and with `sparse_grad` those of `Sparsity` behind them, [fields,
    N].
    """
    options = inputs.problem.options
    objective = options.objective
    if torch.compiler.is_compiling() and (options.vocab_shard is not None or not is_registered(objective)):
        # imported here: torch.compiler.disable loads all of torch._dynamo
        from drpo_kernels.uncompiled import outside_graph

        return partial(outside_graph, _by_its_route, inputs)
    if objective.sequence_level or options.reduction == "none" or inputs.problem.backend == "reference":
        return partial(_loss_from_logprobs, inputs)
    check_objective(objective, inputs.rows, alone=True)
    return inputs.problem.source.fused_loss(inputs)


def _by_its_route(inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
    return _route(inputs)()


def _output(inputs: PolicyInputs, loss: Tensor, outcome: Tensor) -> PolicyLossOutput:
    """Make the result of a call, in the shape of the targets."""
    problem, computed, metrics = inputs.problem, inputs.computed, _metrics(inputs, outcome)
    # A mean over the mask must not take a 0 for the log-prob of a row that was left out.
    left_out = problem.unmasked.reshape(-1) > computed
    reported = outcome[: Outcome.LOGSUMEXP + 1].masked_fill(left_out, torch.nan)
    shape = problem.targets.shape
    logprobs, entropy, logsumexp = reported.view(len(reported), *shape)
    if problem.options.sparse_grad:
        active = inputs.rows[Field.KIND] == RowKind.ACTIVE.value  # torch.compile would find the enum unequal
        metrics |= sparsity_metrics(outcome[Sparsity.ENTRIES], outcome[Sparsity.LEFT_OUT], reported[0], active)
    return PolicyLossOutput(loss, logprobs, entropy, computed.reshape(shape), metrics, logsumexp)


def _metrics(inputs: PolicyInputs, outcome: Tensor) -> dict[str, Tensor]:
    """The metrics of a call. The Triton backend computes them in one launch, unless a graph can fuse their formula."""
    objective, rows, options = inputs.terms.objective, inputs.rows, inputs.problem.options
    estimator = None if options.ref_logprobs is None else options.kl_estimator
    if inputs.problem.backend == "triton" and not traced(rows):
        return row_ops("triton").metrics(
            objective, rows, outcome, inputs.valid, inputs.unscorable, inputs.given, estimator, inputs.terms.kl_cap
        )
    logprobs = outcome[Outcome.LOGPROB]
    old = logprobs if inputs.given is None else rows[Field.OLD_LOGPROB]
    ref_kl = None
    if estimator is not None:
        ref_kl, _ = kl_term(estimator, logprobs, old, rows[Field.REF_LOGPROB], False, inputs.terms.kl_cap)
    entropy, advantages = outcome[Outcome.ENTROPY], rows[Field.ADVANTAGE]
    computed, valid = inputs.computed, inputs.valid
    return policy_metrics(
        objective, logprobs, entropy, outcome[Outcome.SLOPE], old, advantages, computed, valid, inputs.unscorable,
        inputs.unscorable if inputs.given is None else inputs.unscorable & inputs.given.isfinite(), ref_kl,
    ) | evidence_metrics(
        logprobs, entropy, outcome[Outcome.LOGSUMEXP], old, advantages, computed, valid
    )  # fmt: skip


def reference_logprobs_of(problem: Problem, rows: Tensor, computed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The naive log-probs, log-sum-exp and entropy of the computed rows, differentiable, [N] each and 0 elsewhere."""
    from drpo_kernels.reference import reference_logprobs, transformed

    index = positions(computed)
    with torch.autocast(rows.device.type, enabled=False):
        x = problem.source.selected_logits(index, problem.vocab, rows.dtype)
        z = transformed(x, problem.spec().transform, rows[Field.INV_TEMPERATURE, index])
        values = reference_logprobs(z, problem.flat_targets[index])
    zeros = rows.new_zeros(rows.shape[1])
    logprobs, logsumexp, entropy = (zeros.index_put((index,), value) for value in values)
    return logprobs, logsumexp, entropy


def _loss_from_logprobs(inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
    """Compute the loss in PyTorch from differentiable log-probs, in 8F -> (loss, outcome [len(Outcome), N]).

    It serves calls that the fused route cannot: those in which a token's loss depends on other tokens' log-probs, those
    whose caller reduces the loss, and the reference.
    """
    rows, terms, problem = inputs.rows, inputs.terms, inputs.problem
    if problem.backend == "reference":
        values = reference_logprobs_of(problem, rows, inputs.computed)
    else:
        values = problem.source.logprobs(problem.flat_targets, rows, problem.spec(None, inputs.every_row))
    grouped = terms.objective.sequence_level
    valid, sequences = inputs.computed if grouped else None, inputs.sequences if grouped else None
    tokens = row_tokens(values[0], rows, valid, sequences)
    policy = token_losses(terms.objective, tokens)
    loss = row_loss(policy, other_terms(tokens, *values[1:], rows, terms), rows)
    logprobs, logsumexp, entropy = (x.detach() for x in values)
    shape = problem.targets.shape
    slope = ops.sequence_slope.on(rows)(
        logprobs, tokens.old_logprobs, rows[Field.ADVANTAGE], inputs.computed, problem.options.cu_seqlens,
        problem.spec(terms), list(shape),
    )  # fmt: skip
    total = loss.reshape(shape) if problem.options.reduction == "none" else loss.sum()
    return total, torch.stack([logprobs, entropy, logsumexp, loss.detach(), slope])
