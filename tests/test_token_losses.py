"""An objective's losses: one per token, differentiable, and of that token alone, on every backend and in a graph."""

from dataclasses import dataclass

import pytest
import torch

import drpo_kernels as dk
from drpo_kernels import token_losses
from problems import BACKENDS, random_problem, replace
from problems import call as problem_call


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(token_losses, "_tried", set())


def surrogate(tokens):
    return -tokens.advantages * tokens.ratio


@dataclass(frozen=True)
class Written(dk.Objective):
    """A loss as a user may have written it."""

    how: str
    strength: float = 1.0

    def token_loss(self, tokens):
        loss, advantages = surrogate(tokens), tokens.advantages
        return {
            "right": lambda: loss,
            "bfloat16": lambda: loss.bfloat16(),
            "mean": lambda: loss.mean(),
            "sum kept": lambda: loss.sum(0, keepdim=True),
            "column": lambda: loss[:, None],
            "row": lambda: loss[None],
            "number": lambda: 0.5,
            "flags": lambda: loss > 0,
            "nothing": lambda: None,
            "detached": lambda: loss.detach(),
            "of constants": lambda: advantages * tokens.old_logprobs,
            "spread mean": lambda: loss.mean().expand(len(loss)),
            "centred advantages": lambda: (advantages.mean() - advantages) * tokens.ratio,
            "normalised ratios": lambda: -advantages * tokens.ratio / tokens.ratio.mean(),
            "running sum": lambda: loss.cumsum(0),
            "neighbour": lambda: loss + loss.roll(1),
            "largest": lambda: loss / loss.abs().max(),
            "sequences": lambda: tokens.sequences.expand(tokens.sequences.sum(loss)),
            "random": lambda: loss * (1 + torch.rand_like(loss)),
            "gradient of a mean": lambda: loss + (loss.mean() - loss.mean().detach()),
            "outliers": lambda: -advantages * tokens.ratio.minimum(3 * tokens.ratio.mean()),
            "a constant's": lambda: loss.detach() * torch.ones((), requires_grad=True, device=loss.device),
            "of labels": lambda: -torch.ones(2, device=loss.device)[(advantages > 0).long()] * tokens.logprobs,
            "of few advantages": lambda: loss * torch.ones(99, device=loss.device)[(advantages * 0).long()],
        }[self.how]()


WRONG = {
    "mean": (ValueError, r"Written.token_loss .* shape \(24,\), got \(\)"),
    "sum kept": (ValueError, r"Written.token_loss .* shape \(24,\), got \(1,\)"),
    "column": (ValueError, r"Written.token_loss .* shape \(24,\), got \(24, 1\)"),
    "row": (ValueError, r"Written.token_loss .* shape \(24,\), got \(1, 24\)"),
    "number": (TypeError, "Written.token_loss .* got float"),
    "flags": (TypeError, "Written.token_loss .* got torch.bool"),
    "nothing": (TypeError, "Written.token_loss .* got NoneType"),
    "detached": (ValueError, "Written.token_loss must be differentiable"),
    "a constant's": (ValueError, "Written.token_loss must be differentiable"),
    "of constants": (ValueError, "Written.token_loss must be differentiable"),
    "sequences": (AttributeError, "'NoneType' object has no attribute 'expand'"),
}
MIXING = ("spread mean", "centred advantages", "normalised ratios", "running sum", "neighbour", "largest")
MIXING += ("gradient of a mean", "outliers")
MIXED = "Written.token_loss must give a token the same loss and gradient whatever.*sequence_level"
WRONG |= dict.fromkeys(MIXING, (ValueError, MIXED))
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def problem(form):
    made = replace(random_problem(3, (4, 6), 8, 19), mask=None)  # 24 tokens
    return made if form == "linear" else made.as_logits()


@every_backend
@pytest.mark.parametrize("form", ["linear", "logits"])
@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_loss_is_refused(how, form, backend, device):
    error, message = WRONG[how]
    with pytest.raises(error, match=message):
        problem_call(problem(form), Written(how), backend, device)


