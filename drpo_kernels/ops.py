"""The computations behind the autograd functions, each also a custom op that stands in for it inside compiled graphs.

Row compaction has data-dependent shapes, which `torch.compile(fullgraph=True)` and `FakeTensorMode` cannot follow:
there each computation is one opaque op. A schema carries no object, so a `Spec` travels as words and numbers.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.backends import kept_logits as kept
from drpo_kernels.backends import row_ops
from drpo_kernels.backends.ready import gradient_rows, policy_rows, statistics_rows
from drpo_kernels.backends.rows import Outcome, RowBatch, Stat, Terms, Transform, derivative, recordable
from drpo_kernels.backends.sparse.sweep import outcome_fields, sparse_policy_sweep
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
from drpo_kernels.graphs import own_graph, traced
from drpo_kernels.objective import decode_objective, encode_objective
from drpo_kernels.objectives import PolicyGradient
from drpo_kernels.token_losses import token_losses
from drpo_kernels.tokens import Sequences, Tokens


@dataclass(frozen=True)
class Spec:
    """Everything about a call that is not a tensor. `terms` is None for the log-prob functions."""

    vocab: int
    transform: Transform
    execution: Execution
    terms: Terms | None = None

    def encode(self) -> tuple[list[str], list[float]]:
        """The spec as (words, numbers) of a custom op's schema, which cannot carry a process group."""
        if self.execution.shard is not None:
            raise RuntimeError("vocab_shard cannot be used in one graph (fullgraph=True): it holds a process group")
        run, terms = self.execution, self.terms or Terms(PolicyGradient())
        objective, numbers = encode_objective(terms.objective)
        words = [
            objective, terms.kl_estimator or "", str(terms.kl_importance), "True" if terms.entropy_bonus else "",
            "True" if terms.z_loss else "", run.backend, _dtype_name(run.compute_dtype), _dtype_name(run.logits_dtype),
            str(run.workspace_bytes or ""), str(run.every_row), run.head_dtype or "", str(run.batch_invariant),
            "True" if run.sparse_grad else "",
        ]  # fmt: skip
        softcap = math.nan if self.transform.softcap is None else self.transform.softcap
        # the vocabulary and every coefficient may be symbols in a graph: numbers, not words; and whether there is an
        # entropy bonus or a z-loss is one until it is asked for
        return words, list(map(float, (
            self.vocab, self.transform.logit_scale, softcap, run.sparse_grad, terms.kl_cap, *numbers
        )))  # fmt: skip

    @staticmethod
    def decode(words: list[str], numbers: list[float]) -> "Spec":
        objective, kl, importance, bonus, z_loss, backend, *run, _ = words
        compute, logits, workspace, every_row, head, invariant = run
        vocab, scale, softcap, sparse, cap, *hyper = numbers
        objective = decode_objective(objective, hyper)
        terms = Terms(objective, kl or None, importance == "True", bonus == "True", z_loss == "True", cap)
        execution = Execution(
            backend, _dtype_of(compute), _dtype_of(logits), int(workspace) if workspace else None, every_row == "True",
            head_dtype=head or None, batch_invariant=invariant == "True", sparse_grad=sparse,
        )  # fmt: skip
        return Spec(int(vocab), Transform(scale, None if math.isnan(softcap) else softcap), execution, terms)


class OpSpec(NamedTuple):
    """A `Spec` as an op takes it."""

    words: list[str]
    numbers: Tensor  # float64, on the CPU, where reading them waits for nothing


def op_spec(spec: Spec | OpSpec, tensor: Tensor) -> Spec | OpSpec:
    """What an autograd function is given: the spec, or an `OpSpec` where `tensor` is traced. PyTorch 2.8 could not take
    a graph's symbols out of a spec while it differentiates that function.
    """
    if isinstance(spec, OpSpec) or not traced(tensor):
        return spec
    words, numbers = spec.encode()
    # a float in a schema, or in the list of a tensor, would be a constant, which each new value would compile again
    one = tensor.new_ones((), dtype=torch.float64, device="cpu")
    return OpSpec(words, torch.stack([one * number for number in numbers]))


