"""The benchmark of `sparse_grad`: what it compares, and that its tables and pictures come from its lines alone."""
# ruff: noqa: E402 (the benchmark trains the demo, whose packages may be missing, which skips this file)

import pytest
import torch

for package in ("transformers", "matplotlib", "tqdm", "rich"):
    pytest.importorskip(package)

from benchmarks.harness import measure
from benchmarks.harness.blocks import NOT_YET
from benchmarks.harness.records import read
from benchmarks.harness.workloads import Shape, make_inputs
from benchmarks.sparsity import __main__ as sparsity
from benchmarks.sparsity import plots as sparsity_plots
from benchmarks.sparsity import tables as sparsity_tables
from benchmarks.sparsity import tails
from benchmarks.sparsity.tails import WAYS, Rows, cce_filter, compare, with_common_mean
from drpo_kernels import DRPO, linear_policy_loss
from pages import unpadded

SHAPE = Shape(24, 16, 1000)


@pytest.fixture(scope="module")
def rows():
    return Rows.of(make_inputs("mixed", SHAPE))


# --- what becomes of the rest -----------------------------------------------------------------------------------------


def test_rows_are_those_of_the_loss():
    inputs = make_inputs("mixed", SHAPE)
    hidden = inputs.hidden.double().requires_grad_()
    linear_policy_loss(
        hidden, inputs.weight.double(), inputs.targets, inputs.old_logprobs.double(), inputs.advantages.double(),
        objective=DRPO(), backend="reference",
    ).loss.backward()  # fmt: skip
    rows = Rows.of(inputs)
    torch.testing.assert_close(rows.dlogits(rows.p) @ rows.weight, hidden.grad, rtol=1e-9, atol=1e-15)


def test_kept_are_the_fewest(rows):
    kept = rows.kept(0.02)
    left = (rows.p * ~kept).sum(1, keepdim=True)
    assert (left <= 0.02 * rows.miss).all()
    least = torch.where(kept, rows.p, torch.inf).amin(1, keepdim=True)
    assert (torch.where(kept, 0, rows.p) <= least).all()
    sparse = kept.sum(1) < 15
    assert sparse.any() and (left + least > 0.02 * rows.miss)[sparse].all()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_keeps_what_is_kept(way, rows):
    kept = rows.kept(0.02)
    p = WAYS[way](rows, kept, torch.Generator().manual_seed(0))
    if way == "renormalised":
        torch.testing.assert_close(p.sum(1, keepdim=True), rows.miss)
        assert not p[~kept].any()
    elif way == "spread":
        torch.testing.assert_close(p.sum(1, keepdim=True), rows.miss)
    else:
        assert torch.equal(p[kept], rows.p[kept])
        assert way == "sampled" or not p[~kept].any()


def test_sampling_is_unbiased_and_costs_as_many_tokens_again(rows):
    kept, generator = rows.kept(0.1), torch.Generator().manual_seed(0)
    draws = torch.stack([WAYS["sampled"](rows, kept, generator) for _ in range(400)])
    error = (draws.mean(0) - rows.p).sum(1)
    deviation = draws.sum(2).std(0) / 400**0.5
    assert (error.abs() <= 5 * deviation + 1e-12).all()
    assert deviation.max() > 1e-6
    extra = ((draws > 0) & ~kept).sum(2).double().mean(0)
    expected = kept.sum(1).clamp(max=((rows.p > 0) & ~kept).sum(1)).double()
    sparse = kept.sum(1) < 15
    torch.testing.assert_close(extra[sparse], expected[sparse], rtol=0.2, atol=0.5)


def test_the_filter_keeps_whole_blocks(rows, monkeypatch):
    monkeypatch.setattr(tails, "CCE_BLOCK", 8)
    kept, share = cce_filter(rows)
    size = rows.p.scatter(1, rows.targets, rows.miss)
    assert kept[size >= tails.CCE_EPSILON].all() and 0 < share < 1
    assert (size[~kept] < tails.CCE_EPSILON).all() and (~kept).any()


