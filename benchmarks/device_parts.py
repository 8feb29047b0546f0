"""The parts of `python -m benchmarks.device`; as a program one of them, in a process that may die without the rest.

A part is a function of a `Run` that yields records. Each is a line of its file as soon as it is yielded.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import plans, sparsity_tables
from benchmarks.measure import Case, Record, measure
from benchmarks.method import Unsupported
from benchmarks.methods import FLOORS, METHODS, OURS
from benchmarks.peers import PEERS
from benchmarks.provenance import ROOT, provenance
from benchmarks.speed import summary
from benchmarks.tiles import measure as measure_tiles
from benchmarks.timing import clock, interleaved_seconds
from benchmarks.workloads import Workload

STANDARD = plans.STANDARD["cuda"]
MAIN = Workload(STANDARD.model, STANDARD.tokens, "trained", STANDARD.dtype)
DEVICE, SPEED, INVARIANCE, PRECISION = "device.jsonl", "speed.jsonl", "invariance.jsonl", "precision.jsonl"
# exit statuses of a part: it cannot run on this machine, or what it started had to be stopped
UNAVAILABLE, STOPPED = 3, 4
# what a rehearsal measures: the first few of these in every part
REHEARSED, REHEARSED_CASES = ("gemms_whole", "linear_policy_loss", "liger_scaled_sm90", "copy", "policy_loss"), 4
# seconds that a program started by a part leaves for writing down how it ended
RESERVE = 3.0


class Stopped(Exception):
    """A program that a part had started was out of time."""


@dataclass(frozen=True)
class Run:
    """Where results go, until when (of `time.monotonic`), and whether on tiny shapes on a CPU."""

    folder: Path
    deadline: float
    rehearse: bool
    device: torch.device

    @property
    def seconds(self) -> float:
        return max(self.deadline - RESERVE - time.monotonic(), 0.0)


@dataclass(frozen=True)
class Part:
    """`seconds` is its share of the whole run's time; `run` raises `Unsupported` where it cannot."""

    seconds: float
    what: str
    run: Callable[[Run], Iterator[Record]]
    file: str = DEVICE


# --- programs ---------------------------------------------------------------------------------------------------------


def output(command: Sequence[str], seconds: float) -> tuple[int | None, list[str]]:
    """(exit status, or None where it was stopped; its lines), printed as they come."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    stopped = threading.Event()
    timer = threading.Timer(seconds, lambda: (stopped.set(), process.kill()))
    timer.start()
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip("\n"))
    status = process.wait()
    timer.cancel()
    return None if stopped.is_set() else status, lines


def python(*arguments: object) -> list[str]:
    return [sys.executable, "-m", *map(str, arguments)]


def environment(run: Run) -> Iterator[Record]:
    """The device, its driver and clocks, versions, and which peers can be imported."""
    yield provenance("python -m benchmarks.device", run.device)
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,memory.used"
    if shutil.which("nvidia-smi"):
        status, lines = output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], run.seconds)
        if status == 0:
            yield {"nvidia_smi": dict(zip(fields.split(","), lines[0].split(", "), strict=True))}
    packages = dict.fromkeys(method.package for method in PEERS.values() if method.package)
    yield {"peers": {package: _imports(package) for package in (*packages, "cutlass")}}


def _imports(package: str) -> str:
    try:
        importlib.import_module(package)
    except Exception as error:  # in a word: messages name paths of this machine
        return f"{type(error).__name__} {getattr(error, 'name', None) or ''}".strip()
    return "ok"


# of `pytest -v`, alone and under xdist
TEST_LINE = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
XDIST_LINE = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL) (tests/\S+::.+?) *$")


def gpu_tests(run: Run) -> Iterator[Record]:
    yield _tests(run, "-m", "gpu", *(["tests/test_scale.py"] if run.rehearse else []))


def whole_suite(run: Run) -> Iterator[Record]:
    """On a GPU nothing is interpreted: every test of a kernel then runs on the device."""
    spread = ["-n", "8", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    yield _tests(run, "-m", "not gpu", *(["tests/test_layouts.py"] if run.rehearse else spread))


def _tests(run: Run, *arguments: str) -> Record:
    """What was passed, and what failed, by name; also of a run that was stopped."""
    status, lines = output(python("pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *arguments), run.seconds)
    outcomes = [match.groups() for match in map(TEST_LINE.match, lines) if match]
    outcomes += [match.groups()[::-1] for match in map(XDIST_LINE.match, lines) if match]
    counts = {word.lower(): sum(found == word for _, found in outcomes) for word in ("PASSED", "SKIPPED")}
    failed = [name for name, found in outcomes if found in ("FAILED", "ERROR")]
    return {"tests": " ".join(arguments), **counts, "failed": failed, "finished": status is not None, "exit": status}


def invariance(run: Run) -> Iterator[Record]:
    for dtype in ("bfloat16", "float32") if run.rehearse else ("bfloat16", "float16", "float32"):
        yield from _written_by("invariance", run, "--dtypes", dtype)


def precision(run: Run) -> Iterator[Record]:
    yield from _written_by("precision", run, *([] if run.rehearse else ["--device", run.device]))


def _written_by(module: str, run: Run, *arguments: object) -> Iterator[Record]:
    """The lines that `python -m benchmarks.<module>` writes; it makes plots beside them, which stay here."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) if module == "precision" else Path(folder, "records.jsonl")
        quick = ["--quick"] if run.rehearse else []
        status, _ = output(python(f"benchmarks.{module}", *arguments, *quick, "--out", out), run.seconds)
        for path in Path(folder).glob("*.jsonl"):
            yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if status is None:
            raise Stopped
        if status != 0:
            raise RuntimeError(f"benchmarks.{module} exited with {status}")


