"""A call launches little around its products, at any size; and the kernel of the metrics computes their formula."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import drpo_kernels as dk
from drpo_kernels.backends import matmul, row_ops
from drpo_kernels.backends.rows import Field, Outcome
from drpo_kernels.backends.sweep import LinearSweep
from drpo_kernels.evidence import evidence_metrics
from drpo_kernels.kl import kl_term
from drpo_kernels.metrics import policy_metrics

pytest.importorskip("triton")

# These views and allocations launch nothing.
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "expand", "lift_fresh", "new_empty", "permute", "reshape",
    "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
# MOST bounds a forward and backward with defaults, among whose launches are three products, four kernels and two for
# the factors of rows. MOST_A_CHUNK bounds what a further chunk, which is also a window of its own, adds.
MOST, MOST_A_CHUNK = 34, 7


class Launches(TorchDispatchMode):
    """Count the calls that would launch a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Replace each product and row kernel by one cheap operation, so that the test counts what surrounds them."""
    monkeypatch.setattr(matmul, "float32_outputs", lambda *_: (True, True))
    monkeypatch.setattr(matmul, "product", lambda a, b, out, accumulate=False: out.fill_(0.5))
    ops = row_ops("triton")

    class Rows(type(ops)):
        def launch(self, *arguments, **options):
            torch.zeros(1)

        def scale(self, values, factor):
            torch.zeros(1)

        def metrics(self, objective, rows, *arguments):
            torch.zeros(1)
            return {}

    for module in ("autograd", "policy_loss", "backends.sweep"):
        monkeypatch.setattr(sys.modules[f"drpo_kernels.{module}"], "row_ops", lambda name: Rows())


def launches(tokens: int, **options) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 16, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(64, 16, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(64, (tokens,), generator=generator)
    old, advantages = -4 - torch.rand(tokens, generator=generator), 1 + torch.rand(tokens, generator=generator)
    mask = torch.ones(tokens, dtype=torch.bool)
    with Launches() as found:
        out = dk.linear_policy_loss(
            hidden, weight, targets, old, advantages, mask, backend="triton", validate=False, **options
        )
        out.loss.backward()
    return found.names


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a CPU's dispatcher sees")
@pytest.mark.parametrize("tokens", [8, 300])
def test_a_call_launches_little_around_its_products(tokens, like_a_gpu):
    found = launches(tokens)
    assert len(found) <= MOST, found


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a CPU's dispatcher sees")
def test_a_chunk_launches_little(like_a_gpu):
    one, many = launches(6 * 128), launches(6 * 128, workspace_bytes=128 * 64 * 8 + 1)
    further = many.count("zeros") - one.count("zeros")  # the fixture calls `zeros` in place of a row kernel
    assert further >= 3 and len(many) - len(one) <= MOST_A_CHUNK * further, many


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a CPU's dispatcher sees")
def test_the_device_does_not_wait_after_the_count(like_a_gpu, monkeypatch):
    """The device is idle from the count's read-back to the first product. Nothing is launched between them."""
    count_rows = LinearSweep._order

    def counted(self, *arguments):
        count_rows(self, *arguments)
        torch.eye(1)  # this marks the place: nothing else calls `eye`

    monkeypatch.setattr(LinearSweep, "_order", counted)
    found = launches(300)
    assert found[found.index("eye") + 1] == "fill_", found  # in place of the product, the fixture calls `fill_`


