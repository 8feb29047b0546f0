"""Tests of the row kernel that reads a logit once, on hostile rows."""

import math

import pytest
import torch

pytest.importorskip("triton")
from drpo_kernels import DRPO, Tokens
from drpo_kernels.backends.rows import Field, RowBatch, RowKind, Stat, Terms, Transform
from drpo_kernels.backends.triton.launch import TritonRows
from drpo_kernels.backends.triton.tiles import RowTile
from drpo_kernels.triton_support import INTERPRETING

VOCAB, TILE, OBJECTIVE = 700, RowTile(256, 1), DRPO()


def batch_of(count, device):
    """Return rows of a policy near that of its rollout: log μ is the log-prob with a noise of 0.2 nat."""
    logits = 3 * torch.randn(count, VOCAB, device=device)
    targets = torch.randint(VOCAB, (count,), device=device)
    logprobs = logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    rows = torch.zeros(len(Field), count, device=device)
    rows[Field.OLD_LOGPROB] = (logprobs + 0.2 * torch.randn(count, device=device)).clamp(max=0)
    rows[Field.ADVANTAGE] = rows[Field.POLICY] = rows[Field.INV_TEMPERATURE] = 1.0
    rows[Field.KIND] = RowKind.ACTIVE
    return RowBatch(logits, targets, rows, Transform())


def exact(batch):
    """Return (outcome [len(Outcome), n], dlogits) in float64, with 1 - p_y summed from the other probabilities, unlike
    autograd.
    """
    rows, targets = batch.rows.double(), batch.targets[:, None]
    z = batch.logits.double() * rows[Field.INV_TEMPERATURE][:, None]
    logsumexp = z.logsumexp(-1)
    p = (z - logsumexp[:, None]).exp()
    miss = p.scatter(1, targets, 0).sum(1)
    logp = torch.where(miss < 0.5, (-miss).log1p(), z.gather(1, targets)[:, 0] - logsumexp).requires_grad_()
    old = torch.where(rows[Field.OLD_LOGPROB].isnan(), logp.detach(), rows[Field.OLD_LOGPROB])
    losses = OBJECTIVE.token_loss(Tokens(logp, old, rows[Field.ADVANTAGE]))
    (slope,) = torch.autograd.grad(losses.sum(), logp)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    outcome = torch.stack([logp, entropy, logsumexp, rows[Field.POLICY] * losses, slope]).detach()
    scale = (rows[Field.POLICY] * slope * rows[Field.INV_TEMPERATURE])[:, None]
    return outcome, scale * (-p).scatter(1, targets, miss[:, None])


