"""The command for a GPU: every part's lines run here, and what is made of made-up results is right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bars, device, device_parts, measure, plans
from benchmarks.device_parts import DEVICE, MAIN, PARTS, SPEED
from benchmarks.method import Unsupported
from benchmarks.methods import METHODS

SPEED_PARTS = [name for name, part in PARTS.items() if part.file == SPEED]
TEST_OUTPUT = [
    "tests/test_a.py::test_one[x-every other] PASSED  [ 50%]",
    "tests/test_a.py::test_two FAILED  [100%]",
    "[gw1] [ 26%] PASSED tests/test_a.py::test_three[x-every other] ",
    "[gw0] [ 27%] SKIPPED tests/test_a.py::test_four ",
    "FAILED tests/test_a.py::test_two - assert 0",
]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rehearse(part, folder, seconds=60):
    return device_parts.main([part, "--out", str(folder), "--seconds", str(seconds), "--rehearse"])


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", SPEED_PARTS)
def test_speed_parts(part, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "peak_in_fresh_process", lambda inputs, method: 5 << 20)
    assert rehearse(part, tmp_path) == 0
    records = lines(tmp_path / SPEED)
    assert {record["part"] for record in records} == {part}
    assert any(record["method"] == "linear_policy_loss" and record["median_s"] for record in records)
    assert {record["status"] for record in records} <= {"ok", "needs a GPU"}


def test_every_case_of_the_standard_plan_has_a_part():
    planned = [case for part in SPEED_PARTS for case in device_parts.plan_of(part)]
    assert set(plans.STANDARD["cuda"].cases()) <= set(planned)
    assert {case.method for part in ("ours", "peers", "slow_peers") for case in device_parts.plan_of(part)} == {
        *METHODS
    }


@pytest.mark.parametrize(
    "part, field, least",
    [
        ("environment", "device", 1),
        ("floors", "floor", 4),
        pytest.param("tiles", "tile", 4, marks=pytest.mark.interpreted),
        ("profile", "kernel", 5),
    ],
)
def test_other_parts(part, field, least, tmp_path):
    assert rehearse(part, tmp_path) == 0
    records = lines(tmp_path / DEVICE)
    assert sum(field in record for record in records) >= least
    assert all(record["status"] == "ok" for record in records if "tile" in record)


def test_sanitizer_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(device_parts.shutil, "which", lambda *_, **__: None)
    assert rehearse("sanitizer", tmp_path) == device_parts.UNAVAILABLE
    assert lines(tmp_path / DEVICE) == [{"part": "sanitizer", "unavailable": "not on this machine"}]


def test_sanitizer(tmp_path, monkeypatch):
    monkeypatch.setattr(device_parts.shutil, "which", lambda *_, **__: "/bin/compute-sanitizer")
    monkeypatch.setattr(device_parts, "output", lambda *_: (0, ["========= ERROR SUMMARY: 0 errors"]))
    assert rehearse("sanitizer", tmp_path) == 0
    assert lines(tmp_path / DEVICE)[0]["memcheck"] == "ERROR SUMMARY: 0 errors"


@pytest.mark.parametrize("part", ["tests", "suite"])
@pytest.mark.parametrize("status", [1, None], ids=["finished", "stopped"])
def test_outcomes_of_tests(part, status, tmp_path, monkeypatch):
    monkeypatch.setattr(device_parts, "output", lambda *_: (status, TEST_OUTPUT))
    assert rehearse(part, tmp_path) == 0
    (record,) = lines(tmp_path / DEVICE)
    assert (record["passed"], record["skipped"], record["failed"]) == (2, 1, ["tests/test_a.py::test_two"])
    assert record["finished"] == (status is not None)


@pytest.mark.parametrize("part", ["invariance", "precision"])
@pytest.mark.parametrize("status, code", [(0, 0), (None, device_parts.STOPPED)], ids=["finished", "stopped"])
def test_lines_of_another_benchmark(part, status, code, tmp_path, monkeypatch):
    """Its plots stay behind, and what a stopped one has written is kept."""

    def output(command, seconds):
        out = Path(command[command.index("--out") + 1])
        out = out / "precision.jsonl" if part == "precision" else out
        out.write_text('{"kind": "line"}\n')
        out.with_name("plot.png").write_bytes(b"")
        return status, []

    monkeypatch.setattr(device_parts, "output", output)
    assert rehearse(part, tmp_path) == code
    assert lines(tmp_path / f"{part}.jsonl")[0] == {"part": part, "kind": "line"}
    assert [path.name for path in tmp_path.iterdir()] == [f"{part}.jsonl"]


def test_programs_are_stopped_in_time():
    status, found = device_parts.output([sys.executable, "-uc", "import time; print('begun'); time.sleep(60)"], 2.0)
    assert status is None and found == ["begun"]


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def boxes(monkeypatch):
    """Parts that end at once; their time boxes by name."""
    found = {}

    def outcome(part, box, folder, rehearse):
        found[part] = box
        return "done"

    monkeypatch.setattr(device, "_outcome", outcome)
    return found


def test_time_goes_to_the_parts_that_are_left(boxes, tmp_path, capsys):
    arguments = ["--rehearse", "--out", str(tmp_path), "--time-limit", "105"]
    assert device.main(arguments) == 0
    assert list(boxes) == list(device.DEFAULT)
    assert boxes["ours"] > boxes["environment"] and boxes["sweep"] == pytest.approx(100, abs=5)
    boxes.clear()
    assert device.main(arguments) == 0 and not boxes  # all of them done
    assert device.main([*arguments, "--again", "--parts", "tiles,floors"]) == 0
    assert list(boxes) == ["floors", "tiles"]  # in the order of the list
    assert "| tiles | done |" in capsys.readouterr().out
    assert len([record for record in lines(tmp_path / DEVICE) if "end" in record]) == len(device.DEFAULT)


def test_what_failed_is_tried_again(tmp_path, monkeypatch):
    tries = []

    def outcome(part, box, folder, rehearse):
        tries.append(part)
        device.append(folder / DEVICE, {"part": part, "try": len(tries)})
        return "failed: exit 1" if len(tries) == 1 else "done"

    monkeypatch.setattr(device, "_outcome", outcome)
    arguments = ["--rehearse", "--out", str(tmp_path), "--parts", "floors,tiles", "--time-limit", "60"]
    assert [device.main(arguments), device.main(arguments)] == [1, 0]
    assert tries == ["floors", "tiles", "floors"]
    assert [record["try"] for record in lines(tmp_path / DEVICE) if "try" in record] == [2, 3]


def test_a_rehearsal_does_not_stand_for_the_run(boxes, tmp_path, monkeypatch):
    arguments = ["--out", str(tmp_path), "--parts", "floors", "--time-limit", "60"]
    assert device.main([*arguments, "--rehearse"]) == 0
    boxes.clear()
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: True)
    assert device.main(arguments) == 0 and boxes


def test_failed_tests_fail_the_run(boxes, tmp_path):
    arguments = ["--rehearse", "--out", str(tmp_path), "--parts", "tests", "--time-limit", "60"]
    assert device.main(arguments) == 0
    device.append(tmp_path / DEVICE, {"part": "tests", "tests": "-m gpu", "passed": 1, "skipped": 0, "failed": ["a"],
                                      "finished": True, "exit": 1})  # fmt: skip
    assert device.main(arguments) == 1


def test_no_time_left(boxes, tmp_path):
    assert device.main(["--rehearse", "--out", str(tmp_path), "--parts", "floors", "--time-limit", "6"]) == 1
    assert not boxes and lines(tmp_path / DEVICE)[0]["end"] == "not run: no time left"


def test_as_a_program(tmp_path):
    """Parts in processes of their own: one that runs, one that is not for this machine."""
    command = [sys.executable, "-m", "benchmarks.device", "--rehearse", "--out", str(tmp_path / "out")]
    run = subprocess.run([*command, "--parts", "floors,sanitizer"], capture_output=True, text=True, cwd=device.ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    ends = {record["part"]: record["end"] for record in lines(tmp_path / "out" / DEVICE) if "end" in record}
    assert ends["floors"] == "done" and ends["sanitizer"] in ("done", "not on this machine")
    assert (tmp_path / "out" / device.SUMMARY).read_text() == run.stdout[run.stdout.index("# Device") :]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rehearse"], "--out says where results go"),
        (["--out", "x", "--parts", "tiles,floor"], "no part 'floor'; there are environment, tests"),
        (["--out", "x"], "no GPU here; --rehearse"),
    ],
)
def test_malformed_arguments(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        device.main(arguments)
    assert message in capsys.readouterr().err


# --- bars -------------------------------------------------------------------------------------------------------------


def record(
    part, method, milliseconds, dtype="bfloat16", share=1.0, tokens=8192, beyond=0.0, status="ok", inputs="trained"
):
    shape = {"tokens": tokens, "hidden": 4096, "vocab": 151_936}
    return {
        "part": part, "method": method, "dtype": dtype, "active_share": share, "shape": shape, "status": status,
        "median_s": milliseconds and milliseconds / 1e3, "peak_beyond_gradients_bytes": round(beyond * bars.GIB),
        "device": {"gpu": "NVIDIA H200"}, "workload": "Qwen3-8B", "inputs": inputs, "peak_extra_bytes": None,
        "gradient_error": {"hidden": 0.003, "weight": 0.002},
    }  # fmt: skip


GRANTED = max(4 * 151_936 * 4096, 2 * 8192 * 151_936) / bars.GIB
PASSING = [
    record("ours", "gemms_whole", 40), record("ours", "linear_policy_loss", 43),
    record("ours", "linear_policy_loss_1gib", 46), record("ours", "linear_policy_loss", 12, share=0.25),
    record("ours", "linear_policy_loss_frozen_head", 30), record("ours", "linear_token_logprobs", 58),
    record("ours", "gemms_recompute", 53), record("ours", "copy", 9), record("ours", "policy_loss", 11),
    record("ours", "copy", 18, "float32"), record("ours", "policy_loss", 29, "float32"),
    record("peers", "linear_policy_loss", 43), record("peers", "linear_token_logprobs", 58),
    record("peers", "trl", 80, beyond=3), record("peers", "liger_scaled", 130),
    record("slow_peers", "linear_policy_loss", 43), record("slow_peers", "cce_exact", 60),
    record("slow_peers", "cce", 30),
    record("sparse", "gemms_whole", 40, inputs="mixed"), record("sparse", "gemms_whole", 50, inputs="random"),
    record("sparse", "linear_policy_loss_sparse", 23, inputs="mixed"),
    record("sparse", "linear_policy_loss_sparse", 44, inputs="random"),
    record("memory", "linear_policy_loss", 43, beyond=1 + GRANTED),
    record("memory", "linear_policy_loss_frozen_head", 30, beyond=1.05),
    record("memory", "linear_policy_loss_frozen_head", 240, tokens=65_536, beyond=1.09),
]  # fmt: skip


def words(records):
    return [verdict.word for verdict in bars.verdicts(records)]


def test_bars_that_are_met():
    found = bars.verdicts(PASSING)
    assert {verdict.word for verdict in found} == {"PASS"}, [(v.bar.what, v.number, v.remark) for v in found]
    assert found[2].number == "1.395×"  # cce_exact: what filters does not count
    assert "fastest: cce_exact" in found[2].remark and "liger_scaled_sm90: no record" in found[2].remark
    assert found[11].number == "0.575×" and "gradient error 0.30%" in found[11].remark
    assert found[3].number == "0.090 GiB" and "T=65536" in found[3].remark


@pytest.mark.parametrize(
    "bar, changed",
    [
        (0, record("ours", "linear_policy_loss", 44.1)),
        (1, record("ours", "linear_policy_loss_1gib", 47.3)),
        (2, record("peers", "trl", 51)),
        (3, record("memory", "linear_policy_loss_frozen_head", 240, tokens=65_536, beyond=1.11)),
        (4, record("memory", "linear_policy_loss", 43, beyond=1.11 + GRANTED)),
        (5, record("ours", "linear_policy_loss", 12.5, share=0.25)),
        (6, record("ours", "policy_loss", 11.3)),
        (7, record("ours", "policy_loss", 30.1, "float32")),
        (8, record("ours", "linear_token_logprobs", 59.4)),
        (9, record("peers", "trl", 57)),
        (10, record("ours", "linear_policy_loss_frozen_head", 31)),
        (11, record("sparse", "linear_policy_loss_sparse", 24.1, inputs="mixed")),
    ],
)
def test_bars_that_are_missed(bar, changed):
    keys = ("part", "method", "dtype", "active_share", "shape", "inputs")
    kept = [old for old in PASSING if any(old[key] != changed[key] for key in keys)]
    assert len(kept) == len(PASSING) - 1
    assert words([*kept, changed])[bar] == "MISS"


def test_bars_without_numbers():
    assert set(words([])) == {"not measured"}
    failed = record("memory", "linear_policy_loss_frozen_head", None, tokens=32_768, status="out of memory")
    verdict = bars.verdicts([*PASSING, failed | {"peak_beyond_gradients_bytes": None}])[3]
    assert (verdict.word, verdict.remark) == ("not measured", "T=32768: out of memory")
    on_a_cpu = [old | {"device": {"cpu": "any"}} for old in PASSING]
    assert {(verdict.word, verdict.number) for verdict in bars.verdicts(on_a_cpu)} == {("not measured", "–")}


def test_bars_name_methods_and_parts_that_exist():
    """A row that is renamed must not turn a bar into "not measured" for ever."""
    planned = {
        (part, case.method, case.workload.dtype, case.active_share, case.workload.kind)
        for part in SPEED_PARTS
        for case in device_parts.plan_of(part)
    }
    made_up = {(row["part"], row["method"], row["dtype"], row["active_share"], row["inputs"]) for row in PASSING}
    assert made_up <= planned
    assert {case.workload for case in device_parts.plan_of("peers")} == {MAIN}
    assert set(bars.EXACT_PEERS) <= set(METHODS) and Unsupported.__doc__
