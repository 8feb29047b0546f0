"""Start programs of one or several processes, end them as a whole, and read what their cases report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A launch takes 15 to 30 s on two idle cores. A launch that hangs must not stop the suite.
TIMEOUT = 240


def older(package: str, *release: int) -> bool:
    """Return whether the package is installed in a release before (major, minor)."""
    try:
        return tuple(int(n) for n in importlib.metadata.version(package).split(".")[:2]) < release
    except importlib.metadata.PackageNotFoundError:
        return False


INTERPRETER_FAILS = older("triton", 3, 9) and not older("numpy", 2, 4)
WHY = "the interpreter of Triton before 3.9 runs no kernel on NumPy 2.4 and later"


def launch(*words: str, **environment: str) -> tuple[int, str]:
    """Run `python -m words...` in a session of its own, so that a time-out ends all of it. Return (status, output)."""
    folders = [ROOT, ROOT / "tests" / "support"]
    paths = [*map(str, folders), os.environ.get("PYTHONPATH")]
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(
        [sys.executable, "-m", *words], env=os.environ | environment | settings, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun then ends its workers, which have sessions of their own
        try:
            output, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        pytest.fail(f"still running after {TIMEOUT} s: {' '.join(words)}\n{output[-3000:]}")
    return process.returncode, output


def torchrun(processes: int, worker: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run a worker of this folder in several processes, and return (status, output)."""
    # --standalone makes the processes meet on a free port, so that launches do not collide
    command = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return launch(*command, str(Path(__file__).with_name(worker)), *arguments, **environment)


def assert_cases_pass(report: Path, status: int, output: str, at_least: int) -> None:
    """Assert that the worker's report, {case: what went wrong or None}, names no failure."""
    assert report.exists(), f"exit status {status}, no report:\n{output[-4000:]}"
    results = json.loads(report.read_text())
    failures = {name: error for name, error in results.items() if error is not None}
    assert not failures, f"{len(failures)} of {len(results)} cases:\n" + "\n".join(
        f"{name}: {error}" for name, error in failures.items()
    )
    assert status == 0, output[-4000:]
    assert len(results) >= at_least
