"""An objective's losses are one per token, differentiable, and of that token alone, on every backend and in a graph."""

from dataclasses import dataclass

import pytest
import torch

import drpo_kernels as dk
import problems
from drpo_kernels import token_losses
from problems import BACKENDS, random_problem, replace
from problems import call as problem_call


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(token_losses, "_tried", {})


def surrogate(tokens):
    return -tokens.advantages * tokens.ratio


@dataclass(frozen=True)
class Written(dk.Objective):
    """This is a loss as a user may have written it."""

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
            "trimmed": lambda: loss - loss.sort().values[: int(0.1 * len(loss))].sum(),
            "behind a guard": lambda: self.guarded(tokens, loss - loss.mean()),
            "where it is large": lambda: (advantages - advantages.mean()) * self.cut((2.5 * tokens.log_ratio).exp()),
            "of many": lambda: loss - (advantages.mean() if len(loss) >= 8 else 0),
            "largest four": lambda: loss * (advantages >= advantages.topk(4).values[-1]),
            "groups": lambda: loss - advantages.view(-1, 4).mean(1).repeat_interleave(4),
            "a constant's": lambda: loss.detach() * torch.ones((), requires_grad=True, device=loss.device),
            "of labels": lambda: -torch.ones(2, device=loss.device)[(advantages > 0).long()] * tokens.logprobs,
            "of few advantages": lambda: loss * torch.ones(99, device=loss.device)[(advantages * 0).long()],
        }[self.how]()

    @staticmethod
    def guarded(tokens, loss):
        if tokens.ratio.max() > 1e4:
            raise RuntimeError("the policy has exploded")
        return loss

    @staticmethod
    def cut(ratio):
        return torch.where(ratio > 1e3, 0, ratio)


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
MIXING += ("gradient of a mean", "outliers", "trimmed", "behind a guard", "where it is large", "of many")
MIXED = "Written.token_loss must give a token the same loss and gradient whatever.*sequence_level"
WRONG |= dict.fromkeys(MIXING, (ValueError, MIXED))
WRONG |= dict.fromkeys(("largest four", "groups"), (ValueError, "Written.token_loss must take any number of tokens"))
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
    """A loss that draws random numbers looks like one that mixes tokens, but passes."""
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
    """A loss of a sequence objective may mix tokens, but must have their shape."""

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


def test_settings_are_tried_once(device):
    """An objective is tried again with another number, which may mean another formula. If a number is annealed, only
    its first values are tried.
    """
    calls = []

    @dataclass(frozen=True)
    class Counted(Written):
        def token_loss(self, tokens):
            calls.append(len(tokens.logprobs))
            return super().token_loss(tokens)

    def cost(strength):
        calls.clear()
        problem_call(problem("linear"), Counted("right", strength), "torch", device)
        return len(calls)

    # The call itself evaluates the loss twice, on its chunk and for the metrics. The trial evaluates it on made-up
    # tokens and on the call's, each time twice as a whole and in three parts, and once to find other tensors that
    # require grad.
    assert cost(1.0) - cost(1.0) == 2 * 5 + 1
    others = [cost(1 - 0.01 * step) for step in range(1, token_losses.MOST_VALUES)]
    assert set(others) == {cost(1.0) + 11}
    assert cost(0.5) == cost(1.0)
    with pytest.raises(ValueError, match="whatever tokens"):
        problem_call(problem("linear"), Counted("running sum"), "torch", device)


@every_backend
def test_other_settings_are_tried_again(backend, device):
    """Settings are numbers, functions, tensors and what nests them, in dataclasses and other classes, with slots and
    without.
    """

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

    @dataclass(frozen=True, slots=True)
    class Slotted(dk.Objective):
        high: float = 0.1

        def token_loss(self, tokens):
            return surrogate(tokens) - (surrogate(tokens).mean() if self.high > 0.5 else 0)

    @dataclass(frozen=True, eq=False)
    class Holding(dk.Objective):
        held: object

        def token_loss(self, tokens):
            share = self.held
            share = share[-1]["share"] if isinstance(share, list) else share
            share = share.mix if isinstance(share, Annealed) else share
            return share(tokens) if callable(share) else surrogate(tokens) + share * surrogate(tokens).mean()

    zero, one = torch.zeros((), device=device), torch.ones((), device=device)
    pairs = [(Annealed(0.0), Annealed(0.5)), (Plain("not"), Plain("centred")), (Slotted(0.1), Slotted(0.9))]
    pairs += [(Holding(zero), Holding(one)), (Holding(Annealed(0.0)), Holding(Annealed(1.0)))]
    pairs += [(Holding([{"share": 0}]), Holding([{"share": 1}]))]
    for right, wrong in pairs:
        problem_call(problem("linear"), right, backend, device)
        with pytest.raises(ValueError, match="whatever tokens"):
            problem_call(problem("linear"), wrong, backend, device)
    problem_call(problem("linear"), Holding(lambda tokens: surrogate(tokens)), backend, device)
    with pytest.raises(ValueError, match="whatever tokens"):  # this function may lie where the first one was in memory
        problem_call(problem("linear"), Holding(lambda tokens: surrogate(tokens).cumsum(0)), backend, device)
    put = type("Put", (dk.Objective,), {"token_loss": lambda self, tokens: surrogate(tokens)})
    problem_call(problem("linear"), put(), backend, device)
    put.token_loss = lambda self, tokens: surrogate(tokens).cumsum(0)
    with pytest.raises(ValueError, match="whatever tokens"):
        problem_call(problem("linear"), put(), backend, device)
    held = Holding(zero)
    problem_call(problem("linear"), held, backend, device)
    zero.fill_(1)
    with pytest.raises(ValueError, match="whatever tokens"):
        problem_call(problem("linear"), held, backend, device)


