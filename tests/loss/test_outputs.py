"""Tests of metrics against hand-computed values, a user's own objectives, torch.compile, and bad targets without
checks.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import drpo_kernels as dk
import problems
from drpo_kernels.objective import Objective
from problems import BACKENDS, SMALL_WORKSPACE, SPECS, Problem, full_problem, random_problem, relative

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_form = pytest.mark.parametrize("form", ["linear", "logits"])

OF_EVERY_OBJECTIVE = ("ratio_mean", "ratio_max", "kl_k1", "kl_k3", "prob_shift_mean", "prob_shift_max", "weight_mean")
KEYS = {f"drpo/{name}" for name in (*OF_EVERY_OBJECTIVE, "weight_min", "weight_max", "entropy_mean", "active_share")}
KEYS |= {f"drpo/{name}" for name in ("unscorable", "tokens", "computed", "weighted")}


# ---------------------------------------------------------------------------------------------------------------
# metrics


def four_rows():
    """Return four rows and a masked one with π = 3/4 (logits 0 and ln 3). μ = 1/2, 3/4, 1, 3/8 gives r = 3/2, 1, 3/4, 2
    and π - μ = 1/4, 0, -1/4, 3/8.
    """
    logits = torch.tensor([0.0, math.log(3.0)]).expand(1, 5, 2).clone()
    old = torch.log(torch.tensor([[0.5, 0.75, 1.0, 0.375, 0.1]]))
    advantages = torch.tensor([[1.0, 0.0, -1.0, -2.0, 5.0]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    return Problem(torch.ones(1, 5, dtype=torch.long), old, advantages, mask, logits=logits)


def close(got, want):
    assert {f"drpo/{name}": got[f"drpo/{name}"].item() for name in want} == pytest.approx(
        {f"drpo/{name}": value for name, value in want.items()}, rel=1e-5, abs=1e-6
    )


@every_backend
@pytest.mark.parametrize("compact", ["mask", "none"])
def test_metrics_by_hand(compact, backend, device):
    """DRPO with delta = 0.2 has the weights 1 - 1.25 (A > 0), 1 - 1.25 (A < 0, shrunk) and 1 + 1.875 where A != 0. Two
    of those three rows are beyond the trust region.
    """
    out = problems.call(four_rows(), dk.DRPO(delta=0.2), backend, device, compact=compact)
    assert set(out.metrics) >= {*KEYS, "drpo/beyond_trust_region"}
    for name, value in out.metrics.items():
        assert value.dim() == 0, name
        assert not value.requires_grad, name
        assert value.device.type == device.type, name
    log_ratios = [math.log(r) for r in (1.5, 1.0, 0.75, 2.0)]
    close(
        out.metrics,
        {
            "ratio_mean": 5.25 / 4,
            "ratio_max": 2.0,
            "prob_shift_mean": (0.25 + 0.25 + 0.375) / 4,
            "prob_shift_max": 0.375,
            "weight_mean": (-0.25 - 0.25 + 2.875) / 3,
            "weight_min": -0.25,
            "weight_max": 2.875,
            "beyond_trust_region": 2 / 3,
            "entropy_mean": 0.25 * math.log(4) + 0.75 * math.log(4 / 3),
            # the samples are the behaviour policy's: KL(mu || pi) = E[-log r] = E[r - 1 - log r]
            "kl_k1": -sum(log_ratios) / 4,
            "kl_k3": (5.25 - 4 - sum(log_ratios)) / 4,
            "tokens": 4,
            "computed": 4,
            "weighted": 3,
        },
    )


@every_backend
def test_metrics_of_active_rows(backend, device):
    """compact='active' leaves out the A = 0 row. The others have r = 3/2, 3/4, 2; three of four valid tokens are
    active.
    """
    out = problems.call(four_rows(), dk.DRPO(delta=0.2), backend, device)
    close(out.metrics, {"ratio_mean": 4.25 / 3, "beyond_trust_region": 2 / 3, "weight_mean": 2.375 / 3})
    close(out.metrics, {"active_share": 3 / 4, "tokens": 4, "computed": 3, "weighted": 3})


@every_backend
@pytest.mark.parametrize("compact", ["active", "mask"])
def test_clip_share(compact, backend, device):
    """Of the three rows with A != 0, PPO clips r = 3/2 with A > 0 and r = 3/4 with A < 0, not r = 2 with A < 0, which
    dual clipping cuts on the harmless side. CISPO at 1.4 caps 3/2 and 2."""
    problem = four_rows()
    out = problems.call(problem, dk.PPO(), backend, device, compact=compact)
    close(out.metrics, {"clip_share": 2 / 3, "beyond_trust_region": 2 / 3})
    out = problems.call(problem, dk.PPO(dual_clip=1.5), backend, device, compact=compact)
    close(out.metrics, {"clip_share": 1.0, "beyond_trust_region": 2 / 3})
    out = problems.call(problem, dk.CISPO(ratio_cap=1.4), backend, device, compact=compact)
    close(out.metrics, {"clip_share": 2 / 3})


@every_backend
def test_metrics_of_misplaced_tokens(backend, device):
    """Two of six tokens are more than 5 nats below their old log-prob. Of the four whose old log-prob is 0, as a
    placeholder is, three are below -0.05.
    """
    logprobs = torch.tensor([[-5.51, -5.49, -6.0, -1.0, -0.06, -0.04]])
    logits = torch.stack([(-logprobs.exp()).log1p(), logprobs], -1)
    old = torch.tensor([[-0.5, -0.5, 0.0, 0.0, 0.0, 0.0]])
    problem = Problem(torch.ones(1, 6, dtype=torch.long), old, torch.ones(1, 6), logits=logits)
    out = problems.call(problem, dk.DRPO(), backend, device)
    close(out.metrics, {"far_below_share": 2 / 6, "zero_old_share": 3 / 6})
    close(out.metrics, {"logprob_mean": logprobs.mean().item(), "old_logprob_max": 0.0})


@every_backend
def test_metrics_of_a_single_token(backend, device):
    """Every mean over one token is that token's value: r = 3/2, pi - mu = 1/4, and a weight of 1 - 1.25."""
    problem = problems.replace(four_rows(), mask=torch.tensor([[1, 0, 0, 0, 0]]))
    out = problems.call(problem, dk.DRPO(delta=0.2), backend, device)
    close(out.metrics, {"ratio_mean": 1.5, "prob_shift_mean": 0.25, "weight_mean": -0.25, "beyond_trust_region": 1})
    close(out.metrics, {"kl_k1": -math.log(1.5), "active_share": 1, "tokens": 1, "computed": 1, "weighted": 1})


