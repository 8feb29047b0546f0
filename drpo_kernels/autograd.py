"""The autograd boundary: `torch.autograd.Function`s over the computations of ops.py.

The policy losses compute their gradients in the forward and only scale them in the backward. The log-probs compute
theirs in the backward, from logits that a head multiplies a second time, or that the caller gave and autograd has
saved.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from drpo_kernels import ops
from drpo_kernels.backends import row_ops
from drpo_kernels.backends.planning import NeedsGrad
from drpo_kernels.backends.rows import Field, Outcome, Stat
from drpo_kernels.graphs import traced

# Two ways to round the same factor differ by less than this, which is far below the bound on the gradients' error.
SCALE_TOLERANCE = 1e-5


def once_differentiable(backward: Callable) -> Callable:
    """PyTorch's decorator of this name, which also refuses create_graph=True.

    PyTorch's own raises an error only if the upstream gradient requires grad. In all other cases create_graph=True
    would give a gradient without a graph, and a penalty on that gradient would silently have no effect.
    """
    inner = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx, *upstream):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph=True: the fused functions have no second derivative; use backend='reference', which "
                "PyTorch differentiates as often as asked"
            )
        return inner(ctx, *upstream)

    return checked


def _finished(gradient: Tensor, factor: Tensor, dtype: torch.dtype, spec: ops.Spec) -> Tensor:
    """factor · gradient in `dtype`, rounded once. Outside of a graph it overwrites the gradient."""
    if traced(gradient):
        return (gradient.to(factor.dtype) * factor).to(dtype)
    # On a CPU PyTorch scales, whatever the backend: Triton's interpreter would truncate to bf16.
    row_ops("torch" if factor.device.type == "cpu" else spec.execution.backend).scale(gradient, factor)
    return gradient.to(dtype)


def _total(outcome: Tensor) -> Tensor:
    """The loss. It is summed in float64, if the device has it, because advantages of both signs cancel."""
    wide = outcome.dtype if outcome.device.type == "mps" else torch.float64
    return outcome[Outcome.LOSS].sum(dtype=wide).to(outcome.dtype)


def _spend(ctx, name: str) -> None:
    if not torch.compiler.is_compiling():
        if getattr(ctx, "spent", False):
            raise RuntimeError(
                f"{name}: second backward through the same loss. Its gradients are computed in the forward and given "
                "away by the first backward; call the loss again, or use the token log-probs functions, which recompute"
            )
        ctx.spent = True


def _scaled(rows: Tensor, loss_scale: float) -> Tensor:
    """The rows [len(Field), N] of the loss multiplied by `loss_scale`."""
    rows = rows.clone()
    for coefficients in (Field.POLICY, Field.KL, Field.ENTROPY, Field.Z_LOSS):
        rows[coefficients] *= loss_scale
    return rows


def _assert_declared(factor: Tensor, loss_scale: float) -> None:
    """Assert that `factor`, the true scale of the loss divided by `loss_scale`, is 1. This does not wait for a GPU."""
    torch._assert_async(
        (factor - 1).abs() <= SCALE_TOLERANCE,
        f"loss_scale must be what the loss is multiplied by before its backward, got {loss_scale}: main_grad has the "
        "weight's gradient already, at that scale",
    )


# The log-prob functions return these statistics, in the order of `Slope`.
DIFFERENTIABLE = (Stat.LOGPROB, Stat.LOGSUMEXP, Stat.ENTROPY)


def _slopes(*slopes: Tensor | None) -> Tensor | None:
    """Pack slopes in the order of `Slope`, up to the last one that is used. The result is None if none is used."""
    used = [i for i, slope in enumerate(slopes) if slope is not None]
    if not used:
        return None
    first = slopes[used[0]]
    assert first is not None
    zeros = torch.zeros_like(first)
    return torch.stack([zeros if slope is None else slope for slope in slopes[: used[-1] + 1]])


class LinearPolicyLoss(torch.autograd.Function):
    """(hidden [..., H], weight [V, H], bias) -> (loss, outcome [len(Outcome), N]); only the loss has a gradient.

    With `main_grad` the forward adds loss_scale · dW to it, and the weight gets no gradient here.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, main_grad, loss_scale, spec, needs_grad, sparse):
        rows = rows if loss_scale == 1 else _scaled(rows, loss_scale)
        sweep = (ops.sparse_policy if sparse else ops.linear_policy).on(hidden)
        outcome, *gradients = sweep(hidden, weight, bias, targets, rows, main_grad, spec, needs_grad)
        ctx.returned = NeedsGrad(*needs_grad).returned(main_grad)
        ctx.spec, ctx.declares, ctx.loss_scale = spec, main_grad is not None, loss_scale
        ctx.dtypes = [hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(outcome)
        ctx.set_materialize_grads(False)
        total = _total(outcome)
        return total if loss_scale == 1 else total / loss_scale, outcome

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        if upstream is None:  # nothing that is differentiated depends on the loss
            return (None,) * 10
        _spend(ctx, "linear_policy_loss")
        factor = upstream
        if ctx.loss_scale != 1:
            factor = upstream / ctx.loss_scale
            factor = torch.where((factor - 1).abs() <= SCALE_TOLERANCE, 1, factor)  # 1 rounds nothing
        if ctx.declares:
            _assert_declared(factor, ctx.loss_scale)
        gradients = [
            _finished(gradient, factor, dtype, ctx.spec) if needed else None
            for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.returned, strict=True)
        ]
        return *gradients, *[None] * 7


