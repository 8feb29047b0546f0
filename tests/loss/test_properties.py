"""Random shapes, layouts, masks and values against the oracle in fp64, and numeric derivatives.

In fp64 the torch backend and the oracle differ by rounding alone. The bound is 1e-8 of the norm: about 1e-16 times the
largest amplification of the log-ratio drawn here (exp(6) squared, divided by a delta of 0.05) times the length of the
sums.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import drpo_kernels as dk
import oracle
import problems
from problems import Problem, generator, relative

BOUND = 1e-8
QUICK = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def specs(draw):
    """Draw an objective and its hyper-parameters."""
    small = st.floats(0.05, 0.6)
    choices = {
        "DRPO": {"delta": st.floats(0.05, 20.0)},
        "DPPO": {
            "delta_low": small,
            "delta_high": small,
            "divergence": st.sampled_from(["tv", "kl"]),
            "ratio_cap": st.floats(0.5, 20),
        },
        "SPO": {"epsilon": small},
        "PPO": {
            "clip_low": small,
            "clip_high": small,
            "dual_clip": st.none() | st.floats(1.1, 4.0),
        },
        "CISPO": {"ratio_cap": st.floats(0.5, 6.0)},
        "PolicyGradient": {"ratio_cap": st.none() | st.floats(0.5, 6.0)},
        "GSPO": {"clip_low": small, "clip_high": small, "token_level": st.booleans()},
    }
    name = draw(st.sampled_from(sorted(choices)))
    return name, {key: draw(value) for key, value in choices[name].items()}


@st.composite
def problems_of_any_kind(draw):
    rows, length = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    size, vocab = draw(st.integers(1, 8)), draw(st.integers(1, 20))
    spread = draw(st.sampled_from([0.0, 0.3, 2.0]))
    shape, seed = (rows, length), draw(st.integers(0, 2**20))
    g = generator(seed)

    def uniform(*dims):
        return torch.rand(*dims, generator=g, dtype=torch.float64)

    def normal(*dims):
        return torch.randn(*dims, generator=g, dtype=torch.float64)

    hidden, weight = normal(*shape, size) * draw(st.sampled_from([0.1, 1.0, 4.0])), normal(vocab, size)
    bias = normal(vocab) if draw(st.booleans()) else None
    options = {
        "temperature": draw(st.sampled_from([1.0, 0.5, 2.0])),
        "reduction": draw(st.sampled_from(problems.REDUCTIONS)),
        "entropy_coef": draw(st.sampled_from([0.0, 0.2, -0.1])),
        "kl_coef": draw(st.sampled_from([0.0, 0.3])),
        "kl_estimator": draw(st.sampled_from(["k1", "k2", "k3"])),
        "kl_importance": draw(st.booleans()),
        "normalizer": draw(st.sampled_from([None, 7, 2.5])),
        "softcap": draw(st.sampled_from([None, 5.0])),
        "horizon": 5,
    }
    if draw(st.booleans()):
        options["temperature"] = 0.5 + uniform(*shape)
    if draw(st.booleans()):
        options["token_weights"] = uniform(*shape) * 2
    if vocab > 2 and draw(st.booleans()):
        options["vocab_size"] = vocab - 2
    targets = torch.randint(options.get("vocab_size", vocab), shape, generator=g)
    logp = problems.current_logprobs(hidden, weight, bias, targets, options)
    old = (logp + spread * normal(*shape)).clamp(max=0.0)
    old = None if draw(st.integers(0, 4)) == 0 else old
    options["ref_logprobs"] = (logp + spread * normal(*shape)).clamp(max=0.0)
    mask = None if draw(st.integers(0, 4)) == 0 else uniform(*shape) < draw(st.sampled_from([0.0, 0.4, 0.9]))
    advantages = normal(*shape) * (uniform(*shape) < draw(st.sampled_from([0.0, 0.5, 1.0])))
    return Problem(targets, old, advantages, mask, hidden, weight, bias, options=options)


def relayout(problem, kind):
    """Return a problem with the same values and other strides."""

    def changed(x):
        if not isinstance(x, torch.Tensor) or x.dim() < 2 or kind == 0:
            return x
        if kind == 1:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        return torch.stack([x, torch.full_like(x, 1)], dim=-1)[..., 0]

    names = ("hidden", "weight", "targets", "old_logprobs", "advantages", "mask")
    tensors = {name: changed(getattr(problem, name)) for name in names}
    return problems.replace(problem, **tensors, options={k: changed(v) for k, v in problem.options.items()})


@settings(QUICK, max_examples=250)
@given(
    problem=problems_of_any_kind(),
    spec=specs(),
    compact=st.sampled_from(["active", "mask", "none"]),
    workspace=st.sampled_from([None, 1024]),
    kind=st.integers(0, 2),
)
def test_linear_policy_loss(problem, spec, compact, workspace, kind):
    problem = relayout(problem, kind)
    want, want_grads = problems.solve(problem, spec, 2.5)
    out, grads = problems.run(
        problem, problems.build(spec), "torch", upstream=2.5, compact=compact, workspace_bytes=workspace
    )
    assert abs(out.loss.item() - want.loss.item()) <= BOUND * max(want.scale.item(), 1e-6)
    for name in grads:
        assert (grads[name] - want_grads[name]).norm() <= BOUND * max(want_grads[name].norm().item(), 1e-6), name


@settings(QUICK, max_examples=150)
@given(problem=problems_of_any_kind(), spec=specs(), kind=st.integers(0, 2), inplace=st.booleans())
def test_policy_loss(problem, spec, kind, inplace):
    problem = relayout(problem.as_logits(), kind)
    want, want_grads = problems.solve(problem, spec)
    leaf = problem.logits.clone().requires_grad_()
    out = problems.call(problem, problems.build(spec), "torch", leaves={"logits": leaf * 1.0}, inplace=inplace)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert abs(out.loss.item() - want.loss.item()) <= BOUND * max(want.scale.item(), 1e-6)
    assert (grad - want_grads["logits"]).norm() <= BOUND * max(want_grads["logits"].norm().item(), 1e-6)


@settings(QUICK, max_examples=80)
@given(problem=problems_of_any_kind(), kind=st.integers(0, 2))
def test_linear_token_logprobs(problem, kind):
    problem = relayout(problem, kind)
    options = problems.transform_of(problem.options)
    leaves = {name: x.clone().requires_grad_() for name, x in problem.leaves().items()}
    args = (leaves["hidden"], leaves["weight"], problem.targets)
    logp, entropy = dk.linear_token_logprobs(*args, bias=leaves.get("bias"), backend="torch", **options)
    want_leaves = {name: x.clone().requires_grad_() for name, x in problem.leaves().items()}
    raw = want_leaves["hidden"] @ want_leaves["weight"].T
    raw = raw + want_leaves["bias"] if "bias" in want_leaves else raw
    heat = options.pop("temperature")
    z = oracle.transform(raw, heat.unsqueeze(-1) if isinstance(heat, torch.Tensor) else heat, **options)
    shape = problem.targets.shape
    stats = oracle.statistics(z.reshape(-1, z.shape[-1]), problem.targets.reshape(-1))
    want_logp, want_entropy = (x.reshape(shape) for x in stats)
    assert torch.allclose(logp, want_logp, rtol=0, atol=1e-10)
    assert torch.allclose(entropy, want_entropy, rtol=0, atol=1e-10)
    factors = torch.randn(2, *shape, generator=generator(1), dtype=torch.float64)
    got = torch.autograd.grad((logp * factors[0] + entropy * factors[1]).sum(), list(leaves.values()))
    want = torch.autograd.grad((want_logp * factors[0] + want_entropy * factors[1]).sum(), list(want_leaves.values()))
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= BOUND * max(b.norm().item(), 1e-6)


@pytest.mark.interpreted  # compiled kernels meet these shapes in test_cases.py
@settings(QUICK, max_examples=25)
@given(
    rows=st.integers(1, 4),
    vocab=st.integers(1, 300),
    offset=st.sampled_from([-1e4, -80.0, 0.0, 80.0]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_triton_rows(
    rows,
    vocab,
    offset,
    scale,
    seed,
):
    """The row kernel takes fp32 rows of any width and level, within the contract and without a phantom column."""
    g = generator(seed)
    logits = scale * torch.randn(1, rows, vocab, generator=g) + offset
    targets = torch.randint(vocab, (1, rows), generator=g)
    problem = Problem(targets, None, torch.randn(1, rows, generator=g), logits=logits, options={"entropy_coef": 0.1})
    problems.assert_agrees(problem, ("DRPO", {}), "triton", grad_bound=5e-5)


# ---------------------------------------------------------------------------------------------------------------
# numeric derivatives. A cap below every ratio, and rows away from a mask's edge, make stopped factors locally constant.

LOCALLY_SMOOTH = {
    **{name: problems.SPECS[name] for name in ("drpo-default", "drpo-active", "spo", "ppo", "ppo-dual", "pg", "gspo")},
    "dppo-tv": ("DPPO", {"ratio_cap": 0.01}),
    "dppo-kl": ("DPPO", {"ratio_cap": 0.01, "divergence": "kl"}),
    "cispo": ("CISPO", {"ratio_cap": 0.01}),
    "pg-cap": ("PolicyGradient", {"ratio_cap": 0.01}),
}


def numeric_gradient(function, tensors, step=1e-6):
    """Return the central differences of a scalar function, element by element."""
    grads = []
    for tensor in tensors:
        grad = torch.zeros_like(tensor)
        for i in range(tensor.numel()):
            sides = []
            for sign in (1, -1):
                moved = tensor.detach().clone()
                moved.view(-1)[i] += sign * step
                sides.append(function(*(moved if x is tensor else x for x in tensors)).item())
            grad.view(-1)[i] = (sides[0] - sides[1]) / (2 * step)
        grads.append(grad)
    return grads


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("form", ["linear", "logits"])
@pytest.mark.parametrize("name", LOCALLY_SMOOTH)
def test_gradcheck(name, form, backend):
    """Central differences with step 1e-6 in fp64 have errors of 1e-12 * f''' + 1e-16 / 1e-6, hence 1e-6 of the norm.
    torch.autograd.gradcheck differentiates twice, but a gradient computed in the forward allows one backward, so the
    differences are our own.
    """
    problem = problems.full_problem(6, (3, 2), 3, 5, dtype=torch.float64)
    problem = problem if form == "linear" else problem.as_logits()
    leaves = problem.leaves()
    objective = problems.build(LOCALLY_SMOOTH[name])

    def loss(*tensors):
        return problems.call(problem, objective, backend, leaves=dict(zip(leaves, tensors, strict=True))).loss

    with torch.no_grad():
        want = numeric_gradient(loss, list(leaves.values()))
    _, got = problems.run(problem, objective, backend)
    for (leaf, grad), expected in zip(got.items(), want, strict=True):
        assert relative(grad, expected) <= 1e-6, leaf


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("form", ["linear", "logits"])
def test_gradcheck_token_logprobs(form, backend):
    problem = problems.random_problem(7, (2, 3), 3, 5, dtype=torch.float64)
    problem = problem if form == "linear" else problem.as_logits()
    options = {"temperature": 0.8, "softcap": 6.0, "backend": backend}
    function = dk.linear_token_logprobs if form == "linear" else dk.token_logprobs
    inputs = [x.requires_grad_() for x in problem.leaves().values()]
    assert torch.autograd.gradcheck(lambda *x: function(*x, problem.targets, **options), inputs)


def test_numeric_gradient_itself():
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    (grad,) = numeric_gradient(lambda v: (v**3).sum() + math.pi * v[0], [x])
    assert torch.allclose(grad, 3 * x**2 + math.pi * torch.eye(5, dtype=torch.float64)[0], atol=1e-8)