@every_backend
def test_metrics_without_any_valid_token(backend, device):
    problem = problems.replace(random_problem(2), mask=torch.zeros(4, 6))
    out = problems.call(problem, dk.DRPO(), backend, device)
    assert all(math.isfinite(v.item()) for v in out.metrics.values()), out.metrics


# ---------------------------------------------------------------------------------------------------------------
# a user's own objective


@dataclass(frozen=True)
class WithoutMagnitude(Objective):
    """This is DRPO's regulariser without |A|, which acts on A = 0 rows too."""

    delta: float = 0.3

    def token_loss(self, tokens):
        mu = tokens.old_logprobs.exp()
        return -(tokens.ratio * tokens.advantages - mu * (tokens.ratio - 1) ** 2 / (2 * self.delta))


@dataclass(frozen=True)
class SquaredShift(Objective):
    strength: float = 0.5

    def token_loss(self, tokens):
        return -tokens.advantages * tokens.logprobs + self.strength * (tokens.prob_shift**2 + tokens.log_ratio**2)


def without_magnitude(x, delta):
    return -(x.ratio * x.adv - x.old.exp() * (x.ratio - 1) ** 2 / (2 * delta))


def squared_shift(x, strength):
    return -x.adv * x.logp + strength * (x.shift**2 + x.log_ratio**2)


OWN = [
    (WithoutMagnitude(delta=0.2), (without_magnitude, {"delta": 0.2})),
    (SquaredShift(strength=0.7), (squared_shift, {"strength": 0.7})),
]


@every_backend
@every_form
@pytest.mark.parametrize("objective, spec", OWN, ids=["without-magnitude", "squared-shift"])
@pytest.mark.parametrize("make", [random_problem, full_problem])
def test_own_objective(make, objective, spec, form, backend, device):
    problem = make(3)
    problem = problem if form == "linear" else problem.as_logits()
    want, want_grads = problems.solve(problem, spec, 3.7)
    out, grads = problems.run(problem, objective, backend, device, 3.7, workspace_bytes=SMALL_WORKSPACE)
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-4)
    for name in grads:
        assert relative(grads[name], want_grads[name]) <= 5e-5, name
    assert torch.equal(out.computed.cpu(), problem.mask), "rows with A = 0 contribute to this objective"
    if make is random_problem and form == "linear":
        idle = problem.mask & (problem.advantages == 0)
        assert (want_grads["hidden"][idle].norm(dim=-1) > 0).all()
        assert relative(grads["hidden"].cpu()[idle], want_grads["hidden"][idle]) <= 5e-5