class LinearLogprobs(torch.autograd.Function):
    """(hidden [..., H], weight [V, H], bias) -> (logprobs, logsumexp, entropy), [N] each; the backward recomputes
    the logits.

    With `main_grad` the backward adds dW to it, and the weight gets no gradient here.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, main_grad, spec, needs_grad):
        statistics = ops.linear_statistics.on(hidden)(hidden, weight, bias, targets, rows, spec)
        ctx.save_for_backward(hidden, weight, bias, targets, rows, statistics)
        ctx.spec, ctx.needs_grad = spec, needs_grad
        ctx.main_grad = main_grad  # a saved tensor must not change until the backward, but this one may
        ctx.set_materialize_grads(False)
        return tuple(statistics[stat].clone() for stat in DIFFERENTIABLE)

    @staticmethod
    @once_differentiable
    def backward(ctx, *slopes):
        slopes = _slopes(*slopes)
        if slopes is None:
            return (None,) * 8
        saved = ctx.saved_tensors  # read only once, because hooks of activation checkpointing give a tensor once
        gradients = ops.linear_recompute.on(slopes)(*saved, slopes, ctx.main_grad, ctx.spec, ctx.needs_grad)
        returned = NeedsGrad(*ctx.needs_grad).returned(ctx.main_grad)
        gradients = [
            gradient.to(x.dtype) if needed else None
            for gradient, x, needed in zip(gradients, saved[:3], returned, strict=True)
        ]
        return *gradients, *[None] * 5


class ReadyPolicyLoss(torch.autograd.Function):
    """logits [..., V] -> (loss, outcome [len(Outcome), N]); only the loss has a gradient."""

    @staticmethod
    def forward(ctx, logits, targets, rows, spec, with_gradient, inplace):
        outcome, gradient, unscale = ops.ready_policy.on(logits)(logits, targets, rows, spec, with_gradient, inplace)
        ctx.save_for_backward(gradient, unscale)
        ctx.spec = spec
        ctx.mark_non_differentiable(outcome)
        ctx.set_materialize_grads(False)
        return _total(outcome), outcome

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        if upstream is None:
            return (None,) * 6
        _spend(ctx, "policy_loss")
        gradient, unscale = ctx.saved_tensors
        return _finished(gradient, upstream * unscale, gradient.dtype, ctx.spec), None, None, None, None, None


class ReadyLogprobs(torch.autograd.Function):
    """logits [..., V] -> (logprobs, logsumexp, entropy), [N] each and differentiable."""

    @staticmethod
    def forward(ctx, logits, targets, rows, spec):
        statistics = ops.ready_statistics.on(logits)(logits, targets, rows, spec)
        ctx.save_for_backward(logits, targets, rows, statistics)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return tuple(statistics[stat].clone() for stat in DIFFERENTIABLE)

    @staticmethod
    @once_differentiable
    def backward(ctx, *slopes):
        slopes = _slopes(*slopes)
        if slopes is None:
            return (None,) * 4
        gradient, unscale = ops.ready_gradient.on(slopes)(*ctx.saved_tensors, slopes, ctx.spec)
        if gradient.dtype == torch.float16:
            gradient = _finished(gradient, unscale, gradient.dtype, ctx.spec)
        return gradient, None, None, None


class KeptLogits(torch.autograd.Function):
    """(hidden [..., H], weight [V, H], bias, ids [N, K]) -> logits [N, K] of those entries, 0 where ids are below 0."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, spec, needs_grad):
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.spec, ctx.needs_grad = spec, needs_grad
        return ops.kept_logits.on(hidden)(hidden, weight, bias, ids, spec)

    @staticmethod
    @once_differentiable
    def backward(ctx, slopes):
        gradients = ops.kept_gradients.on(slopes)(*ctx.saved_tensors, slopes.contiguous(), ctx.spec, ctx.needs_grad)
        return *(g if needed else None for g, needed in zip(gradients, ctx.needs_grad, strict=True)), None, None, None
