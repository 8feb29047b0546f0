"""The row kernels that are measured by themselves: the candidate that reads once computes what the one that reads twice
does.
"""

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import tiles
from benchmarks.method import OBJECTIVE
from benchmarks.one_read import dlogits, one_read
from drpo_kernels import Tokens
from drpo_kernels.backends.rows import Row
from drpo_kernels.backends.triton.tiles import RowTile

VOCAB, TILE = 700, RowTile(256, 1)


def exact(batch):
    """(outcome [len(Outcome), n], dlogits) in float64 autograd."""
    leaf, rows = batch.logits.double().requires_grad_(), batch.rows.double()
    logps = (leaf * rows[Row.INV_TEMPERATURE][:, None]).log_softmax(-1)
    logp = logps.gather(-1, batch.targets[:, None])[:, 0]
    old = torch.where(rows[Row.OLD_LOGPROB].isnan(), logp.detach(), rows[Row.OLD_LOGPROB])
    losses = OBJECTIVE.token_loss(Tokens(logp, old, rows[Row.ADVANTAGE]))
    (slope,) = torch.autograd.grad(losses.sum(), logp, retain_graph=True)
    entropy = -(logps.exp() * logps.clamp(min=-1e20)).sum(-1)
    logsumexp = (leaf * rows[Row.INV_TEMPERATURE][:, None]).logsumexp(-1)
    outcome = torch.stack([logp, entropy, logsumexp, rows[Row.POLICY] * losses, slope]).detach()
    return outcome, torch.autograd.grad((rows[Row.POLICY] * losses).sum(), leaf)[0]


def test_one_read_agrees_with_float64(device):
    """Also where the rollout's log-prob is far off, absent, or the target nearly certain."""
    torch.manual_seed(0)
    batch = tiles._batch(8, VOCAB, torch.float32, device)
    batch.rows[Row.INV_TEMPERATURE] = torch.linspace(0.7, 1.3, 8, device=device)
    batch.logits[1] -= 1e4
    batch.logits[2, batch.targets[2]] = 40.0
    batch.logits[3, batch.targets[3]] = -180.0
    batch.rows[Row.OLD_LOGPROB, 4] = float("nan")
    batch.rows[Row.OLD_LOGPROB, 5] = -300.0
    batch.logits[6, : VOCAB // 2] = float("-inf")
    batch.targets[6], batch.targets[7] = VOCAB - 1, 0
    out = torch.full((8, VOCAB), float("nan"), dtype=torch.bfloat16, device=device)
    outcome, factors = one_read(batch, out, TILE)
    want, gradient = exact(batch)
    # the ulp of 1e4, which row 1 is lower by; and that moves what depends on log π
    allowed = 1e-3 + 2e-3 * want.abs() * torch.tensor([0, 0, 0, 1, 1], device=device)[:, None]
    assert ((outcome - want).abs() <= allowed).all()
    found = dlogits(factors, out).double()
    # a bf16 of each entry, which the interpreter truncates
    assert (found - gradient).abs().max() <= 2.0**-7 * gradient.abs().max()
    assert ((found - gradient).norm(dim=1) <= 2.0**-7 * gradient.norm(dim=1)).all()


def test_every_kernel_is_measured(device):
    found = list(tiles.measure(device, True, float("inf")))
    kernels = {(record["row_kernel"], record["logits"]) for record in found}
    assert kernels == {(tiles.COPY, "float32"), (tiles.TWO_READS, "float32"), (tiles.ONE_READ, "float32"),
                       (tiles.COPY, "bfloat16"), (tiles.TWO_READS, "bfloat16")}  # fmt: skip
    assert all(record["status"] == "ok" and record["TB/s"] > 0 for record in found)
    assert sum(record["chosen"] for record in found) == 2
