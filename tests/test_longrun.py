"""A hundred steps of the long run (`make longrun`: 2,000): ours, eager float32 and fp64 stay together, nothing grows.

Bounds. One step's loss is a float32 number: 2^-24 of Σ|c_t ℓ_t|, about 1 here, is 6e-8. Each of 100 AdamW steps moves
the weights by at most the learning rate in the worst entry, and by its relative gradient error (1e-6) elsewhere, which
a curvature of order one turns into 100 · lr · 1e-6 = 2e-7 on the loss. 1e-5 leaves room for entries whose gradient is
near 0. Against eager float32, whose rounding is of the same size, ours may be 10 times as far off.
"""

import pytest

longrun = pytest.importorskip("benchmarks.longrun")
SIZE = longrun.Size(steps=100, batch=6, length=8, vocab=48, hidden=16)


@pytest.fixture(scope="module")
def records():
    return longrun.measure(SIZE)


def test_curves_stay_together(records):
    ours, eager = records["ours"], records["eager"]
    assert len(ours["loss"]) == SIZE.steps
    assert ours["loss_gap_max"] <= 1e-5
    assert ours["loss_gap_max"] <= 10 * eager["loss_gap_max"] + 1e-6
    assert ours["weight_gap"] <= 10 * eager["weight_gap"] + 1e-6
    assert longrun.stays_together(records)


def test_the_stream_is_off_policy(records):
    """Otherwise the ratio is 1 and the run says nothing."""
    assert max(records["exact"]["ratio_max"]) > 1.05


def test_nothing_grows(records):
    """The same number of live tensors after 20, 50 and 100 steps."""
    assert len(set(records["ours"]["live_tensors"])) == 1


def test_results_and_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(longrun, "measure", lambda size: RECORDS)
    assert longrun.main(["--steps", "40", "--out", str(tmp_path / "run.jsonl")]) == 0
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == len(longrun.RUNS)
    assert (tmp_path / "run.png").stat().st_size > 1000


DISTANCES = {"loss_gap_max": 1e-6, "weight_gap": 1e-6, "loss_scale": 1.0}
RECORDS = {
    name: {"run": name, "loss": [0.1 * i for i in range(40)], "ratio_max": [1.0] * 40, **DISTANCES}
    for name in longrun.RUNS
}
