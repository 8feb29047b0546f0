"""Peak extra memory of one forward and backward, from the allocator on a GPU and from the operating system on a CPU.

`python -m benchmarks.harness.memory INPUTS METHOD` prints the bytes on the CPU as JSON, or null where Linux's counters
are missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness.workloads import Inputs

ROOT = Path(__file__).resolve().parents[2]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
# glibc keeps freed blocks below a threshold that it raises by itself. Fixed at 64 KiB, a warm process gives all back.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}


def peak_in_fresh_process(inputs: Inputs, method: str) -> int | None:
    """Return the bytes at the peak of a warm call on the CPU beyond those before it, including the gradients handed
    back.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "inputs.pt")
        torch.save(vars(inputs), saved)
        command = [sys.executable, "-m", "benchmarks.harness.memory", str(saved), method]
        environment = os.environ | RETURN_FREED
        run = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def peak_of(step: Callable[[], object]) -> int | None:
    """Return the bytes of this process at the peak of `step()` beyond those before it, or None without Linux's
    counters.
    """
    if not CLEAR.exists():
        return None
    CLEAR.write_text(RESET_PEAK)
    before = _status_bytes("VmRSS")
    result = step()
    peak = _status_bytes("VmHWM") - before
    del result
    return peak


def peak_on_device(step: Callable[[], object], device: torch.device) -> int:
    """Return the bytes allocated on a GPU at the peak of `step()`, which has run before, beyond those before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def _status_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(inputs: str, method: str) -> None:
    from benchmarks.harness.methods import METHODS

    step = METHODS[method].prepare(Inputs(**torch.load(inputs)))
    step()  # this loads libraries, starts thread pools and compiles
    print(json.dumps(peak_of(step)))


if __name__ == "__main__":
    main(*sys.argv[1:])
