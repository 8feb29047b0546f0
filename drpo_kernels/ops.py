"""The computations of autograd.py as custom ops, which stand in for them inside compiled graphs.

Row compaction has data-dependent shapes, which `torch.compile(fullgraph=True)` and `FakeTensorMode` cannot follow. For
them each computation is one opaque op.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.backends.kept_logits import kept_gradients as _kept_gradients
from drpo_kernels.backends.kept_logits import kept_logits as _kept_logits
from drpo_kernels.backends.planning import NeedsGrad
from drpo_kernels.backends.ready import ready_gradient as _ready_gradient
from drpo_kernels.backends.ready import ready_policy as _ready_policy
from drpo_kernels.backends.ready import ready_statistics as _ready_statistics
from drpo_kernels.backends.row_loss import policy_slope
from drpo_kernels.backends.rows import Outcome, Stat
from drpo_kernels.backends.sparse.contract import SPARSE_OUTCOME
from drpo_kernels.backends.sparse.sweep import sparse_policy_sweep
from drpo_kernels.backends.spec import OpSpec, Spec, op_spec
from drpo_kernels.backends.sweep import policy_sweep, recompute_sweep, statistics_sweep, stored_gradient_dtype
from drpo_kernels.graphs import traced
from drpo_kernels.tokens import Sequences

_library = torch.library.Library("drpo_kernels", "DEF")
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor rows"
_READY = "Tensor logits, Tensor targets, Tensor rows"
_SPEC = "str[] words, Tensor numbers"


def _recording_autograd():
    """A context with autograd's dispatch keys, which a compiled graph excludes from its ops. Objectives need them to be
    differentiated inside of an op.
    """
    keys, key = torch._C.DispatchKeySet, torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set() - keys(key.AutogradFunctionality) - keys(key.ADInplaceOrView)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


class Computation(NamedTuple):
    """A function of tensors and a `Spec`, and the custom op that stands in for it inside a graph."""

    function: Callable
    op: Callable

    def on(self, tensor: Tensor) -> Callable:
        """The op if `tensor`, one of the arguments, is traced, and the function otherwise."""
        return self.op if traced(tensor) else self.function


def _define(name: str, arguments: str, returns: str, function, fake):
    """Register `function(*tensors, spec, *rest)` as an op `(*tensors, words, numbers, *rest)`. `fake` takes the op's
    arguments and returns empty tensors like its results.
    """
    _library.define(f"{name}({arguments}) -> {returns}")
    tensors = arguments.split(", str[] words")[0].count(",") + 1

    def implementation(*args):
        words, numbers = args[tensors], args[tensors + 1]
        with _recording_autograd():
            return function(*args[:tensors], Spec.decode(words, numbers.tolist()), *args[tensors + 2 :])

    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"drpo_kernels::{name}", fake, lib=_library)
    op = getattr(torch.ops.drpo_kernels, name)

    def call_op(*args):
        spec = op_spec(args[tensors], args[0])
        assert isinstance(spec, OpSpec)
        return op(*args[:tensors], spec.words, spec.numbers, *args[tensors + 1 :])

    return Computation(function, call_op)


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None, needs_grad: list[bool]
) -> tuple[Tensor, ...]:
    returned = NeedsGrad(*needs_grad).returned(main_grad)
    return tuple(
        x.new_empty(x.shape, dtype=stored_gradient_dtype(x.dtype)) if x is not None and needed else hidden.new_empty(0)
        for x, needed in zip((hidden, weight, bias), returned, strict=True)
    )


def _policy_op(name: str, fields: int, sweep):
    return _define(
        name,
        f"{_HEAD}, Tensor(a!)? main_grad, {_SPEC}, bool[] needs_grad",
        "(Tensor, Tensor, Tensor, Tensor)",
        sweep,
        lambda hidden, weight, bias, targets, rows, main_grad, words, numbers, needs_grad: (
            rows.new_empty(fields, rows.shape[1]),
            *_empty_gradients(hidden, weight, bias, main_grad, needs_grad),
        ),
    )


linear_policy = _policy_op("linear_policy", len(Outcome), policy_sweep)
sparse_policy = _policy_op("sparse_policy", SPARSE_OUTCOME, sparse_policy_sweep)
linear_statistics = _define(
    "linear_statistics",
    f"{_HEAD}, {_SPEC}",
    "Tensor",
    statistics_sweep,
    lambda hidden, weight, bias, targets, rows, words, numbers: rows.new_empty(len(Stat), rows.shape[1]),
)
linear_recompute = _define(
    "linear_recompute",
    f"{_HEAD}, Tensor statistics, Tensor slopes, Tensor(a!)? main_grad, {_SPEC}, bool[] needs_grad",
    "(Tensor, Tensor, Tensor)",
    recompute_sweep,
    lambda hidden, weight, bias, targets, rows, statistics, slopes, main_grad, words, numbers, needs_grad: (
        _empty_gradients(hidden, weight, bias, main_grad, needs_grad)
    ),
)
ready_policy = _define(
    "ready_policy",
    f"{_READY}, {_SPEC}, bool with_gradient, bool inplace",
    "(Tensor, Tensor, Tensor)",
    _ready_policy,
    lambda logits, targets, rows, words, numbers, with_gradient, inplace: (
        rows.new_empty(len(Outcome), rows.shape[1]),
        logits.new_empty(logits.shape if with_gradient else 0),
        rows.new_empty(()),
    ),
)
ready_statistics = _define(
    "ready_statistics",
    f"{_READY}, {_SPEC}",
    "Tensor",
    _ready_statistics,
    lambda logits, targets, rows, words, numbers: rows.new_empty(len(Stat), rows.shape[1]),
)
ready_gradient = _define(
    "ready_gradient",
    f"{_READY}, Tensor statistics, Tensor slopes, {_SPEC}",
    "(Tensor, Tensor)",
    _ready_gradient,
    lambda logits, targets, rows, statistics, slopes, words, numbers: (
        logits.new_empty(logits.shape), rows.new_empty(())
    ),
)  # fmt: skip
kept_logits = _define(
    "kept_logits",
    f"Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, {_SPEC}",
    "Tensor",
    _kept_logits,
    lambda hidden, weight, bias, ids, words, numbers: hidden.new_empty(
        ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32)
    ),
)
kept_gradients = _define(
    "kept_gradients",
    f"Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor slopes, {_SPEC}, bool[] needs_grad",
    "(Tensor, Tensor, Tensor)",
    _kept_gradients,
    lambda hidden, weight, bias, ids, slopes, words, numbers, needs_grad: tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else hidden.new_empty(0)
        for x, needed in zip((hidden, weight, bias), needs_grad, strict=True)
    ),
)


def _sequence_slope(logprobs, old, advantages, valid, cu_seqlens, spec: Spec, shape: list[int]) -> Tensor:
    """Call `policy_slope` for targets of this shape. An op cannot take `Sequences`, so they are made here."""
    assert spec.terms is not None
    objective = spec.terms.objective
    if not objective.sequence_level:
        return policy_slope(logprobs, old, advantages, None, None, objective)
    return policy_slope(logprobs, old, advantages, valid, Sequences(torch.Size(shape), cu_seqlens), objective)


sequence_slope = _define(
    "sequence_slope",
    f"Tensor logprobs, Tensor old, Tensor advantages, Tensor valid, Tensor? cu_seqlens, {_SPEC}, SymInt[] shape",
    "Tensor",
    _sequence_slope,
    lambda logprobs, old, advantages, valid, cu_seqlens, words, numbers, shape: torch.empty_like(logprobs),
)
