"""Tests of the bars that a run on a GPU must reach: each of them can be met, missed and not measured."""

import pytest
import torch

from benchmarks.device import bars
from benchmarks.device.page import summary
from benchmarks.device.parts import PARTS
from benchmarks.device.plan import MIDDLE, PLANS, SMALL
from benchmarks.harness.methods import METHODS
from benchmarks.harness.runs import DEVICE, MAIN, SPEED
from benchmarks.harness.workloads import MODELS, Workload
from drpo_kernels.backends.planning import workspace_bytes
from pages import unpadded

LOSS, FROZEN = "linear_policy_loss", "linear_policy_loss_frozen_head"
SPARSE, LOGPROBS = "linear_policy_loss_sparse", "linear_token_logprobs"


def record(part, method, milliseconds, floor=None, *, model=MAIN.model, tokens=MAIN.tokens, beyond=0.0, **fields):
    shape = {"tokens": tokens, "hidden": MODELS[model].hidden, "vocab": MODELS[model].vocab}
    return {
        "part": part, "method": method, "dtype": "bfloat16", "active_share": 1.0, "shape": shape, "workload": model,
        "inputs": "trained", "median_s": milliseconds and milliseconds / 1e3, "status": "ok",
        "floor_median_s": floor and floor / 1e3, "peak_beyond_gradients_bytes": round(beyond * bars.GIB),
        "device": {"gpu": "NVIDIA H200"}, "commit": "c" * 40, "date": "2026-11-27",
        "gradient_error": {"hidden": 0.003, "weight": 0.002},
    } | fields  # fmt: skip


def rows(logits, kernel, rate, chosen=False):
    return {"part": "rows", "row_kernel": kernel, "logits": logits, "TB/s": rate, "chosen": chosen, "commit": "c" * 40}


def run_of_tests(part, passed=10, failed=(), finished=True):
    return {"part": part, "tests": f"-m gpu of {part}", "passed": passed, "failed": list(failed), "finished": finished}


WORKSPACE = workspace_bytes(torch.device("cuda"), 151_936, 4, None) / bars.GIB
GRANTED = 4 * 151_936 * 4096 / bars.GIB
RETAINED = max(GRANTED, 2 * 8192 * 151_936 / bars.GIB)
PASSING = [
    record("ours", LOSS, 43, 40), record("ours", LOSS, 12, 40, active_share=0.25), record("ours", FROZEN, 30, 27),
    record("ours", LOGPROBS, 58, 53),
    record("peers", LOSS, 43, 40), record("peers", LOGPROBS, 58, 53), record("peers", "trl", 80, 40, beyond=3),
    record("peers", "liger_scaled", 130, 40),
    # In this process everything takes twice as long, so times are compared in units of the floor beside them.
    record("slow_peers", LOSS, 86, 80), record("slow_peers", "cce_exact", 120, 80), record("slow_peers", "cce", 60, 80),
    *(record("small", LOSS, 1.2, 1, model=small.model, tokens=small.tokens) for small in SMALL),
    record("small", LOSS, 22, 20, model=MIDDLE.model),
    *(record("small", "eager", 30, 1, model=small.model, tokens=small.tokens) for small in (*SMALL, MIDDLE)),
    record("sparse", SPARSE, 23, 40, inputs="mixed"), record("sparse", SPARSE, 44, 40, inputs="random"),
    record("memory", LOSS, 43, 40, beyond=WORKSPACE + RETAINED), record("memory", FROZEN, 30, 27, beyond=WORKSPACE),
    record("memory", LOSS, 340, 320, tokens=65_536, beyond=WORKSPACE + GRANTED),
    record("memory", FROZEN, 240, 220, tokens=65_536, beyond=WORKSPACE + 0.09),
]  # fmt: skip
DEVICE_LINES = [
    run_of_tests("scale"), run_of_tests("tests", passed=20),
    *(line for dtype in ("bfloat16", "float32") for line in (
        rows(dtype, "copy", 4.0), rows(dtype, "two reads", 3.4, chosen=True), rows(dtype, "one read", 3.9),
        rows(dtype, "two reads", None),
    )),
]  # fmt: skip
NAMES = (
    "tests", "main", "peer", "middle", "1.5B", "0.5B", "eager", "frozen memory", "memory", "quarter", "frozen",
    "sparse", "bf16 rows", "fp32 rows", "recompute", "heads",
)  # fmt: skip