def hostile(device):
    """Return rows whose old log-prob is far off, absent or no log-prob, and rows that are shifted, banned or nearly
    certain.
    """
    batch = batch_of(16, device)
    old, targets, logits = batch.rows[Field.OLD_LOGPROB], batch.targets, batch.logits
    batch.rows[Field.INV_TEMPERATURE] = torch.linspace(0.7, 1.3, 16, device=device)
    logits[1] -= 1e4
    logits[2, targets[2]] = 60.0  # p = 1 - 1e-20
    logits[3, targets[3]] = -180.0
    old[3] = -0.5
    old[4], old[5], old[6] = float("nan"), -300.0, 0.01
    logits[7, : VOCAB // 2] = float("-inf")
    targets[7], targets[8] = VOCAB - 1, 0
    logits[9, targets[9]] = -417.0
    logits[10] *= 40
    logits[11, targets[11]] = float("-inf")
    logits[12] = 0.0
    logits[13] = float("-inf")
    logits[13, targets[13]] = 3.0  # every other token is banned
    old[14] = 40.0  # no check has seen this value
    return batch


def test_one_read_agrees_with_float64(device):
    torch.manual_seed(0)
    batch = hostile(device)
    batch.rows[Field.KIND, 15] = RowKind.SKIPPED
    batch.logits[15] = float("nan")
    out = torch.full((16, VOCAB), float("nan"), dtype=torch.bfloat16, device=device)
    factors = torch.full((16,), float("nan"), device=device)
    outcome = TritonRows(TILE).policy(batch, Terms(OBJECTIVE), out, factors)
    want, gradient = exact(batch)
    assert (outcome[:, 15] == 0).all() and factors[15] == 0 and (out[15] == 0).all()
    outcome, want, gradient = outcome[:, :15], want[:, :15], gradient[:15]
    assert outcome[0, 11] == -torch.inf
    # Row 1 is lower by 1e4, and is allowed an ulp of that, which also moves what depends on log π.
    allowed = 1e-3 + 2e-3 * want.abs() * torch.tensor([0, 0, 0, 1, 1], device=device)[:, None]
    assert ((outcome - want).abs() <= allowed)[:, [*range(11), 12, 13, 14]].all()
    assert ((outcome - want).abs() <= 3e-6 * want.abs().clamp(min=1))[:3, [0, 2, 4, 5, 6, 7, 8, 12, 13]].all()
    found = (factors[:15, None] * out[:15].float()).double()
    rounding = 2.0**-7 if INTERPRETING else 2.0**-8  # relative, of an entry; the interpreter truncates
    assert ((found - gradient).abs() <= rounding * gradient.abs() + 3e-3 * gradient.norm(dim=1)[:, None]).all()
    assert ((found - gradient).norm(dim=1) <= (rounding + 2e-3) * gradient.norm(dim=1)).all()


def test_one_read_behind_a_soft_cap(device):
    """The gradient of the raw logits has the cap's slope at every entry, the target's among them."""
    torch.manual_seed(0)
    batch = batch_of(8, device)
    bias, cap = torch.randn(VOCAB, device=device), 4.0
    raw = batch.logits.double() + bias.double()
    capped = batch._replace(logits=cap * torch.tanh(raw / cap))
    outcome, gradient = exact(capped)
    gradient *= 1 - torch.tanh(raw / cap).square()
    out, factors = torch.empty(8, VOCAB, dtype=torch.bfloat16, device=device), torch.empty(8, device=device)
    batch = batch._replace(transform=Transform(softcap=cap), bias=bias)
    found = TritonRows(TILE).policy(batch, Terms(OBJECTIVE), out, factors)
    assert (found - outcome).abs().max() <= 1e-4 * outcome.abs().max()
    found, at_target = (factors[:, None] * out.float()).double(), batch.targets[:, None]
    rounding = 2.0**-7 if INTERPRETING else 2.0**-8
    assert ((found - gradient).norm(dim=1) <= rounding * gradient.norm(dim=1)).all()
    assert (found - gradient).gather(1, at_target).abs().le(rounding * gradient.gather(1, at_target).abs()).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("at_target", [False, True])
def test_a_poisoned_row_is_never_a_number(at_target, poison, device):
    batch = batch_of(2, device)
    batch.logits[0, batch.targets[0] if at_target else (batch.targets[0] + 1) % VOCAB] = poison
    out, factors = torch.empty(2, VOCAB, dtype=torch.bfloat16, device=device), torch.empty(2, device=device)
    outcome = TritonRows(TILE).policy(batch, Terms(OBJECTIVE), out, factors)
    assert outcome[:, 0].isnan().all() and factors[0].isnan()
    assert outcome[:, 1].isfinite().all() and out[1].isfinite().all()
    assert TritonRows(TILE).statistics(batch)[Stat.LOGPROB].isnan().tolist() == [True, False]


@pytest.mark.parametrize("ratio", [0.5, 1.2, 3.9])
@pytest.mark.parametrize("lead", [8.0, 16.0, 25.0])
@pytest.mark.parametrize("of_target", [False, True])
def test_the_entropy_of_a_confident_row_keeps_its_digits(of_target, lead, ratio, device):
    """The entropy's gradient keeps its digits, as a bonus in the kernel of the loss, however small the entropy is and
    whatever μ was.
    """
    batch = batch_of(1, device)
    target = batch.targets[0]
    batch.logits.zero_()
    batch.logits[0, target if of_target else (target + 1) % VOCAB] = lead
    batch.rows[Field.ADVANTAGE], batch.rows[Field.ENTROPY] = 0.0, 1.0
    logp = batch.logits.double().log_softmax(1)
    batch.rows[Field.OLD_LOGPROB] = (logp[0, target] - math.log(ratio)).clamp(max=0.0)
    out = torch.empty_like(batch.logits)
    TritonRows(TILE).policy(batch, Terms(OBJECTIVE, entropy_bonus=True), out)
    entropy = -(logp.exp() * logp).sum()
    want = logp.exp() * (logp + entropy)  # the gradient of -H
    assert (out - want).norm() <= 1e-5 * want.norm()
