"""The parts of `python -m benchmarks.device`; as a program one of them, in a process that may die without the rest.

A part is a function of a `Run` that yields records. Each is a line of its file as soon as it is yielded.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
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

from benchmarks.device import measures, tiles
from benchmarks.harness import plans
from benchmarks.harness.measure import FAILED, Case, in_order, measured, started
from benchmarks.harness.method import Unsupported
from benchmarks.harness.methods import FLOORS, METHODS, OURS
from benchmarks.harness.mixes import MIXES
from benchmarks.harness.peers import PEERS
from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.records import Record, append, read
from benchmarks.harness.runs import DEVICE, INVARIANCE, MAIN, PRECISION, SPEED, key_of
from benchmarks.harness.timing import clock, interleaved_seconds

# Small models and small batches, which most runs have.
SMALL = tuple(
    replace(MAIN, model=model, tokens=tokens)
    for model in ("Qwen2.5-0.5B", "Qwen2.5-1.5B")
    for tokens in (512, 1024, 256, 2048)
)
MIDDLE = replace(MAIN, model="Qwen3-30B-A3B")
LOSS = "linear_policy_loss"
# The backward of Liger's Hopper head is one kernel with a barrier across the device, which may never be passed.
HANGS = "liger_scaled_sm90"
# The shapes of SMALL at which the eager loss is compiled too; each compilation takes seconds.
COMPILED = (SMALL[0], SMALL[5])
# A part exits with one of these when it cannot run on this machine, when it had to stop what it had started, or when
# the device is lost.
UNAVAILABLE, STOPPED, LOST = 3, 4, 5
# A rehearsal measures the first few of these in every part.
REHEARSED, REHEARSED_CASES = ("gemms_whole", "linear_policy_loss", "liger_scaled_sm90", "copy", "policy_loss"), 4
# Seconds that a part keeps for writing down how a program that it started has ended.
RESERVE = 3.0
# The tests of sizes, streams and graphs, and the other files that have tests of a GPU.
SCALE = "tests/loss/test_scale.py"
OTHERS = ("cases", "invariance", "fp8", "exact_products", "benchmarks", "distributed", "verl_head")
OTHERS = sorted(str(path.relative_to(ROOT)) for name in OTHERS for path in ROOT.glob(f"tests/*/test_{name}.py"))
# The number of pytest processes of a part. They share the device.
WORKERS = {"scale": 3, "tests": 6, "gpu": 6, "suite": 12}


class Stopped(Exception):
    """A program that a part had started was out of time."""


class Lost(Exception):
    """The device answers no more in this process."""


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

    def source(self, part: str) -> Record:
        """What every record of the part says of its origin."""
        rehearse = " --rehearse" if self.rehearse else ""
        return provenance(f"python -m benchmarks.device{rehearse} --parts {part}", self.device)


@dataclass(frozen=True)
class Part:
    """A function that yields records.

    seconds   its share of the whole run's time
    run       raises `Unsupported` if it cannot run here, and `Lost` if a new process may go on
    patience  seconds without a new line after which it is taken to hang
    """

    seconds: float
    what: str
    run: Callable[[Run], Iterator[Record]]
    file: str = DEVICE
    patience: float = math.inf


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
    """The driver, the clocks, and which peers can be imported. Device and versions are in every line anyway."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,memory.used"
    if shutil.which("nvidia-smi"):
        status, lines = output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], run.seconds)
        if status == 0:
            yield {"nvidia_smi": dict(zip(fields.split(","), lines[0].split(", "), strict=True))}
    packages = dict.fromkeys(method.package for method in PEERS.values() if method.package)
    found = {package: importlib.util.find_spec(package) is not None for package in (*packages, "cutlass", "xdist")}
    yield {"packages": found}


# a line of `pytest -v`, alone and under xdist
TEST_LINE = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
XDIST_LINE = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL) (tests/\S+::.+?) *$")


def tests_of(part: str, selection: Sequence[str], rehearsed: str, run: Run) -> Iterator[Record]:
    """The counts of a run of tests and the names of those that failed, also if it had to be stopped."""
    spread = []
    if importlib.util.find_spec("xdist") and not run.rehearse:
        spread = ["-n", str(WORKERS[part]), "--dist", "worksteal"]
    arguments = [*selection, *([rehearsed] if run.rehearse and rehearsed else []), *spread]
    options = ["-v", "--tb=short", "--durations=12", "-p", "no:cacheprovider"]
    status, lines = output(python("pytest", *options, *arguments), run.seconds)
    outcomes = [match.groups() for match in map(TEST_LINE.match, lines) if match]
    outcomes += [match.groups()[::-1] for match in map(XDIST_LINE.match, lines) if match]
    counts = {word.lower(): sum(found == word for _, found in outcomes) for word in ("PASSED", "SKIPPED")}
    failed = [name for name, found in outcomes if found in ("FAILED", "ERROR")]
    yield {"tests": " ".join(selection), **counts, "failed": failed, "finished": status is not None, "exit": status}
    if status is None:
        raise Stopped
    if status not in (0, 1):  # 1: tests have failed; 2 to 5: none, or not all, were run
        raise RuntimeError(f"pytest exited with {status}")
    if not (counts["passed"] or failed or run.rehearse):
        raise RuntimeError("every test was skipped")


