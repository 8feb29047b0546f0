"""Tests of every objective, reduction, backend and input form against the fp64 oracle.

Error budget. With fp32 inputs, a logit carries a rounding of a few 2^-24 of its size (|z| < 30 here), so probabilities
and ratios are off by about 2e-6, and the contract's 5e-5 on gradients leaves room for accumulation only; the loss gets
the contract's 1e-4. With bf16 inputs, rounding dlogits once and the result once costs 2^-9/sqrt(3) = 0.11 % each,
norm-wise at most 0.2-0.3 % together; the contract is 0.4 %. Their loss is computed from fp32 logits, hence 1e-4 again.
"""

import itertools

import pytest
import torch

import drpo_kernels
import oracle
import problems
from problems import (
    BACKENDS,
    FORMS,
    REDUCTIONS,
    SMALL_WORKSPACE,
    SPECS,
    assert_agrees,
    full_problem,
    generator,
    grid,
    random_problem,
    relative,
)

FP32 = {"grad_bound": 5e-5, "loss_bound": 1e-4}
HALF = {"grad_bound": 4e-3, "loss_bound": 1e-4}
UPSTREAM = 3.7


def own_coefficients(seed, shape):
    """Return a caller's own aggregation, with a different tensor for each of the four terms and some zeros."""
    g = generator(seed)
    coefficients = [torch.rand(shape, generator=g) for _ in range(4)]
    coefficients[0][0, 1] = 0.0
    return tuple(coefficients)


def with_reduction(problem, reduction, seed):
    if reduction == "coefficients":
        return problem.with_options(reduction=own_coefficients(seed, problem.targets.shape))
    changes = {"reduction": reduction}
    if reduction.endswith("norm"):
        changes["horizon"] = 11
    if seed % 2:
        changes["normalizer"] = 17 if seed % 4 == 1 else torch.tensor(17.0)
    return problem.with_options(**changes)


def variety(seed):
    """Return options that must not change the result. They take turns, so that the sweep meets them all."""
    return {"compact": ("active", "mask", "none")[seed % 3], "workspace_bytes": (None, SMALL_WORKSPACE)[seed % 2]}


CASES = list(itertools.product(SPECS, (*REDUCTIONS, "coefficients")))


@pytest.mark.parametrize("name, reduction, form, backend", grid(SPECS, (*REDUCTIONS, "coefficients")))
def test_everything_together(name, reduction, form, backend, device):
    """The call has a KL term, entropy bonus, z-loss, bias, softcap, scale, per-token temperature, token weights, an
    upstream factor of 3.7 and rows with A = 0.

    Metrics are compared too. They are ratios of exponentials of log-probs that are good to about 1e-6, hence 1e-4 of
    the value, and 1e-6 near 0.
    """
    seed = CASES.index((name, reduction))
    problem = with_reduction(full_problem(seed), reduction, seed)
    problem = problem if form == "linear" else problem.as_logits()
    out, _ = assert_agrees(problem, SPECS[name], backend, device, upstream=UPSTREAM, **FP32, **variety(seed))
    for key, value in problems.solve(problem, SPECS[name])[0].metrics.items():
        assert out.metrics[key].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name, form, backend", grid(SPECS))
def test_bare(name, form, backend, device):
    """Without an optional term, rows without an advantage may be dropped."""
    seed = 100 + list(SPECS).index(name)
    problem = random_problem(seed)
    problem = problem if form == "linear" else problem.as_logits()
    out, _ = assert_agrees(problem, SPECS[name], backend, device, upstream=UPSTREAM, **FP32)
    dropped = problem.mask & (problem.advantages == 0)
    if name.startswith("gspo"):
        dropped = dropped & (problem.advantages == 0).masked_fill(~problem.mask, True).all(-1, keepdim=True)
    assert not out.computed.cpu()[~problem.mask].any()
    assert out.computed.cpu()[problem.mask & ~dropped].all(), "a row that contributes was dropped"
    if not name.startswith("gspo"):
        assert not out.computed.cpu()[dropped].any(), "compact='active' keeps rows that cannot contribute"


