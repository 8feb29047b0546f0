"""Tests of the oracle itself: values worked out by hand, and derivatives checked numerically."""

import math

import pytest
import torch

import oracle
import problems

LN2, LN3 = math.log(2.0), math.log(3.0)

# One row has two tokens with pi = 3/4 and mu = 1/2, hence r = 3/2 and pi - mu = 1/4. Each case is (spec, A, loss, d
# loss / d logp).
BY_HAND = [
    (("DRPO", {"delta": 0.5}), 2.0, -2.75, -1.5),  # -(1.5*2 - 2*0.5*0.25/1), weight 1 - 0.25/0.5
    (("DRPO", {"delta": 0.5}), -2.0, 3.25, 4.5),  # weight 1 + 0.5
    (("DRPO", {"delta": 0.25}), 1.0, -1.25, 0.0),  # on the boundary, where the weight is 0
    (("DPPO", {}), 1.0, 0.0, 0.0),  # |pi - mu| = 0.25 > 0.15, moving away
    (("DPPO", {}), -1.0, 1.5 * math.log(0.75), 1.5),  # moving back: kept, sg(r) * logp
    (("DPPO", {"delta_high": 0.3, "ratio_cap": 1.2}), 1.0, -1.2 * math.log(0.75), -1.2),
    (("DPPO", {"divergence": "kl", "delta_high": 0.14}), 1.0, 0.0, 0.0),  # D = 0.5 ln(2/3) + 0.5 ln 2 = 0.1438
    (("DPPO", {"divergence": "kl", "delta_high": 0.15}), 1.0, -1.5 * math.log(0.75), -1.5),
    (("SPO", {"epsilon": 0.5}), 2.0, -2.5, 0.0),  # -(3 - 2*0.25/1); derivative -A r (1 - 0.5/0.5)
    (("PPO", {}), 1.0, -1.2, 0.0),
    (("PPO", {}), -1.0, 1.5, 1.5),
    (("PPO", {"dual_clip": 1.25}), -1.0, 1.25, 0.0),
    (("CISPO", {"ratio_cap": 1.4}), 2.0, -2.8 * math.log(0.75), -2.8),
    (("PolicyGradient", {}), 2.0, -3.0, -3.0),
    (("PolicyGradient", {"ratio_cap": 1.4}), 2.0, -2.8 * math.log(0.75), -2.8),
    (("GSPO", {}), 1.0, -1.0004, 0.0),
    (("GSPO", {}), -1.0, 1.5, 1.5),
]


def one_row(spec, adv, **options):
    logits = torch.tensor([[[0.0, LN3]]], dtype=torch.float64, requires_grad=True)
    row = [torch.tensor([[value]], dtype=torch.float64) for value in (-LN2, adv)]
    out = oracle.policy_loss(logits, torch.tensor([[1]]), *row, spec=spec, **options)
    return out, torch.autograd.grad(out.loss, logits)[0].flatten()


@pytest.mark.parametrize("spec, adv, loss, slope", BY_HAND)
def test_value_and_slope(spec, adv, loss, slope):
    out, grad = one_row(spec, adv)
    assert out.loss.item() == pytest.approx(loss, abs=1e-7)  # 1e-7: the 1e-8 inside DPPO's logarithms
    assert grad.tolist() == pytest.approx([-0.25 * slope, 0.25 * slope], abs=1e-12)


def test_kl_and_entropy_terms():
    ref = torch.tensor([[-LN3]], dtype=torch.float64)
    delta = math.log(0.75) + LN3
    for estimator, value in (("k1", delta), ("k2", delta**2 / 2), ("k3", math.exp(-delta) + delta - 1)):
        out, _ = one_row(("DRPO", {}), 0.0, ref_logprobs=ref, kl_coef=2.0, kl_estimator=estimator)
        assert out.loss.item() == pytest.approx(2 * value, abs=1e-12)
    out, _ = one_row(("DRPO", {}), 0.0, entropy_coef=2.0)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert out.loss.item() == pytest.approx(-2 * entropy, abs=1e-12)
    assert out.entropy.item() == pytest.approx(entropy, abs=1e-12)


