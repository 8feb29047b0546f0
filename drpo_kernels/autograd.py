"""The autograd boundary: four `torch.autograd.Function`s, and the custom ops that stand in for them inside compiled graphs.

The fused functions compute their gradients in the forward and only scale them in the backward. Under `torch.compile` each calls one
opaque op (row compaction has data-dependent shapes); the op's schema carries no object, so a `Spec` travels as a word list and floats.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo_kernels.backends import row_ops
from drpo_kernels.backends.ready import gradient_rows, policy_rows, statistics_rows
from drpo_kernels.backends.rows import Outcome, Stat, Terms, Transform
from drpo_kernels.backends.sweep import (
    Execution,
    Gradients,
    Head,
    Wanted,
    policy_sweep,
    recompute_sweep,
    statistics_sweep,
    stored_gradient_dtype,
)
from drpo_kernels.objectives import PolicyGradient, decode_objective, encode_objective


@dataclass(frozen=True)
class Spec:
    """Everything about a call that is not a tensor. `terms` is None for the log-prob functions."""

    vocab: int
    transform: Transform
    execution: Execution
    terms: Terms | None = None

    def encode(self) -> tuple[list[str], list[float]]:
        """The spec as (words, numbers) of a custom op's schema."""
        run, terms = self.execution, self.terms or Terms(PolicyGradient())
        objective, numbers = encode_objective(terms.objective)
        words = [
            objective, terms.kl_estimator or "", str(terms.entropy_bonus), run.backend, _dtype_name(run.compute_dtype),
            _dtype_name(run.logits_dtype), str(run.workspace_bytes or ""), str(run.every_row), str(self.vocab),
        ]  # fmt: skip
        softcap = math.nan if self.transform.softcap is None else self.transform.softcap
        return words, [float(self.transform.logit_scale), float(softcap), *numbers]

    @staticmethod
    def decode(words: list[str], numbers: list[float]) -> "Spec":
        objective, kl, bonus, backend, compute, logits, workspace, every_row, vocab = words
        scale, softcap, *hyper = numbers
        terms = Terms(decode_objective(objective, hyper), kl or None, bonus == "True")
        execution = Execution(
            backend, _dtype_of(compute), _dtype_of(logits), int(workspace) if workspace else None, every_row == "True"
        )
        return Spec(int(vocab), Transform(scale, None if math.isnan(softcap) else softcap), execution, terms)