# ---------------------------------------------------------------------------------------------------------------
# torch.compile


class Head(nn.Module):
    def __init__(self, weight, bias, objective):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.objective = objective

    def forward(self, hidden, targets, old, advantages, mask):
        hidden = torch.tanh(hidden) * 2
        if self.objective is None:
            logprobs, entropy = dk.linear_token_logprobs(hidden, self.weight, targets, bias=self.bias)
            return (logprobs * advantages * mask).sum() - 0.1 * (entropy * mask).mean(), logprobs.detach()
        out = dk.linear_policy_loss(
            hidden,
            self.weight,
            targets,
            old,
            advantages,
            mask,
            bias=self.bias,
            objective=self.objective,
            entropy_coef=0.1,
        )
        return out.loss * 2, out.metrics["drpo/ratio_mean"]


@pytest.mark.parametrize(
    "name, compiler",
    [("drpo-active", "inductor"), ("ppo", "eager"), ("gspo", "aot_eager"), (None, "aot_eager")],
)
def test_compile(name, compiler, device):
    """One graph gives the numbers of the eager module. The operations and the precision are the same, hence 1e-6.
    Generating code (inductor) takes long and sees the operators from outside, so that one such graph is enough.
    """
    torch._dynamo.reset()
    objective = problems.build(SPECS[name]) if name else None
    first = random_problem(4, bias=True)
    head = Head(first.weight, first.bias, objective).to(device)
    compiled = torch.compile(head, fullgraph=True, backend=compiler)
    for problem in (first, random_problem(5, (4, 9), bias=True)):
        rest = [x.to(device) for x in (problem.targets, problem.old_logprobs, problem.advantages, problem.mask)]
        found = []
        for module in (head, compiled):
            hidden = problem.hidden.to(device).requires_grad_()
            loss, metric = module(hidden, *rest)
            grads = torch.autograd.grad(loss, [hidden, head.weight, head.bias])
            found.append((loss, metric, grads))
        (loss, metric, grads), (loss2, metric2, grads2) = found
        assert loss2.item() == pytest.approx(loss.item(), rel=1e-6)
        assert relative(metric2, metric) <= 1e-6
        assert all(relative(b, a) <= 1e-6 for a, b in zip(grads, grads2, strict=True))


@pytest.mark.parametrize("name", ["drpo-active", None])
def test_compile_from_logits(name, device):
    torch._dynamo.reset()
    problem = random_problem(6).as_logits()
    rest = [x.to(device) for x in (problem.targets, problem.old_logprobs, problem.advantages, problem.mask)]
    objective = problems.build(SPECS[name]) if name else None

    def loss(logits, targets, old, advantages, mask):
        if objective is None:
            logprobs, entropy = dk.token_logprobs(logits * 1.5, targets)
            return (logprobs * advantages).sum() + entropy.sum()
        return dk.policy_loss(logits * 1.5, targets, old, advantages, mask, objective=objective).loss

    leaves = [problem.logits.to(device).requires_grad_() for _ in range(2)]
    first, second = loss(leaves[0], *rest), torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves[1], *rest)
    first.backward()
    second.backward()
    assert second.item() == pytest.approx(first.item(), rel=1e-6)
    assert relative(leaves[1].grad, leaves[0].grad) <= 1e-6


# ---------------------------------------------------------------------------------------------------------------
# out-of-range targets with the checks off


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bad", [21, 23, -1, -100, 10**6])
def test_bad_target_without_validation_stays_in_bounds(bad, backend, device):
    """The call raises, or the other rows' numbers stay the same and nothing outside the logits is written."""
    problem = random_problem(7, (2, 3), 8, 21).as_logits()
    problem = problems.replace(problem, mask=None)
    size = problem.logits.numel()
    block = torch.full((3 * size,), 777.0, device=device)
    logits = block[size : 2 * size].view(2, 3, 21).copy_(problem.logits).requires_grad_()
    targets = problem.targets.clone()
    targets[1, 2] = bad
    changed = problems.replace(problem, targets=targets)
    want, _ = problems.solve(problem, SPECS["drpo-active"])
    objective = problems.build(SPECS["drpo-active"])
    try:
        out = problems.call(
            changed, objective, backend, device, {"logits": logits}, validate=False, inplace=True, compact="none"
        )
        out.loss.backward()
    except (ValueError, IndexError, RuntimeError):
        pass
    else:
        error = (out.logprobs.detach().cpu().double() - want.logprobs).abs().view(-1)[:-1]
        assert error.max().item() <= 1e-4
    assert (block[:size] == 777).all()
    assert (block[2 * size :] == 777).all()