def sanitizer(run: Run) -> Iterator[Record]:
    """The row kernels under memcheck: views of logits whose surroundings must not be touched."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        raise Unsupported("not on this machine")
    test = python("pytest", "-q", "-p", "no:cacheprovider", "tests/test_scale.py", "-k", "not_contiguous and tiny")
    # without PyTorch's caching, every tensor is an allocation of its own, whose end is seen
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", program, "--tool", "memcheck", "--error-exitcode", "9", *test]
    status, lines = output(command, run.seconds)
    verdicts = [line.strip("= ") for line in lines if "ERROR SUMMARY" in line]
    yield {"memcheck": verdicts[-1] if verdicts else "no verdict", "exit": status}


# --- measurements -----------------------------------------------------------------------------------------------------


def plan_of(part: str) -> list[Case]:
    """At the workload of the bars: floors and ours; peers with ours and floors beside them; then ours over T; then
    whatever else the standard plan of a GPU holds.
    """
    logits = [name for name in ("copy", *OURS) if METHODS[name].takes == "logits"]
    hidden = [name for name in (*FLOORS, *OURS) if METHODS[name].takes == "hidden"]
    beside = ("gemms_whole", "linear_policy_loss", "linear_token_logprobs")
    # last, for they compile or tune themselves at their first call
    slow = ("liger_grpo", "eager_compiled", "cce_exact", "cce")
    quick = [name for name in PEERS if name not in slow and METHODS[name].takes == "hidden"]
    by_logits = ("copy", "policy_loss", "eager_from_logits", "liger_triton_grpo")
    sparse = [name for name in sparsity_tables.METHODS if name != "cce"] + ["cce_exact", "cce"]
    wide = replace(MAIN, dtype="float32")
    cases = {
        "ours": [Case(name, MAIN) for name in hidden]
        + [Case("linear_policy_loss", MAIN, 0.25)]
        + [Case(name, workload) for workload in (MAIN, wide) for name in logits],
        "peers": [Case(name, MAIN) for name in (*beside, "liger_scaled_sm90", *quick, "eager")],
        "slow_peers": [Case(name, MAIN) for name in (*beside, *slow, *by_logits)],
        "sparse": [Case(name, replace(MAIN, kind=kind)) for kind in sparsity_tables.KINDS for name in sparse],
        "memory": [
            Case(name, replace(MAIN, tokens=tokens))
            for tokens in (65_536, 8192, 16_384, 32_768, 2048)
            for name in ("linear_policy_loss", "linear_policy_loss_frozen_head")
        ],
    }
    taken = {case for name in ("ours", "peers", "slow_peers") for case in cases[name]}
    cases["sweep"] = [case for case in STANDARD.cases() if case not in taken]
    return list(dict.fromkeys(cases[part]))


def speed(part: str, rounds: int, run: Run) -> Iterator[Record]:
    """A workload at a time, so that what is measured is also written."""
    plan = plan_of(part)
    if run.rehearse:
        plan = [case for case in plans.quick(plan) if case.method in REHEARSED][:REHEARSED_CASES]
        rounds = 2
    source = provenance(f"python -m benchmarks.device --parts {part}", run.device)
    for workload in dict.fromkeys(case.workload for case in plan):
        cases = [case for case in plan if case.workload == workload]
        records = measure(cases, source, device=run.device, rounds=rounds, budget_seconds=run.seconds)
        print("\n".join(summary(records)), flush=True)
        yield from records


def floors(run: Run) -> Iterator[Record]:
    """TFLOP/s of the three products, each alone, and TB/s of a copy of the logits."""
    case = plans.quick([Case("gemms_whole", MAIN)])[0] if run.rehearse else Case("gemms_whole", MAIN)
    shape, dtype = case.workload.shape, getattr(torch, MAIN.dtype)
    hidden, weight = (
        torch.randn(rows, shape.hidden, device=run.device, dtype=dtype) for rows in (shape.tokens, shape.vocab)
    )
    logits = hidden @ weight.T
    outputs = [torch.empty_like(x) for x in (logits, hidden, weight)]
    work = {
        "logits": lambda: torch.mm(hidden, weight.T, out=outputs[0]),
        "dX": lambda: torch.mm(logits, weight, out=outputs[1]),
        "dW": lambda: torch.mm(logits.T, hidden, out=outputs[2]),
        "copy": lambda: outputs[0].copy_(logits),
    }
    rounds = 2 if run.rehearse else 20
    seconds = interleaved_seconds(work, rounds, lambda: None, clock(run.device), run.deadline)
    flop = 2 * shape.tokens * shape.hidden * shape.vocab
    for name, samples in seconds.items():
        if not samples:
            raise Stopped
        median = statistics.median(samples)
        rate = {"TB/s": 2 * logits.nbytes / median / 1e12} if name == "copy" else {"TFLOP/s": flop / median / 1e12}
        yield {"floor": name, "shape": vars(shape), "dtype": MAIN.dtype, "median_s": median, **rate}


def tiles(run: Run) -> Iterator[Record]:
    """The row kernel with every candidate tile: "chosen" is what `row_tile` picks without being told."""
    yield from measure_tiles(run.device, run.rehearse, run.deadline)


def profile(run: Run) -> Iterator[Record]:
    """Where the microseconds of one `linear_policy_loss` go, by kernel."""
    workload = plans.quick([Case("gemms_whole", MAIN)])[0].workload if run.rehearse else MAIN
    step = METHODS["linear_policy_loss"].prepare(workload.inputs(run.device))
    for _ in range(2):
        step()
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU if run.device.type == "cpu" else kind.CUDA]) as trace:
        step()
    field = "self_cpu_time_total" if run.device.type == "cpu" else "self_device_time_total"
    kernels = sorted(trace.key_averages(), key=lambda event: -getattr(event, field))
    for event in kernels[:24]:
        yield {"kernel": event.key[:160], "calls": event.count, "microseconds": getattr(event, field)}


PARTS = {
    "environment": Part(15, "device, driver, clocks, versions, peers", environment),
    "tests": Part(90, "pytest -m gpu", gpu_tests),
    "floors": Part(10, "bare products and copy, each alone", floors),
    "ours": Part(75, "our paths at the workload of the bars", functools.partial(speed, "ours", 20), SPEED),
    "peers": Part(65, "peers there, ours beside them", functools.partial(speed, "peers", 10), SPEED),
    "sparse": Part(75, "sparse gradients over the entropy", functools.partial(speed, "sparse", 5), SPEED),
    "memory": Part(45, "ours over T up to 65,536", functools.partial(speed, "memory", 2), SPEED),
    "slow_peers": Part(60, "peers that compile or tune themselves", functools.partial(speed, "slow_peers", 5), SPEED),
    "tiles": Part(20, "candidate tiles of the row kernel", tiles),
    "profile": Part(10, "kernel times of one step", profile),
    "invariance": Part(25, "python -m benchmarks.invariance", invariance, INVARIANCE),
    "precision": Part(25, "python -m benchmarks.precision", precision, PRECISION),
    "sanitizer": Part(40, "compute-sanitizer on the row kernels", sanitizer),
    "sweep": Part(60, "other inputs, shares, models and T", functools.partial(speed, "sweep", 5), SPEED),
    "suite": Part(0, "every other test, on the device; only where it is asked for", whole_suite),
}


def append(path: Path, record: Record) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part; UNAVAILABLE where it cannot run on this machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_parts", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.rehearse else "cpu")
    run = Run(options.out, time.monotonic() + options.seconds, options.rehearse, device)
    part = PARTS[options.part]
    try:
        for record in part.run(run):
            append(run.folder / part.file, {"part": options.part, **record})
    except Unsupported as reason:
        append(run.folder / DEVICE, {"part": options.part, "unavailable": str(reason)})
        return UNAVAILABLE
    except Stopped:
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
