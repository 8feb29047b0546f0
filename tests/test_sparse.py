"""`sparse_grad`: what a row leaves out is within its bound, and so is what that does to dX and dW.

The bounds: a row's dlogits differ from the exact ones in the entries left out alone, whose masses p_v add up to at most
τ · (1 - p_y). So |ΔdX_t| <= |s_t| τ (1 - p_y) max_v |W_v| and ‖ΔdW‖ <= Σ_t |s_t| τ (1 - p_y) |x_t|, s_t = c_t dℓ/dlogπ,
and what float32 rounds on the way: 1e-5 of the row's own gradient.
"""

import pytest
import torch

import drpo_kernels
from drpo_kernels import DRPO, PPO, linear_policy_loss

ROUNDING = 1e-5


def problem(seed, count=24, hidden=16, vocab=300, dtype=torch.float32, pull=8.0):
    """(hidden, weight, targets, old_logprobs, advantages): rows between decided and flat."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=g) / hidden**0.5
    targets = torch.randint(vocab, (count,), generator=g)
    x = 3 * (torch.randn(count, hidden, generator=g) + pull * torch.rand(count, 1, generator=g) * weight[targets])
    old = -2 * torch.rand(count, generator=g)
    return x.to(dtype), weight.to(dtype), targets, old, torch.randn(count, generator=g)


def gradients(inputs, **options):
    x, weight, targets, old, advantages = inputs
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = linear_policy_loss(*leaves, targets, old, advantages, objective=DRPO(delta=0.2), **options)
    out.loss.backward()
    return out, *(leaf.grad.double() for leaf in leaves)


def bounds(inputs, tau, **options):
    """-> (exact dX, dW in float64, the bounds [T] and 0-d)."""
    x, weight, targets, old, advantages = inputs
    wide = (x.double(), weight.double(), targets, old.double(), advantages.double())
    out, dx, dw = gradients(wide, backend="reference", **options)
    logp = out.logprobs.double().requires_grad_()
    tokens = drpo_kernels.Tokens(logp, wide[3], wide[4])
    (slope,) = torch.autograd.grad(DRPO(delta=0.2).token_loss(tokens).mean(), logp)
    left = (tau + ROUNDING) * slope.abs() * -torch.expm1(logp.detach()) / options.get("temperature", 1.0)
    return dx, dw, left * wide[1].norm(dim=1).max(), (left * wide[0].norm(dim=1)).sum()


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("tau", [0.001, 0.02, 0.3])
def test_gradients_are_within_the_derived_bound(seed, tau):
    inputs = problem(seed, pull=4.0 + seed % 12)
    dx, dw, dx_bound, dw_bound = bounds(inputs, tau)
    out, found_dx, found_dw = gradients(inputs, sparse_grad=tau, workspace_bytes=10_000)
    slack = 1e-5 * dx.norm(dim=1) + 1e-9
    assert ((found_dx - dx).norm(dim=1) <= dx_bound + slack).all()
    assert (found_dw - dw).norm() <= dw_bound + 1e-5 * dw.norm()
    assert out.metrics["drpo/left_out_share_max"] <= tau * (1 + 1e-4)


def test_some_rows_are_sparse_and_some_dense():
    out, *_ = gradients(problem(0), sparse_grad=0.02)
    assert 0 < out.metrics["drpo/sparse_share"] < 1
    assert out.metrics["drpo/sparse_entries"] >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"temperature": 0.7}, {"compact": "none"}])
def test_the_loss_is_exact_and_the_gradient_near(dtype, options):
    inputs = problem(3, dtype=dtype)
    exact, dx, dw = gradients(inputs, **options)
    out, found_dx, found_dw = gradients(inputs, sparse_grad=0.01, **options)
    torch.testing.assert_close(out.loss, exact.loss, rtol=1e-6, atol=1e-7)
    assert (found_dx - dx).norm() <= 0.02 * dx.norm()
    assert (found_dw - dw).norm() <= 0.02 * dw.norm()


@pytest.mark.parametrize("compact", ["active", "none"])
def test_masked_rows_contribute_nothing(compact):
    x, weight, targets, old, advantages = problem(5)
    mask = torch.arange(len(targets)) % 3 > 0
    first = gradients((x, weight, targets, old, advantages), mask=mask, sparse_grad=0.01, compact=compact)
    bad = torch.where(mask[:, None], x, torch.nan), weight, targets.where(mask, -100), old.where(mask, torch.inf)
    second = gradients((*bad, advantages.where(mask, torch.nan)), mask=mask, sparse_grad=0.01, compact=compact)
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    assert not first[1][~mask].any()


def test_bias_and_main_grad():
    x, weight, targets, old, advantages = problem(7)
    bias = torch.randn(300, generator=torch.Generator().manual_seed(1)).requires_grad_()
    plain, main = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    rest = targets, old, advantages
    linear_policy_loss(x, plain, *rest, bias=bias, sparse_grad=0.01).loss.backward()
    buffer = torch.ones_like(weight)
    linear_policy_loss(x, main, *rest, bias=bias.detach(), sparse_grad=0.01, main_grad=buffer).loss.backward()
    torch.testing.assert_close(buffer - 1, plain.grad, rtol=0, atol=1e-6)
    exact = bias.detach().clone().requires_grad_()
    linear_policy_loss(x, weight, *rest, bias=exact).loss.backward()
    assert (bias.grad - exact.grad).norm() <= 0.02 * exact.grad.norm()


def test_the_same_bits_from_run_to_run():
    inputs = problem(9, count=60)
    first, second = (gradients(inputs, sparse_grad=0.01, workspace_bytes=20_000) for _ in range(2))
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])


@pytest.mark.parametrize(
    "name, options",
    [
        ("sparse_grad", {"sparse_grad": -0.1}),
        ("sparse_grad", {"sparse_grad": 1.0}),
        ("entropy_coef", {"sparse_grad": 0.1, "entropy_coef": 0.1}),
        ("backend", {"sparse_grad": 0.1, "backend": "reference"}),
        ("batch_invariant", {"sparse_grad": 0.1, "batch_invariant": True, "backend": None}),
    ],
)
def test_what_cannot_be_asked_for(name, options):
    x, weight, *rest = problem(0)
    with pytest.raises(ValueError, match=name):
        linear_policy_loss(x, weight, *rest, objective=PPO(), **options)


def test_triton_agrees_with_torch():
    inputs = problem(11, count=6, vocab=70)
    of = {backend: gradients(inputs, sparse_grad=0.05, backend=backend) for backend in ("torch", "triton")}
    torch.testing.assert_close(of["triton"][1], of["torch"][1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(of["triton"][2], of["torch"][2], rtol=1e-4, atol=1e-7)
