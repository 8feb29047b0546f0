"""Tests of `sparse_grad`: what a row leaves out is within its bound, and so is the effect on dX, dW and db.

sparse_cases.py makes the problems, solves them in float64 by the oracle, and states the bounds. A tolerance that is not
stated there stands beside its test.
"""

import functools
import math

import pytest
import torch

import drpo_kernels as dk
import problems
from drpo_kernels.backends import matmul, torch_rows
from drpo_kernels.backends.sparse import selection
from drpo_kernels.backends.sparse.contract import LEAST_ENTRIES, SHARE_ROUNDING, entry_limit
from drpo_kernels.distributed import reduce_metrics
from sparse_cases import (
    BF16,
    COMPACT,
    FP16,
    FP32,
    FP64,
    ROW,
    SHARES,
    STORED,
    Case,
    assert_below,
    assert_exact_but_for_the_least,
    assert_same,
    assert_within_bounds,
    case_of,
    drawn,
    exact,
    found,
    gradients,
    in_dtype,
    one_row,
    rows_of,
    visible,
)

# --- the bound --------------------------------------------------------------------------------------------------------

SEEDS, SEEN = range(300), range(160)


@functools.cache
def bounded(seed: int, device: str) -> tuple[int, int]:
    """Check the bounds of a random problem of 50 rows, and return (rows with a gradient, sparse ones)."""
    case = drawn(seed)
    want, got = exact(case), found(case, device=device)
    assert_within_bounds(case, got, want)
    return int(want.active.sum()), int((want.active & (got.entries > 0)).sum())


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_are_within_the_bound(seed, device):
    bounded(seed, str(device))


@pytest.mark.parametrize("seed", SEEN)
def test_only_the_least_entries_are_left_out(seed, device):
    case = visible(drawn(seed))
    assert_exact_but_for_the_least(case, found(case, device=device), device.type)


def test_the_problems_above_are_many_and_of_both_kinds(device):
    rows, sparse = (sum(counts) for counts in zip(*(bounded(s, str(device)) for s in SEEDS), strict=True))
    assert rows > 10_000 and 0.1 * rows < sparse < 0.9 * rows


@pytest.mark.parametrize("vocab", [40, 130, 200, 256, 640, 1000, 2000])
@pytest.mark.parametrize("count", [3, LEAST_ENTRIES])
def test_a_row_that_few_entries_suffice_for_is_sparse(count, vocab, device):
    """The row is sparse whatever columns the entries are in, even with one in every block of 64. The other columns
    weigh a thousandth of the budget.
    """
    logits = torch.full((vocab,), -20.0)
    logits[torch.linspace(0, vocab - 2, count).long()] = 1.0
    logits[-1] = 3.0
    case = one_row(logits, target=vocab - 1)
    got = found(case, device=device)
    assert got.entries.tolist() == [count + 1]
    assert_within_bounds(case, got)


@pytest.mark.parametrize("beyond", [0, 1])
def test_the_entry_limit(beyond, device):
    """As many equal probabilities as the limit allows are all kept. With one more, the row is dense."""
    vocab = 300
    limit = entry_limit(vocab, device.type)
    logits = torch.full((vocab,), -20.0)
    logits[5 : 5 + limit + beyond] = 0.0
    case = one_row(logits)
    got = found(case, device=device)
    assert got.entries.tolist() == [0 if beyond else limit + 1]
    assert_within_bounds(case, got)


@pytest.mark.parametrize("tau", [0.5 * SHARE_ROUNDING, 1e-5, 0.9, 0.999])
def test_extreme_tolerances(tau, device):
    """Every row is dense if the tolerance is below what float32 sums can resolve."""
    case = case_of(2, (40,), vocab=LEAST_ENTRIES, tau=tau)
    got = found(case, device=device)
    assert_within_bounds(case, got)
    assert (got.entries > 0).any() == (tau > SHARE_ROUNDING)


