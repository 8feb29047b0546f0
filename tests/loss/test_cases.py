"""Shapes and values that broke other implementations, each against the fp64 oracle.

The bounds are those of test_conformance.py unless a comment derives another.
"""

import math

import pytest
import torch

import drpo_kernels
import problems
from problems import BACKENDS, SPECS, Problem, assert_agrees, generator, random_problem, relative, row_relative

FP32 = {"grad_bound": 5e-5, "loss_bound": 1e-4}
DRPO = SPECS["drpo-active"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_form = pytest.mark.parametrize("form", ["linear", "logits"])


def exact(problem, backend) -> Problem:
    """Return the problem in float64 for the reference backend, whose naive autograd loses 1 - p near p = 1 in fp32."""
    if backend != "reference":
        return problem
    return problems.replace(problem, **{name: x.double() for name, x in problem.leaves().items()})


def logits_problem(logits, targets, *, old=None, advantages=None, seed=0, **options) -> Problem:
    """Return a problem of ready logits without a mask. Unless given, it is on-policy and has random advantages."""
    advantages = torch.randn(targets.shape, generator=generator(seed)) if advantages is None else advantages
    return Problem(targets, old, advantages, logits=logits, options=options)


# ---------------------------------------------------------------------------------------------------------------
# sizes


@every_backend
@every_form
@pytest.mark.parametrize("vocab", [2, 3, 127, 128, 129, 255, 257, 300])
def test_vocabulary_not_a_multiple_of_a_block(vocab, form, backend, device):
    """All real logits are well below zero, so that a phantom logit of 0 would show at once."""
    problem = random_problem(vocab, (2, 3), 8, vocab, bias=True, entropy_coef=0.1)
    problem = problems.replace(problem, bias=problem.bias - 60.0, mask=None)
    problem = problem if form == "linear" else problem.as_logits()
    assert_agrees(problem, DRPO, backend, device, **FP32)


@pytest.mark.parametrize(
    "dtype, vocab", [(torch.float32, 2049), (torch.float32, 5000), (torch.bfloat16, 9000)], ids=str
)
@pytest.mark.parametrize("order", ["rising", "falling", "first block banned"])
def test_rows_longer_than_a_block(order, dtype, vocab, device):
    """The row kernel reads a row block by block, with a running maximum that rises, stays, or is still -inf."""
    g = generator(vocab)
    logits = torch.randn(1, 4, vocab, generator=g) + torch.linspace(-9.0, 9.0, vocab) * (1 if order == "rising" else -1)
    targets = torch.tensor([[vocab - 1, 100, vocab // 2, 2048]])
    if order == "first block banned":
        logits[..., :4096] = -math.inf
        targets = torch.full_like(targets, vocab - 1)
        logits[..., vocab - 1] = 1.0
    problem = logits_problem(logits.to(dtype), targets, entropy_coef=0.1, softcap=None)
    bound = FP32 if dtype is torch.float32 else {**FP32, "grad_bound": 4e-3}
    assert_agrees(problem, DRPO, "triton", device, **bound)
    if order != "first block banned":
        assert_agrees(problem.with_options(softcap=7.0), DRPO, "triton", device, **bound)


@every_backend
@every_form
def test_vocabulary_of_one(form, backend, device):
    """p is 1, so that there is nothing to learn and nothing to divide by."""
    problem = random_problem(1, (2, 3), 4, 1, kl_coef=0.0, entropy_coef=0.2)
    problem = problems.replace(problem, mask=None, old_logprobs=None)
    problem = problem if form == "linear" else problem.as_logits()
    out, grads = assert_agrees(problem, ("PPO", {}), backend, device, **FP32)
    assert (out.logprobs == 0).all()
    assert (out.entropy == 0).all()
    assert all((g == 0).all() for g in grads.values())


@every_backend
@every_form
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["token-mean", "token-sum"])
def test_no_token_and_one_token(shape, reduction, form, backend, device):
    hidden, weight, _, targets = problems.trained_looking(3, shape, 8, 19)
    problem = Problem(
        targets, torch.full(shape, -1.5), torch.ones(shape), None, hidden, weight, options={"reduction": reduction}
    )
    problem = problem if form == "linear" else problem.as_logits()
    out, grads = assert_agrees(problem, DRPO, backend, device, **FP32)
    assert out.loss.requires_grad
    assert all(g.shape == problem.leaves()[name].shape for name, g in grads.items())


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("masked", [False, True])
@every_form
def test_more_rows_than_a_grid_dimension(form, masked, backend, device):
    shape = (75_000,)
    hidden, weight, _, targets = problems.trained_looking(4, shape, 2, 5)
    g = generator(4)
    old = -3.0 * torch.rand(shape, generator=g)
    mask = torch.rand(shape, generator=g) < 0.9 if masked else None
    problem = Problem(targets, old, torch.randn(shape, generator=g), mask, hidden, weight)
    problem = problem if form == "linear" else problem.as_logits()
    assert_agrees(problem, ("DRPO", {}), backend, device, **FP32)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("form", ["linear", "logits"])
def test_more_logits_than_int32(form, device):
    """With T * V > 2^31 the last rows must equal the same rows alone."""
    rows, vocab, size, tail = 16_500, 131_072, 64, 64
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, size, device=device, generator=g, dtype=torch.bfloat16)
    weight = torch.randn(vocab, size, device=device, generator=g, dtype=torch.bfloat16) / 8
    targets = torch.randint(vocab, (rows,), device=device, generator=g)
    rest = (torch.full((rows,), -9.0, device=device), torch.ones(rows, device=device))
    options = {"backend": "triton", "reduction": "token-sum"}
    if form == "linear":
        leaf = hidden.requires_grad_()
        out = drpo_kernels.linear_policy_loss(leaf, weight, targets, *rest, **options)
        small = leaf[-tail:].detach().requires_grad_()
        alone = drpo_kernels.linear_policy_loss(small, weight, targets[-tail:], *(x[-tail:] for x in rest), **options)
    else:
        leaf = (hidden @ weight.T).requires_grad_()
        out = drpo_kernels.policy_loss(leaf, targets, *rest, **options)
        small = leaf[-tail:].detach().clone().requires_grad_()
        alone = drpo_kernels.policy_loss(small, targets[-tail:], *(x[-tail:] for x in rest), **options)
    out.loss.backward()
    alone.loss.backward()
    assert (out.logprobs[-tail:] - alone.logprobs).abs().max().item() <= 1e-4
    assert relative(leaf.grad[-tail:], small.grad) <= 4e-3


# ---------------------------------------------------------------------------------------------------------------
# values


@every_backend
@every_form
@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_all_logits_far_from_zero(level, form, backend, device):
    """With ready logits the inputs are exact, so fp32 bounds hold. Through a bias each logit is rounded to half an ulp
    of 1e4 (4.9e-4) in fp32, which moves p by as much: twice that is the bound there.
    """
    problem = random_problem(5, (2, 4), 64, 29, bias=True)
    problem = problems.replace(problem, mask=None, old_logprobs=None)
    problem = problems.replace(problem, bias=problem.bias + level)
    problem = problem if form == "linear" else problem.as_logits()
    bound = FP32 if form == "logits" else {"grad_bound": 1e-3, "loss_bound": 1e-3}
    for spec in (DRPO, ("PPO", {})):
        assert_agrees(problem, spec, backend, device, **bound)


TAILS = [1e-1, 1e-3, 1e-5, 1e-7, 1e-9]


def confident_logits(vocab, targets):
    """Return one row for each of TAILS, whose target has probability about 1 - tail."""
    noise = 0.1 * torch.rand(len(TAILS), vocab, generator=generator(7), dtype=torch.float64)
    tail = torch.tensor(TAILS, dtype=torch.float64)
    peak = torch.log((1 - tail) / tail * (vocab - 1)).unsqueeze(-1)
    return (noise + peak * torch.nn.functional.one_hot(targets, vocab)).float()


@every_backend
@pytest.mark.parametrize("vocab", [2, 5, 200])
@pytest.mark.parametrize("name, entropy_coef", [("drpo-active", 0.0), ("ppo", 0.0), ("cispo", 0.0), ("ppo", 0.5)])
def test_confident_rows(name, entropy_coef, vocab, backend, device):
    """The target has p = 1 - tail. The row's gradient is s (onehot - p), and both halves of it are of size `tail`: the
    target's half is lost if it is taken from a rounded 1 - p, and so is that of the entropy. Each row is within 1e-4.
    """
    targets = torch.randint(vocab, (len(TAILS),), generator=generator(6))
    options = {"reduction": "token-sum", "entropy_coef": entropy_coef}
    problem = logits_problem(confident_logits(vocab, targets), targets, seed=8, **options)
    if entropy_coef:
        problem = problems.replace(problem, advantages=torch.zeros(len(TAILS)))
    problem = exact(problem, backend)
    _, want = problems.solve(problem, SPECS[name])
    _, got = problems.run(problem, problems.build(SPECS[name]), backend, device)
    assert row_relative(got["logits"], want["logits"]) <= 1e-4


@every_backend
@pytest.mark.parametrize("tail", [1e-3, 1e-6, 1e-9])
def test_confident_rows_through_the_head(tail, backend, device):
    """The same holds through hidden @ weight.T, where a peak of 30 in fp32 moves 1 - p by 30 * 2^-24 * a few."""
    vocab, size = 11, 11
    targets = torch.tensor([[3, 0, 7], [10, 1, 4]])
    weight = torch.eye(vocab)
    peak = math.log((1 - tail) / tail * (vocab - 1))
    hidden = 0.1 * torch.rand(2, 3, size, generator=generator(7)) + peak * torch.nn.functional.one_hot(targets, size)
    problem = Problem(targets, None, torch.tensor([[1.0, -1, 2], [1, 1, -3]]), None, hidden, weight)
    assert_agrees(exact(problem, backend), DRPO, backend, device, grad_bound=1e-4, loss_bound=1e-4)


@every_backend
@pytest.mark.parametrize("old", [-1e-9, 0.0, 1e-7])
def test_confident_behaviour_policy(old, backend, device):
    """μ is 1 up to rounding, and may exceed 1. π - μ must come from expm1, and DPPO's 1 - μ from its 1e-8."""
    shape, vocab = (1, 4), 9
    targets = torch.arange(4).reshape(shape)
    logits = 12.0 * torch.nn.functional.one_hot(targets, vocab) + torch.rand(1, 4, vocab, generator=generator(9))
    adv = torch.tensor([[1.0, -1.0, 2.0, -0.5]])
    problem = exact(logits_problem(logits, targets, old=torch.full(shape, old), advantages=adv), backend)
    for name in ("drpo-active", "dppo-tv", "ppo"):
        _, want = problems.solve(problem, SPECS[name])
        _, got = problems.run(problem, problems.build(SPECS[name]), backend, device)
        assert row_relative(got["logits"], want["logits"]) <= 1e-4, name


@every_backend
@pytest.mark.parametrize("delta, kept", [(9.5, True), (8.0, False)])
def test_divergence_of_a_certain_token(delta, kept, backend, device):
    """With π = 1 - 1e-10 and μ = 1/2 the binary KL is 8.5 with verl's 1e-8 inside its logarithms, and 10.8 without."""
    logits = torch.tensor([[0.0, 10 * math.log(10.0)]])
    problem = exact(logits_problem(logits, torch.tensor([1]), old=torch.tensor([-math.log(2.0)])), backend)
    problem = problems.replace(problem, advantages=torch.ones(1))
    spec = ("DPPO", {"divergence": "kl", "delta_high": delta})
    _, want = problems.solve(problem, spec)
    _, got = problems.run(problem, problems.build(spec), backend, device)
    assert (want["logits"].norm() > 0) == kept
    assert relative(got["logits"], want["logits"]) <= 1e-4


EXTREME_LOG_RATIOS = [-60.0, -21.0, -15.0, -3.0, -1e-3, 1e-3, 3.0, 15.0, 21.0, 60.0, 150.0, 400.0]


@every_backend
@pytest.mark.parametrize("name", [name for name in SPECS if SPECS[name][0] != "GSPO"])
def test_extreme_ratios(name, backend, device):
    """Log-ratios lie on both sides of the clamp at 20 and beyond the range of exp in fp32, and μ underflows to 0.

    Each row is checked. In fp32 a logit of 70 puts 70 * 2^-24 = 4e-6 on the log-ratio, and SPO squares the ratio, hence
    1e-4.
    """
    vocab, rows = 6, len(EXTREME_LOG_RATIOS)
    delta = torch.tensor(EXTREME_LOG_RATIOS, dtype=torch.float64)
    logp = torch.where(delta < -1, delta - 1.0, torch.full_like(delta, -1.0))
    logits = torch.rand(rows, vocab, generator=generator(10), dtype=torch.float64)
    rest = torch.logsumexp(logits[:, 1:], -1)
    logits[:, 0] = rest + logp - torch.log(-torch.expm1(logp))
    logits = logits.float()
    logp = torch.log_softmax(logits.double(), -1)[:, 0]
    old = (logp - delta).clamp(max=0).float()
    targets = torch.zeros(rows, dtype=torch.long)
    for sign in (1.0, -1.0):
        advantages = torch.full((rows,), sign)
        problem = logits_problem(logits, targets, old=old, advantages=advantages, reduction="token-sum")
        problem = exact(problem, backend)
        _, want = problems.solve(problem, SPECS[name])
        out, got = problems.run(problem, problems.build(SPECS[name]), backend, device)
        assert math.isfinite(out.loss.item())
        assert row_relative(got["logits"], want["logits"]) <= 1e-4
        assert all(math.isfinite(value.item()) for value in out.metrics.values()), out.metrics


@every_backend
@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("distance", [30.0, 84.0, 120.0])
def test_kl_far_from_the_reference(distance, estimator, backend, device):
    """A token is far below its reference. fp32 has no exp(119), but the pull is finite and upwards."""
    logits = torch.tensor([[0.0, distance + 1.0]])
    problem = logits_problem(logits, torch.tensor([0]), advantages=torch.zeros(1), kl_coef=1e-3, kl_estimator=estimator)
    problem = problem.with_options(ref_logprobs=torch.tensor([-1.0]))
    out, grads = problems.run(problem, problems.build(DRPO), backend, device)
    assert math.isfinite(out.loss.item())
    assert grads["logits"].isfinite().all()
    assert grads["logits"][0, 0] < 0 < grads["logits"][0, 1]
    if distance < 80 or estimator == "k2":
        _, want = problems.solve(problem, DRPO)
        assert relative(grads["logits"], want["logits"]) <= 1e-4


@every_backend
@every_form
def test_banned_tokens(form, backend, device):
    """Some logits are -inf, also in the first positions: p = 0, no gradient, and 0 * log 0 = 0 in the entropy."""
    vocab = 140
    problem = random_problem(11, (2, 4), 8, vocab, bias=True, entropy_coef=0.3)
    targets = problem.targets % 5 + 100
    banned = torch.rand(vocab, generator=generator(12)) < 0.3
    banned[:65] = True
    banned[100:105] = False
    bias = problem.bias.masked_fill(banned, -math.inf)
    problem = problems.replace(problem, mask=None, old_logprobs=torch.full((2, 4), -1.0), targets=targets)
    if form == "linear":
        problem = problems.replace(problem, bias=bias)
    else:
        problem = problem.as_logits()
        problem = problems.replace(problem, logits=problem.logits.masked_fill(banned, -math.inf))
    _, grads = assert_agrees(problem, DRPO, backend, device, **FP32)
    where = grads["bias"] if form == "linear" else grads["logits"]
    assert (where.cpu()[..., banned] == 0).all()


@every_backend
@every_form
@pytest.mark.parametrize("compact", ["active", "none"])
def test_padded_vocabulary(compact, form, backend, device):
    """Padding rows of the weight hold large junk. They get no probability and a gradient of exactly 0."""
    real, padded = 133, 144
    problem = random_problem(13, (2, 4), 8, padded, bias=True, vocab_size=real, entropy_coef=0.1)
    weight = problem.weight.clone()
    weight[real:] = 50.0
    problem = problems.replace(problem, weight=weight)
    problem = problem if form == "linear" else problem.as_logits()
    _, grads = assert_agrees(problem, DRPO, backend, device, **FP32, compact=compact)
    if form == "linear":
        assert (grads["weight"][real:] == 0).all()
        assert (grads["bias"][real:] == 0).all()
    else:
        assert (grads["logits"][..., real:] == 0).all()
