"""Views, dtypes and values at the edges of the contract between the public functions, the sweeps and the kernels."""

import math
from dataclasses import dataclass

import pytest
import torch

import drpo_kernels as dk

BACKENDS = ["torch", "triton"]
VOCAB = 37


def logits_of(rows=12, seed=0, dtype=torch.float32):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(rows=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(VOCAB, (rows,), generator=generator)
    return targets, -3 * torch.rand(rows, generator=generator), torch.randn(rows, generator=generator)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["logits", "linear"])
def test_gradient_expanded_from_a_sum(form, backend, device):
    """`logprobs.sum().backward()` hands over a gradient of stride 0."""
    grads = {}
    for name in (backend, "reference"):
        x = logits_of().to(device).requires_grad_()
        targets = inputs()[0].to(device)
        if form == "logits":
            logprobs, _ = dk.token_logprobs(x, targets, backend=name)
        else:
            head = torch.eye(VOCAB, device=device)
            logprobs, _ = dk.linear_token_logprobs(x, head, targets, backend=name)
        logprobs.sum().backward()
        grads[name] = x.grad
    assert relative(grads[backend], grads["reference"]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", ["every other", "column", "expanded"])
def test_strided_targets(view, backend, device):
    targets, _, _ = inputs(24)
    targets = targets.to(device)
    targets = {"every other": targets[::2], "column": targets.view(12, 2)[:, 1], "expanded": targets[:1].expand(12)}[
        view
    ]
    got, _ = dk.token_logprobs(logits_of().to(device), targets, backend=backend)
    want, _ = dk.token_logprobs(logits_of().to(device), targets.clone(), backend="reference")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded"])
def test_inplace_on_views(view, backend, device):
    """`inplace` is a permission. The gradient is also right for rows that are not contiguous."""
    targets, old, advantages = (x.to(device) for x in inputs())
    base = {
        "transposed": lambda: logits_of().T.contiguous().T,
        "sliced": lambda: torch.cat([logits_of(), logits_of()], 1).view(12, 2, VOCAB)[:, 0],
        "expanded": lambda: logits_of()[:1].expand(12, VOCAB),
    }[view]
    grads = {}
    for name, inplace in ((backend, True), ("reference", False)):
        leaf = base().to(device).requires_grad_()
        out = dk.policy_loss(
            leaf * 1 if view == "sliced" else leaf, targets, old, advantages, inplace=inplace, backend=name
        )
        (3.7 * out.loss).backward()
        grads[name] = leaf.grad
    assert relative(grads[backend], grads["reference"]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_gradient_with_a_low_temperature(backend, device):
    """The scale of a float16 gradient must allow for dz/dx = 1/temperature. Otherwise the scaled gradient overflows to
    inf.
    """
    targets, old, advantages = (x.to(device) for x in inputs())
    x = logits_of(dtype=torch.float16).to(device).requires_grad_()
    wide = x.detach().double().requires_grad_()
    for leaf, name in ((x, backend), (wide, "reference")):
        dk.policy_loss(leaf, targets, old, advantages, temperature=0.1, backend=name).loss.backward()
    assert x.grad.isfinite().all()
    assert relative(x.grad.double(), wide.grad) < 4e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", [dk.DRPO(), dk.PPO(), dk.CISPO(), dk.DPPO()])
@pytest.mark.parametrize("bad", ["nan logit", "inf logit", "banned row", "target"])
def test_a_bad_row_is_never_a_number(bad, objective, backend, device):
    x, (targets, old, advantages) = logits_of(), inputs()
    if bad == "target":
        targets[3] = VOCAB + 5
    elif bad == "banned row":
        x[3] = -math.inf
    else:
        x[3, 7] = float(bad.split()[0])
    arguments = (t.to(device) for t in (x, targets, old, advantages))
    with torch.no_grad():
        out = dk.policy_loss(*arguments, objective=objective, backend=backend, validate=False)
    assert out.loss.isnan()
    for value in (out.logprobs, out.entropy, out.logsumexp):
        assert value.isnan().tolist() == [i == 3 for i in range(12)]


@dataclass(frozen=True)
class InfiniteAtCertainty(dk.Objective):
    def token_loss(self, tokens):
        return tokens.advantages * torch.log(-tokens.logprobs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compact", ["active", "mask", "none"])
def test_skipped_rows_do_not_reach_a_user_objective(compact, backend, device):
    """A skipped row reports the log-prob 0, at which this objective is infinite."""
    targets, old, advantages = (x.to(device) for x in inputs())
    mask = torch.arange(12, device=device) % 3 > 0
    out = dk.policy_loss(
        logits_of().to(device), targets, old, advantages, mask,
        objective=InfiniteAtCertainty(), compact=compact, backend=backend,
    )  # fmt: skip
    want = (advantages * torch.log(-out.logprobs))[mask].mean()
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compact", ["active", "mask", "none"])
@pytest.mark.parametrize("objective", [dk.CISPO(), dk.DPPO(), dk.PolicyGradient(2.0)])
def test_a_banned_target_without_advantage_costs_nothing(objective, compact, backend, device):
    x, (targets, old, advantages) = logits_of(), inputs()
    x[2, targets[2]] = -math.inf
    advantages[2] = 0
    arguments = (t.to(device) for t in (x, targets, old, advantages))
    assert dk.policy_loss(*arguments, objective=objective, compact=compact, backend=backend).loss.isfinite()


def test_fullgraph_with_the_default_objective(device):
    targets, old, advantages = (x.to(device) for x in inputs())
    weight = torch.eye(VOCAB, device=device)
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        x = logits_of().to(device).requires_grad_()
        loss = wrap(lambda x: dk.linear_policy_loss(x, weight, targets, old, advantages).loss)(x)
        loss.backward()
        results.append((loss.item(), x.grad))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_coefficients_are_not_printed(monkeypatch, device):
    """Formatting a tensor would synchronise with a GPU."""
    targets, old, advantages = (x.to(device) for x in inputs())

    def fail(self, **_):
        raise AssertionError("a tensor was formatted")

    monkeypatch.setattr(torch.Tensor, "__repr__", fail)
    coefficients = dk.TokenCoefficients(torch.ones(12, device=device))
    dk.policy_loss(logits_of().to(device), targets, old, advantages, reduction=coefficients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rollouts_made_in_inference_mode(backend, device):
    with torch.inference_mode():
        targets, old, advantages = (x.to(device).clone() for x in inputs())
    x = logits_of().to(device).requires_grad_()
    dk.token_logprobs(x, targets, backend=backend)[0].sum().backward()
    dk.policy_loss(x.view(3, 4, VOCAB), targets.view(3, 4), old.view(3, 4), advantages.view(3, 4), objective=dk.GSPO(),
                   backend=backend).loss.backward()  # fmt: skip
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_share_of_sequences(backend, device):
    """Only sequences whose own ratio is beyond the clip count, whatever the ratios of their tokens."""
    targets, _, _ = inputs()
    x = logits_of().view(3, 4, VOCAB).to(device)
    targets = targets.view(3, 4).to(device)
    logprobs, _ = dk.token_logprobs(x, targets)
    wobble = torch.tensor([0.3, -0.3, 0.2, -0.2], device=device)  # their mean is 0, and so the sequence's ratio is 1
    shift = torch.tensor([[0.0], [-1.0], [0.0]], device=device)  # the second sequence's ratio is e
    out = dk.policy_loss(
        x, targets, (logprobs + wobble + shift).clamp(max=0), torch.ones(3, device=device), objective=dk.GSPO(0.2, 0.2),
        backend=backend,
    )  # fmt: skip
    assert out.metrics["drpo/clip_share"].item() == pytest.approx(1 / 3)


def test_workspace_is_a_whole_number_of_bytes():
    targets, old, advantages = inputs()
    with pytest.raises(TypeError, match="workspace_bytes"):
        dk.linear_policy_loss(logits_of(), torch.eye(VOCAB), targets, old, advantages, workspace_bytes=1e6)


# ---------------------------------------------------------------------------------------------------------------
# found by fuzzing (fuzz.py)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_of_a_strided_batch(backend, device):
    """A single element with a stride of 2 counts as contiguous, and `.contiguous()` keeps the stride."""
    targets, old, advantages = (x[::12].to(device) for x in inputs(24))
    x = logits_of(2).to(device)
    for rows in (slice(0, 1), slice(1, 2)):
        out = dk.policy_loss(x[rows], targets[rows], old[rows], advantages[rows], backend=backend)
        want = dk.policy_loss(x[rows], targets[rows].clone(), old[rows], advantages[rows], backend="reference")
        assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_from_logits_of_any_strides(backend, device):
    targets, old, advantages = (x.to(device) for x in inputs())
    transposed = logits_of().to(device).T.contiguous().T
    out = dk.policy_loss(transposed, targets, old, advantages, backend=backend)
    want = dk.policy_loss(logits_of().to(device), targets, old, advantages, backend=backend)
    assert torch.equal(out.loss, want.loss)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("old", [1e-7, 5e-3, 1e-2])
def test_binary_kl_of_a_behaviour_policy_above_one(old, backend, device):
    """Rounding may leave log μ > 0, for which log(1 - μ + 1e-8) would be NaN."""
    targets, _, advantages = (x.to(device) for x in inputs())
    x = logits_of().to(device).requires_grad_()
    behaviour, objective = torch.full((12,), old, device=device), dk.DPPO(divergence="kl")
    loss = dk.policy_loss(x, targets, behaviour, advantages, objective=objective, backend=backend).loss
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_weighted_kl_far_from_both_policies(backend, device):
    """r = e^20 times a k3 of e^80 is inf in float32, and its gradient would be inf · 0."""
    x = torch.tensor([[0.0, 90.0, -90.0]], device=device).requires_grad_()
    out = dk.policy_loss(
        x, torch.tensor([0], device=device), torch.tensor([-120.0], device=device), torch.ones(1, device=device),
        ref_logprobs=torch.tensor([-0.5], device=device), kl_coef=0.1, kl_importance=True, backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite() and x.grad.isfinite().all()


def test_reference_gradient_under_float16_autocast(device):
    """The operands are rounded to float16, but gradients of 1e6 and of 1e-9 are not."""
    hidden, weight = logits_of(12, 2).to(device), logits_of(VOCAB, 3).to(device)
    targets, old, advantages = (x.to(device) for x in inputs())
    for size in (1e7, 1e-9):
        grads = {}
        for backend in ("reference", "torch"):
            leaf = weight.clone().requires_grad_()
            with torch.autocast(device.type, dtype=torch.float16):
                loss = dk.linear_policy_loss(hidden, leaf, targets, old, size * advantages, backend=backend).loss
            loss.backward()
            grads[backend] = leaf.grad
        assert relative(grads["torch"], grads["reference"]) < 4e-3


class Dropped(torch.autograd.Function):
    """This function treats its input as a branch that is not differentiated does, so that the
    input's gradient is None.
    """

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_loss_whose_gradient_is_dropped(backend, device):
    """Such a loss leaves no gradient, and may still be differentiated."""
    hidden, weight = (torch.randn(n, 5, device=device, requires_grad=True) for n in (3, 7))
    rows = torch.arange(3, device=device), torch.full((3,), -2.0, device=device), torch.ones(3, device=device)
    linear = dk.linear_policy_loss(hidden, weight, *rows, backend=backend).loss
    ready = dk.policy_loss(hidden @ weight.T, *rows, backend=backend).loss
    for loss in (linear, ready):
        Dropped.apply(loss).backward(retain_graph=True)
        assert all(x.grad is None or not x.grad.any() for x in (hidden, weight))
        loss.backward()
        assert hidden.grad.any() and weight.grad.any()
        hidden.grad = weight.grad = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("objective", [dk.PPO(), dk.PPO(dual_clip=3.0), dk.DRPO(delta=0.2)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_advantage_of_nan_never_looks_good(backend, objective, dtype, device):
    """An unchecked NaN shows in the loss, the row's gradient and a metric, whatever the objective clips."""
    logits = torch.randn(3, 9, device=device).to(dtype).requires_grad_()
    rows = torch.arange(3, device=device), torch.full((3,), -2.0, device=device)
    advantages = torch.tensor([1.0, math.nan, -1.0], device=device)
    out = dk.policy_loss(logits, *rows, advantages, objective=objective, backend=backend, validate=False)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert out.loss.isnan() and out.metrics["drpo/nonfinite"] == 1
    assert gradient[1].isnan().all()
    if dtype == torch.float32:  # in float16 the rows share a scale, so the NaN reaches all of them
        assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("reference", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_without_a_kl_term_needs_no_reference(backend, estimator, reference, device):
    """Such a token has the coefficient 0 for the KL term, and its reference log-prob is not a number."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=g).to(device).requires_grad_() for n in (6, 11))
    rest = torch.arange(6, device=device), torch.full((6,), -2.0, device=device), torch.ones(6, device=device)
    ref, kl = torch.full((6,), -2.5, device=device), torch.ones(6, device=device)
    ref[2], kl[2] = reference, 0
    coefficients = dk.TokenCoefficients(torch.ones(6, device=device), kl=kl)
    out = dk.linear_policy_loss(
        hidden, weight, *rest, reduction=coefficients, ref_logprobs=ref, kl_coef=0.5, kl_estimator=estimator,
        validate=False, backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()
