"""Tests of old log-probs that are not log-probs (NaN, -inf, sentinels, placeholders), and of what a left-out row
reports.
"""

import math

import pytest
import torch

import drpo_kernels as dk
from drpo_kernels.tokens import LEAST_LOGPROB, scorable
from problems import BACKENDS, random_problem, replace

every_backend = pytest.mark.parametrize("backend", BACKENDS)
OBJECTIVES = [dk.DRPO(0.2), dk.CISPO(), dk.GSPO()]
NONE = [math.nan, -math.inf, -9999.0, -1e9, -1e4, -1000.0, LEAST_LOGPROB, -3.4e38]


def outcome(backend, device, old, objective, targets=None, advantages=None, **options):
    """Return (loss, dX, dW, output) of a call whose mask leaves out its last token."""
    made = random_problem(2, (3, 4), 8, 23)
    tensors = made.hidden, made.weight, made.targets if targets is None else targets, old
    hidden, weight, targets, old = (x.clone().to(device) for x in tensors)
    advantages = (made.advantages if advantages is None else advantages).to(device)
    mask = torch.ones(3, 4, dtype=torch.bool, device=device)
    mask[-1, -1] = False
    options = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
    hidden.requires_grad_(), weight.requires_grad_()
    out = dk.linear_policy_loss(
        hidden, weight, targets, old, advantages, mask, objective=objective, backend=backend, **options
    )
    out.loss.backward()
    return out.loss.detach(), hidden.grad, weight.grad, out


def old_logprobs(value, dtype=torch.float32):
    old = random_problem(2, (3, 4), 8, 23).old_logprobs.clone().to(dtype)
    old[0, 1] = value
    return old