@pytest.mark.parametrize("poison", [None, "logprob", "entropy", "slope"])
@pytest.mark.parametrize(
    "objective", [dk.DRPO(delta=0.2), dk.PPO(), dk.GSPO(3e-4, 4e-4)], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("count", [0, 1, 2500])
def test_metrics_of_the_kernel_are_the_formula(count, objective, poison, device):
    """The two agree over several blocks. A NaN shows in the metrics in which the formula shows it, and in no other."""
    generator = torch.Generator().manual_seed(count)
    rows, outcome = torch.zeros(len(Field), count), torch.zeros(len(Outcome), count)
    rows[Field.OLD_LOGPROB] = -6 * torch.rand(count, generator=generator)
    rows[Field.OLD_LOGPROB, ::5], rows[Field.OLD_LOGPROB, 2::11] = 0.0, rows[Field.OLD_LOGPROB, 1::11]
    rows[Field.REF_LOGPROB] = rows[Field.OLD_LOGPROB] - 1
    rows[Field.ADVANTAGE] = torch.randn(count, generator=generator) * (torch.rand(count, generator=generator) < 0.8)
    rows[Field.KIND] = torch.randint(3, (count,), generator=generator).float()
    outcome[Outcome.LOGPROB] = rows[Field.OLD_LOGPROB] + 3 * torch.randn(count, generator=generator)
    outcome[Outcome.ENTROPY] = torch.rand(count, generator=generator)
    outcome[Outcome.LOGSUMEXP] = torch.randn(count, generator=generator)
    outcome[Outcome.SLOPE] = torch.randn(count, generator=generator).clamp(min=-0.5)
    rows[Field.OLD_LOGPROB, ::7] = torch.nan  # these tokens are on-policy
    if poison and count:
        rows[Field.KIND, -1] = 2
        outcome[Outcome[poison.upper()], -1] = torch.nan
    given = torch.full((count,), -9999.0)
    given[::2] = -torch.inf
    dropped, unscorable = (torch.rand(count, generator=generator) < share for share in (0.2, 0.1))
    valid = (rows[Field.KIND] > 0) | dropped
    old = torch.where(rows[Field.OLD_LOGPROB].isnan(), outcome[Outcome.LOGPROB], rows[Field.OLD_LOGPROB])
    logprobs, entropy, logsumexp, _, slope = outcome
    want = policy_metrics(
        objective, logprobs, entropy, slope, old, rows[Field.ADVANTAGE], rows[Field.KIND] > 0, valid, unscorable,
        unscorable & given.isfinite(), kl_term("k2", logprobs, old, rows[Field.REF_LOGPROB], False, 2.0)[0],
    ) | evidence_metrics(
        logprobs, entropy, logsumexp, old, rows[Field.ADVANTAGE], rows[Field.KIND] > 0, valid
    )  # fmt: skip
    placed = (x.to(device) for x in (rows, outcome, valid, unscorable, given))
    found = row_ops("triton").metrics(objective, *placed, "k2", 2.0)
    assert list(found) == list(want)
    for name, value in found.items():
        assert value.dtype == want[name].dtype and value.shape == ()
        # float32 sums of 2500 numbers in another order
        torch.testing.assert_close(value.cpu(), want[name], rtol=3e-6, atol=1e-7, equal_nan=True, msg=name)


def test_means_of_ones_are_one(device):
    """The mean of n ones is 1 for every n. A reciprocal would make it 0.99999994 for 41 of the counts."""
    for count in range(1, 130):
        rows, outcome = torch.zeros(len(Field), count, device=device), torch.zeros(len(Outcome), count, device=device)
        rows[Field.ADVANTAGE], rows[Field.KIND] = 0.0, 2.0
        flags = torch.ones(count, dtype=torch.bool, device=device), torch.zeros(count, dtype=torch.bool, device=device)
        found = row_ops("triton").metrics(dk.DRPO(), rows, outcome, *flags, None, None, math.inf)
        assert found["drpo/ratio_mean"] == found["drpo/active_share"] == 1, count
        assert not torch.signbit(found["drpo/weight_min"]), "0 where nothing is weighted"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_metrics_may_be_changed_in_place(backend, device):
    """A trainer may change one metric in place, inside its own graph, without changing the others."""
    logits = torch.randn(4, 9, device=device, requires_grad=True)
    targets, old = torch.zeros(4, dtype=torch.int64, device=device), torch.full((4,), -2.0, device=device)
    metrics = dk.policy_loss(logits, targets, old, torch.ones(4, device=device), backend=backend).metrics
    weight = torch.ones((), device=device, requires_grad=True)
    total = weight * metrics["drpo/kl_k1"]
    metrics["drpo/ratio_mean"] /= 2
    metrics["drpo/kl_k3"] += weight
    (total + metrics["drpo/kl_k3"]).backward()
    assert weight.grad == 1 + metrics["drpo/kl_k1"]