def _dtype_name(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def _dtype_of(name: str) -> torch.dtype | None:
    return getattr(torch, name) if name else None


# --- the computations, with tensors in and tensors out ---------------------------------------------------------------


def _linear_policy(hidden, weight, bias, targets, rows, spec: Spec, wanted: list[bool]) -> tuple[Tensor, ...]:
    head = Head(weight, bias, spec.vocab, spec.transform)
    outcome, gradients = policy_sweep(hidden, head, targets, rows, spec.terms, spec.execution, Wanted(*wanted))
    return outcome, *_present(gradients, hidden)


def _linear_statistics(hidden, weight, bias, targets, rows, spec: Spec) -> Tensor:
    return statistics_sweep(hidden, Head(weight, bias, spec.vocab, spec.transform), targets, rows, spec.execution)


def _linear_recompute(hidden, weight, bias, targets, rows, statistics, slopes, spec: Spec, wanted: list[bool]):
    head = Head(weight, bias, spec.vocab, spec.transform)
    gradients = recompute_sweep(hidden, head, targets, rows, statistics, slopes, spec.execution, Wanted(*wanted))
    return _present(gradients, hidden)


def _ready_policy(logits, targets, rows, spec: Spec, with_gradient: bool, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> (outcome, gradient, 0-d factor on the gradient)."""
    out = None
    if with_gradient:
        out = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    ops = row_ops(spec.execution.backend)
    outcome, undo = policy_rows(ops, logits, targets, rows, spec.terms, spec.transform, None, spec.vocab, out)
    if inplace and with_gradient:
        torch.autograd.graph.increment_version(logits)
    return outcome, logits.new_empty(0) if out is None else out, rows.new_ones(()) if undo is None else undo


def _ready_statistics(logits, targets, rows, spec: Spec) -> Tensor:
    ops = row_ops(spec.execution.backend)
    return statistics_rows(ops, logits, targets, rows, spec.transform, None, spec.vocab)


def _ready_gradient(logits, targets, rows, statistics, slopes, spec: Spec) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    ops = row_ops(spec.execution.backend)
    undo = gradient_rows(ops, logits, targets, rows, statistics, slopes, spec.transform, None, spec.vocab, out)
    return out, rows.new_ones(()) if undo is None else undo


def _present(gradients: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    """An op returns tensors, so a gradient nobody asked for is an empty one."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


# --- custom ops -------------------------------------------------------------------------------------------------------

_library = torch.library.Library("drpo_kernels", "DEF")
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor rows"
_READY = "Tensor logits, Tensor targets, Tensor rows"
_SPEC = "str[] words, float[] numbers"


def _empty_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(x.shape, dtype=stored_gradient_dtype(x.dtype)) if want else hidden.new_empty(0)
        for x, want in zip((hidden, weight, bias), wanted, strict=True)
    )


def _define(name: str, arguments: str, returns: str, function, fake) -> None:
    """Register `function(*tensors, spec, *rest)` as an op `(tensors, words, numbers, rest)`, and its shapes."""
    _library.define(f"{name}({arguments}) -> {returns}")
    tensors = arguments.split(", str[] words")[0].count(",") + 1

    def implementation(*args):
        words, numbers = args[tensors], args[tensors + 1]
        return function(*args[:tensors], Spec.decode(words, numbers), *args[tensors + 2 :])

    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"drpo_kernels::{name}", fake, lib=_library)


_define(
    "linear_policy", f"{_HEAD}, {_SPEC}, bool[] wanted", "(Tensor, Tensor, Tensor, Tensor)", _linear_policy,
    lambda hidden, weight, bias, targets, rows, words, numbers, wanted: (
        rows.new_empty(len(Outcome), rows.shape[1]), *_empty_gradients(hidden, weight, bias, wanted)
    ),
)  # fmt: skip
_define(
    "linear_statistics", f"{_HEAD}, {_SPEC}", "Tensor", _linear_statistics,
    lambda hidden, weight, bias, targets, rows, words, numbers: rows.new_empty(len(Stat), rows.shape[1]),
)  # fmt: skip
_define(
    "linear_recompute", f"{_HEAD}, Tensor statistics, Tensor slopes, {_SPEC}, bool[] wanted", "(Tensor, Tensor, Tensor)",
    _linear_recompute,
    lambda hidden, weight, bias, targets, rows, statistics, slopes, words, numbers, wanted: (
        _empty_gradients(hidden, weight, bias, wanted)
    ),
)  # fmt: skip
_define(
    "ready_policy", f"{_READY}, {_SPEC}, bool with_gradient", "(Tensor, Tensor, Tensor)",
    lambda logits, targets, rows, spec, with_gradient: _ready_policy(logits, targets, rows, spec, with_gradient, False),
    lambda logits, targets, rows, words, numbers, with_gradient: (
        rows.new_empty(len(Outcome), rows.shape[1]), logits.new_empty(logits.shape if with_gradient else 0), rows.new_empty(())
    ),
)  # fmt: skip
_define(
    "ready_statistics", f"{_READY}, {_SPEC}", "Tensor", _ready_statistics,
    lambda logits, targets, rows, words, numbers: rows.new_empty(len(Stat), rows.shape[1]),
)  # fmt: skip
_define(
    "ready_gradient", f"{_READY}, Tensor statistics, Tensor slopes, {_SPEC}", "(Tensor, Tensor)", _ready_gradient,
    lambda logits, targets, rows, statistics, slopes, words, numbers: (logits.new_empty(logits.shape), rows.new_empty(())),
)  # fmt: skip


