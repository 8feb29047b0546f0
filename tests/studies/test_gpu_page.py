"""Tests that the pages about a GPU are written from a run's lines alone, whatever is missing in them."""

import pytest

from benchmarks import report
from benchmarks.device import page as gpu_page
from benchmarks.device.parts import PARTS
from benchmarks.device.plan import PLANS, SMALL
from benchmarks.harness import measure
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.records import append
from benchmarks.harness.runs import DEVICE, INVARIANCE, MAIN, PRECISION, SPEED, read_run
from pages import unpadded

SOURCE = {
    "device": {"gpu": "NVIDIA H200", "driver": "1.2", "cuda": "13.0", "sms": 132, "cpu": "any"},
    "versions": {"torch": "2.11.0"}, "commit": "0123456789abcdef", "dirty": False, "command": "a command",
    "date": "2026-01-02T03:04:05",
}  # fmt: skip
PLANNED = {
    (part, case.method, case.workload, case.active_share): case
    for part in (name for name, part in PARTS.items() if part.file == SPEED)
    for case in PLANS[part]
}
OK = {"status": "ok", "gradient_error": {"hidden": 0.002, "weight": 0.001}, "entropy_quantiles": [0.1, 0.5, 2.0]}
SPARSITY = {"drpo/sparse_share": 0.9, "drpo/sparse_entries": 20.0}


def times_of(case):
    """Return times in ms: 1 for each floor, 1.25 for our methods, and 2 for others."""
    method = measure.METHODS[case.method]
    median = 1.0 if method.floor else 1.25 if method.package is None and case.method != "eager" else 2.0
    floor = None if method.floor else 1e-3
    return {"median_s": 1e-3 * median, "min_s": 1e-3, "max_s": 3e-3, "seconds": [1e-3] * 4, "floor_median_s": floor}


def speed_lines():
    for (part, *_), case in PLANNED.items():
        begun = {"part": part, **measure.started(case), **SOURCE}
        yield begun
        peaks = {} if begun["floor"] else {"peak_extra_bytes": 2 << 30, "peak_beyond_gradients_bytes": 1 << 30}
        metrics = {"metrics": SPARSITY if "sparse" in case.method else None, "entropy_nats": 0.5}
        yield begun | OK | times_of(case) | peaks | metrics


def product(name, rows, inner, columns, rate, out="bfloat16"):
    shape = {"rows": rows, "inner": inner, "columns": columns}
    return {"part": "floors", "product": name, "shape": shape, "out": out, "median_s": 1 / rate, "TFLOP/s": rate,
            "accumulates": name == "dW" and out == "float32"}  # fmt: skip


def row_kernel(logits, kernel, rate, num_warps=None, chosen=False):
    tile = num_warps and {"block": 2048, "num_warps": num_warps}
    return {"part": "rows", "row_kernel": kernel, "logits": logits, "tile": tile, "chosen": chosen, "status": "ok",
            "shape": {"rows": 1664, "vocab": 151_936}, "median_s": 1e-3 / rate, "TB/s": rate}  # fmt: skip


