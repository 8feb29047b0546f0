"""The parts of `python -m benchmarks.device`. As a program it runs one of them, in a process that may die without the
rest.

A part is a function of a `Job` that yields records. Each is a line of its file as soon as it is yielded.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.device import measures, tiles
from benchmarks.device.plan import HANGS, LOSS, PLANS, RESERVE, WHOLE, Job
from benchmarks.harness import plans
from benchmarks.harness.measure import FAILED, Case, in_order, measured, started
from benchmarks.harness.method import Unsupported
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.records import Record, append, read
from benchmarks.harness.runs import DEVICE, INVARIANCE, PRECISION, SPEED, key_of
from examples import smollm

# A part exits with one of these when it cannot run on this machine, when it had to stop what it had started, or when
# the device is lost.
UNAVAILABLE, STOPPED, LOST = 3, 4, 5
# A rehearsal measures the first few cases of these methods in every part.
REHEARSED, REHEARSED_CASES = (WHOLE, LOSS, HANGS, "copy", "policy_loss"), 4
# The tests of sizes, streams and graphs, and the other files that have tests of a GPU.
SCALE = "tests/loss/test_scale.py"
OTHERS = ("cases", "invariance", "fp8", "exact_products", "benchmarks", "distributed", "verl_head")
OTHERS = sorted(str(path.relative_to(ROOT)) for name in OTHERS for path in ROOT.glob(f"tests/*/test_{name}.py"))


class Stopped(Exception):
    """A program that a part had started was out of time."""


class Lost(Exception):
    """The device answers no more in this process."""


# --- programs ---------------------------------------------------------------------------------------------------------


def output(command: Sequence[object], seconds: float) -> tuple[int | None, list[str]]:
    """Run a program and print its lines as they come. Return (exit status, or None if it was stopped; its lines)."""
    words = [str(word) for word in command]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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


def environment(job: Job) -> Iterator[Record]:
    """Yield the clocks and the power; device and versions are in every line anyway."""
    if shutil.which("nvidia-smi") is None:
        raise Unsupported("nvidia-smi is not on this machine")
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,memory.used"
    status, lines = output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], job.seconds)
    if status is None:
        raise Stopped
    if status != 0:
        raise Unsupported(f"nvidia-smi exited with {status}")
    yield {"nvidia_smi": dict(zip(fields.split(","), lines[0].split(", "), strict=True))}


# These match a line of `pytest -v`, alone and under xdist.
TEST_LINE = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
XDIST_LINE = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL) (tests/\S+::.+?) *$")


def tests_of(selection: Sequence[str], workers: int, rehearsed: str, job: Job) -> Iterator[Record]:
    """Yield the counts of a run of tests and the names of those that failed, also if it had to be stopped. A rehearsal
    runs one file in place of all; otherwise `workers` processes of pytest share the device.
    """
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--durations=12", "-p", "no:cacheprovider"]
    command += [*selection[:2], rehearsed] if job.rehearse else selection
    if importlib.util.find_spec("xdist") and not job.rehearse:
        command += ["-n", workers, "--dist", "worksteal"]
    status, lines = output(command, job.seconds)
    outcomes = [match.groups() for match in map(TEST_LINE.match, lines) if match]
    outcomes += [match.groups()[::-1] for match in map(XDIST_LINE.match, lines) if match]
    counts = {word.lower(): sum(found == word for _, found in outcomes) for word in ("PASSED", "SKIPPED")}
    failed = [name for name, found in outcomes if found in ("FAILED", "ERROR")]
    yield {"tests": " ".join(selection), **counts, "failed": failed, "finished": status is not None, "exit": status}
    if status is None:
        raise Stopped
    if status not in (0, 1):  # 1: tests have failed; 2 to 5: none, or not all, were run
        raise RuntimeError(f"pytest exited with {status}")
    if not (counts["passed"] or failed or job.rehearse):
        raise RuntimeError("every test was skipped")


def study(name: str, job: Job) -> Iterator[Record]:
    """Yield the lines that `python -m benchmarks.<name>` writes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--quick"] if job.rehearse else ["--device", job.device]
        out = Path(folder, "records.jsonl")
        status, _ = output([sys.executable, "-m", f"benchmarks.{name}", *arguments, "--out", out], job.seconds)
        yield from read(out)
        if status is None:
            raise Stopped
        if status != 0:
            raise RuntimeError(f"benchmarks.{name} exited with {status}")


