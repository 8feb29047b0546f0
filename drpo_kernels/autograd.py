"""The autograd boundary: four `torch.autograd.Function`s over the computations of ops.py.

The policy losses compute their gradients in the forward and only scale them in the backward; the log-probs recompute
the logits there.
"""

import torch
from torch import Tensor

from drpo_kernels import ops
from drpo_kernels.backends.rows import Outcome, Stat

# elements scaled at a time: a float32 temporary of 64 MiB where the device needs one
SCALE_BLOCK = 1 << 24


def _finished(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor · gradient in `dtype`, rounded once; in place where nobody can see it."""
    if torch.compiler.is_compiling():
        return (gradient.to(factor.dtype) * factor).to(dtype)
    if factor.device.type == "cpu" and factor.item() == 1:  # reading it synchronises nothing there
        return gradient.to(dtype)
    # a 1-d factor takes part in type promotion: a 0-d one would first be rounded to bf16
    factor = factor.reshape(1)
    for block in gradient.view(-1).split(SCALE_BLOCK):
        torch.mul(block, factor, out=block)
    return gradient.to(dtype)


def _total(outcome: Tensor) -> Tensor:
    """The loss: summed in float64, where the device has it, because advantages of both signs cancel."""
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


def _slopes(logprob_slope: Tensor | None, entropy_slope: Tensor | None) -> Tensor | None:
    """[1, N], or [2, N] where the entropy is used, or None where neither is."""
    if logprob_slope is None and entropy_slope is None:
        return None
    if entropy_slope is None:
        return logprob_slope[None].contiguous()
    return torch.stack([torch.zeros_like(entropy_slope) if logprob_slope is None else logprob_slope, entropy_slope])


class LinearPolicyLoss(torch.autograd.Function):
    """(hidden [N, H], weight [V, H], bias) -> (loss, outcome [len(Outcome), N]); only the loss has a gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, spec, wanted):
        outcome, *gradients = ops.linear_policy(hidden, weight, bias, targets, rows, spec, wanted)
        ctx.wanted = wanted
        ctx.dtypes = [hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(outcome)
        return _total(outcome), outcome

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        _spend(ctx, "linear_policy_loss")
        gradients = [
            _finished(gradient, upstream, dtype) if want else None
            for gradient, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
        ]
        return *gradients, None, None, None, None


class LinearLogprobs(torch.autograd.Function):
    """(hidden [N, H], weight [V, H], bias) -> (logprobs [N], entropy [N]); the backward recomputes the logits."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, spec, wanted):
        statistics = ops.linear_statistics(hidden, weight, bias, targets, rows, spec)
        ctx.save_for_backward(hidden, weight, bias, targets, rows, statistics)
        ctx.spec, ctx.wanted = spec, wanted
        ctx.set_materialize_grads(False)
        return statistics[Stat.LOGPROB].clone(), statistics[Stat.ENTROPY].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, logprob_slope, entropy_slope):
        slopes = _slopes(logprob_slope, entropy_slope)
        if slopes is None:
            return (None,) * 7
        gradients = ops.linear_recompute(*ctx.saved_tensors, slopes, ctx.spec, ctx.wanted)
        inputs = ctx.saved_tensors[:3]
        gradients = [g.to(x.dtype) if want else None for g, x, want in zip(gradients, inputs, ctx.wanted, strict=True)]
        return *gradients, None, None, None, None


class ReadyPolicyLoss(torch.autograd.Function):
    """logits [..., V] -> (loss, outcome [len(Outcome), N]); only the loss has a gradient."""

    @staticmethod
    def forward(ctx, logits, targets, rows, spec, with_gradient, inplace):
        outcome, gradient, undo = ops.ready_policy(logits, targets, rows, spec, with_gradient, inplace)
        ctx.save_for_backward(gradient, undo)
        ctx.mark_non_differentiable(outcome)
        return _total(outcome), outcome

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        _spend(ctx, "policy_loss")
        gradient, undo = ctx.saved_tensors
        return _finished(gradient, upstream * undo, gradient.dtype), None, None, None, None, None


class ReadyLogprobs(torch.autograd.Function):
    """logits [..., V] -> (logprobs [N], entropy [N]), both differentiable."""

    @staticmethod
    def forward(ctx, logits, targets, rows, spec):
        statistics = ops.ready_statistics(logits, targets, rows, spec)
        ctx.save_for_backward(logits, targets, rows, statistics)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return statistics[Stat.LOGPROB].clone(), statistics[Stat.ENTROPY].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, logprob_slope, entropy_slope):
        slopes = _slopes(logprob_slope, entropy_slope)
        if slopes is None:
            return (None,) * 4
        gradient, undo = ops.ready_gradient(*ctx.saved_tensors, slopes, ctx.spec)
        if gradient.dtype == torch.float16:
            gradient = _finished(gradient, undo, gradient.dtype)
        return gradient, None, None, None