@every_backend
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_no_sampled_token_has_is_masked_and_counted(dtype, objective, backend, device):
    *want, _ = outcome(backend, device, old_logprobs(math.nan, dtype), objective)
    for value in NONE:
        *got, out = outcome(backend, device, old_logprobs(value, dtype), objective)
        assert all(map(torch.equal, got, want)), value
        assert out.metrics["drpo/unscorable"] == 1, value
        assert out.metrics["drpo/sentinels"] == math.isfinite(torch.tensor(value, dtype=dtype).item()), value
        assert not out.computed[0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unlikely_token_is_not(backend, device):
    """The token is the least likely one that float32 noise of 32 bits can choose, at three times the temperature of its
    log-prob.
    """
    old = old_logprobs(-(23 * 3 + math.log(262_144)))
    *_, out = outcome(backend, device, old, dk.DRPO(0.2), advantages=torch.ones(3, 4))
    assert out.metrics["drpo/unscorable"] == 0
    assert out.computed[0, 1]


def test_the_floor_is_below_what_is_sampled():
    """The noise is Gumbel noise from the smallest uniform numbers that 24 to 32 random bits give, for a vocabulary of
    2^18.
    """
    for bits in (24, 32):
        rarest = -math.log(-math.log1p(-(2.0**-bits))) + math.log(math.log(2.0**bits))
        for temperature in (0.6, 1.0, 2.0, 3.0):
            assert -temperature * rarest - math.log(2**18) > LEAST_LOGPROB
    assert scorable(torch.tensor(-99.0))


@every_backend
@pytest.mark.parametrize("objective", [dk.DRPO(0.2), dk.GSPO()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("validate", [True, False])
def test_an_unscorable_row_may_carry_anything(validate, objective, backend, device):
    """Like a masked row, it may have any target, advantage, weight, reference, temperature and coefficient."""
    problem = random_problem(2, (3, 4), 8, 23)
    names = ("targets", "advantages", "ref_logprobs", "token_weights", "temperature")
    right = {"targets": problem.targets, "advantages": problem.advantages, "ref_logprobs": problem.old_logprobs - 0.3}
    right |= {"token_weights": torch.rand(3, 4), "temperature": 0.5 + torch.rand(3, 4)}
    options = {"kl_coef": 0.1, "entropy_coef": 0.01, "validate": validate}
    old = old_logprobs(math.nan)
    *want, _ = outcome(backend, device, old, objective, **right, **options)
    for name in names:
        for value in (-100,) if name == "targets" else (math.nan, math.inf):
            wrong = {**right, name: right[name].clone()}
            wrong[name][0, 1] = value
            *got, _ = outcome(backend, device, old, objective, **wrong, **options)
            assert all(map(torch.equal, got, want)), (name, value)


# --- what a row reports -----------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("form", ["linear", "logits"])
def test_a_mean_over_the_mask_is_right_or_nan(form, backend, device):
    """With A = 0 rows left out, a mean over the mask is NaN. With compact="mask" it is the mean of all rows."""
    made = replace(random_problem(4, (3, 4), 8, 23))
    advantages = made.advantages.clone()
    advantages[1] = 0
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[:, -1] = False
    logits = made.hidden.double() @ made.weight.double().T
    logp = logits.log_softmax(-1)
    exact = logp.gather(-1, made.targets[..., None])[..., 0], -(logp.exp() * logp).sum(-1)
    rest = [x.to(device) for x in (made.targets, made.old_logprobs, advantages, mask)]

    def call(**options):
        if form == "logits":
            return dk.policy_loss(logits.float().to(device), *rest, backend=backend, **options)
        hidden, weight = made.hidden.to(device), made.weight.to(device)
        return dk.linear_policy_loss(hidden, weight, *rest, backend=backend, **options)

    for compact in ("active", "mask", "none"):
        out = call(compact=compact)
        left_out = mask & (advantages == 0) if compact == "active" else torch.zeros_like(mask)
        for values, want in zip((out.logprobs.cpu(), out.entropy.cpu()), exact, strict=True):
            assert (values[~mask] == 0).all()
            assert torch.equal(values.isnan(), left_out)
            # This is the contract's 1e-4 on a log-prob.
            torch.testing.assert_close(values[mask & ~left_out].double(), want[mask & ~left_out], rtol=0, atol=1e-4)
        assert out.logprobs[mask.to(device)].mean().isnan() == (compact == "active")
        assert out.loss.isfinite()
        assert all(value.isfinite() for value in out.metrics.values())


@every_backend
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_to_the_reference_is_reported(estimator, backend, device):
    """The KL is reported with and without a coefficient, which changes the loss alone."""
    made = random_problem(4, (3, 4), 8, 23)
    ref = made.old_logprobs - torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    logp = (made.hidden.double() @ made.weight.double().T).log_softmax(-1).gather(-1, made.targets[..., None])[..., 0]
    d = logp - ref.double()
    want = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() + d - 1}[estimator].mean().item()
    arguments = [x.to(device) for x in (made.hidden, made.weight, made.targets, made.old_logprobs, made.advantages)]
    options = {"backend": backend, "kl_estimator": estimator, "compact": "mask"}
    without = dk.linear_policy_loss(*arguments, **options)
    measured = dk.linear_policy_loss(*arguments, ref_logprobs=ref.to(device), **options)
    weighted = dk.linear_policy_loss(*arguments, ref_logprobs=ref.to(device), kl_coef=0.5, **options)
    assert "drpo/ref_kl" not in without.metrics
    for out in (measured, weighted):
        assert out.metrics["drpo/ref_kl"].item() == pytest.approx(want, rel=1e-4)
    assert torch.equal(measured.loss, without.loss)
    assert weighted.loss.item() == pytest.approx(without.loss.item() + 0.5 * want, rel=1e-4)


@every_backend
@pytest.mark.parametrize("form", ["linear", "logits"])
@pytest.mark.parametrize("objective", [dk.DRPO(0.2), dk.PPO(), dk.GSPO()], ids=lambda o: type(o).__name__)
def test_a_loss_per_token(objective, form, backend, device):
    """With reduction="none", any weighted sum of the losses has the gradient that the reference computes in float64."""
    made = random_problem(7, (3, 4), 8, 23)
    generator = torch.Generator().manual_seed(0)
    upstream, ref = torch.randn(3, 4, generator=generator), made.old_logprobs - 0.2
    advantages, mask = made.advantages.clone(), torch.ones(3, 4, dtype=torch.bool)
    advantages[0, 0], mask[1, 1] = 0, False
    options = {"objective": objective, "kl_coef": 0.1, "entropy_coef": 0.02, "reduction": "none"}

    def gradients(dtype, backend, device):
        leaves = [x.to(device, dtype).requires_grad_() for x in (made.hidden, made.weight)]
        rest = [x.to(device) for x in (made.targets, made.old_logprobs, advantages, mask)]
        call = dk.policy_loss if form == "logits" else dk.linear_policy_loss
        first = [leaves[0] @ leaves[1].T] if form == "logits" else leaves
        out = call(*first, *rest, ref_logprobs=ref.to(device), backend=backend, **options)
        total = (out.loss * upstream.to(out.loss)).sum()
        return out, [g.cpu().double() for g in torch.autograd.grad(total, leaves)]

    out, got = gradients(torch.float32, backend, device)
    exact, want = gradients(torch.float64, "reference", "cpu")
    assert out.loss.shape == mask.shape
    assert out.loss[1, 1] == 0
    torch.testing.assert_close(out.loss.detach().cpu().double(), exact.loss.detach(), rtol=1e-4, atol=1e-5)
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 5e-5 * w.norm()  # the contract's bound in float32


def test_a_loss_per_token_has_no_normalizer(device):
    made = random_problem(7, (3, 4), 8, 23)
    arguments = [x.to(device) for x in (made.hidden, made.weight, made.targets, made.old_logprobs, made.advantages)]
    with pytest.raises(ValueError, match="normalizer must be None"):
        dk.linear_policy_loss(*arguments, reduction="none", normalizer=3.0)
    with pytest.raises(ValueError, match="sparse_grad must be 0 with reduction"):
        dk.linear_policy_loss(*arguments, reduction="none", sparse_grad=0.01)


# --- what `diagnose` says about it ------------------------------------------------------------------------------------


def test_diagnosis_names_sentinels():
    *_, out = outcome("torch", "cpu", old_logprobs(-9999.0), dk.DRPO(0.2))
    (sentence,) = dk.diagnose(out.metrics)[:1]
    assert "1 old log-probs are -100 or below" in sentence
    assert "-9999" in sentence


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_diagnosis_names_placeholders(share):
    """Log-probs of 0.0 are placeholders at any batch size, unless the policy is sure of its tokens."""
    made = random_problem(3, (4, 4), 8, 23)
    old = made.old_logprobs.clone()
    old.view(-1)[: int(share * 16)] = 0.0
    out = dk.linear_policy_loss(made.hidden, made.weight, made.targets, old, torch.ones(4), objective=dk.DRPO(0.2))
    (sentence,) = dk.diagnose(out.metrics)[:1]
    assert "placeholders" in sentence
    logits = 30 * torch.nn.functional.one_hot(made.targets, 23).float()
    sure = dk.policy_loss(logits, made.targets, torch.zeros(4, 4), torch.ones(4), objective=dk.DRPO(0.2))
    assert not any("placeholders" in said for said in dk.diagnose(sure.metrics))