@pytest.mark.parametrize(
    "name, term, form, backend", grid(["drpo-active", "gspo"], ["kl_coef", "entropy_coef", "z_loss_coef"])
)
def test_one_optional_term(name, term, form, backend, device):
    """The KL term, the entropy bonus or the z-loss alone keeps the rows without an advantage."""
    problem = full_problem(110).with_options(kl_coef=0.0, entropy_coef=0.0, z_loss_coef=0.0)
    problem = problem.with_options(**{term: 0.3})
    problem = problem if form == "linear" else problem.as_logits()
    out, _ = assert_agrees(problem, SPECS[name], backend, device, **FP32)
    assert torch.equal(out.computed.cpu(), problem.mask)


@pytest.mark.parametrize("name, form, backend", grid(SPECS))
def test_on_policy(name, form, backend, device):
    """With old_logprobs=None, μ is the row's own detached log-prob, so that r = 1 and μ = π has no gradient."""
    problem = problems.replace(full_problem(7), old_logprobs=None).with_options(softcap=None)
    problem = problem if form == "linear" else problem.as_logits()
    assert_agrees(problem, SPECS[name], backend, device, **FP32)


@pytest.mark.parametrize("name, reduction, form, backend", grid(["drpo-active", "gspo", "gspo-token"], REDUCTIONS))
def test_packed(name, reduction, form, backend, device):
    problem = with_reduction(full_problem(21), reduction, 2)
    problem = problems.packed(problem if form == "linear" else problem.as_logits())
    assert_agrees(problem, SPECS[name], backend, device, **FP32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("name", ["drpo-active", "gspo"])
def test_packed_ragged(name, reduction, backend, device):
    """Sequences have different lengths. One has no token, and one has a single token."""
    problem = problems.packed(random_problem(31))
    logp = problems.current_logprobs(problem.hidden, problem.weight, None, problem.targets, {})
    problem.old_logprobs[-1] = logp[-1] - 0.5  # r = e^0.5, which is not clipped for A < 0
    problem.mask[-1], problem.advantages[-1] = True, -1.5
    problem = problem.with_options(reduction=reduction, cu_seqlens=torch.tensor([0, 3, 3, 14, 23, 24]))
    assert_agrees(problem, SPECS[name], backend, device, **FP32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["drpo-active", "gspo"])
def test_packed_as_one_row(name, backend, device):
    """Packed inputs may have the shape [1, T], with one advantage for each sequence of `cu_seqlens`."""
    problem = problems.packed(random_problem(33))
    per_sequence = torch.tensor([0.7, 0.0, -1.2])
    lengths = torch.tensor([5, 8, 11])
    options = {"reduction": "seq-mean-token-mean", "cu_seqlens": torch.tensor([0, 5, 13, 24])}
    spread = problems.replace(problem, advantages=per_sequence.repeat_interleave(lengths)).with_options(**options)
    want, want_grads = problems.solve(spread, SPECS[name])
    for make in (lambda x: x, lambda x: x.unsqueeze(0)):
        fields = {n: make(getattr(problem, n)) for n in ("hidden", "targets", "old_logprobs", "mask")}
        given = problems.replace(problem, **fields, advantages=per_sequence).with_options(**options)
        out, grads = problems.run(given, problems.build(SPECS[name]), backend, device)
        assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-4)
        assert relative(grads["hidden"].reshape(24, -1), want_grads["hidden"]) <= 5e-5
        assert relative(grads["weight"], want_grads["weight"]) <= 5e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4,), (4, 1)], ids=str)