def study(name: str, run: Run) -> Iterator[Record]:
    """The lines that `python -m benchmarks.<name>` writes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--quick"] if run.rehearse else ["--device", run.device]
        out = Path(folder, "records.jsonl")
        status, _ = output(python(f"benchmarks.{name}", *arguments, "--out", out), run.seconds)
        yield from read(out)
        if status is None:
            raise Stopped
        if status != 0:
            raise RuntimeError(f"benchmarks.{name} exited with {status}")


def sanitizer(run: Run) -> Iterator[Record]:
    """The row kernels under memcheck, on views of logits whose surroundings they must not touch."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        raise Unsupported("not on this machine")
    test = python("pytest", "-q", "-p", "no:cacheprovider", "tests/loss/test_scale.py", "-k", "not_contiguous and tiny")
    # Without PyTorch's caching every tensor is an allocation of its own, so that memcheck sees where it ends.
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", program, "--tool", "memcheck", "--error-exitcode", "9", *test]
    status, lines = output(command, run.seconds)
    verdicts = [line.strip("= ") for line in lines if "ERROR SUMMARY" in line]
    yield {"memcheck": verdicts[-1] if verdicts else "no verdict", "exit": status}


# --- measurements -----------------------------------------------------------------------------------------------------


def plan_of(part: str) -> list[Case]:
    """The cases of a part of speed. `sweep` has what the standard plan of a GPU holds and no earlier part does."""
    logits = [name for name in ("copy", *OURS) if METHODS[name].takes == "logits"]
    hidden = [name for name in (*FLOORS, *OURS) if METHODS[name].takes == "hidden"]
    beside = ("gemms_whole", "linear_policy_loss", "linear_token_logprobs")
    # These compile or tune themselves at their first call.
    slow = ("liger_grpo", "cce_exact", "cce", "eager_compiled")
    quick = [name for name in PEERS if name not in (*slow, HANGS) and METHODS[name].takes == "hidden"]
    by_logits = ("copy", "policy_loss", "eager_from_logits", "liger_triton_grpo")
    small = ("gemms_whole", "eager", "linear_policy_loss", "eager_compiled")
    sparse = ("gemms_whole", LOSS, f"{LOSS}_sparse", f"{LOSS}_sparse_tight")
    wide = replace(MAIN, dtype="float32")
    cases = {
        "ours": [Case(name, MAIN) for name in hidden]
        + [Case("linear_policy_loss", MAIN, 0.25)]
        + [Case(name, workload) for workload in (MAIN, wide) for name in logits],
        "peers": [Case(name, MAIN) for name in (*beside, *quick, "eager")],
        "liger_sm90": [Case(HANGS, MAIN)],
        "slow_peers": [Case(name, MAIN) for name in (*beside, *slow, *by_logits)],
        "small": [
            Case(name, workload)
            for workload in (*SMALL, MIDDLE)
            for name in small
            if name != "eager_compiled" or workload in COMPILED
        ],
        "sparse": [Case(name, replace(MAIN, kind=kind)) for kind in (*MIXES, "trained", "random") for name in sparse],
        "memory": [
            Case(name, replace(MAIN, tokens=tokens))
            for tokens in (8192, 65_536, 2048, 32_768, 16_384)
            for name in ("linear_policy_loss", "linear_policy_loss_frozen_head")
        ],
    }
    taken = {case for name in ("ours", "peers", "liger_sm90", "slow_peers") for case in cases[name]}
    cases["sweep"] = [case for case in plans.STANDARD["cuda"].cases() if case not in taken]
    return list(dict.fromkeys(cases[part]))


def speed(part: str, rounds: int, run: Run) -> Iterator[Record]:
    """Measure the part's cases. Each yields a line when it begins, which its record then replaces. A case that an
    earlier process has begun is not measured again."""
    plan = plan_of(part)
    if run.rehearse:
        plan = [case for case in plans.quick(plan) if case.method in REHEARSED][:REHEARSED_CASES]
        rounds = 2
    path = run.folder / SPEED
    begun = {key_of(record) for record in read(path) if record["part"] == part}
    source = run.source(part)

    def begin(case: Case) -> None:
        append(path, {"part": part, **started(case), **source})

    plan = [case for case in in_order(plan) if key_of({"part": part, **started(case)}) not in begun]
    for record in measured(plan, source, run.device, rounds, run.deadline - RESERVE, begin):
        print(f"{record['method']}, {record['workload']}: {record['median_s']} s, {record['status']}", flush=True)
        yield record
        if record["status"].startswith(FAILED) and run.device.type == "cuda":
            _still_there(run.device)


