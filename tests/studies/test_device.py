"""Tests of the command for a GPU: which parts run, for how long, and what becomes of one that fails, hangs or dies."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest

from benchmarks.device import __main__ as device
from benchmarks.device import parts as device_parts
from benchmarks.device.parts import LOST, PARTS, SITTINGS
from benchmarks.harness.measure import DIED, Case, started
from benchmarks.harness.records import append, read
from benchmarks.harness.runs import DEVICE, MAIN, SPEED, SPEED_PARTS, once, read_run
from pages import unpadded


@pytest.fixture
def boxes(monkeypatch):
    """Make all parts end at once, and return their time boxes by name."""
    found = {}

    def outcome(part, box, folder, rehearse):
        found[part] = box
        return "done"

    monkeypatch.setattr(device, "_outcome", outcome)
    return found


def run(folder, *arguments):
    return device.main(["--rehearse", "--out", str(folder), *arguments])


# --- which parts, and when --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sitting", SITTINGS)
def test_sittings(sitting, boxes, tmp_path):
    parts, seconds = SITTINGS[sitting]
    assert run(tmp_path, "--sitting", sitting) == 0
    assert tuple(boxes) == parts
    # Parts that end at once leave all their time to the last one.
    assert boxes[parts[-1]] == pytest.approx(seconds - device.LAST, abs=5)


def test_sittings_hold_every_part_once():
    parts = [part for names, _ in SITTINGS.values() for part in names]
    assert sorted(parts) == sorted(PARTS)


def test_time_goes_to_the_parts_that_are_left(boxes, tmp_path):
    arguments = ["--parts", "floors", "ours", "rows", "--time-limit", "105"]
    assert run(tmp_path, *arguments) == 0
    weights = [PARTS[part].seconds for part in ("floors", "ours", "rows")]
    assert boxes["floors"] == pytest.approx(100 * weights[0] / sum(weights), abs=3)
    assert boxes["ours"] > boxes["floors"] and boxes["rows"] == pytest.approx(100, abs=5)


def test_parts_that_are_done_are_skipped(boxes, tmp_path):
    arguments = ["--parts", "floors", "rows", "--time-limit", "60"]
    assert run(tmp_path, *arguments) == 0
    boxes.clear()
    assert run(tmp_path, *arguments) == 0 and not boxes
    assert run(tmp_path, *arguments, "--again") == 0 and list(boxes) == ["floors", "rows"]
    # each part has one record of its end
    assert [record["part"] for record in read(tmp_path / DEVICE)] == ["floors", "rows"]
    assert "| rows | done |" in unpadded((tmp_path / device.SUMMARY).read_text())


def test_a_rehearsal_does_not_stand_for_the_run(boxes, tmp_path, monkeypatch):
    assert run(tmp_path, "--parts", "floors") == 0
    boxes.clear()
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: True)
    assert device.main(["--out", str(tmp_path), "--parts", "floors"]) == 0 and boxes


def test_what_failed_is_tried_again(tmp_path, monkeypatch):
    tries = []

    def outcome(part, box, folder, rehearse):
        tries.append(part)
        append(folder / DEVICE, {"part": part, "try": len(tries)})
        return "failed: 1" if len(tries) == 1 else "done"

    monkeypatch.setattr(device, "_outcome", outcome)
    arguments = ["--parts", "floors", "rows", "--time-limit", "60"]
    assert [run(tmp_path, *arguments), run(tmp_path, *arguments)] == [1, 0]
    assert tries == ["floors", "rows", "floors"]
    assert [record["try"] for record in read(tmp_path / DEVICE) if "try" in record] == [2, 3]


def test_no_time_left(boxes, tmp_path):
    assert run(tmp_path, "--parts", "floors", "--time-limit", "6") == 1
    assert not boxes and read(tmp_path / DEVICE)[0]["end"] == "not run: no time left"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rehearse"], "--out says where results go"),
        (["--out", "x", "--parts", "rows", "floor"], "invalid choice: 'floor'"),
        (["--out", "x", "--sitting", "fourth"], "invalid choice: 'fourth'"),
        (["--out", "x"], "no GPU here; --rehearse"),
    ],
)
def test_malformed_arguments(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        device.main(arguments)
    assert message in capsys.readouterr().err


# --- the exit status --------------------------------------------------------------------------------------------------

TESTS = {"part": "tests", "tests": "-m gpu", "passed": 3, "skipped": 0, "failed": [], "finished": True, "exit": 0}


@pytest.mark.parametrize(
    "end, line, status",
    [
        ("done", TESTS, 0),
        ("done", TESTS | {"failed": ["tests/test_a.py::test_one"], "exit": 1}, 1),
        # this part belongs to another sitting
        ("done", TESTS | {"part": "scale", "failed": ["tests/test_a.py::test_one"]}, 0),
        ("not on this machine", TESTS, 0),
        ("stopped: out of time", TESTS, 1),
        ("failed: 1, see log.txt", TESTS, 1),
    ],
)
def test_exit_status(end, line, status, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_outcome", lambda part, box, folder, rehearse: append(folder / DEVICE, line) or end)
    assert run(tmp_path, "--parts", "tests") == status


@pytest.mark.parametrize(
    "method, status, code",
    [
        ("linear_policy_loss", "ok", 0),
        ("linear_policy_loss", "not run: time budget", 0),
        ("linear_policy_loss", "wrong gradients", 1),
        ("linear_policy_loss", DIED, 1),
        ("liger_scaled_sm90", DIED, 0),  # a peer's failure does not count
    ],
)
def test_methods_that_are_wrong_fail_the_run(method, status, code, tmp_path, monkeypatch):
    def outcome(part, box, folder, rehearse):
        begun = {"part": part, **started(Case(method, MAIN)), "device": {}}
        append(folder / SPEED, begun)
        append(folder / SPEED, begun | {"status": status})
        return "done"

    monkeypatch.setattr(device, "_outcome", outcome)
    assert run(tmp_path, "--parts", "ours") == code


# --- processes --------------------------------------------------------------------------------------------------------


def test_as_a_program(tmp_path):
    """Parts run in processes of their own: one that runs, and one that is not for this machine."""
    command = [sys.executable, "-m", "benchmarks.device", "--rehearse", "--out", str(tmp_path / "out")]
    command += ["--parts", "floors", "sanitizer"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=device.ROOT)
    assert found.returncode == 0, found.stdout + found.stderr
    ends = {record["part"]: record["end"] for record in read(tmp_path / "out" / DEVICE) if "end" in record}
    assert ends["floors"] == "done" and ends["sanitizer"] in ("done", "not on this machine")
    heading = "# A rehearsal on a CPU: numbers mean nothing"
    assert heading in found.stdout and (tmp_path / "out" / device.SUMMARY).read_text().startswith(heading)


DYING = """
    #!{python}
    import json, os, signal, sys, time
    from pathlib import Path

    lines = Path(sys.argv[sys.argv.index("--out") + 1], "speed.jsonl")

    def append(case):
        with lines.open("a") as file:
            file.write(json.dumps({{"part": "ours", "case": case}}) + "\\n")

    begun = lines.read_text() if lines.exists() else ""
    if "dies" not in begun:
        append("dies")
        os.kill(os.getpid(), signal.SIGKILL)
    if "hangs" not in begun:
        append("hangs")
        time.sleep(600)
    append("works")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a script in place of Python")
