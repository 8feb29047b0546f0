"""Tests of the cap on the KL term's log-ratio, and of CISPO's floor, against float64 autograd of their formulas."""

import math

import pytest
import torch

import drpo_kernels as dk
from problems import BACKENDS, random_problem, relative

every_backend = pytest.mark.parametrize("backend", BACKENDS)
MADE = random_problem(9, (3, 5), 8, 23)
CAP = 0.75


def logprobs(hidden):
    z = hidden @ MADE.weight.double().T
    return z.log_softmax(-1).gather(-1, MADE.targets[..., None])[..., 0]


def call(backend, device, **options):
    """Return (loss, gradient of hidden, output) of a call whose loss is a sum over tokens."""
    leaf = MADE.hidden.clone().to(device).requires_grad_()
    rest = [x.to(device) for x in (MADE.weight, MADE.targets, MADE.old_logprobs, MADE.advantages)]
    options = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
    out = dk.linear_policy_loss(leaf, *rest, backend=backend, reduction="token-sum", **options)
    out.loss.backward()
    return out.loss.item(), leaf.grad, out


@every_backend
@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("route", ["fused", "recomputed"])
def test_a_capped_log_ratio(route, estimator, importance, backend, device):
    """The value stops at the cap, and the slope is 0 beyond it. The ratio of `kl_importance` keeps its own slope, and
    with GSPO it is the token's own ratio too, where TRL and Liger take the sequence's.
    """
    objective = dk.PPO() if route == "fused" else dk.GSPO()
    distance = torch.linspace(-3, 3, 15).view(3, 5)
    ref = (logprobs(MADE.hidden.double()) - distance).float()
    options = {"ref_logprobs": ref, "kl_estimator": estimator, "kl_importance": importance, "objective": objective}
    options["validate"] = False  # some of these references are above 0
    loss, gradient, out = call(backend, device, kl_coef=0.5, kl_cap=CAP, **options)
    without, plain, _ = call(backend, device, objective=objective, compact="mask")
    leaf = MADE.hidden.double().requires_grad_()
    logp = logprobs(leaf)
    d = (logp - ref.double()).clamp(-CAP, CAP)
    kl = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() + d - 1}[estimator]
    ratio = (logp - MADE.old_logprobs.double()).clamp(-20, 20).exp() if importance else 1
    term = 0.5 * (ratio * kl).sum()
    term.backward()
    assert ((d.abs() == CAP).sum(), (d.abs() < CAP).sum()) == (12, 3)
    assert loss - without == pytest.approx(term.item(), rel=1e-4, abs=1e-4)  # float32 sums of 15 losses
    assert relative(gradient - plain, leaf.grad) <= 5e-5 * max(1, (plain.norm() / leaf.grad.norm()).item())
    assert out.metrics["drpo/ref_kl"].item() == pytest.approx(kl.mean().item(), rel=1e-4, abs=1e-6)


@every_backend
def test_a_cap_beyond_every_token_changes_nothing(backend, device):
    options = {"ref_logprobs": MADE.old_logprobs - 0.5, "kl_coef": 0.5, "objective": dk.DRPO(0.2)}
    (loss, gradient, _), (loss2, gradient2, _) = (
        call(backend, device, kl_cap=cap, **options) for cap in (None, 1000.0)
    )
    assert loss == loss2
    assert torch.equal(gradient, gradient2)


@pytest.mark.parametrize("cap", [0.0, -1.0, math.nan, math.inf, True, "20"])
def test_bad_caps(cap):
    with pytest.raises((TypeError, ValueError), match="kl_cap must"):
        call("torch", "cpu", kl_cap=cap, kl_coef=0.1, ref_logprobs=MADE.old_logprobs)


@every_backend
def test_cispo_between_its_bounds(backend, device):
    objective = dk.CISPO(ratio_cap=1.5, ratio_floor=0.75)
    loss, gradient, _ = call(backend, device, objective=objective)
    leaf = MADE.hidden.double().requires_grad_()
    logp = logprobs(leaf)
    weight = (logp - MADE.old_logprobs.double()).exp().detach()
    assert (weight < 0.75).any()
    assert (weight > 1.5).any()
    want = -(MADE.advantages.double() * weight.clamp(0.75, 1.5) * logp).sum()
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-4)
    assert relative(gradient, leaf.grad) <= 5e-5


@pytest.mark.parametrize("floor", [-0.1, 5.5, math.nan, True])
def test_bad_floors(floor):
    with pytest.raises((TypeError, ValueError), match="CISPO: ratio_floor"):
        dk.CISPO(ratio_cap=5.0, ratio_floor=floor)