DEVICE_LINES = [
    product("logits", 512, 4096, 151_936, 800), product("logits", 512, 4096, 151_936, 640, "float32"),
    product("dX", 2048, 151_936, 4096, 750), product("dX", 2432, 151_936, 4096, 600),
    product("dW", 151_936, 2048, 4096, 700), product("dW", 151_936, 2048, 4096, 560, "float32"),
    *(line for logits in ("float32", "bfloat16") for line in (
        row_kernel(logits, "copy", 4.0), row_kernel(logits, "two reads", 2.0, 8, True),
        row_kernel(logits, "two reads", 2.4, 16), row_kernel(logits, "one read", 3.6, 32),
    )),
    {"part": "profile", "profile": {"model": "a-model", "tokens": 512, "hidden": 896, "vocab": 9}, "kernels": 20,
     "short_kernels": 12, "short_us": 50.0, "idle_us": 100.0, "whole_us": 1000.0,
     "gaps": [{"us": 60.0, "after": "a copy", "before": "a kernel"}]},
    {"part": "demo", "demo": {"before": {"greedy": 0.25}, "after": {"greedy": 0.75}}, "steps": 9, "objective": "DRPO()",
     "seconds": 2.0},
    {"part": "scale", "tests": "-m gpu", "passed": 3, "skipped": 0, "failed": ["tests/test_a.py::test_one"],
     "finished": True, "exit": 1},
]  # fmt: skip
CASE = {
    "part": "invariance", "benchmark": "invariance", "method": "batch_invariant", "dtype": "bfloat16", "status": "ok",
    "shape": {"tokens": 512, "hidden": 64, "vocab": 99}, "variation": "in batches of 1", "rows": 4,
    "changed": {"logprob": 0, "dX": 1}, "largest_logprob_change": 0.0, **SOURCE,
}  # fmt: skip
PRECISION_LINES = [
    {"kind": "run", "benchmark": "precision", **SOURCE},
    {"kind": "regime", "regime": "trained", "label": "trained-looking", "largest_logit": 5.0,
     "shape": {"tokens": 8, "hidden": 4, "vocab": 99}},
    {"kind": "bar", "regime": "trained", "bar": "hidden", "value": 0.01, "bound": 0.004, "met": False},
    {"kind": "bar", "regime": "trained", "bar": "weight", "value": 0.001, "bound": 0.004, "met": True},
    {"kind": "regime", "regime": "flat", "label": "flat", "largest_logit": 5.0,
     "shape": {"tokens": 8, "hidden": 4, "vocab": 99}},
]  # fmt: skip


def written(folder, left_out=(), change=lambda record: record):
    """Write a run's folder without some parts and with changed lines of speed."""
    files = {SPEED: map(change, speed_lines()), DEVICE: ({**line, **SOURCE} for line in DEVICE_LINES),
             INVARIANCE: [CASE], PRECISION: ({"part": "precision", **line} for line in PRECISION_LINES)}  # fmt: skip
    folder.mkdir()
    for name, lines in files.items():
        for line in lines:
            if line["part"] not in left_out:
                append(folder / name, line)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("whole") / "gpu")


GPU_BLOCKS = [block for block in report.BLOCKS.values() if block.results.startswith("gpu")]
# The prediction is made without a run, and test_roofline.py has its page.
GPU_BLOCKS = [block for block in GPU_BLOCKS if block.name != "roofline"]


def page_of_everything(path):
    path.write_text("\n\n".join(marker for block in GPU_BLOCKS for marker in block.markers))
    return path


def reported(folder, page, capsys):
    for block in GPU_BLOCKS:
        results = folder / block.results.removeprefix("gpu").removeprefix("/")
        assert report.main(["--block", block.name, "--results", str(results), "--page", str(page)]) == 0
    assert not capsys.readouterr().out  # nothing is printed, because every block found its place
    return unpadded(page.read_text())


