"""Tests of places where a plain formula would lose its digits: float32 inputs keep the gradient within 5e-5 of
float64's.
"""

import pytest
import torch

import drpo_kernels as dk
from problems import BACKENDS, relative

BOUND = 5e-5  # the contract's bound, relative to the norm
chunked_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
SIZES = (5, 40)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@chunked_backend
@pytest.mark.parametrize("raw, entropy", [(0, False), (0, True), (60, True), (124, False), (-124, False), (200, False)])
def test_a_saturated_softcap(raw, entropy, backend, device):
    """The slope of the cap is 1 - tanh², which is 1e-5 at a raw logit of 200 under a cap of 30. (The entropy's gradient
    is made of differences of the capped logits, which float32 rounds to 2e-6. At 124 they are 1e-2, and not known to
    5e-5.)
    """
    bias = raw + 2 * torch.randn(SIZES[1], generator=generator(1))
    hidden, weight = torch.randn(SIZES[0], 8, generator=generator(2)), torch.randn(SIZES[1], 8, generator=generator(3))
    weight, targets = weight / 20, torch.randint(SIZES[1], SIZES[:1], generator=generator(4))

    def gradients(dtype, backend, device):
        leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight, bias)]
        out = dk.linear_token_logprobs(
            leaves[0], leaves[1], targets.to(device), bias=leaves[2], softcap=30.0, backend=backend
        )
        return torch.autograd.grad(out[entropy].sum(), leaves)

    want = gradients(torch.float64, "reference", "cpu")
    for got, exact in zip(gradients(torch.float32, backend, device), want, strict=True):
        assert relative(got, exact) <= BOUND


@chunked_backend
@pytest.mark.parametrize("vocab", [40, 20_000])
@pytest.mark.parametrize("spread, temperature", [(1e-3, 1), (1e-4, 1), (1e-5, 1), (1.0, 1e3), (0.1, 1e4), (3.0, 1)])
def test_the_entropy_of_a_flat_row(spread, temperature, vocab, backend, device):
    """The gradient contains log p + H, which is as small as the logits' spread but a difference of two numbers near log
    V.
    """
    logits = spread * torch.randn(3, vocab, generator=generator(5))
    targets = torch.randint(vocab, (3,), generator=generator(6))

    def gradients(dtype, backend, device):
        leaf, zero = logits.to(device, dtype).requires_grad_(), torch.zeros(3, device=device)
        _, entropy = dk.token_logprobs(leaf, targets.to(device), temperature=temperature, backend=backend)
        bonus = dk.policy_loss(
            leaf, targets.to(device), None, zero, objective=dk.PPO(), entropy_coef=1.0, temperature=temperature,
            backend=backend,
        ).loss  # fmt: skip
        return [torch.autograd.grad(value.sum(), leaf)[0] for value in (entropy, bonus)]

    want = gradients(torch.float64, "reference", "cpu")
    for got, exact in zip(gradients(torch.float32, backend, device), want, strict=True):
        assert relative(got, exact) <= BOUND


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clamped", [False, True])
def test_drpo_near_its_boundary(clamped, backend, device):
    """w = 1 - (π - μ)/δ is within a hundredth of 0 for tokens with μ of e^-17 to e^-20, or so small that Δ is clamped.

    An error ε of log π becomes 20 ε in μ (r - 1), but only ε in π - μ, which is 100 ε relative to w.
    """
    count, delta = 200, 0.2
    p = (delta * (1 + 0.02 * (torch.rand(count, generator=generator(7)) - 0.5))).double()
    logits = torch.zeros(count, 7)
    logits[:, 0] = (p / (1 - p)).log() + torch.tensor(6.0, dtype=torch.float64).log()
    old = -17 - 3 * torch.rand(count, generator=generator(8)) - (5 if clamped else 0)

    def gradient(dtype, backend, device):
        leaf = logits.to(device, dtype).requires_grad_()
        targets, advantages = torch.zeros(count, dtype=torch.int64, device=device), torch.ones(count, device=device)
        out = dk.policy_loss(
            leaf, targets, old.to(device, dtype), advantages, objective=dk.DRPO(delta), backend=backend
        )
        return torch.autograd.grad(out.loss, leaf)[0]

    want = gradient(torch.float64, "reference", "cpu")
    got = gradient(torch.float32, backend, device)
    if clamped:
        beyond = (want == 0).all(1)
        assert beyond.any()
        assert (got.cpu()[beyond] == 0).all()
        assert relative(got.cpu()[~beyond], want[~beyond]) <= BOUND
    else:
        assert relative(got, want) <= BOUND
