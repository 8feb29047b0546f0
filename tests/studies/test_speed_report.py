"""Tests that tables and plots are written from the benchmark's lines alone."""

import json

import pytest
import torch

from benchmarks import report
from benchmarks.harness import measure
from benchmarks.harness.measure import Case
from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.workloads import Workload
from benchmarks.speed import tables as speed_tables
from pages import unpadded


@pytest.fixture(scope="module")
def measured():
    """Return the records of a floor and a method, without the process that measures memory."""
    plan = [Case(name, Workload("cpu_small", 48, "random", "float32")) for name in ("gemms_whole", "eager")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "peak_in_fresh_process", lambda inputs, method: 1 << 20)
        return measure.measure(plan, provenance("python -m benchmarks.speed"), device=torch.device("cpu"), rounds=2)


def recorded(measured):
    """Return lines with known numbers."""
    floor, eager = measured
    numbers = {"min_s": 1.4, "max_s": 1.75, "seconds": [1.4, 1.75]}
    floor = floor | numbers | {"median_s": 1.5}
    eager = eager | numbers | {"median_s": 2.5, "floor_median_s": 1.25}
    eager |= {"peak_extra_bytes": 770 * 2**20, "peak_beyond_gradients_bytes": 702 * 2**20}
    eager |= {"gradient_error": {"hidden": 3e-7, "weight": 2e-7}}
    ours = eager | {"method": "linear_policy_loss", "median_s": 1.8}
    rounding = eager | {"method": "trl", "status": "ok, gradient error 4 %", "rounds_away": "bf16 logits"}
    rounding |= {"gradient_error": {"hidden": 0.01, "weight": 0.0412}}
    none = {"median_s": None, "seconds": [], "peak_extra_bytes": None, "peak_beyond_gradients_bytes": None}
    absent = eager | none | {"method": "liger_grpo", "same_loss": False, "status": "liger_kernel not installed"}
    wrong = eager | none | {"method": "cce", "status": "wrong gradients", "gradient_error": {"hidden": 0.5}}
    few = ours | {"active_share": 0.25, "median_s": 0.45}
    longer = [record | {"shape": record["shape"] | {"tokens": 256}} for record in (floor, eager, ours)]
    # Another model is drawn beside the first, and left out where it was not measured.
    other = {"workload": "Qwen3-8B"}
    others = [
        floor | other,
        ours | other,
        rounding | other | none | {"status": "out of memory", "gradient_error": None},
    ]
    return [floor, eager, ours, rounding, absent, wrong, few, *longer, *others]


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_report_rewrites_its_block_alone(measured, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results, readme = written(tmp_path / "cpu.jsonl", recorded(measured)), tmp_path / "README.md"
    start, end = report.BLOCKS["every-cpu"].markers
    readme.write_text(f"# Title\n\n{start}\nold\n{end}\n\nAfter.\n")
    arguments = ["--results", results, "--page", str(readme), "--block", "every-cpu"]
    assert report.main(arguments) == 0
    text = unpadded(readme.read_text())
    assert text.startswith(f"# Title\n\n{start}\n")
    assert text.endswith(f"{end}\n\nAfter.\n")
    assert "old" not in text
    assert "| floor: three GEMMs, unchunked | 1500 (1400 to 1750) | – | 0.60× | – | – | – |" in text
    assert "| eager PyTorch | 2500 (1400 to 1750) | 2.00× | 1.00× | 770 MiB | 702 MiB | 3e-07 |" in text
    assert (
        "| TRL's fused head | 2500 (1400 to 1750) | 2.00× | 1.00× | 770 MiB | 702 MiB | 4.1 % (bf16 logits) |" in text
    )
    assert "| cut-cross-entropy | wrong gradients | – | – | – | – | 50 % |" in text
    assert "No numbers: Liger's chunked GRPO loss (same cost, other loss) (liger_kernel not installed)." in text
    assert "| 25% | 450 (0.25× of all rows) |" in text
    assert "T=48 " in text and "T=256 " in text and "Qwen3-8B" in text
    assert f"torch {torch.__version__}" in text and "2 samples each" in text
    pictures = [f"cpu_{name}.png" for name in speed_tables.PLOTS]
    assert all(f"bench_results/{name}" in (ROOT / "docs" / "benchmarks.md").read_text() for name in pictures)
    assert all((tmp_path / name).stat().st_size > 5000 for name in pictures)
    before = [(tmp_path / name).read_bytes() for name in pictures]
    assert report.main(arguments) == 0
    assert unpadded(readme.read_text()) == text
    assert [(tmp_path / name).read_bytes() for name in pictures] == before


def test_ratios(measured):
    """The ratio to a method's floor uses the samples between its own; that to another method of the same process uses
    its median, else both are in floors.
    """
    floor, eager, ours, *_ = records = recorded(measured)
    assert measure.ratio(eager, "gemms_whole", records) == pytest.approx(2.5 / 1.25)
    assert measure.ratio(ours, "eager", records) == pytest.approx(1.8 / 2.5)
    later = ours | {"date": "later", "median_s": 3.6, "floor_median_s": 2.5}
    assert measure.ratio(later, "eager", [*records, later]) == pytest.approx((3.6 / 2.5) / (2.5 / 1.25))
    without = {"floor_median_s": None}
    assert measure.ratio(later | without, "eager", records) is None
    assert measure.ratio(ours | without, "gemms_whole", records) == pytest.approx(1.8 / 1.5)
    assert measure.ratio(later | without, "gemms_whole", [floor, eager]) is None


def test_pictures_need_something_to_show(measured):
    floor, eager, *_ = recorded(measured)
    assert speed_tables.pictures([floor, eager]) == []


MARKED = "\n".join(report.BLOCKS["every-cpu"].markers)


@pytest.mark.parametrize("rehearsal, text", [(False, "# Title\n"), (True, MARKED)])
def test_report_prints_without_markers_or_from_a_quick_run(measured, tmp_path, capsys, rehearsal, text):
    rehearsed = [record | {"command": "python -m benchmarks.speed --quick"} for record in measured]
    results = written(tmp_path / "cpu.jsonl", rehearsed if rehearsal else recorded(measured))
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert report.main(["--results", results, "--page", str(readme), "--block", "every-cpu"]) == 0
    assert readme.read_text() == text
    assert "| eager PyTorch |" in unpadded(capsys.readouterr().out)


@pytest.mark.parametrize("records, word", [(None, "missing"), ([{"benchmark": "cpu"}], "of another version")])
def test_report_without_results_says_what_to_run(tmp_path, capsys, records, word):
    results = tmp_path / "cpu.jsonl"
    if records:
        written(results, records)
    assert report.main(["--block", "every-cpu", "--results", str(results)]) == 2
    error = capsys.readouterr().err
    assert word in error and "python -m benchmarks.speed" in error


def test_a_page_says_that_a_gpu_has_not_been_measured(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("\n".join(report.BLOCKS["gpu"].markers))
    assert report.main(["--block", "gpu", "--results", str(tmp_path / "none.jsonl"), "--page", str(page)]) == 0
    assert "Not measured yet" in page.read_text()