@pytest.mark.parametrize("name", ["drpo-active", "ppo", "gspo"])
def test_advantage_per_sequence(name, shape, backend, device):
    advantages = torch.tensor([1.3, -0.4, 0.0, -1.1]).reshape(shape)
    assert_agrees(problems.replace(random_problem(41), advantages=advantages), SPECS[name], backend, device, **FP32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_scalar_temperature(form, as_tensor, backend, device):
    problem = full_problem(51, temperature=torch.tensor(0.6) if as_tensor else 0.6)
    problem = problem if form == "linear" else problem.as_logits()
    assert_agrees(problem, SPECS["drpo-active"], backend, device, **FP32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_coefficients_default_to_the_policy_ones(estimator, backend, device):
    shape = (4, 6)
    policy, kl, entropy, z_loss = own_coefficients(3, shape)
    for given in ((policy, None, None), (policy, kl, None), (policy, None, entropy), (policy, None, None, z_loss)):
        problem = full_problem(61, kl_estimator=estimator, reduction=given)
        assert_agrees(problem, SPECS["drpo-active"], backend, device, **FP32)


@pytest.mark.parametrize("estimator, form, backend", grid(["k1", "k2", "k3"]))
def test_kl_weighted_by_the_ratio(estimator, form, backend, device):
    """The slope of r·kl also has a term from the derivative of r. Far below the reference the
    sum must keep its digits.
    """
    problem = full_problem(62, kl_estimator=estimator, kl_importance=True, kl_coef=0.4)
    problem = problem.with_options(ref_logprobs=(problem.options["ref_logprobs"] + 12).clamp(max=0))
    problem = problem if form == "linear" else problem.as_logits()
    assert_agrees(problem, SPECS["drpo-active"], backend, device, **FP32)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name, dtype, form, backend", grid(["drpo-active", "dppo-tv", "ppo", "gspo"], HALVES))
def test_half_precision_inputs(name, dtype, form, backend, device):
    problem = full_problem(71, hidden_size=16, vocab=67, dtype=dtype)
    problem = problem if form == "linear" else problem.as_logits()
    assert_agrees(problem, SPECS[name], backend, device, upstream=UPSTREAM, **HALF, workspace_bytes=SMALL_WORKSPACE)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SPECS)
def test_double_precision(name, form, backend, device):
    """In fp64 rounding hides no error: 1e-9 leaves 1e6 ulp for the order of sums and the conditioning."""
    problem = full_problem(81, dtype=torch.float64)
    problem = problem if form == "linear" else problem.as_logits()
    assert_agrees(problem, SPECS[name], backend, device, grad_bound=1e-9, loss_bound=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"softcap": 8.0, "logit_scale": 0.7}, {"vocab_size": 33}], ids=str)
