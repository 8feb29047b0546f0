"""Tests of the parts of the command for a GPU: each is rehearsed here and leaves its lines."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.device import measures as device_measures
from benchmarks.device import parts as device_parts
from benchmarks.device import tiles
from benchmarks.device.measures import Span
from benchmarks.device.parts import LOST, OTHERS, PARTS, SCALE, STOPPED, UNAVAILABLE
from benchmarks.device.plan import PLANS, Job
from benchmarks.harness import measure, plans, provenance
from benchmarks.harness.measure import DIED
from benchmarks.harness.methods import METHODS
from benchmarks.harness.records import append, read
from benchmarks.harness.runs import DEVICE, SPEED, read_run

SPEED_PARTS = [name for name, part in PARTS.items() if part.file == SPEED]
CPU = torch.device("cpu")


def rehearse(part, folder, seconds=60):
    return device_parts.main([part, "--out", str(folder), "--seconds", str(seconds), "--rehearse"])


# --- speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", SPEED_PARTS)
def test_speed_parts(part, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "peak_in_fresh_process", lambda inputs, method: 5 << 20)
    assert rehearse(part, tmp_path) == 0
    lines, records = read(tmp_path / SPEED), read_run(tmp_path)[SPEED]
    # a case has a line when it begins, and its record right behind that
    assert [line["status"] for line in lines[::2]] == [DIED] * len(records) and lines[1::2] == records
    assert {record["part"] for record in records} == {part}
    alone = part == "liger_sm90"  # this part has nothing to run here
    assert alone or any(r["method"] == "linear_policy_loss" and r["floor_median_s"] for r in records)
    assert {record["status"] for record in records} <= {"ok", "needs a GPU"}


def test_every_case_of_the_standard_plan_has_a_part():
    planned = [case for part in SPEED_PARTS for case in PLANS[part]]
    assert set(plans.STANDARD["cuda"].cases()) <= set(planned)
    at_the_bars = ("ours", "peers", "slow_peers", "liger_sm90")
    assert {case.method for part in at_the_bars for case in PLANS[part]} == {*METHODS}


def test_cases_that_an_earlier_process_has_begun_are_left_alone(tmp_path):
    """This holds within a part: what another part has begun is measured again."""
    floors = [c for c in plans.quick(PLANS["sparse"]) if c.method == "gemms_whole"]
    mixed, reasoning = (next(c for c in floors if c.workload.kind == kind) for kind in ("mixed", "reasoning"))
    for part, case in (("sparse", mixed), ("peers", reasoning)):
        append(tmp_path / SPEED, {"part": part, **measure.started(case)})
    assert rehearse("sparse", tmp_path) == 0
    new = [line["inputs"] for line in read(tmp_path / SPEED)[2:] if line["method"] == "gemms_whole"]
    assert new == ["reasoning", "reasoning"]  # the line of a case that begins, and its record


def test_a_lost_device_ends_the_process(tmp_path, monkeypatch):
    """After a failure the process asks whether the device still answers."""

    def ones(*_, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    (case, *_) = PLANS["ours"]
    failed = measure.started(case) | {"status": "failed: AcceleratorError"}
    monkeypatch.setattr(Job, "source", lambda job, part: {})
    monkeypatch.setattr(device_parts, "measured", lambda *_: iter([failed]))
    monkeypatch.setattr(device_parts.torch, "ones", ones)
    found = device_parts.speed("ours", 3, Job(tmp_path, float("inf"), False, torch.device("cuda")))
    assert next(found) == failed
    with pytest.raises(device_parts.Lost):
        next(found)


@pytest.mark.parametrize("error, status", [(device_parts.Lost, LOST), (device_parts.Stopped, STOPPED)])
def test_exit_statuses(error, status, tmp_path, monkeypatch):
    """The records that were yielded before the error stay."""

    def part(run):
        yield {"line": 1}
        raise error

    monkeypatch.setitem(PARTS, "rows", replace(PARTS["rows"], run=part))
    assert rehearse("rows", tmp_path) == status
    assert [record["line"] for record in read(tmp_path / DEVICE)] == [1]


# --- other measurements -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part, field, least",
    [
        ("floors", "product", 5),
        pytest.param("rows", "row_kernel", 5, marks=pytest.mark.interpreted),
        ("profile", "kernel", 5),
        ("profile", "profile", 1),
    ],
)
def test_other_parts(part, field, least, tmp_path):
    assert rehearse(part, tmp_path) == 0
    records = read(tmp_path / DEVICE)
    assert sum(field in record for record in records) >= least
    for record in records:
        assert record["device"] and record["versions"] and record["command"].endswith(f"--parts {part}")


def test_a_run_of_the_demo(tmp_path):
    for package in ("transformers", "tqdm", "rich"):
        pytest.importorskip(package)
    assert rehearse("demo", tmp_path) == 0
    whole, *comparisons = read(tmp_path / DEVICE)
    assert set(whole["demo"]) == {"before", "after"} and len(whole["history"]) >= whole["steps"]
    assert len(comparisons) == 2 and all(found["loss"] < 1e-5 for found in comparisons)


def test_products():
    """Each shape has a line for every dtype of its result, as the linear path multiplies. Without time, the lines are
    there all the same.
    """
    found = list(device_measures.products(Job(Path(), math.inf, True, CPU)))
    kinds = [(record["product"], record["out"]) for record in found]
    logits, dw = ([(name, out) for out in ("bfloat16", "float32")] for name in ("logits", "dW"))
    assert kinds == [*logits, ("dX", "bfloat16"), *dw]
    for record in found:
        flop = 2 * math.prod(record["shape"].values())
        assert record["TFLOP/s"] == pytest.approx(flop / record["median_s"] / 1e12)
    assert {r["median_s"] for r in device_measures.products(Job(Path(), -math.inf, True, CPU))} == {None}


def test_overheads():
    """The trace has two kernels side by side, a gap of 3 µs, a kernel inside another, and a gap of 5 µs."""
    times = {"a": (10, 30), "b": (12, 32), "c": (35, 50), "d": (36, 38), "e": (55, 60)}
    spans = [Span(name, *time) for name, time in reversed(times.items())]
    assert device_measures.overheads(spans) == {
        "kernels": 5, "short_kernels": 2, "short_us": 7, "idle_us": 8, "whole_us": 50,
        "gaps": [{"us": 5, "after": "d", "before": "e"}, {"us": 3, "after": "b", "before": "c"}],
    }  # fmt: skip
    assert device_measures.overheads([])["whole_us"] == 0


def test_by_kernel():
    spans = [Span("short", 0, 1), Span("long", 1, 21), Span("short", 30, 34)]
    assert device_measures.by_kernel(spans) == [("long", 1, 20), ("short", 2, 5)]


# --- programs ---------------------------------------------------------------------------------------------------------


def test_sanitizer_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(device_parts.shutil, "which", lambda *_, **__: None)
    assert rehearse("sanitizer", tmp_path) == UNAVAILABLE
    assert read(tmp_path / DEVICE) == [{"part": "sanitizer", "unavailable": "not on this machine"}]


def test_sanitizer(tmp_path, monkeypatch):
    monkeypatch.setattr(device_parts.shutil, "which", lambda *_, **__: "/bin/compute-sanitizer")
    monkeypatch.setattr(device_parts, "output", lambda *_: (0, ["========= ERROR SUMMARY: 0 errors"]))
    assert rehearse("sanitizer", tmp_path) == 0
    assert read(tmp_path / DEVICE)[0]["memcheck"] == "ERROR SUMMARY: 0 errors"


TEST_OUTPUT = [
    "tests/test_a.py::test_one[x-every other] PASSED  [ 50%]",
    "tests/test_a.py::test_two FAILED  [100%]",
    "[gw1] [ 26%] PASSED tests/test_a.py::test_three[x-every other] ",
    "[gw0] [ 27%] SKIPPED tests/test_a.py::test_four ",
    "FAILED tests/test_a.py::test_two - assert 0",
]


@pytest.mark.parametrize("part", ["scale", "tests", "suite"])
@pytest.mark.parametrize("status, code", [(1, 0), (None, STOPPED)], ids=["finished", "stopped"])
def test_outcomes_of_tests(part, status, code, tmp_path, monkeypatch):
    monkeypatch.setattr(device_parts, "output", lambda *_: (status, TEST_OUTPUT))
    assert rehearse(part, tmp_path) == code
    (record,) = read(tmp_path / DEVICE)
    assert (record["passed"], record["skipped"], record["failed"]) == (2, 1, ["tests/test_a.py::test_two"])
    assert record["finished"] == (status is not None)


@pytest.mark.parametrize("status, lines", [(5, []), (4, []), (2, TEST_OUTPUT[:1]), (0, TEST_OUTPUT[3:4])])
def test_a_part_without_a_test_fails(status, lines, tmp_path, monkeypatch):
    """pytest found no test (5), found no such file (4), or broke off (2); or every test was skipped."""
    monkeypatch.setattr(device_parts, "output", lambda *_: (status, lines))
    job = Job(tmp_path, math.inf, False, CPU)
    with pytest.raises(RuntimeError, match=r"pytest exited|every test was skipped"):
        list(device_parts.tests_of(["-m", "gpu"], 3, SCALE, job))


def test_files_with_tests_of_a_gpu():
    """A file that is not named there is never run on one."""
    paths = (device_parts.ROOT / "tests").rglob("test_*.py")
    files = [path for path in paths if re.search(r"mark\.gpu", path.read_text(encoding="utf-8"))]
    assert {str(path.relative_to(device_parts.ROOT)) for path in files} == {SCALE, *OTHERS}


@pytest.mark.parametrize("part", ["invariance", "precision"])
@pytest.mark.parametrize("status, code", [(0, 0), (None, STOPPED)], ids=["finished", "stopped"])
def test_lines_of_another_benchmark(part, status, code, tmp_path, monkeypatch):
    """The plots of the other benchmark stay behind, and what it wrote before it was stopped is kept."""

    def output(command, seconds):
        out = Path(command[command.index("--out") + 1])
        out.write_text('{"kind": "line"}\n')
        out.with_name("plot.png").write_bytes(b"")
        return status, []

    monkeypatch.setattr(device_parts, "output", output)
    assert rehearse(part, tmp_path) == code
    assert read(tmp_path / f"{part}.jsonl")[0] == {"part": part, "kind": "line"}
    assert [path.name for path in tmp_path.iterdir()] == [f"{part}.jsonl"]


def test_a_broken_promise_ends_the_part_behind_its_lines(tmp_path, monkeypatch):
    def output(command, seconds):
        assert "--dtypes" not in command  # all dtypes are measured
        Path(command[command.index("--out") + 1]).write_text('{"kind": "line"}\n')
        return 1, []

    monkeypatch.setattr(device_parts, "output", output)
    with pytest.raises(RuntimeError, match="invariance exited with 1"):
        rehearse("invariance", tmp_path)
    assert read(tmp_path / "invariance.jsonl")


def test_programs_are_stopped_in_time():
    status, found = device_parts.output([sys.executable, "-uc", "import time; print('begun'); time.sleep(60)"], 2.0)
    assert status is None and found == ["begun"]


def test_a_copy_without_a_repository_names_its_commit(monkeypatch):
    monkeypatch.setattr(provenance, "_git", lambda *_: None)
    monkeypatch.setenv("DRPO_COMMIT", "0123abc")
    found = provenance.provenance("a command")
    assert (found["commit"], found["dirty"]) == ("0123abc", None)
    monkeypatch.delenv("DRPO_COMMIT")
    assert provenance.provenance("a command")["commit"] is None


def test_every_row_kernel_is_measured(device):
    pytest.importorskip("triton")
    found = list(tiles.measure(Job(Path(), math.inf, True, device)))
    kernels = {(record["row_kernel"], record["logits"]) for record in found}
    assert kernels == {(tiles.COPY, "float32"), (tiles.TWO_READS, "float32"), (tiles.ONE_READ, "float32"),
                       (tiles.COPY, "bfloat16"), (tiles.TWO_READS, "bfloat16")}  # fmt: skip
    assert all(record["status"] == "ok" and record["TB/s"] > 0 for record in found)
    assert sum(record["chosen"] for record in found) == 2
