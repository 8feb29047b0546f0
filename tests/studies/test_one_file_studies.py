"""Tests of the studies of one file each: a trainer's step, and which bits of a row change with the rows beside it."""

import json

import pytest

from benchmarks import invariance, report, trainers
from benchmarks.harness.records import read
from pages import unpadded


def test_trainers(tmp_path, capsys):
    pytest.importorskip("trl", reason="trl is not installed")
    out = tmp_path / "trainers.jsonl"
    assert trainers.main(["--quick", "--out", str(out)]) == 0
    records = read(out)
    assert [record["trainer"] for record in records] == ["GRPOTrainer", "DRPOTrainer"]
    assert all(record["gradient_error"] <= trainers.AGREEMENT and len(record["seconds"]) == 2 for record in records)
    page = tmp_path / "page.md"
    page.write_text("\n".join(report.BLOCKS["trainers"].markers))
    real = [record | {"command": "python -m benchmarks.trainers"} for record in records]
    out.write_text("".join(json.dumps(record) + "\n" for record in real))
    capsys.readouterr()
    assert report.main(["--block", "trainers", "--results", str(out), "--page", str(page)]) == 0
    assert "| DRPOTrainer | " in unpadded(page.read_text()) and not capsys.readouterr().out


def test_invariance(tmp_path, capsys):
    """On a CPU the vendor's products are measured, and `batch_invariant` says why it is not."""
    out = tmp_path / "invariance.jsonl"
    assert invariance.main(["--quick", "--device", "cpu", "--dtypes", "float32", "--out", str(out)]) == 0
    records = read(out)
    measured = [record for record in records if record["method"] == "default"]
    assert {record["status"] for record in measured} == {"ok"}
    assert measured[-1]["variation"] == "run again" and not any(measured[-1]["changed"].values())
    assert [record["status"] for record in records if record["method"] == "batch_invariant"] == ["needs a GPU"]
    capsys.readouterr()
    assert report.main(["--block", "invariance", "--results", str(out)]) == 0
    assert "| run again | 0% / 0% | 0.0e+00 |" in unpadded(capsys.readouterr().out)


@pytest.mark.parametrize(
    "change, broke",
    [
        ({}, False),
        ({"changed": {"logprob": 1}}, True),
        ({"changed": {"logprob": 1}, "method": "default"}, False),
        ({"variation": "in chunks of 1", "dW_change": 1e-7}, True),
        ({"variation": "not compacted", "dW_change": 1e-7}, False),
        ({"variation": "run again", "dW_change": 1e-7, "method": "default"}, True),
        ({"status": "needs a GPU"}, False),
    ],
)
def test_broken_invariance_fails_the_run(change, broke):
    record = {"status": "ok", "method": "batch_invariant", "variation": "permuted", "changed": {"logprob": 0}}
    assert invariance.broken(record | change) == broke
