"""Tests of the benchmark of `sparse_grad`: what it compares, and that its tables and pictures come from its lines
alone.
"""
# ruff: noqa: E402 (the benchmark trains the demo, whose packages may be missing, which skips this file)

import pytest
import torch

for package in ("transformers", "matplotlib", "tqdm", "rich"):
    pytest.importorskip(package)

from benchmarks.harness import measure
from benchmarks.harness.blocks import NOT_YET
from benchmarks.harness.provenance import provenance
from benchmarks.harness.records import read
from benchmarks.harness.workloads import Shape, make_inputs
from benchmarks.sparsity import __main__ as sparsity
from benchmarks.sparsity import plots as sparsity_plots
from benchmarks.sparsity import tables as sparsity_tables
from drpo_kernels import DRPO, linear_policy_loss
from pages import unpadded

SHAPE = Shape(24, 16, 1000)


def test_a_direction_that_all_rows_of_the_head_share_does_not_leak():
    """What is left out is spread evenly, so that dlogits still sum to 0 and the error of dX does not grow."""
    inputs = make_inputs("mixed", SHAPE)

    def hidden_gradient(weight, tolerance):
        hidden = inputs.hidden.clone().requires_grad_()
        rows = inputs.targets, inputs.old_logprobs, inputs.advantages
        leaf = weight.clone().requires_grad_()
        out = linear_policy_loss(hidden, leaf, *rows, objective=DRPO(), sparse_grad=tolerance)
        return torch.autograd.grad(out.loss, hidden)[0].double()

    def error(weight):
        exact = hidden_gradient(weight, 0.0)
        return ((hidden_gradient(weight, 0.03) - exact).norm() / exact.norm()).item()

    plain, shared = error(inputs.weight), error(inputs.weight + 1 / SHAPE.hidden**0.5)
    assert plain > 1e-3 and shared == pytest.approx(plain, rel=1e-2)


# --- the run, its tables and pictures ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Return the records of a quick run, without the processes that measure memory and without the demo's training."""
    out = tmp_path_factory.mktemp("sparsity") / "sparsity.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "peak_in_fresh_process", lambda inputs, method: 1 << 20)
        arguments = ["--quick", "--device", "cpu", "--out", str(out)]
        assert sparsity.main([*arguments, "--parts", "regimes"]) == 0
        assert sparsity.main([*arguments, "--parts", "speed"]) == 0
    return out


def test_parts_are_kept_in_order(records):
    found = read(records)
    assert list(dict.fromkeys(record["part"] for record in found)) == ["speed", "regimes"]
    assert all(record["benchmark"] == "sparsity" and record["commit"] for record in found)
    commands = {record["part"]: record["command"] for record in found}
    assert "python -m benchmarks.sparsity" in commands["regimes"] and "--parts regimes" in commands["regimes"]


def test_tables(records):
    found = read(records)
    speed = unpadded(sparsity_tables.render_speed(found))
    assert "| mixed entropies | 0.064, 0.96 | 0.01 |" in speed and "random inputs" in speed
    over_tolerance = unpadded(sparsity_tables.render_regimes(found))
    assert over_tolerance.count("| trained-looking, large logits |") == 2
    assert sparsity_tables.render_learning(found) == NOT_YET
    assert sparsity_tables.render_speed([]) == NOT_YET


def test_regimes_record_what_bounds_promise(records):
    for record in sparsity_tables.of_part(read(records), "regimes"):
        if record["dtype"] == "float32":
            for tolerance, found in record["over_tolerance"].items():
                assert found["drpo/left_out_share_max"] <= float(tolerance)
                assert found["errors"]["weight"] <= float(tolerance) + record["dense"]["weight"]


def test_pictures(records, tmp_path):
    sparsity_plots.draw(read(records), tmp_path, "sparsity")
    picture = (tmp_path / "sparsity_speed.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 8000


def test_paired_rewards():
    exact, sparse = (0.7, 0.8, 0.9), (0.71, 0.79, 0.93)
    records = [
        {"part": "learning", "seed": seed, "sparse_grad": tolerance, "sampled": rewards[seed], "greedy": 1.0}
        | provenance("test")
        for tolerance, rewards in ((0.0, exact), (0.01, sparse))
        for seed in range(3)
    ]
    lines = unpadded(sparsity_tables.render_learning(records)).splitlines()
    assert lines[2] == "| sampled, 3 seeds | 80.0 % | 81.0 % | +1.0 ± 1.2 |"
    assert lines[3] == "| greedy, 3 seeds | 100.0 % | 100.0 % | +0.0 ± 0.0 |"


def test_runs_that_are_paired(tmp_path):
    out = tmp_path / "sparsity.jsonl"
    assert sparsity.main(["--quick", "--parts", "learning", "--out", str(out)]) == 0
    records = read(out)
    assert [(record["seed"], record["sparse_grad"]) for record in records] == [(0, 0.0), (0, 0.01), (1, 0.0), (1, 0.01)]
    assert all(0 <= record[name] <= 1 for record in records for name in ("sampled", "greedy"))
