"""Tests of hooks on saved tensors (activation checkpointing, offloading) and of second derivatives."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import drpo_kernels as dk
from problems import BACKENDS, relative

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@dataclass(frozen=True)
class Own(dk.Objective):
    def token_loss(self, tokens):
        return -tokens.advantages * tokens.ratio


OBJECTIVES = [dk.DRPO(0.2), dk.GSPO(), Own()]
ROWS, HIDDEN, VOCAB = (2, 4), 6, 23


def inputs(device):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(*ROWS, HIDDEN, generator=generator), torch.randn(VOCAB, HIDDEN, generator=generator)
    targets, old = torch.randint(VOCAB, ROWS, generator=generator), -3 * torch.rand(ROWS, generator=generator)
    advantages = torch.randn(ROWS, generator=generator)
    hidden, weight = (x.to(device).requires_grad_() for x in (hidden, weight))
    return hidden, weight, targets.to(device), old.to(device), advantages.to(device)


def calls(targets, old, advantages, backend):
    """Yield (name, function), where each function maps (hidden, weight) to a scalar. A chunk has two rows."""
    options = {"backend": backend, "workspace_bytes": 2 * VOCAB * 4}
    rest = targets, old, advantages

    def policy(objective, form, **more):
        if form == "linear":
            return lambda h, w: dk.linear_policy_loss(h, w, *rest, objective=objective, **options, **more).loss.sum()
        return lambda h, w: dk.policy_loss(h @ w.T, *rest, objective=objective, backend=backend, **more).loss.sum()

    for objective in OBJECTIVES:
        for form in ("linear", "logits"):
            yield f"{type(objective).__name__} {form}", policy(objective, form)
    yield "none", policy(dk.DRPO(), "linear", reduction="none")
    yield "log-probs", lambda h, w: sum(x.sum() for x in dk.linear_token_logprobs(h, w, targets, **options))
    yield "of logits", lambda h, w: sum(x.sum() for x in dk.token_logprobs(h @ w.T, targets, backend=backend))


@every_backend
def test_a_checkpointed_model_runs_twice(backend, device):
    """The model runs in the forward and once in the backward, however many chunks there are, and its gradients are the
    same.
    """
    hidden, weight, *rest = inputs(device)
    for name, call in calls(*rest, backend):
        runs = []

        def step(h, call=call, runs=runs):
            runs.append(1)
            return call(torch.tanh(h), weight)

        want = torch.autograd.grad(call(torch.tanh(hidden), weight), [hidden, weight])
        got = torch.autograd.grad(checkpoint(step, hidden, use_reentrant=False), [hidden, weight])
        assert len(runs) == 2, name
        assert all(map(torch.equal, got, want)), name


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_first_use_of_an_objective_runs_the_model_no_more(backend, device):
    """At its first use an objective is tried on other tokens, which must not run the model again."""

    @dataclass(frozen=True)
    class New(Own):
        pass

    hidden, weight, *rest = inputs(device)
    runs = []

    def step(h):
        runs.append(1)
        return dk.linear_policy_loss(torch.tanh(h), weight, *rest, objective=New(), backend=backend).loss

    checkpoint(step, hidden, use_reentrant=False).backward()
    assert len(runs) == 2


@every_backend
def test_hooks_that_unpack_a_tensor_once(backend, device):
    """Offloading hooks free their copy when they hand it back."""

    def unpack(box):
        return box.pop()

    hidden, weight, *rest = inputs(device)
    for name, call in calls(*rest, backend):
        want = torch.autograd.grad(call(hidden, weight), [hidden, weight])
        with torch.autograd.graph.saved_tensors_hooks(lambda x: [x.clone()], unpack):
            loss = call(hidden, weight)
        assert all(map(torch.equal, torch.autograd.grad(loss, [hidden, weight]), want)), name


def test_the_inner_graph_is_freed(device):
    """A hook that keeps a tensor must not keep its graph."""
    kept = []

    @dataclass(frozen=True)
    class Watched(Own):
        def token_loss(self, tokens):
            loss = tokens.ratio  # the backward of this saves its own result
            kept.append(weakref.ref(loss))
            return -tokens.advantages * loss

    hidden, weight, *rest = inputs(device)
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            dk.linear_policy_loss(hidden, weight, *rest, objective=Watched(), backend="torch")
        assert kept and all(reference() is None for reference in kept)
    finally:
        gc.enable()


@every_backend
def test_a_second_derivative_is_right_or_refused(backend, device):
    """The gradient of a gradient penalty is that of float64 autograd, unless it is refused."""

    def penalised(call, hidden, weight):
        value = call(hidden * 2, weight)
        (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
        return torch.autograd.grad(value + gradient.square().sum(), hidden)[0]

    hidden, weight, *rest = inputs(device)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = dict(calls(*rest, "reference"))
    for name, call in calls(*rest, backend):
        if backend == "reference":
            # Float32 goes through two backwards. The float64 result has the same formula without their rounding.
            assert relative(penalised(call, hidden, weight), penalised(exact[name], *wide)) <= 1e-4, name
        else:
            with pytest.raises(RuntimeError, match=r"create_graph=True.*backend='reference'"):
                penalised(call, hidden, weight)


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_reference_has_every_derivative(estimator, importance):
    hidden, weight, targets, old, advantages = (
        x.detach().double() if x.is_floating_point() else x for x in inputs("cpu")
    )
    options = {"kl_coef": 0.3, "kl_estimator": estimator, "kl_importance": importance, "entropy_coef": 0.1}

    def loss(h):
        return dk.linear_policy_loss(
            h, weight, targets[:1, :3], old[:1, :3], advantages[:1, :3], ref_logprobs=old[:1, :3] - 0.5,
            objective=dk.DRPO(0.2), backend="reference", **options,
        ).loss  # fmt: skip

    leaf = hidden[:1, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, leaf)
    assert torch.autograd.gradgradcheck(loss, leaf)
