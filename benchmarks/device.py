"""`python -m benchmarks.device --out DIR`: everything that only a GPU can tell, for one that is at hand for minutes.

Parts run in order, each in a process and a time box of its own: a share of what is left, so that one that ends early
leaves its time to the rest. Results are lines of at most six files in DIR as soon as they are measured; summary.md,
rewritten after every part and printed last, puts each bar beside its number. A part that is done in DIR is skipped
unless --again. Peers are measured where Python finds them (PYTHONPATH); nothing is installed or fetched.

In more than one sitting: the default, then `--parts suite`, then what the summary calls not measured. speed.jsonl is
what `benchmarks.report` reads. `--rehearse` goes through the same lines on a CPU at tiny shapes; its numbers mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.device_parts import DEVICE, INVARIANCE, PARTS, PRECISION, SPEED, STOPPED, UNAVAILABLE, append
from benchmarks.device_summary import summary
from benchmarks.measure import Record
from benchmarks.provenance import ROOT

SUMMARY, LOG = "summary.md", "log.txt"
# beyond its box, for a part that watches the clock itself; and of the limit, for the summary
GRACE, LAST = 8.0, 5.0
# a box is no shorter: importing PyTorch takes as long
LEAST = 5.0
DEFAULT = tuple(name for name, part in PARTS.items() if part.seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are not done; 1 if one of them failed or ran out of time."""
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
    deadline = time.monotonic() + options.time_limit - LAST
    done = set() if options.again else _done(options.out, options.rehearse)
    waiting = [name for name in PARTS if name in options.parts and name not in done]
    while waiting:
        left = deadline - time.monotonic()
        share = left * _weight(waiting[0]) / sum(map(_weight, waiting))
        _run(waiting.pop(0), min(max(share, LEAST), left), options.out, options.rehearse)
        (options.out / SUMMARY).write_text(summary(_read(options.out)), encoding="utf-8")
    records = _read(options.out)
    print(summary(records, short=True), end="")
    return int(any(record["part"] in options.parts and _bad(record) for record in records[DEVICE]))


def _done(folder: Path, rehearsal: bool) -> set[str]:
    """A rehearsal does not stand for the run."""
    ends = [record for record in _read(folder)[DEVICE] if "end" in record]
    return {record["part"] for record in ends if record["end"] == "done" and record["rehearsal"] == rehearsal}


def _bad(record: Record) -> bool:
    """A part that has not come to its end, or tests that failed in one that has."""
    return record.get("end", "").startswith(("failed", "stopped", "not run")) or bool(record.get("failed"))


def _weight(part: str) -> float:
    return PARTS[part].seconds or 300.0


def _run(part: str, box: float, folder: Path, rehearse: bool) -> None:
    """One part to its end, which becomes a line of its own."""
    _forget(part, folder)
    start = time.monotonic()
    end = "not run: no time left" if box < LEAST else _outcome(part, box, folder, rehearse)
    seconds = round(time.monotonic() - start, 1)
    record = {"part": part, "end": end, "seconds": seconds, "box": round(box, 1), "rehearsal": rehearse}
    append(folder / DEVICE, record)
    print(f"{part:<12} {seconds:>6.1f} s of {box:.0f}  {end}", flush=True)


def _outcome(part: str, box: float, folder: Path, rehearse: bool) -> str:
    command = [sys.executable, "-m", "benchmarks.device_parts", part, "--out", str(folder.resolve())]
    command += ["--seconds", f"{box:.1f}", *(["--rehearse"] if rehearse else [])]
    settings = (
        os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"} | ({"TRITON_INTERPRET": "1"} if rehearse else {})
    )
    with (folder / LOG).open("a", encoding="utf-8") as log:
        print(f"\n===== {part} =====", file=log, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=settings, stdout=log, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )
        try:
            status = process.wait(box + GRACE)
        except subprocess.TimeoutExpired:
            return f"stopped after {box + GRACE:.0f} s"
        finally:
            _stop(process)
    if status == STOPPED:
        return "stopped: out of time"
    if status == UNAVAILABLE:
        return next(record["unavailable"] for record in _read(folder)[DEVICE][::-1] if "unavailable" in record)
    return "done" if status == 0 else f"failed: exit {status}, see {LOG}"


def _stop(process: subprocess.Popen) -> None:
    """It and what it started, which is one process group: a stopped part must not go on using the device."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _read(folder: Path) -> dict[str, list[Record]]:
    """The lines of each file; none where there is no file."""
    paths = {name: folder / name for name in (DEVICE, SPEED, INVARIANCE, PRECISION)}
    return {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        for name, path in paths.items()
    }


def _forget(part: str, folder: Path) -> None:
    """What an earlier try has left."""
    for name, records in _read(folder).items():
        kept = [record for record in records if record["part"] != part]
        if len(kept) < len(records):
            (folder / name).write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder")
    parser.add_argument("--parts", type=_parts, default=list(DEFAULT), help="names with commas between; see --list")
    parser.add_argument("--time-limit", type=float, default=540, help="seconds for all parts together (default 540)")
    parser.add_argument("--again", action="store_true", help="run parts that are done, too")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny shapes")
    parser.add_argument("--list", action="store_true", help="print the parts and their shares of the time")
    return parser


def _parts(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {', '.join(map(repr, unknown))}; there are {', '.join(PARTS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
