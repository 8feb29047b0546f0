"""A subclass of a built-in objective runs the formula that it has, and keeps or loses the Triton twin with it."""

import functools
from dataclasses import dataclass

import pytest

import drpo_kernels as dk
from problems import BACKENDS, random_problem, replace
from problems import call as problem_call

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def problem():
    """Return 24 tokens without a mask."""
    return replace(random_problem(3, (4, 6), 8, 19), mask=None)


def surrogate(tokens):
    return -tokens.advantages * tokens.ratio


@dataclass(frozen=True)
class Tripled(dk.Objective):
    def token_loss(self, tokens):
        return 3 * surrogate(tokens)


def mixed_in(parent):
    return dataclass(frozen=True)(type("MixedIn", (Tripled, parent), {}))


def overridden(parent):
    return dataclass(frozen=True)(type("Overridden", (parent,), {"token_loss": Tripled.token_loss}))


def wrapped(parent):
    """Return a subclass whose formula is made by `functools.wraps`, which copies everything that a function carries."""
    token_loss = functools.wraps(parent.token_loss)(lambda self, tokens: 3 * surrogate(tokens))
    return type("Wrapped", (parent,), {"token_loss": token_loss})


def put_in_place(parent):
    put = type("PutInPlace", (parent,), {})
    put.token_loss = Tripled.token_loss
    return put


@every_backend
@pytest.mark.parametrize("parent", [dk.DRPO, dk.PPO, dk.CISPO, dk.DPPO])
@pytest.mark.parametrize("make", [mixed_in, overridden, wrapped, put_in_place])
def test_a_subclass_of_a_built_in_objective_runs_its_own_formula(make, parent, backend, device):
    """The subclass does not run the Triton twin of its parent, wherever its own formula comes from."""
    given = problem()
    objectives = Tripled(), make(parent)()
    loss, own = (problem_call(given, objective, backend, device).loss.item() for objective in objectives)
    assert own == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("parent", [dk.DRPO, dk.PPO])
def test_a_subclass_with_the_formula_of_its_parent_keeps_the_twin(parent):
    @dataclass(frozen=True)
    class Renamed(parent):
        label: str = ""

    assert Renamed().twin is parent().twin is not None and Renamed().zero_if_no_advantage


@every_backend
def test_rows_without_advantage_count_in_a_formula_of_their_own(backend, device):
    """The parent's promise that such rows do not count is about the parent's formula. A wrong promise of the subclass
    is an error.
    """

    @dataclass(frozen=True)
    class Pulled(dk.DRPO):
        def token_loss(self, tokens):
            return super().token_loss(tokens) + 5 * tokens.prob_shift**2

    @dataclass(frozen=True)
    class Promising(Pulled):
        zero_if_no_advantage = True

    given = problem()
    given.advantages[::2] = 0
    losses = [
        problem_call(given, Pulled(0.2), backend, device, compact=compact).loss.item()
        for compact in ("active", "mask", "none")
    ]
    exact = problem_call(given, Pulled(0.2), "reference", device, compact="none").loss.item()
    assert losses == pytest.approx([exact] * 3, rel=1e-5)
    with pytest.raises(ValueError, match=r"Promising\.zero_if_no_advantage must be False"):
        problem_call(given, Promising(0.2), backend, device)


@dataclass(frozen=True)
class Twinned(dk.Objective):
    """Triton would run another function for this objective, one that is never compared with its formula."""

    zero_if_no_advantage = True
    twin = dk.DRPO().twin

    def token_loss(self, tokens):
        return surrogate(tokens) + surrogate(tokens).mean()


@every_backend
def test_a_formula_with_a_twin_is_tried_too(backend, device):
    with pytest.raises(ValueError, match="whatever tokens"):
        problem_call(problem(), Twinned(), backend, device)