def _dtype_name(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def _dtype_of(name: str) -> torch.dtype | None:
    return getattr(torch, name) if name else None


# --- the computations, with tensors in and tensors out ---------------------------------------------------------------


def _linear_policy(hidden, weight, bias, targets, rows, main_grad, spec: Spec, wanted: list[bool]):
    head = Head(weight, bias, spec.vocab, spec.transform, main_grad)
    sweep = sparse_policy_sweep if spec.execution.sparse_grad else policy_sweep
    outcome, gradients = sweep(hidden, head, targets, rows, spec.terms, spec.execution, Wanted(*wanted))
    return outcome, *_present(gradients, hidden)


def _linear_statistics(hidden, weight, bias, targets, rows, spec: Spec) -> Tensor:
    return statistics_sweep(hidden, Head(weight, bias, spec.vocab, spec.transform), targets, rows, spec.execution)


def _linear_recompute(
    hidden, weight, bias, targets, rows, statistics, slopes, main_grad, spec: Spec, wanted: list[bool]
) -> tuple[Tensor, ...]:
    head = Head(weight, bias, spec.vocab, spec.transform, main_grad)
    gradients = recompute_sweep(hidden, head, targets, rows, statistics, slopes, spec.execution, Wanted(*wanted))
    return _present(gradients, hidden)


def _ready_policy(
    logits, targets, rows, spec: Spec, with_gradient: bool, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (outcome, gradient, 0-d factor on the gradient)."""
    out = None
    if with_gradient:
        out = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    ops = row_ops(spec.execution.backend)
    outcome, undo = policy_rows(ops, RowBatch(logits, targets, rows, spec.transform), spec.vocab, spec.terms, out)
    if inplace and with_gradient:
        torch.autograd.graph.increment_version(logits)
    gradient = logits.new_empty(0) if out is None else out.detach()
    return outcome, gradient, rows.new_ones(()) if undo is None else undo


def _ready_statistics(logits, targets, rows, spec: Spec) -> Tensor:
    ops = row_ops(spec.execution.backend)
    return statistics_rows(ops, RowBatch(logits, targets, rows, spec.transform), spec.vocab)


def _ready_gradient(logits, targets, rows, statistics, slopes, spec: Spec) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    ops = row_ops(spec.execution.backend)
    undo = gradient_rows(ops, RowBatch(logits, targets, rows, spec.transform), spec.vocab, statistics, slopes, out)
    return out, rows.new_ones(()) if undo is None else undo


def _kept_logits(hidden, weight, bias, ids, spec: Spec) -> Tensor:
    return kept.logits(hidden, weight, bias, ids, spec.execution)


def _kept_gradients(hidden, weight, bias, ids, slopes, spec: Spec, wanted: list[bool]) -> tuple[Tensor, ...]:
    return _present(kept.gradients(hidden, weight, bias, ids, slopes, spec.execution, Wanted(*wanted)), hidden)


def _sequence_slope(logprobs, old, advantages, valid, cu_seqlens, spec: Spec, shape: list[int]) -> Tensor:
    """∂(Σ ℓ)/∂logπ of each token, [N], where autograd differentiates the loss; `shape` is that of the targets."""
    objective, groups = spec.terms.objective, {}
    with own_graph():
        if objective.sequence_level:
            groups = {"valid": recordable(valid), "sequences": Sequences(torch.Size(shape), cu_seqlens)}
        leaf = recordable(logprobs).detach().requires_grad_()
        tokens = Tokens(leaf, recordable(old), recordable(advantages), **groups)
        return derivative(token_losses(objective, tokens), leaf, objective)


def _present(gradients: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    """An op returns tensors, so a gradient nobody asked for is an empty one."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


# --- custom ops -------------------------------------------------------------------------------------------------------

_library = torch.library.Library("drpo_kernels", "DEF")
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor rows"
_READY = "Tensor logits, Tensor targets, Tensor rows"
_SPEC = "str[] words, Tensor numbers"


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, ...]:
    returned = [wanted[0], wanted[1] and main_grad is None, wanted[2]]
    return tuple(
        x.new_empty(x.shape, dtype=stored_gradient_dtype(x.dtype)) if want else hidden.new_empty(0)
        for x, want in zip((hidden, weight, bias), returned, strict=True)
    )


def _recording_autograd():
    """A compiled graph excludes autograd's dispatch keys from its ops; inside, objectives differentiate themselves."""
    keys, key = torch._C.DispatchKeySet, torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set() - keys(key.AutogradFunctionality) - keys(key.ADInplaceOrView)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _define(name: str, arguments: str, returns: str, function, fake):
    """Register `function(*tensors, spec, *rest)` as an op `(tensors, words, numbers, rest)` shaped by `fake`.

    -> the same function, which calls itself through the op while a graph is being traced.
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

    def call(*args):
        if not traced(args[0]):
            return function(*args)
        words, numbers = op_spec(args[tensors], args[0])
        return op(*args[:tensors], words, numbers, *args[tensors + 1 :])

    return call


linear_policy = _define(
    "linear_policy",
    f"{_HEAD}, Tensor(a!)? main_grad, {_SPEC}, bool[] wanted", "(Tensor, Tensor, Tensor, Tensor)", _linear_policy,
    lambda hidden, weight, bias, targets, rows, main_grad, words, numbers, wanted: (
        rows.new_empty(outcome_fields(bool(words[-1])), rows.shape[1]),
        *_empty_gradients(hidden, weight, bias, main_grad, wanted),
    ),
)  # fmt: skip
linear_statistics = _define(
    "linear_statistics", f"{_HEAD}, {_SPEC}", "Tensor", _linear_statistics,
    lambda hidden, weight, bias, targets, rows, words, numbers: rows.new_empty(len(Stat), rows.shape[1]),
)  # fmt: skip
linear_recompute = _define(
    "linear_recompute",
    f"{_HEAD}, Tensor statistics, Tensor slopes, Tensor(a!)? main_grad, {_SPEC}, bool[] wanted",
    "(Tensor, Tensor, Tensor)", _linear_recompute,
    lambda hidden, weight, bias, targets, rows, statistics, slopes, main_grad, words, numbers, wanted: (
        _empty_gradients(hidden, weight, bias, main_grad, wanted)
    ),
)  # fmt: skip
ready_policy = _define(
    "ready_policy", f"{_READY}, {_SPEC}, bool with_gradient, bool inplace", "(Tensor, Tensor, Tensor)",
    _ready_policy,
    lambda logits, targets, rows, words, numbers, with_gradient, inplace: (
        rows.new_empty(len(Outcome), rows.shape[1]),
        logits.new_empty(logits.shape if with_gradient else 0),
        rows.new_empty(()),
    ),
)  # fmt: skip
ready_statistics = _define(
    "ready_statistics", f"{_READY}, {_SPEC}", "Tensor", _ready_statistics,
    lambda logits, targets, rows, words, numbers: rows.new_empty(len(Stat), rows.shape[1]),
)  # fmt: skip
ready_gradient = _define(
    "ready_gradient", f"{_READY}, Tensor statistics, Tensor slopes, {_SPEC}", "(Tensor, Tensor)", _ready_gradient,
    lambda logits, targets, rows, statistics, slopes, words, numbers: (
        logits.new_empty(logits.shape), rows.new_empty(())
    ),
)  # fmt: skip

kept_logits = _define(
    "kept_logits", f"Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, {_SPEC}", "Tensor", _kept_logits,
    lambda hidden, weight, bias, ids, words, numbers: (
        hidden.new_empty(ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    ),
)  # fmt: skip
kept_gradients = _define(
    "kept_gradients",
    f"Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor slopes, {_SPEC}, bool[] wanted",
    "(Tensor, Tensor, Tensor)", _kept_gradients,
    lambda hidden, weight, bias, ids, slopes, words, numbers, wanted: tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if want else hidden.new_empty(0)
        for x, want in zip((hidden, weight, bias), wanted, strict=True)
    ),
)  # fmt: skip
sequence_slope = _define(
    "sequence_slope",
    f"Tensor logprobs, Tensor old, Tensor advantages, Tensor valid, Tensor? cu_seqlens, {_SPEC}, SymInt[] shape",
    "Tensor",
    _sequence_slope,
    lambda logprobs, old, advantages, valid, cu_seqlens, words, numbers, shape: torch.empty_like(logprobs),
)  # fmt: skip