@pytest.mark.parametrize(
    "reduction, options, want",
    [
        ("token-mean", {}, [1 / 3, 1 / 3, 0, 1 / 3]),
        ("token-mean", {"normalizer": 6}, [1 / 6, 1 / 6, 0, 1 / 6]),
        ("token-sum", {}, [1, 1, 0, 1]),
        ("token-sum", {"normalizer": 4}, [1 / 4, 1 / 4, 0, 1 / 4]),
        ("seq-mean-token-mean", {}, [1 / 4, 1 / 4, 0, 1 / 2]),
        ("seq-mean-token-mean", {"normalizer": 8}, [1 / 16, 1 / 16, 0, 1 / 8]),
        ("seq-mean-token-sum", {}, [1 / 2, 1 / 2, 0, 1 / 2]),
        ("seq-mean-token-sum-norm", {"horizon": 5}, [1 / 10, 1 / 10, 0, 1 / 10]),
        ("seq-mean-token-sum-norm", {"horizon": 5, "normalizer": 4}, [1 / 20, 1 / 20, 0, 1 / 20]),
    ],
)
def test_reductions(reduction, options, want):
    """The first sequence has two tokens, the second has one, and the third has none."""
    valid = torch.tensor([True, True, False, True, False, False])
    seq = torch.tensor([0, 0, 1, 1, 2, 2])
    assert oracle.coefficients(valid, seq, reduction, **options).tolist() == pytest.approx([*want, 0, 0])


@pytest.mark.parametrize("token_level, advantages", [(False, [2.0, 2.0]), (True, [1.0, 3.0])])
def test_gspo_gradient_flows_through_the_mean(token_level, advantages):
    """For two unclipped tokens l_t = -A_t s, so that each logp gets -(A_1 + A_2) s / 2, or -A_t s with token_level."""
    logp = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    adv = torch.tensor([1.0, 3.0], dtype=torch.float64)
    rows = oracle.Rows(logp, torch.tensor([-1.1, -1.8], dtype=torch.float64), adv, torch.tensor([0, 0]), 1)
    oracle.gspo(rows, 0.2, 0.2, token_level).sum().backward()
    assert logp.grad.tolist() == pytest.approx([-x * math.exp(-0.05) for x in advantages])


# Numeric differentiation looks through a stop-gradient; a cap below every ratio holds the stopped factor constant.
SMOOTH = {
    **{name: problems.SPECS[name] for name in ("drpo-default", "drpo-active", "spo", "ppo", "ppo-dual", "pg", "gspo")},
    "dppo": ("DPPO", {"ratio_cap": 0.01}),
    "cispo": ("CISPO", {"ratio_cap": 0.01}),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name):
    problem = problems.full_problem(3, (3, 3), 4, 6)
    inputs = [x.double().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]

    def loss(hidden, weight, bias):
        rest = (problem.targets, problem.old_logprobs, problem.advantages, problem.mask)
        return oracle.policy_loss((hidden, weight), *rest, spec=SMOOTH[name], bias=bias, **problem.options).loss

    assert torch.autograd.gradcheck(loss, inputs)


def test_masked_rows_are_never_read():
    problem = problems.full_problem(5)
    want, grads = problems.solve(problem, ("DRPO", {}))
    hidden = torch.where(problem.mask.unsqueeze(-1), problem.hidden, torch.tensor(math.nan))
    poisoned = problems.replace(problem, hidden=hidden, targets=problem.targets.where(problem.mask, torch.tensor(-100)))
    out, poisoned_grads = problems.solve(poisoned, ("DRPO", {}))
    assert torch.equal(out.loss, want.loss)
    assert all(torch.equal(grads[name], poisoned_grads[name]) for name in grads)


def test_unscored_rows_count_as_masked():
    problem = problems.random_problem(6)
    unscored = torch.zeros_like(problem.mask)
    unscored[2, 0] = True
    missing = problems.replace(problem, old_logprobs=problem.old_logprobs.masked_fill(unscored, math.nan))
    masked = problems.replace(problem, mask=problem.mask & ~unscored)
    assert torch.equal(problems.solve(missing, ("PPO", {}))[0].loss, problems.solve(masked, ("PPO", {}))[0].loss)