@pytest.mark.parametrize("vocab", [700, 32_768])
@pytest.mark.parametrize("spread", [1.0, 3.0, 4.0, 5.0, 8.0])
def test_rows_that_are_given_up_are_dense(spread, vocab, device):
    """Two tests give rows up: a lower bound on what they leave out, which misses few, and the entropy, which finds only
    flat rows.
    """
    limit, tau = entry_limit(vocab, "cpu"), 0.01
    e = (spread * torch.randn(100, vocab, generator=problems.generator(5))).exp().to(device)
    e[:, 0] = 0  # column of the target
    e /= e.amax(1, keepdim=True)
    total = e.sum(1)
    left_out = 1 - e.topk(limit, dim=1).values.sum(1) / total
    least = selection.hopeless(e, e[:, : vocab // 64 * 64].unflatten(1, (-1, 64)).amax(2), limit) / total
    assert_below(least, left_out + 1e-5, "what is left out at least")
    assert (least > tau).sum() >= 0.85 * (left_out > tau).sum()
    for miss in (1e-6, 0.3, 1 - 1e-6):  # total probability of the columns beside the target
        p = (e / total[:, None] * miss).double()
        entropy = -torch.special.xlogy(p, p).sum(1) - (1 - miss) * math.log1p(-miss)
        statistics = torch.stack([entropy * 0, entropy, entropy * 0, entropy * 0 + 1, entropy * 0 + miss]).float()
        flat = selection.too_flat(statistics, vocab, tau, limit)
        assert (left_out[flat] > tau).all()
        assert flat.all() if spread == 1 else not flat.all()


@pytest.mark.parametrize("spread, tau", [(6.0, 0.05), (10.0, 0.01)])
def test_a_large_vocabulary(spread, tau, device):
    """The vocabulary is large enough to be sampled: some rows are given up, and some undecided ones turn out sparse."""
    case = case_of(8, (24,), vocab=8192, hidden=24, spread=spread, pull=0.0, tau=tau)
    got = found(case, device=device)
    assert_within_bounds(case, got)
    assert (got.entries > entry_limit(8192, device.type) // 4).sum() > 0 and (got.entries == 0).any()


# --- what is not left out is exact ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"logit_scale": 1.25}, {"temperature": 0.7}, {"compact": "none"}])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64])
def test_the_loss_and_its_statistics_are_those_without(dtype, options, device):
    case = in_dtype(case_of(3, (4, 6), **options), dtype)
    (out, _), (want, _) = (gradients(case, device=device, sparse_grad=tau) for tau in (0.02, 0.0))
    for name in ("loss", "logprobs", "entropy"):
        torch.testing.assert_close(getattr(out, name), getattr(want, name), rtol=1e-6, atol=1e-7, equal_nan=True)
    assert torch.equal(out.computed, want.computed)
    assert out.metrics.keys() >= want.metrics.keys() | set(SHARES)
    with torch.no_grad():
        leaves = {name: value.to(device) for name, value in case.problem.leaves().items()}
        silent = problems.call(case.problem, dk.DRPO(delta=0.15), "torch", device, leaves, sparse_grad=0.02)
    torch.testing.assert_close(silent.loss, out.loss.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("workspace", [None, ROW * 3])
def test_flat_rows_are_as_without(workspace, bias, device):
    """The two calls add the same sums in different orders, hence 1e-6."""
    case = case_of(1, (40,), spread=0.05, pull=0.0, bias=bias, workspace_bytes=workspace)
    got = found(case, device=device)
    assert not got.entries.any()
    (out, grads), (_, want) = (gradients(case, device=device, sparse_grad=tau) for tau in (case.tau, 0.0))
    assert_same(grads, want, 1e-6)
    assert [out.metrics[name].item() for name in SHARES] == [0, 0, 0, 0]


@pytest.mark.parametrize("options", [{}, {"workspace_bytes": ROW * 3}, {"compact": "none"}])
def test_no_row_is_dense(options, device):
    case = case_of(4, (160,), pull=16.0, bias=True, tau=0.3, **options)
    peaked = exact(case).miss < 0.2  # the other rows may need more entries
    kept = {n: getattr(case.problem, n)[peaked] for n in ("hidden", "targets", "old_logprobs", "advantages")}
    case = case.with_tensors(**kept)
    got = found(case, device=device)
    assert len(got.entries) > 15 and ((got.entries > 0) | ~exact(case).active).all()
    assert_within_bounds(case, got)


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("mask", [None, 3])
def test_metrics_are_what_the_gradient_shows(mask, compact, device):
    """All entries that a row left out have the same gradient, which no other entry has."""
    case = case_of(6, (40,), tau=0.05, spread=1.5, compact=compact, pull=14.0)
    if mask:
        case = case.with_tensors(mask=torch.arange(40) % mask > 0)
    case = visible(case.with_tensors(advantages=torch.where(case.problem.advantages == 0, 1, case.problem.advantages)))
    case = Case(case.problem, "pg", case.tau)
    want = exact(case)
    out, grads = gradients(case, device=device)
    d = grads["hidden"][:, : case.vocab].cpu()
    same = d == d.mode(1).values[:, None]
    sparse = want.active & (same.sum(1) > 50)  # more than 50 of the row's 130 entries
    left = torch.where(same, want.probs, 0).sum(1)[sparse]
    assert 0.1 < sparse.sum() / want.active.sum() < 0.9
    shown = {
        "drpo/sparse_share": sparse.sum() / want.active.sum(),
        "drpo/sparse_entries": (~same).sum(1)[sparse].double().mean(),
        "drpo/left_out_mean": left.mean(),
        "drpo/left_out_share_max": (left / want.miss[sparse]).max(),
    }
    for name, value in shown.items():  # what is left out is reported plus SHARE_ROUNDING, as an upper bound
        assert out.metrics[name].item() == pytest.approx(value.item(), rel=1e-5, abs=2 * SHARE_ROUNDING), name
        assert not out.metrics[name].requires_grad and out.metrics[name].shape == ()


def test_metrics_of_batches_combine():
    """`reduce_metrics` of two micro-batches, one of which is sparse, gives the metrics of both together."""
    case = case_of(8, (40,), tau=0.05)
    order = found(case).entries.argsort(descending=True)
    whole = rows_of(case, order)
    parts = [rows_of(case, part, normalizer=40) for part in (order[:9], order[9:])]
    want, metrics = found(whole).out.metrics, [found(part).out.metrics for part in parts]
    assert metrics[0]["drpo/sparse_share"] == 1 > 2 * metrics[1]["drpo/sparse_share"] > 0
    reduced = reduce_metrics(metrics)
    for name in want.keys() - problems.OF_NEIGHBOURS:
        assert reduced[name].item() == pytest.approx(want[name].item(), rel=1e-5, abs=1e-6), name


def test_the_demo_summarises_and_diagnose_reads_them():
    for package in ("transformers", "tqdm"):
        pytest.importorskip(package)
    from drpo_kernels.demo import train

    metrics = [found(case_of(seed, tau=0.05)).out.metrics for seed in (8, 9)]
    summary = train._summarise(metrics)
    for name in SHARES:
        values = [m[name].item() for m in metrics]
        expected = max(values) if name.endswith("_max") else sum(values) / 2
        assert summary[name] == pytest.approx(expected)
    for m in metrics:
        assert dk.diagnose(m) == dk.diagnose({name: value for name, value in m.items() if name not in SHARES})


# --- determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"compact": "none"}, {"workspace_bytes": ROW * 6}], ids=str)
def test_the_same_bits_from_run_to_run(options, device):
    case = case_of(9, (60,), bias=True, **options)
    (first, grads), (second, again) = (gradients(case, device=device) for _ in range(2))
    assert torch.equal(first.loss, second.loss) and 0 < first.metrics["drpo/sparse_share"] < 1
    assert_same(again, grads)


@pytest.mark.interpreted  # on a GPU other chunks change the products' last bit, and so what is left out
@pytest.mark.parametrize("compact", COMPACT)
def test_chunks_and_order_do_not_matter(compact, device):
    """Float32 sums are added in another order, hence 1e-6."""
    case = case_of(28, (40,), bias=True, compact=compact).with_tensors(mask=torch.arange(40) % 4 > 0)
    want = found(case, device=device)
    _, grads = gradients(case, device=device)
    for workspace in (1, ROW * 3, ROW * 17):
        got = found(case.with_options(workspace_bytes=workspace), device=device)
        assert torch.equal(got.entries, want.entries) and torch.equal(got.left_out, want.left_out)
        assert_same(gradients(case, device=device, workspace_bytes=workspace)[1], grads, 1e-6)
    order = torch.randperm(40, generator=problems.generator(3))
    moved = rows_of(case, order, workspace_bytes=ROW * 3)
    assert torch.equal(found(moved, device=device).entries, want.entries[order])
    _, other = gradients(moved, device=device)
    assert_same({**other, "hidden": other["hidden"][order.argsort().to(device)]}, grads, 1e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("options", [{}, {"compact": "none"}], ids=str)
def test_temporaries_of_any_size(options, dtype, monkeypatch, device):
    """Rows are selected and gathered a few at a time, which changes at most the order of sums."""
    case = in_dtype(case_of(29, (40,), bias=True, **options), dtype)
    case = case.with_tensors(mask=torch.arange(40) % 4 > 0)
    want, (_, grads) = found(case, device=device), gradients(case, device=device)
    assert 0 < want.out.metrics["drpo/sparse_share"] < 1
    for name in ("CPU_BLOCK", "DEVICE_BLOCK"):
        monkeypatch.setattr(torch_rows, name, 3 * 130)
    for name in ("CPU_CAST_BYTES", "DEVICE_CAST_BYTES"):
        monkeypatch.setattr(matmul, name, 4 * 16 * 7)
    assert torch.equal(found(case, device=device).entries, want.entries)
    assert_same(gradients(case, device=device)[1], grads, 1e-6 if dtype == FP32 else STORED[BF16])


# --- Triton -----------------------------------------------------------------------------------------------------------

TRITON = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": torch.linspace(0.7, 1.8, 8), "logit_scale": 1.25},
    "small workspace": {"workspace_bytes": 4 * 131 * 3, "compact": "none", "bias": True},
    "bf16 logits": {"logits_dtype": BF16, "dtype": BF16},
    "kl": {"kl_coef": 0.2, "objective": "spo"},
    "user": {"objective": "user", "compact": "mask"},
    "one more than a block": {"vocab": 1025, "spread": 12.0, "tau": 0.3},
    "tiny": {"vocab": 3, "bias": True},
    "fp16": {"dtype": FP16},
}


@pytest.mark.parametrize("name", TRITON)
def test_triton_keeps_what_torch_keeps(name, device):
    """The logits are exact, so the backends differ only in rounding the softmax: by 1e-4 of the gradient, plus its
    dtype's rounding.
    """
    pytest.importorskip("triton")
    options = dict(TRITON[name])
    dtype = options.pop("dtype", FP32)
    case = case_of(30, (8,), **{"vocab": 131, "hidden": 12, "tau": 0.05, **options})
    case = in_dtype(case.with_tensors(mask=torch.arange(8) != 3), dtype)
    got, want = (found(case, backend, device) for backend in ("triton", "torch"))
    assert torch.equal(got.entries, want.entries)
    assert 0 < (got.entries > 0).sum() < 7 or name == "tiny"
    bound = 1e-4 + STORED[dtype]
    assert problems.row_relative(got.hidden, want.hidden) <= bound
    assert problems.relative(got.weight, want.weight) <= bound
    if want.bias is not None:
        assert problems.relative(got.bias, want.bias) <= bound
    torch.testing.assert_close(got.left_out, want.left_out, rtol=1e-4, atol=2 * SHARE_ROUNDING)


@pytest.mark.parametrize("name", ["plain", "bias", "temperature", "small workspace", "tiny"])
def test_triton_leaves_out_only_the_least(name, device):
    pytest.importorskip("triton")
    case = visible(case_of(31, (8,), **{"vocab": 131, "hidden": 12, "tau": 0.05, **TRITON[name]}))
    got = found(case, "triton", device)
    assert (got.entries > 0).any()
    assert_within_bounds(case, got)
    assert_exact_but_for_the_least(case, got, device.type)


def test_triton_on_edges(device):
    """The rows are a NaN row, a certain one and a flat one."""
    pytest.importorskip("triton")
    case = case_of(32, (6,), vocab=131, hidden=12, objective="pg")
    x = case.problem.hidden.clone()
    x[1] = torch.nan
    x[2] *= 40
    x[3] = 0
    got = found(case.with_tensors(hidden=x), "triton", device)
    want = found(case.with_tensors(hidden=x), "torch", device)
    fine = torch.arange(6) != 1
    assert got.entries[1] == got.entries[3] == 0
    assert got.hidden[1].isnan().all() and got.hidden[fine].isfinite().all()
    assert problems.row_relative(got.hidden[fine], want.hidden[fine]) <= 1e-4