@dataclass(frozen=True, eq=False)
class Learned(dk.Objective):
    strength: torch.Tensor

    def token_loss(self, tokens):
        return surrogate(tokens) + self.strength.exp() * tokens.ratio_minus_one**2


@every_backend
def test_nothing_else_is_differentiated_silently(backend, device):
    """A learned coefficient is an error where it would get no gradient, and gets one elsewhere."""
    given, strength = problem("linear"), torch.full((), 0.3, device=device, requires_grad=True)
    leaves = {name: x.to(device).requires_grad_() for name, x in given.leaves().items()}
    if backend == "reference":
        problem_call(given, Learned(strength), backend, device, leaves).loss.backward()
    else:
        with torch.no_grad():
            assert problem_call(given, Learned(strength), backend, device, leaves).loss.isfinite()
        with pytest.raises(ValueError, match=r"Learned\.token_loss has a tensor in it that requires grad, of shape"):
            problem_call(given, Learned(strength), backend, device, leaves)
        problem_call(given, Learned(strength), backend, device, leaves, reduction="none").loss.mean().backward()
        assert problem_call(given, Learned(strength.detach()), backend, device, leaves).loss.isfinite()
    logprobs = problem_call(given, dk.DRPO(), backend, device, leaves, compact="mask").logprobs
    tokens = dk.Tokens(logprobs, given.old_logprobs.to(device), given.advantages.to(device))
    assert strength.grad.item() == pytest.approx((strength.exp() * tokens.ratio_minus_one**2).mean().item(), rel=1e-5)


@dataclass(frozen=True)
class Promised(dk.Objective):
    zero_if_no_advantage = True

    def token_loss(self, tokens):
        return surrogate(tokens)


@every_backend
def test_a_bad_row_is_not_blamed_on_the_objective(backend, device):
    given = problem("logits")
    given.logits[0, 0], given.advantages[0, 0] = torch.nan, 1.0
    assert problem_call(given, Promised(), backend, device, validate=False).loss.isnan()


@every_backend
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_an_objective_may_write_to_what_it_is_given(reduction, backend, device):
    """The metrics, and a KL term weighted by the ratio, do not see what the objective wrote."""

    @dataclass(frozen=True)
    class Clamping(dk.Objective):
        def token_loss(self, tokens):
            return -tokens.advantages.clamp_(min=0) * (tokens.logprobs - tokens.old_logprobs.clamp_(min=-1)).exp()

    @dataclass(frozen=True)
    class Clamped(dk.Objective):
        def token_loss(self, tokens):
            return -tokens.advantages.clamp(min=0) * (tokens.logprobs - tokens.old_logprobs.clamp(min=-1)).exp()

    given = problem("linear")
    given = given.with_options(ref_logprobs=given.old_logprobs - 0.3, kl_coef=0.5, kl_importance=True)
    leaves = {name: x.to(device).requires_grad_() for name, x in given.leaves().items()}
    got, want = (
        problem_call(given, objective, backend, device, leaves, reduction=reduction)
        for objective in (Clamping(), Clamped())
    )
    assert torch.equal(got.loss, want.loss) and got.metrics == want.metrics
    got.loss.sum().backward()


class Truncated(dk.Objective):
    """Importance weights are often written like this: the ratio is read once without a gradient, and once with one."""

    def token_loss(self, tokens):
        with torch.no_grad():
            weight = tokens.ratio.clamp(max=1.2)
        return -weight * tokens.logprobs * tokens.advantages - 0.1 * tokens.ratio * tokens.advantages


def test_a_look_without_a_gradient_takes_none_away(device):
    logprobs, old, advantages = (torch.randn(30, dtype=torch.float64, device=device) for _ in range(3))
    leaf = (logprobs - 2).requires_grad_()
    tokens = dk.Tokens(leaf, old - 2, advantages)
    (found,) = torch.autograd.grad(token_losses.token_losses(Truncated(), tokens).sum(), leaf)
    ratio = (leaf - old + 2).exp().detach()
    assert torch.allclose(found, -advantages * (ratio.clamp(max=1.2) + 0.1 * ratio))


@dataclass(frozen=True)
class InPlace(dk.Objective):
    """This objective writes to a ratio, which is its own copy, and reads the ratio again."""

    writes: bool

    def token_loss(self, tokens):
        weight = tokens.ratio.detach()
        weight = weight.clamp_(max=1.05) if self.writes else weight.clamp(max=1.05)
        return -tokens.advantages * (weight * tokens.logprobs + tokens.ratio)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_what_an_objective_writes_to_is_its_own(backend):
    (written, first), (kept, second) = (
        problems.run(random_problem(3), InPlace(writes), backend) for writes in (True, False)
    )
    assert written.loss == kept.loss
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_foreign_tensor_is_found_under_torch_compile():
    """A class that is not registered runs outside the graph, and its loss is checked there."""
    factor = torch.nn.Parameter(torch.ones(()))

    class Learning(dk.Objective):
        def token_loss(self, tokens):
            return surrogate(tokens) * factor

    problem = random_problem(3)
    given = problem.hidden.clone().requires_grad_(), problem.weight, problem.targets, problem.old_logprobs
    torch.compiler.reset()
    step = torch.compile(
        lambda *given: dk.linear_policy_loss(*given, problem.advantages, objective=Learning()).loss, backend="eager"
    )
    with pytest.raises(ValueError, match="has a tensor in it that requires grad"):
        step(*given)