def _still_there(device: torch.device) -> None:
    """After some errors every later call fails too, until the process ends."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        raise Lost from error


def floors(run: Run) -> Iterator[Record]:
    """TFLOP/s of the three products, each alone, and TB/s of a copy of the logits; then products at chunk shapes."""
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
    yield from measures.products(run.device, run.rehearse, run.deadline)


def rows(run: Run) -> Iterator[Record]:
    yield from tiles.measure(run.device, run.rehearse, run.deadline)


def profile(run: Run) -> Iterator[Record]:
    """At the workload of the bars, and where a call is short."""
    steps = [(LOSS, workload) for workload in (MAIN, *COMPILED)]
    steps.append((f"{LOSS}_sparse", replace(MAIN, kind="mixed")))
    if run.rehearse:
        steps = [(LOSS, plans.quick([Case("gemms_whole", MAIN)])[0].workload)]
    yield from measures.profile(steps, run.device)


def demo(run: Run) -> Iterator[Record]:
    yield from measures.demo(run.device, run.rehearse)


def _speed_part(seconds: float, what: str, name: str, rounds: int, patience: float = 45) -> Part:
    return Part(seconds, what, functools.partial(speed, name, rounds), SPEED, patience)


def _tests_part(seconds: float, what: str, name: str, *selection: str, rehearsed: str = SCALE) -> Part:
    return Part(seconds, what, functools.partial(tests_of, name, selection, rehearsed))


PARTS = {
    "environment": Part(6, "device, driver, clocks, versions, packages", environment),
    "floors": Part(9, "matrix rates of bare products, whole and at chunk shapes, and copy bandwidth", floors),
    "ours": _speed_part(34, "floors and ours at the workload of the bars", "ours", 10),
    "scale": _tests_part(34, "pytest on a GPU: sizes, graphs, streams, bits", "scale", "-m", "gpu", SCALE),
    "small": _speed_part(40, "small models and batches, eager and compiled beside ours", "small", 20),
    "peers": _speed_part(35, "the peers that start at once", "peers", 10),
    "sparse": _speed_part(14, "sparse gradients over entropies", "sparse", 6),
    "memory": _speed_part(30, "memory over T to 65,536", "memory", 2),
    "rows": Part(13, "the row kernels by themselves, at three tiles, beside a copy", rows),
    "profile": Part(16, "kernels, short kernels and gaps of a step", profile),
    "tests": _tests_part(38, "pytest on a GPU: every other file", "tests", "-m", "gpu", *OTHERS,
                         rehearsed="tests/studies/test_benchmarks.py"),
    "gpu": _tests_part(55, "pytest on a GPU: all of them at once", "gpu", "-m", "gpu", SCALE, *OTHERS, rehearsed=""),
    "liger_sm90": _speed_part(80, "Liger's Hopper kernels, alone: they may hang", "liger_sm90", 10, 75),
    "slow_peers": _speed_part(60, "the peers that compile or tune themselves first", "slow_peers", 10, 40),
    "demo": Part(36, "the demo's training, before and after", demo),
    "invariance": Part(50, "python -m benchmarks.invariance", functools.partial(study, "invariance"), INVARIANCE),
    "precision": Part(33, "python -m benchmarks.precision", functools.partial(study, "precision"), PRECISION),
    "sanitizer": Part(40, "compute-sanitizer on the row kernels", sanitizer),
    "sweep": _speed_part(60, "other inputs, shares, models and T", "sweep", 5),
    "suite": _tests_part(180, "every other test, on the device", "suite", "-m", "not gpu",
                         rehearsed="tests/loss/test_layouts.py"),
}  # fmt: skip
# Every sitting's parts in the order in which they run, and the seconds that all of them together may take.
SITTINGS = {
    "first": (("environment", "floors", "ours", "scale"), 160.0),
    "second": (
        ("peers", "small", "sparse", "memory", "rows", "profile", "tests", "liger_sm90", "slow_peers", "demo",
         "invariance", "precision"),
        480.0,
    ),
    "third": (("gpu", "sanitizer", "sweep", "suite"), 480.0),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part; UNAVAILABLE where it cannot run on this machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device.parts", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.rehearse else "cpu")
    run = Run(options.out, time.monotonic() + options.seconds, options.rehearse, device)
    part = PARTS[options.part]
    # The lines of the other files bring their own source.
    source = run.source(options.part) if part.file == DEVICE else {}
    try:
        for record in part.run(run):
            append(run.folder / part.file, {"part": options.part, **record, **source})
    except Unsupported as reason:
        append(run.folder / DEVICE, {"part": options.part, "unavailable": str(reason)})
        return UNAVAILABLE
    except Stopped:
        return STOPPED
    except Lost:
        return LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