def found(records=PASSING, lines=DEVICE_LINES):
    return dict(zip(NAMES, bars.verdicts({SPEED: records, DEVICE: lines}), strict=True))


def test_bars_that_are_met():
    verdicts = found()
    assert {name: verdict.word for name, verdict in verdicts.items()} == dict.fromkeys(NAMES, "PASS")
    assert (verdicts["tests"].number, verdicts["tests"].remark) == ("0", "30 passed")
    assert verdicts["main"].number == "1.075×" and verdicts["main"].remark == "43.00 ms over 40.00 ms"
    # 1.5 floors are compared with 1.075, because a head that filters its gradient does not count.
    assert verdicts["peer"].number == "1.395×" and "fastest: cce_exact" in verdicts["peer"].remark
    assert "liger_scaled_sm90: no record" in verdicts["peer"].remark
    assert verdicts["frozen memory"].number == "0.090 GiB" and "T=65536" in verdicts["frozen memory"].remark
    assert verdicts["sparse"].number == "0.575×"
    assert verdicts["bf16 rows"].number == "85.0%"


@pytest.mark.parametrize(
    "bar, changed",
    [
        ("main", record("ours", LOSS, 44.1, 40)),
        ("main", record("ours", LOSS, 43, 39)),
        ("peer", record("slow_peers", "cce_exact", 100, 80)),
        ("middle", record("small", LOSS, 23.1, 20, model=MIDDLE.model)),
        ("1.5B", record("small", LOSS, 1.26, 1, model="Qwen2.5-1.5B", tokens=1024)),
        ("0.5B", record("small", LOSS, 1.51, 1, model="Qwen2.5-0.5B", tokens=512)),
        ("eager", record("small", "eager", 1.1, 1, model="Qwen2.5-0.5B", tokens=256)),
        ("frozen memory", record("memory", FROZEN, 240, 220, tokens=65_536, beyond=WORKSPACE + 0.11)),
        ("memory", record("memory", LOSS, 43, 40, beyond=WORKSPACE + RETAINED + 0.11)),
        ("memory", record("memory", LOSS, 340, 320, tokens=65_536, beyond=WORKSPACE + GRANTED + 0.11)),
        ("quarter", record("ours", LOSS, 12.6, 40, active_share=0.25)),
        ("frozen", record("ours", FROZEN, 31, 27)),
        ("sparse", record("sparse", SPARSE, 24.1, 40, inputs="mixed")),
        ("recompute", record("ours", LOGPROBS, 59.4, 53)),
        ("heads", record("peers", "trl", 57, 40)),
    ],
)
def test_bars_that_are_missed(bar, changed):
    keys = ("part", "method", "active_share", "workload", "shape", "inputs")
    kept = [old for old in PASSING if any(old[key] != changed[key] for key in keys)]
    assert len(kept) == len(PASSING) - 1
    assert found([*kept, changed])[bar].word == "MISS"


@pytest.mark.parametrize(
    "bar, lines, number",
    [
        ("tests", [run_of_tests("scale", failed=["tests/test_a.py::test_one"])], "1"),
        ("tests", [run_of_tests("scale"), run_of_tests("tests", failed=["a", "b"], finished=False)], "3"),
        ("bf16 rows", [rows("bfloat16", "copy", 4.0), rows("bfloat16", "two reads", 3.1, chosen=True)], "77.5%"),
        ("fp32 rows", [rows("float32", "copy", 4.0), rows("float32", "two reads", 2.3, chosen=True)], "57.5%"),
    ],
)
def test_bars_of_other_lines_that_are_missed(bar, lines, number):
    verdict = found(lines=lines)[bar]
    assert (verdict.word, verdict.number) == ("MISS", number)


