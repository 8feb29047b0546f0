"""Peak extra memory of one forward and backward, as the operating system sees it, in a fresh process.

As a program, `python -m benchmarks.memory INPUTS METHOD`: prints the bytes as JSON, or null where Linux's counters
are missing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.methods import METHODS
from benchmarks.workloads import Inputs, Shape, make_inputs

ROOT = Path(__file__).resolve().parent.parent
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def peak_in_fresh_process(inputs: Path, method: str) -> int | None:
    """Bytes at the peak of a call beyond those before it; the gradients handed back are among them."""
    command = [sys.executable, "-m", "benchmarks.memory", str(inputs), method]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def peak_here(inputs: Inputs, method: str) -> int | None:
    """The same in this process, whose allocator must not hold free pages yet."""
    prepare = METHODS[method].prepare
    prepare(make_inputs("random", Shape(64, 8, 64)))()  # loads libraries and starts thread pools
    torch.ones(512, 512) @ torch.ones(512, 512)
    return peak_of(prepare(inputs))


def peak_of(step: Callable[[], object]) -> int | None:
    """Bytes of this process at the peak of `step()` beyond those before it; None without Linux's counters."""
    if not CLEAR.exists():
        return None
    CLEAR.write_text(RESET_PEAK)
    before = _status_bytes("VmRSS")
    result = step()
    peak = _status_bytes("VmHWM") - before
    del result
    return peak


def _status_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(peak_here(Inputs.load(Path(sys.argv[1])), sys.argv[2])))