def sanitizer(job: Job) -> Iterator[Record]:
    """Run the row kernels under memcheck, on views of logits whose surroundings they must not touch."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        raise Unsupported("not on this machine")
    # Without PyTorch's caching every tensor is an allocation of its own, so that memcheck sees where it ends.
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", program, "--tool", "memcheck", "--error-exitcode", "9"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", SCALE, "-k", "not_contiguous and tiny"]
    status, lines = output(command, job.seconds)
    verdicts = [line.strip("= ") for line in lines if "ERROR SUMMARY" in line]
    yield {"memcheck": verdicts[-1] if verdicts else "no verdict", "exit": status}


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(part: str, rounds: int, job: Job) -> Iterator[Record]:
    """Measure the part's cases. Each yields a line when it begins, which its record then replaces. A case that an
    earlier process has begun is not measured again."""
    plan = PLANS[part]
    if job.rehearse:
        plan, rounds = [case for case in plans.quick(plan) if case.method in REHEARSED][:REHEARSED_CASES], 2
    path = job.folder / SPEED
    begun = {key_of(record) for record in read(path) if record["part"] == part}
    source = job.source(part)

    def begin(case: Case) -> None:
        append(path, {"part": part, **started(case), **source})

    plan = [case for case in in_order(plan) if key_of({"part": part, **started(case)}) not in begun]
    for record in measured(plan, source, job.device, rounds, job.deadline - RESERVE, begin):
        print(f"{record['method']}, {record['workload']}: {record['median_s']} s, {record['status']}", flush=True)
        yield record
        if record["status"].startswith(FAILED) and job.device.type == "cuda":
            _still_there(job.device)


def real(job: Job) -> Iterator[Record]:
    if not (smollm.CACHE / "head.pt").exists() and not job.rehearse:
        raise Unsupported("the head of SmolLM2 is not here: bring the head.pt that `make smollm` leaves")
    yield from speed("real", 10, job)


def _still_there(device: torch.device) -> None:
    """Raise `Lost` if the device no longer answers. After some errors every later call fails too, until the process
    ends.
    """
    try:
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        raise Lost from error


# --- the table of parts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A function that yields records.

    seconds   its share of the whole run's time
    run       raises `Unsupported` if it cannot run here, and `Lost` if a new process may go on
    patience  seconds without a new line after which it is taken to hang
    """

    seconds: float
    what: str
    run: Callable[[Job], Iterator[Record]]
    file: str = DEVICE
    patience: float = math.inf


def _speed(seconds: float, what: str, name: str, rounds: int, patience: float = 45) -> Part:
    return Part(seconds, what, partial(speed, name, rounds), SPEED, patience)


def _tests(seconds: float, what: str, workers: int, *selection: str, rehearsed: str = SCALE) -> Part:
    return Part(seconds, what, partial(tests_of, selection, workers, rehearsed))


# Every sitting's parts in the order in which they run.
FIRST = {
    "environment": Part(6, "clocks and power", environment),
    "floors": Part(9, "matrix rates of bare products at chunk shapes", measures.products),
    "ours": _speed(34, "floors and ours at the workload of the bars", "ours", 10),
    "scale": _tests(34, "pytest on a GPU: sizes, graphs, streams, bits", 3, "-m", "gpu", SCALE),
}
SECOND = {
    "peers": _speed(35, "the peers that start at once", "peers", 10),
    "small": _speed(40, "small models and batches, eager and compiled beside ours", "small", 20),
    "sparse": _speed(14, "sparse gradients over entropies", "sparse", 6),
    "memory": _speed(30, "memory over T to 65,536", "memory", 2),
    "rows": Part(13, "the row kernels by themselves, at three tiles, beside a copy", tiles.measure),
    "profile": Part(16, "kernels, short kernels and gaps of a step", measures.profile),
    "tests": _tests(38, "pytest on a GPU: every other file", 6, "-m", "gpu", *OTHERS,
                    rehearsed="tests/studies/test_benchmarks.py"),
    "liger_sm90": _speed(80, "Liger's Hopper kernels, alone: they may hang", "liger_sm90", 10, 75),
    "slow_peers": _speed(60, "the peers that compile or tune themselves first", "slow_peers", 10, 40),
    "demo": Part(36, "the demo's training, before and after", measures.demo),
    "invariance": Part(50, "python -m benchmarks.invariance", partial(study, "invariance"), INVARIANCE),
    "precision": Part(33, "python -m benchmarks.precision", partial(study, "precision"), PRECISION),
}  # fmt: skip
THIRD = {
    "gpu": _tests(55, "pytest on a GPU: all of them at once", 6, "-m", "gpu", SCALE, *OTHERS),
    "sanitizer": Part(40, "compute-sanitizer on the row kernels", sanitizer),
    "real": Part(20, "a real model's tokens, exact and sparse", real, SPEED, 45),
    "sweep": _speed(60, "other inputs, shares, models and T", "sweep", 5),
    "suite": _tests(180, "every other test, on the device", 12, "-m", "not gpu",
                    rehearsed="tests/loss/test_layouts.py"),
}  # fmt: skip
PARTS = FIRST | SECOND | THIRD
# The number is the seconds that a sitting's parts may take together.
SITTINGS = {"first": (tuple(FIRST), 160.0), "second": (tuple(SECOND), 480.0), "third": (tuple(THIRD), 480.0)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part, and return UNAVAILABLE if it cannot run on this machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device.parts", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.rehearse else "cpu")
    job = Job(options.out, time.monotonic() + options.seconds, options.rehearse, device)
    part = PARTS[options.part]
    # The lines of the other files name their own source.
    source = job.source(options.part) if part.file == DEVICE else {}
    try:
        for record in part.run(job):
            append(job.folder / part.file, {"part": options.part, **record, **source})
    except Unsupported as reason:
        append(job.folder / DEVICE, {"part": options.part, "unavailable": str(reason)})
        return UNAVAILABLE
    except Stopped:
        return STOPPED
    except Lost:
        return LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
