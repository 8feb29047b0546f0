"""`python -m benchmarks.device --sitting first --out DIR` measures what only a GPU can tell, within minutes.

There are three sittings: `first` takes under three minutes and has the clocks, bare products, our own methods and the
tests of sizes, graphs and streams; `second` takes eight minutes and has peers, small models, sparse gradients, memory,
row kernels, a profile, the other GPU tests, a run, batch invariance and precision; `third` is what is left. `--parts`
names parts in place of a sitting's.

Parts run in order, each in a process of its own and for a share of the time that is left. Every result is a line of a
file in DIR as soon as it is measured. A process that dies, hangs or loses the device costs the case that it had begun;
a new one goes on behind that case. summary.md is rewritten after every part and printed at the end. A part that is done
in DIR is skipped unless --again is given. Nothing is installed or fetched: peers are measured if Python finds them, and
tabulate and tqdm must be installed beside PyTorch and Triton. Without a repository around it, the environment variable
DRPO_COMMIT names the commit.

The exit status is 0 if every part came to its end and no test failed, else 1. `--rehearse` goes through the same lines
on a CPU at tiny shapes, where its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from benchmarks.device.page import summary
from benchmarks.device.parts import LOST, PARTS, SITTINGS, STOPPED, UNAVAILABLE
from benchmarks.harness import cli
from benchmarks.harness.measure import is_broken
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.records import Record, append, read, replace_part, select
from benchmarks.harness.runs import DEVICE, FILES, SPEED, read_run

SUMMARY, LOG = "summary.md", "log.txt"
# GRACE is how many seconds a part, which watches the clock itself, may overrun its box. LAST is kept for the summary.
GRACE, LAST = 8.0, 5.0
# No box is shorter than this, because importing PyTorch takes as long.
LEAST = 5.0
# A running part is looked at every GLANCE seconds. If it has to be ended, one of the two words says why.
GLANCE = 0.2
SILENT, OVERTIME = "no answer", "over its box"
NO_TIME = "not run: no time left"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are not done, and return 1 if one of them failed or ran out of time."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(f"{name:<12} {part.seconds:>4g} s  {part.what}" for name, part in PARTS.items()))
        return 0
    if options.out is None:
        parser.error("--out says where results go")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no GPU here; --rehearse runs every part on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    parts, seconds = SITTINGS[options.sitting]
    parts = options.parts or parts
    deadline = time.monotonic() + (options.time_limit or seconds) - LAST
    done = select(read(options.out / DEVICE), end="done", rehearsal=options.rehearse)
    waiting = [name for name in parts if options.again or not select(done, part=name)]
    while waiting:
        left, weights = deadline - time.monotonic(), [PARTS[name].seconds for name in waiting]
        box = min(max(left * weights[0] / sum(weights), LEAST), left)
        _run(waiting.pop(0), box, options.out, options.rehearse)
        (options.out / SUMMARY).write_text(summary(read_run(options.out)), encoding="utf-8")
    run = read_run(options.out)
    print(summary(run), end="")
    return int(any(record["part"] in parts and _bad(record) for record in run[DEVICE] + run[SPEED]))


def _bad(record: Record) -> bool:
    """Return whether a part has not come to its end, tests have failed, or a method of ours is wrong."""
    if "method" in record:
        return is_broken(record["method"], record["status"])
    return record.get("end", "").startswith(("failed", "stopped", "not run")) or bool(record.get("failed"))


def _run(part: str, box: float, folder: Path, rehearse: bool) -> None:
    """Run one part to its end, which becomes a line of its own, in place of the lines of an earlier try."""
    for name in FILES:
        replace_part(folder / name, part, [])
    start = time.monotonic()
    end = NO_TIME if box < LEAST else _outcome(part, box, folder, rehearse)
    seconds = round(time.monotonic() - start, 1)
    append(folder / DEVICE, {"part": part, "end": end, "seconds": seconds, "box": round(box, 1), "rehearsal": rehearse})
    print(f"{part:<12} {seconds:>6.1f} s of {box:.0f}  {end}", flush=True)


def _outcome(part: str, box: float, folder: Path, rehearse: bool) -> str:
    """Run a part within its box of seconds and return how it ended. If a case ends a part that writes a line per case,
    the part is started again behind that case."""
    deadline = time.monotonic() + box
    with (folder / LOG).open("a", encoding="utf-8") as log:
        while True:
            print(f"\n===== {part} =====", file=log, flush=True)
            before, left = _size(folder, part), deadline - time.monotonic()
            status = _process(part, left, folder, rehearse, log)
            died = status in (LOST, SILENT) or (isinstance(status, int) and status < 0)
            grown = PARTS[part].file == SPEED and _size(folder, part) > before
            again = died and grown and deadline - time.monotonic() > LEAST
            if not again:
                break
            print(f"{part:<12} goes on in a new process: {status}", flush=True)
    if status == UNAVAILABLE:
        return next(record["unavailable"] for record in read(folder / DEVICE)[::-1] if "unavailable" in record)
    if status in (STOPPED, OVERTIME):
        return "stopped: out of time"
    return "done" if status == 0 else f"failed: {status}, see {LOG}"


def _process(part: str, seconds: float, folder: Path, rehearse: bool, log: IO[str]) -> int | str:
    """Return the exit status, or the reason why the process had to be stopped: SILENT or OVERTIME."""
    command = [sys.executable, "-m", "benchmarks.device.parts", part, "--out", str(folder.resolve())]
    command += ["--seconds", f"{seconds:.1f}", *(["--rehearse"] if rehearse else [])]
    settings = os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    settings |= {"TRITON_INTERPRET": "1"} if rehearse else {}
    process = subprocess.Popen(
        command, cwd=ROOT, env=settings, stdout=log, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
    )
    deadline = time.monotonic() + seconds + GRACE
    size, heard = _size(folder, part), time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(GLANCE)
            now = time.monotonic()
            if (found := _size(folder, part)) != size:
                size, heard = found, now
            if now > deadline:
                return OVERTIME
            if now - heard > PARTS[part].patience:
                return SILENT
        return process.returncode
    finally:
        _stop(process)


def _size(folder: Path, part: str) -> int:
    path = folder / PARTS[part].file
    return path.stat().st_size if path.exists() else 0


def _stop(process: subprocess.Popen) -> None:
    """End the process and all that it started, which is one process group, so that nothing goes on using the device."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("benchmarks.device", __doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder")
    parser.add_argument("--sitting", choices=SITTINGS, default="first", help="which parts, and for how long")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, metavar="PART", help="in place of the sitting's; see --list"
    )
    parser.add_argument("--time-limit", type=float, help="seconds for all parts together, in place of the sitting's")
    parser.add_argument("--again", action="store_true", help="run parts that are done, too")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny shapes")
    parser.add_argument("--list", action="store_true", help="print the parts and their shares of the time")
    return parser


if __name__ == "__main__":
    sys.exit(main())