# --- autograd ---------------------------------------------------------------------------------------------------------


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
                f"{name}: second backward through the same loss. Its gradients are computed in the forward and given away by the first "
                "backward; call the loss again, or use the token log-probs functions, which recompute"
            )
        ctx.spent = True


def _slopes(logprob_slope: Tensor | None, entropy_slope: Tensor | None) -> Tensor:
    """[1, N], or [2, N] where the entropy is used."""
    if entropy_slope is None:
        return logprob_slope[None]
    return torch.stack([torch.zeros_like(entropy_slope) if logprob_slope is None else logprob_slope, entropy_slope])


class LinearPolicyLoss(torch.autograd.Function):
    """(hidden [N, H], weight [V, H], bias) -> (loss, outcome [len(Outcome), N]); only the loss has a gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, spec, wanted):
        if torch.compiler.is_compiling():
            words, numbers = spec.encode()
            results = torch.ops.drpo_kernels.linear_policy(hidden, weight, bias, targets, rows, words, numbers, wanted)
        else:
            results = _linear_policy(hidden, weight, bias, targets, rows, spec, wanted)
        outcome, *gradients = results
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
    """(hidden [N, H], weight [V, H], bias) -> (logprobs [N], entropy [N]), both differentiable: the logits are recomputed in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, spec, wanted):
        if torch.compiler.is_compiling():
            words, numbers = spec.encode()
            statistics = torch.ops.drpo_kernels.linear_statistics(hidden, weight, bias, targets, rows, words, numbers)
        else:
            statistics = _linear_statistics(hidden, weight, bias, targets, rows, spec)
        ctx.save_for_backward(hidden, weight, bias, targets, rows, statistics)
        ctx.spec, ctx.wanted = spec, wanted
        ctx.set_materialize_grads(False)
        return statistics[Stat.LOGPROB].clone(), statistics[Stat.ENTROPY].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, logprob_slope, entropy_slope):
        slopes = _slopes(logprob_slope, entropy_slope)
        if torch.compiler.is_compiling():
            words, numbers = ctx.spec.encode()
            gradients = torch.ops.drpo_kernels.linear_recompute(*ctx.saved_tensors, slopes, words, numbers, ctx.wanted)
        else:
            gradients = _linear_recompute(*ctx.saved_tensors, slopes, ctx.spec, ctx.wanted)
        inputs = ctx.saved_tensors[:3]
        gradients = [g.to(x.dtype) if want else None for g, x, want in zip(gradients, inputs, ctx.wanted, strict=True)]
        return *gradients, None, None, None, None


class ReadyPolicyLoss(torch.autograd.Function):
    """logits [..., V] -> (loss, outcome [len(Outcome), N]); only the loss has a gradient."""

    @staticmethod
    def forward(ctx, logits, targets, rows, spec, with_gradient, inplace):
        if torch.compiler.is_compiling():
            words, numbers = spec.encode()
            results = torch.ops.drpo_kernels.ready_policy(logits, targets, rows, words, numbers, with_gradient)
        else:
            results = _ready_policy(logits.detach(), targets, rows, spec, with_gradient, inplace)
        outcome, gradient, undo = results
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
        if torch.compiler.is_compiling():
            words, numbers = spec.encode()
            statistics = torch.ops.drpo_kernels.ready_statistics(logits, targets, rows, words, numbers)
        else:
            statistics = _ready_statistics(logits, targets, rows, spec)
        ctx.save_for_backward(logits, targets, rows, statistics)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return statistics[Stat.LOGPROB].clone(), statistics[Stat.ENTROPY].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, logprob_slope, entropy_slope):
        slopes = _slopes(logprob_slope, entropy_slope)
        if torch.compiler.is_compiling():
            words, numbers = ctx.spec.encode()
            gradient, undo = torch.ops.drpo_kernels.ready_gradient(*ctx.saved_tensors, slopes, words, numbers)
        else:
            gradient, undo = _ready_gradient(*ctx.saved_tensors, slopes, ctx.spec)
        return _finished(gradient, undo, gradient.dtype), None, None, None