def test_every_number_has_its_place(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    text = reported(folder, page_of_everything(tmp_path / "page.md"), capsys)
    assert "Not measured yet" not in text
    for sentence in (
        "6 of the 16 bars", "| GPU tests that fail | ≤ 0 | 1 | MISS |", "`tests/test_a.py::test_one`",
        "| dX | 2432 | 4096 | 600 | – |", "| logits | 512 | 4096 | 800 | 640 | 1.25× |",
        "| two reads, in use then | float32 | 256 | 0.500 | 2.00 | 50% |", "| one read | float32 | 1024 | 0.278 |",
        "| 20 | 1.00 | 12 | 0.05 (5%) | 0.10 (10%) | 60 µs behind `a copy` |",
        f"faster at {len(SMALL) + 1} of {len(SMALL) + 1}",
        "| TRL's fused head | 2.00 (1.00 to 3.00) | 2.00× | 1.00× | 2048 MiB | 1024 MiB | 0.2 % |",
        "greedy 25.0% before and 75.0% after", "a promise is broken in 1 of 1 cases", "dX of 1 of 4 rows",
        "1 of 2 bars are not met**: trained-looking: dX 0.01 > 4e-3", "The run ended before: flat.",
        "batch_invariant", "commit 0123456789ab;",
    ):  # fmt: skip
        assert sentence in text, sentence
    pictures = sorted(path.name for path in folder.parent.glob("*.png"))
    assert pictures == ["gpu_peers.png", "gpu_small.png"]
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert all(f"bench_results/{name}" in page for name in pictures)


def test_twice_is_once(folder, tmp_path, capsys):
    page = page_of_everything(tmp_path / "page.md")
    assert reported(folder, page, capsys) == reported(folder, page, capsys)


# For each part with lines in the run above: the title of the finding that is empty without them, or None.
SAYING = {
    **dict.fromkeys(["ours", "peers", "slow_peers", "small", "sparse", "memory", "scale", "invariance", "precision"]),
    "all": None,
    "floors": "Bare products", "rows": "The row kernels", "profile": "Short kernels and gaps",
    "demo": "A run from beginning to end",
}  # fmt: skip


@pytest.fixture
def coarse(monkeypatch):
    """Draw every picture at a low resolution: encoding it takes longer than the rest of a page."""
    monkeypatch.setattr("benchmarks.harness.pictures.DPI", 10)


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("part", SAYING)
def test_a_part_may_be_missing(part, tmp_path, capsys):
    left_out = PARTS if part == "all" else [part]
    text = reported(written(tmp_path / "gpu", left_out), page_of_everything(tmp_path / "page.md"), capsys)
    if part == "all":
        assert text.count("Not measured yet") == len(GPU_BLOCKS) and "%" not in text
    if SAYING[part] is not None:
        assert f"### {SAYING[part]}\n\nNot measured yet." in text


NO_TIME = {"median_s": None, "min_s": None, "max_s": None, "seconds": [], "floor_median_s": None, "metrics": None,
           "peak_extra_bytes": None, "peak_beyond_gradients_bytes": None, "gradient_error": None,
           "entropy_quantiles": None, "entropy_nats": None, "status": "not run: time budget"}  # fmt: skip


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize(
    "method", ["gemms_whole", "eager", "linear_policy_loss", "linear_policy_loss_sparse", "trl", "copy"]
)
def test_a_method_may_have_no_time(method, tmp_path, capsys):
    def change(record):
        return record | NO_TIME if record["method"] == method else record

    text = reported(written(tmp_path / "gpu", change=change), page_of_everything(tmp_path / "page.md"), capsys)
    assert "not run: time budget" in text


def test_a_run_that_measured_nothing(tmp_path, capsys):
    folder = written(tmp_path / "gpu", change=lambda record: record | NO_TIME)
    assert "Not measured yet" in reported(folder, page_of_everything(tmp_path / "page.md"), capsys)


def test_a_floor_may_have_no_time(tmp_path, capsys):
    folder = written(tmp_path / "gpu", change=lambda record: record | {"floor_median_s": None})
    assert "linear_policy_loss" in reported(folder, page_of_everything(tmp_path / "page.md"), capsys)


def test_the_page_of_a_rehearsal_is_printed(folder, tmp_path, capsys):
    rehearsed = written(tmp_path / "gpu")
    command = "python -m benchmarks.device --rehearse --parts demo"
    append(rehearsed / DEVICE, DEVICE_LINES[-2] | SOURCE | {"command": command})
    page = page_of_everything(tmp_path / "page.md")
    before = page.read_text()
    assert report.main(["--block", "gpu", "--results", str(rehearsed), "--page", str(page)]) == 0
    assert page.read_text() == before and "bars are met" in capsys.readouterr().out


def test_two_commits_are_both_named(folder):
    run = read_run(folder)
    run[SPEED][0] = run[SPEED][0] | {"commit": "fedcba9876543210"}
    assert "commit fedcba987654, 0123456789ab;" in gpu_page.run_origin({SPEED: run[SPEED]})


def test_heads_are_those_of_the_bars(folder):
    heads = gpu_page.main_heads(read_run(folder))
    assert len({record["method"] for record in heads}) == len(heads) > 8
    assert {(r["workload"], r["shape"]["tokens"]) for r in heads} == {(MAIN.model, MAIN.tokens)}