def test_token_logprobs(options, form, backend, device):
    """The log-prob, the entropy and the log-sum-exp are right, and so is the gradient of any function of them."""
    problem = random_problem(91, bias=True, temperature=0.8, **options)
    problem = problem if form == "linear" else problem.as_logits()
    check_token_logprobs(problem, form, backend, device, 5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_token_logprobs_half_precision(dtype, form, backend, device):
    problem = random_problem(92, hidden_size=16, vocab=67, bias=True, dtype=dtype)
    problem = problem if form == "linear" else problem.as_logits()
    check_token_logprobs(problem, form, backend, device, 4e-3)


def check_token_logprobs(problem, form, backend, device, bound):
    g = generator(5)
    upstream = [torch.randn(problem.targets.shape, generator=g) for _ in range(3)]
    leaves = {name: value.to(device).requires_grad_() for name, value in problem.leaves().items()}
    targets = problem.targets.to(device)
    options = {**problem.options, "backend": backend, "return_logsumexp": True}
    if form == "linear":
        got = drpo_kernels.linear_token_logprobs(
            leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], workspace_bytes=SMALL_WORKSPACE, **options
        )
    else:
        got = drpo_kernels.token_logprobs(leaves["logits"], targets, **options)
    want_leaves = {name: value.double().requires_grad_() for name, value in problem.leaves().items()}
    if form == "linear":
        raw = want_leaves["hidden"] @ want_leaves["weight"].T + want_leaves["bias"]
    else:
        raw = want_leaves["logits"]
    z = oracle.transform(raw, **{"temperature": 1.0, **problem.options})
    want = [*oracle.statistics(z.flatten(0, -2), problem.targets.flatten()), z.flatten(0, -2).logsumexp(1)]
    want = [x.reshape(problem.targets.shape) for x in want]
    for a, b in zip(got, want, strict=True):
        assert (a.detach().cpu().double() - b.detach()).abs().max().item() <= problems.logprob_bound(problem)
    for chosen in ((0,), (1,), (2,), (0, 1), (0, 1, 2)):
        scalar = sum((got[i] * upstream[i].to(device)).sum() for i in chosen)
        want_scalar = sum((want[i] * upstream[i].double()).sum() for i in chosen)
        grads = torch.autograd.grad(scalar, list(leaves.values()), retain_graph=True)
        want_grads = torch.autograd.grad(want_scalar, list(want_leaves.values()), retain_graph=True)
        for name, a, b in zip(leaves, grads, want_grads, strict=True):
            assert a.dtype == problem.leaves()[name].dtype
            assert relative(a, b) <= bound, (name, chosen)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_two_forms_of_gspo(weighted, device):
    """The two forms have one loss. Their gradients differ unless a sequence's tokens share A and a weight."""
    problem = problems.replace(random_problem(96), advantages=torch.tensor([1.0, 2.0, -0.5, -1.5]))
    if weighted:
        problem = problem.with_options(token_weights=full_problem(96).options["token_weights"])
    forms = [problems.build(("GSPO", {"clip_low": 0.3, "clip_high": 0.3, "token_level": x})) for x in (False, True)]
    (out, grads), (out_token, grads_token) = (problems.run(problem, form, "torch", device) for form in forms)
    assert out_token.loss.item() == pytest.approx(out.loss.item(), rel=1e-6)  # a few roundings of float32
    distance = relative(grads_token["hidden"], grads["hidden"])
    assert distance > 1e-2 if weighted else distance <= FP32["grad_bound"]


@pytest.mark.parametrize("name", sorted(oracle.DEFAULTS))
def test_default_hyper_parameters(name):
    """The constructor's defaults are those of the specification's table."""
    objective = getattr(drpo_kernels, name)()
    for key, value in oracle.DEFAULTS[name].items():
        assert getattr(objective, key) == value, key


def test_defaults_of_the_calls(device):
    """The defaults are objective=DRPO(), its delta, reduction='token-mean', backend=None and no mask."""
    problem = problems.replace(random_problem(95), mask=None)
    hidden, weight = problem.hidden.to(device), problem.weight.to(device)
    rest = [x.to(device) for x in (problem.targets, problem.old_logprobs, problem.advantages)]
    logits = (problem.hidden.double() @ problem.weight.double().T).float().to(device)
    want = problems.solve(problem, ("DRPO", {}))[0].loss.item()
    small = problems.solve(problem, ("DRPO", {"delta": 0.1}))[0].loss.item()
    got = [
        drpo_kernels.linear_policy_loss(hidden, weight, *rest).loss,
        drpo_kernels.policy_loss(logits, *rest).loss,
        drpo_kernels.linear_drpo_loss(hidden, weight, *rest).loss,
        drpo_kernels.drpo_loss(logits, *rest).loss,
    ]
    assert [x.item() for x in got] == pytest.approx([want] * 4, rel=1e-4)
    got = [
        drpo_kernels.linear_drpo_loss(hidden, weight, *rest, delta=0.1).loss,
        drpo_kernels.drpo_loss(logits, *rest, delta=0.1).loss,
    ]
    assert [x.item() for x in got] == pytest.approx([small] * 2, rel=1e-4)