@every_backend
@pytest.mark.parametrize("how", ["right", "bfloat16", "random", "of labels", "of few advantages"])
def test_a_right_loss_is_not(how, backend, device):
    """What draws random numbers cannot be told from what mixes tokens, and passes."""
    assert problem_call(problem("linear"), Written(how), backend, device).loss.isfinite()


def test_trying_an_objective_draws_none_of_the_run_s_random_numbers(device):
    torch.manual_seed(0)
    with torch.random.fork_rng():
        problem_call(problem("linear"), Written("random"), "torch", device)
        tried = torch.rand(3)
    problem_call(problem("linear"), Written("random"), "torch", device)
    assert torch.equal(torch.rand(3), tried)


@every_backend
def test_a_sequence_objective_may_mix(backend, device):
    """Not what its shape is, though."""

    @dataclass(frozen=True)
    class Sequence(Written):
        sequence_level = True

    assert problem_call(problem("linear"), Sequence("sequences"), backend, device).loss.isfinite()
    with pytest.raises(ValueError, match=r"Sequence.token_loss .* shape \(24,\), got \(\)"):
        problem_call(problem("linear"), Sequence("mean"), backend, device)


@dk.register_objective
@dataclass(frozen=True)
class RegisteredMean(dk.Objective):
    def token_loss(self, tokens):
        return surrogate(tokens).mean()


@pytest.mark.parametrize("objective, fullgraph", [(RegisteredMean(), True), (Written("centred advantages"), False)])
def test_inside_a_graph(objective, fullgraph, device):
    torch.compiler.reset()
    given = problem("linear")
    leaves = {name: leaf.to(device) for name, leaf in given.leaves().items()}

    @torch.compile(fullgraph=fullgraph, backend="eager")
    def loss(leaves):
        return problem_call(given, objective, "torch", device, leaves).loss

    with pytest.raises(ValueError, match=r"\.token_loss must"):
        loss(leaves)


def test_an_objective_is_tried_once(device):
    """Another value of a coefficient is the same formula; another option may not be."""
    calls = []

    @dataclass(frozen=True)
    class Counted(Written):
        def token_loss(self, tokens):
            calls.append(len(tokens.logprobs))
            return super().token_loss(tokens)

    for strength in (1.0, 0.9, 0.8):
        problem_call(problem("linear"), Counted("right", strength), "torch", device)
    assert calls.count(1) == len(token_losses.SAMPLE)
    with pytest.raises(ValueError, match="whatever tokens"):
        problem_call(problem("linear"), Counted("running sum"), "torch", device)


@every_backend
def test_a_coefficient_that_was_0_is_tried_again(backend, device):
    """And so is another attribute of a class that is no dataclass."""

    @dataclass(frozen=True)
    class Annealed(dk.Objective):
        mix: float = 0.0

        def token_loss(self, tokens):
            return surrogate(tokens) + self.mix * surrogate(tokens).mean()

    class Plain(dk.Objective):
        def __init__(self, mode):
            object.__setattr__(self, "mode", mode)

        def token_loss(self, tokens):
            loss = surrogate(tokens)
            return loss - loss.mean() if self.mode == "centred" else loss

    for right, wrong in ((Annealed(0.0), Annealed(0.5)), (Plain("not"), Plain("centred"))):
        problem_call(problem("linear"), right, backend, device)
        with pytest.raises(ValueError, match="whatever tokens"):
            problem_call(problem("linear"), wrong, backend, device)


@every_backend
@pytest.mark.parametrize("parent", [dk.DRPO, dk.PPO, dk.CISPO])
def test_a_subclass_of_a_built_in_objective_runs_its_own_formula(parent, backend, device):
    """Not the Triton twin of its parent's."""

    @dataclass(frozen=True)
    class Tripled(parent):
        def token_loss(self, tokens):
            return 3 * super().token_loss(tokens)

    given = problem("linear")
    loss, tripled = (problem_call(given, kind(), backend, device).loss.item() for kind in (parent, Tripled))
    assert tripled == pytest.approx(3 * loss, rel=1e-5)
