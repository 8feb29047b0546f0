"""The benchmark measures, refuses to time what is wrong, and its report is written from its lines alone."""

import copy
import json
import sys

import pytest
import torch

from benchmarks import cpu, invariance, methods, report, trainers, workloads
from benchmarks.exact import TOLERANCE, agrees, exact_result, gradient_errors
from benchmarks.timing import interleaved_seconds
from drpo_kernels import backends

FIELDS = {
    "benchmark", "workload", "shape", "dtype", "objective", "entropy_nats", "method", "label", "active_share", "status",
    "gradient_error", "seconds", "median_s", "min_s", "max_s", "time_ratio", "peak_extra_bytes",
    "peak_beyond_gradients_bytes", "memory_ratio", "device", "versions", "commit", "dirty", "command", "date",
}  # fmt: skip
TINY = workloads.Shape(48, 8, 96)


def run(tmp_path, *arguments):
    out = tmp_path / "results" / "cpu.jsonl"
    code = cpu.main(["--quick", "--workloads", "random", "--out", str(out), *arguments])
    return code, report.read(out)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The records of one run with a floor and one measured process."""
    return run(tmp_path_factory.mktemp("quick"), "--methods", "gemms", "eager")


def test_quick_run_writes_every_field(quick, tmp_path):
    code, records = quick
    assert code == 0
    assert [record["method"] for record in records] == ["gemms", "eager"]
    for record in records:
        assert set(record) == FIELDS
        assert record["status"] == "ok"
        assert len(record["seconds"]) == 2
        assert 0 < record["min_s"] <= record["median_s"] <= record["max_s"]
        assert set(record["time_ratio"]) == {"gemms", "eager"}
        assert record["command"] == "python -m benchmarks.cpu --methods gemms eager --workloads random --quick"
        assert str(tmp_path.parent) not in json.dumps(record)
    floor, eager = records
    assert floor["gradient_error"] is None
    assert max(eager["gradient_error"].values()) < TOLERANCE
    if sys.platform == "linux":
        assert eager["peak_extra_bytes"] > 0


def test_wrong_gradients_get_no_time(tmp_path, monkeypatch):
    def doubled(inputs):
        step = methods.fused(inputs)

        def wrong():
            loss, hidden, weight = step()
            return methods.Result(loss, hidden, 2 * weight)

        return wrong

    monkeypatch.setitem(methods.METHODS, "linear_policy_loss", methods.Method(doubled))
    code, records = run(tmp_path, "--methods", "linear_policy_loss")
    assert code == 1
    for record in records:
        assert record["status"] == "wrong gradients"
        assert record["gradient_error"]["weight"] == pytest.approx(1, rel=1e-4)
        assert record["seconds"] is record["median_s"] is record["peak_extra_bytes"] is None


def test_absent_peer_is_a_row(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "trl"] or ["trl"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "trl", None)
    code, records = run(tmp_path, "--methods", "trl")
    assert code == 0
    assert [record["status"] for record in records] == ["trl not installed"]


def test_a_method_for_gpus_is_a_row(tmp_path):
    code, records = run(tmp_path, "--methods", "batch_invariant")
    assert code == 0
    assert [record["status"] for record in records] == ["needs a GPU"]


@pytest.mark.parametrize("kind", workloads.KINDS)
def test_own_methods_agree_with_float64(kind):
    inputs = workloads.make_inputs(kind, TINY).with_active_share(0.25)
    assert (inputs.advantages != 0).sum() == TINY.tokens // 4
    exact = exact_result(inputs)
    for prepare in (methods.eager, methods.fused, methods.recompute):
        assert agrees(gradient_errors(prepare(inputs)(), exact))


def test_trained_inputs_are_peaked(tmp_path):
    inputs = workloads.make_inputs("trained", workloads.Shape(200, 16, 500))
    assert inputs.entropy == pytest.approx(workloads.TRAINED_ENTROPY, rel=0.01)
    inputs.save(tmp_path / "inputs.pt")
    again = workloads.Inputs.load(tmp_path / "inputs.pt")
    assert all(torch.equal(torch.as_tensor(old), torch.as_tensor(vars(again)[k])) for k, old in vars(inputs).items())


def test_rounds_are_interleaved_and_the_first_is_dropped():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = interleaved_seconds(functions, rounds=2, after_each=lambda: None)
    assert "".join(calls) == "abbaab"
    assert [len(samples) for samples in seconds.values()] == [2, 2]


def recorded(quick):
    """Lines with known numbers."""
    floor, eager = copy.deepcopy(quick[1])
    floor |= {"median_s": 1.5, "min_s": 1.4, "max_s": 1.75, "time_ratio": {"gemms": 1.0, "eager": 0.6}}
    eager |= {"median_s": 2.5, "min_s": 2.25, "max_s": 3.0, "time_ratio": {"gemms": 1.667, "eager": 1.0}}
    eager |= {"peak_extra_bytes": 770 * 2**20, "peak_beyond_gradients_bytes": 702 * 2**20}
    absent = eager | {"method": "trl", "status": "trl not installed", "seconds": None, "median_s": None}
    records = [floor, eager, absent | {"peak_extra_bytes": None}]
    return [record | {"command": "python -m benchmarks.cpu"} for record in records]


def test_report_rewrites_its_block_alone(quick, tmp_path):
    results, readme = tmp_path / "cpu.jsonl", tmp_path / "README.md"
    results.write_text("".join(json.dumps(record) + "\n" for record in recorded(quick)))
    start, end = report.BLOCKS["cpu"].markers
    readme.write_text(f"# Title\n\n{start}\nold\n{end}\n\nAfter.\n")
    arguments = ["--results", str(results), "--page", str(readme), "--block", "cpu"]
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{start}\n")
    assert text.endswith(f"{end}\n\nAfter.\n")
    assert "old" not in text
    assert "| the three bare GEMMs, same chunks | 1500 (1400 to 1750) | 1.00× | 0.60× | – |" in text
    assert "| eager PyTorch | 2500 (2250 to 3000) | 1.67× | 1.00× | 770 (702 beyond the gradients) |" in text
    assert "| TRL's fused head + objective | trl not installed | – | – | – |" in text
    assert f"torch {torch.__version__}" in text and "2 samples each" in text
    assert report.main(arguments) == 0
    assert readme.read_text() == text


MARKED = "\n".join(report.BLOCKS["cpu"].markers)


@pytest.mark.parametrize("rehearsal, text", [(False, "# Title\n"), (True, MARKED)])
def test_report_prints_without_markers_or_from_a_quick_run(quick, tmp_path, capsys, rehearsal, text):
    results, readme = tmp_path / "cpu.jsonl", tmp_path / "README.md"
    records = quick[1] if rehearsal else recorded(quick)
    results.write_text("".join(json.dumps(record) + "\n" for record in records))
    readme.write_text(text)
    assert report.main(["--results", str(results), "--page", str(readme), "--block", "cpu"]) == 0
    assert readme.read_text() == text
    assert "| eager PyTorch |" in capsys.readouterr().out


def test_report_without_results_says_what_to_run(tmp_path, capsys):
    assert report.main(["--block", "cpu", "--results", str(tmp_path / "none.jsonl")]) == 2
    assert "python -m benchmarks.cpu" in capsys.readouterr().err


def test_trainers(tmp_path, capsys):
    pytest.importorskip("trl", reason="trl is not installed")
    out = tmp_path / "trainers.jsonl"
    assert trainers.main(["--quick", "--out", str(out)]) == 0
    records = report.read(out)
    assert [record["trainer"] for record in records] == ["GRPOTrainer", "DRPOTrainer"]
    assert all(record["gradient_error"] <= trainers.AGREEMENT and len(record["seconds"]) == 2 for record in records)
    page = tmp_path / "page.md"
    page.write_text("\n".join(report.BLOCKS["trainers"].markers))
    real = [record | {"command": "python -m benchmarks.trainers"} for record in records]
    out.write_text("".join(json.dumps(record) + "\n" for record in real))
    capsys.readouterr()
    assert report.main(["--block", "trainers", "--results", str(out), "--page", str(page)]) == 0
    assert "| DRPOTrainer | " in page.read_text() and not capsys.readouterr().out


def test_invariance(tmp_path, monkeypatch, capsys):
    """Without Triton: the vendor's products are measured, and `batch_invariant` says why it is not."""
    monkeypatch.setattr(backends, "INTERPRETING", False)
    out = tmp_path / "invariance.jsonl"
    assert invariance.main(["--quick", "--device", "cpu", "--dtypes", "float32", "--out", str(out)]) == 0
    records = report.read(out)
    measured = [record for record in records if record["method"] == "default"]
    assert {record["status"] for record in measured} == {"ok"}
    assert measured[-1]["variation"] == "run again" and not any(measured[-1]["changed"].values())
    assert [record["status"] for record in records if record["method"] == "batch_invariant"] == ["needs a GPU"]
    capsys.readouterr()
    assert report.main(["--block", "invariance", "--results", str(out)]) == 0
    assert "| run again | 0% / 0% | 0.0e+00 |" in capsys.readouterr().out


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