def test_bars_without_numbers():
    assert {v.word for v in found([], []).values()} == {"not measured"}
    over = record("memory", FROZEN, None, tokens=32_768, status="not run: time budget")
    verdict = found([*PASSING, over | {"peak_beyond_gradients_bytes": None}])["frozen memory"]
    assert verdict.word == "PASS" and verdict.remark.endswith("T of 8192, 65536")
    full = over | {"peak_beyond_gradients_bytes": None, "status": "out of memory"}
    verdict = found([*PASSING, full])["frozen memory"]
    assert (verdict.word, verdict.remark) == ("not measured", "T=32768: out of memory")
    without_floor = [old | {"floor_median_s": None} for old in PASSING]
    words = {name: verdict.word for name, verdict in found(without_floor).items()}
    # What is compared with our own time in the same process needs no floor.
    of_no_floor = ("tests", "eager", "frozen memory", "memory", "quarter", "frozen", "bf16 rows", "fp32 rows")
    assert words == {name: "PASS" if name in of_no_floor else "not measured" for name in NAMES}
    assert found(lines=[rows("bfloat16", "copy", 4.0)])["bf16 rows"].remark == "the row kernels have no times"


def test_sittings_of_several_commits():
    """A number from an earlier commit says so, and two numbers from different commits are not compared."""
    later = {"commit": "d" * 40, "date": "2026-11-28"}
    dense = record("ours", LOSS, 42, 40, **later)
    shape = record("small", LOSS, 1.1, 1, model=SMALL[0].model, tokens=SMALL[0].tokens, **later)
    slower = record("small", "eager", 0.9, 1, model=SMALL[1].model, tokens=SMALL[1].tokens)
    keys = ("part", "method", "active_share", "workload", "shape", "inputs")
    changed = (dense, shape, slower)
    kept = [old for old in PASSING if all(any(old[key] != new[key] for key in keys) for new in changed)]
    verdicts = found([*kept, *changed])
    assert verdicts["main"].remark == "42.00 ms over 40.00 ms"
    assert verdicts["recompute"].remark.endswith("at commit cccccccccccc")
    assert verdicts["bf16 rows"].remark.endswith("at commit cccccccccccc")
    # The dense time is from the same commit and from another part.
    assert verdicts["quarter"].remark.startswith("12.00 ms over 43.00 ms")
    alone = [row for row in kept if (row["method"], row["active_share"]) != (LOSS, 1.0)]
    assert found([*alone, *changed])["quarter"].word == "not measured"
    assert verdicts["eager"].word == "MISS" and verdicts["eager"].remark.endswith("at commit cccccccccccc")


def test_a_rehearsal_has_no_verdicts():
    on_a_cpu = [old | {"device": {"cpu": "any"}} for old in PASSING]
    assert {(v.word, v.number) for v in found(on_a_cpu).values()} == {("not measured", "–")}


def test_bars_name_methods_and_parts_that_exist():
    """A row that is renamed must not turn a bar into "not measured" for ever."""
    planned = {
        (part, case.method, case.workload, case.active_share)
        for part in (name for name, part in PARTS.items() if part.file == SPEED)
        for case in PLANS[part]
    }
    for row in PASSING:
        workload = Workload(row["workload"], row["shape"]["tokens"], row["inputs"], row["dtype"])
        assert (row["part"], row["method"], workload, row["active_share"]) in planned, row
    assert set(bars.RL_PEERS) <= set(METHODS)


def test_a_summary_puts_bars_first():
    failed = run_of_tests("scale", failed=["tests/test_a.py::test_one"]) | {"skipped": 0, "exit": 1}
    text = unpadded(summary({SPEED: [], DEVICE: [failed]}))
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Bars", "## Tests", "## Parts"]
    assert "| GPU tests that fail | ≤ 0 | 1 | MISS | 10 passed |" in text and "`tests/test_a.py::test_one`" in text