def test_a_process_that_dies_or_hangs_costs_the_case_that_it_had_begun(tmp_path, monkeypatch):
    """The processes are real. test_device_parts.py tests that a part leaves alone what an earlier process has begun."""
    script = tmp_path / "dying.py"
    script.write_text(textwrap.dedent(DYING).lstrip().format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setitem(PARTS, "ours", replace(PARTS["ours"], patience=2))
    assert device._outcome("ours", 300, tmp_path, True) == "done"
    assert [record["case"] for record in read(tmp_path / SPEED)] == ["dies", "hangs", "works"]


@pytest.mark.parametrize(
    "statuses, progress, end",
    [
        ([0], True, "done"),
        ([LOST, 0], True, "done"),
        ([device.SILENT, -9, 0], True, "done"),
        ([LOST], False, f"failed: {LOST}, see log.txt"),  # a new process would always end at the same place
        ([1], True, "failed: 1, see log.txt"),
        ([device.OVERTIME], True, "stopped: out of time"),
        ([device_parts.STOPPED], True, "stopped: out of time"),
    ],
)
def test_a_part_goes_on_in_a_new_process(statuses, progress, end, tmp_path, monkeypatch):
    left = iter(statuses)

    def process(part, seconds, folder, rehearse, log):
        if progress:
            append(folder / SPEED, {"part": part})
        return next(left)

    monkeypatch.setattr(device, "_process", process)
    assert device._outcome("ours", 60, tmp_path, True) == end
    assert not list(left)


def test_only_cases_that_are_lines_are_gone_on_behind(tmp_path, monkeypatch):
    statuses = iter([-9])  # the process dies only once
    monkeypatch.setattr(device, "_process", lambda *_: append(tmp_path / DEVICE, {"part": "rows"}) or next(statuses))
    assert device._outcome("rows", 60, tmp_path, True) == "failed: -9, see log.txt"


# --- lines on disk ----------------------------------------------------------------------------------------------------


def test_half_written_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read(path) == []
    append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    assert read(path) == [{"a": 1}]
    append(path, {"a": 3})
    assert read(path) == [{"a": 1}, {"a": 3}]


def test_a_case_of_several_parts_is_read_once(tmp_path):
    """Of a part the last line counts, and of several parts the first one that has a time."""
    line = started(Case("gemms_whole", MAIN))
    for part, milliseconds in (("slow_peers", 3), ("ours", None), ("ours", 2), ("peers", None), ("peers", 1)):
        append(tmp_path / SPEED, {"part": part, **line, "median_s": milliseconds})
    records = read_run(tmp_path)[SPEED]
    assert [(r["part"], r["median_s"]) for r in records] == [("slow_peers", 3), ("ours", 2), ("peers", 1)]
    assert [(r["part"], r["median_s"]) for r in once(records)] == [("ours", 2)]
    assert once([record | {"median_s": None} for record in records[:2]])[0]["part"] == "ours"


def test_every_part_of_speed_has_a_place_among_those_that_measure_the_same():
    assert set(SPEED_PARTS) == {name for name, part in PARTS.items() if part.file == SPEED}