def test_comparison_of_ways():
    """What the page says: spread evenly, a direction that all rows share does not leak into dX."""
    inputs = make_inputs("mixed", SHAPE)
    plain, shared = (
        {record["way"]: record["errors"] for record in compare(chosen, 0.01)}
        for chosen in (inputs, with_common_mean(inputs))
    )
    assert set(plain) == set(sparsity_tables.WAYS)
    assert shared["spread"]["hidden"] == pytest.approx(plain["spread"]["hidden"], rel=1e-3)
    assert shared["dropped"]["hidden"] > 1.5 * plain["dropped"]["hidden"]
    assert plain["spread"]["weight"] <= 0.01


# --- the run, its tables and pictures ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Of a quick run, without the processes that measure memory and without the demo's training."""
    out = tmp_path_factory.mktemp("sparsity") / "sparsity.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "peak_in_fresh_process", lambda inputs, method: 1 << 20)
        patch.setattr(sparsity, "METHODS", [name for name in sparsity_tables.METHODS if name != "cce"])
        arguments = ["--quick", "--device", "cpu", "--out", str(out)]
        assert sparsity.main([*arguments, "--parts", "ways", "regimes"]) == 0
        assert sparsity.main([*arguments, "--parts", "speed"]) == 0
    return out


def test_parts_are_kept_in_order(records):
    found = read(records)
    assert list(dict.fromkeys(record["part"] for record in found)) == ["speed", "ways", "regimes"]
    assert all(record["benchmark"] == "sparsity" and record["commit"] for record in found)
    commands = {record["part"]: record["command"] for record in found}
    assert "python -m benchmarks.sparsity" in commands["ways"] and "--parts ways regimes" in commands["ways"]


def test_tables(records):
    found = read(records)
    speed = unpadded(sparsity_tables.render_speed(found))
    assert "| mixed entropies | 0.064, 0.96 | 0.01 |" in speed and "random inputs" in speed
    assert "spread evenly (this package)" in sparsity_tables.render_part(sparsity_tables.ways, found)
    over_tolerance = unpadded(sparsity_tables.render_part(sparsity_tables.regimes, found))
    assert over_tolerance.count("| trained-looking, large logits |") == 2
    assert sparsity_tables.render_part(sparsity_tables.demo, found) == NOT_YET
    assert sparsity_tables.render_speed([]) == NOT_YET


def test_regimes_record_what_bounds_promise(records):
    for record in sparsity_tables.of_part(read(records), "regimes"):
        if record["dtype"] == "float32":
            for tolerance, found in record["over_tolerance"].items():
                assert found["drpo/left_out_share_max"] <= float(tolerance)
                assert found["errors"]["weight"] <= float(tolerance) + record["dense"]["weight"]


def test_pictures(records, tmp_path):
    sparsity_plots.draw(read(records), tmp_path, "sparsity")
    for name in ("sparsity_speed.png", "sparsity_error.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 8000


def test_the_trained_demo(tmp_path):
    """Its own quick run, in which nothing is learnt."""
    out = tmp_path / "sparsity.jsonl"
    assert sparsity.main(["--quick", "--parts", "demo", "--out", str(out)]) == 0
    (record,) = read(out)
    assert record["shape"]["vocab"] == 14 and set(record["over_tolerance"]) == {str(t) for t in sparsity.TOLERANCES}
    text = unpadded(sparsity_tables.render_part(sparsity_tables.demo, [record]))
    assert text.startswith("T=") and "| 0.01 | " in text


def test_paired_rewards():
    exact, sparse = (0.7, 0.8, 0.9), (0.71, 0.79, 0.93)
    records = [
        {"seed": seed, "sparse_grad": tolerance, "sampled": rewards[seed], "greedy": 1.0}
        for tolerance, rewards in ((0.0, exact), (0.01, sparse))
        for seed in range(3)
    ]
    lines = unpadded("\n".join(sparsity_tables.learning(records))).splitlines()
    assert lines[2] == "| sampled, 3 seeds | 80.0 % | 81.0 % | +1.0 ± 1.2 |"
    assert lines[3] == "| greedy, 3 seeds | 100.0 % | 100.0 % | +0.0 ± 0.0 |"


def test_runs_that_are_paired(tmp_path):
    out = tmp_path / "sparsity.jsonl"
    assert sparsity.main(["--quick", "--parts", "learning", "--out", str(out)]) == 0
    records = read(out)
    assert [(record["seed"], record["sparse_grad"]) for record in records] == [(0, 0.0), (0, 0.01), (1, 0.0), (1, 0.01)]
    assert all(0 <= record[name] <= 1 for record in records for name in ("sampled", "greedy"))
