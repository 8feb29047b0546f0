"""`python -m drpo_kernels doctor`: what this machine has, which backend will run and why, and whether it is right."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence

import torch

from drpo_kernels.backends import choose_backend
from drpo_kernels.commands.selfcheck import BUDGETS, CASES, MEASURES, run_checks
from drpo_kernels.commands.table import TextTable
from drpo_kernels.triton_support import HAS_TRITON, INTERPRETING
from drpo_kernels.version import __version__

BACKENDS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(argv: Sequence[str]) -> int:
    """Print the report and the self-check; return 1 if a backend disagrees with the reference."""
    parser = argparse.ArgumentParser(prog="python -m drpo_kernels doctor", description=__doc__)
    parser.add_argument("--only", choices=BACKENDS, help="skip the report and check one backend only")
    options = parser.parse_args(argv)
    if options.only:
        return 0 if self_check([options.only]) else 1
    print("\n".join(environment()), end="\n\n")
    print("\n".join(choices()), end="\n\n")
    healthy = self_check(BACKENDS)
    if _triton_needs_interpreter():
        healthy &= _check_interpreted()
    print("\nall comparisons within budget" if healthy else "\nSELF-CHECK FAILED: please report everything above")
    return 0 if healthy else 1


def environment() -> Iterator[str]:
    """The versions and devices of this machine, one line each."""
    versions, builds = torch.version, []
    builds += [f"CUDA {versions.cuda}"] if versions.cuda else []
    builds += [f"ROCm {versions.hip}"] if versions.hip else []
    facts = {
        "drpo_kernels": __version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}, built for {' and '.join(builds) or 'CPU only'}",
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "not set"),
        **{str(device): _describe(device) for device in devices()},
    }
    yield from (f"{name:<16}  {fact}" for name, fact in facts.items())


def devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def _version(module: str) -> str:
    """The version that the module states, because builds of PyTorch bring Triton under several distribution names."""
    return importlib.import_module(module).__version__ if importlib.util.find_spec(module) else "not installed"


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    found = torch.cuda.get_device_properties(device)
    architecture = found.gcnArchName if torch.version.hip else f"sm_{found.major}{found.minor}"
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
    return f"{found.name}, {architecture}, {free:.1f} of {total:.1f} GiB free"


def choices() -> Iterator[str]:
    """What `backend=None` means for each device and dtype, and why."""
    table = TextTable(("device", "dtype", "backend", "because"), widths=(6, 8, 7, 7), left=4)
    yield table.header()
    for device in devices():
        for dtype in DTYPES:
            choice = choose_backend(None, device, dtype)
            yield table.row((device, _short(dtype), choice.name, choice.reason))
    for device in devices():
        if obstacle := _obstacle("triton", device):
            yield f"on {device}, {obstacle}"


def self_check(backends: Iterable[str]) -> bool:
    """Compare the backends with the reference on every device where they run; True if all are within budget."""
    widths = (6, 7, max(map(len, CASES)), 8, 7, 7, 7, 7, 4)
    table = TextTable(("device", "backend", "objective", "dtype", *MEASURES, ""), widths, left=4)
    print(table.header())
    runnable = [(b, d) for d in devices() for b in backends if not _obstacle(b, d)]
    results = [_check_one(table, backend, device) for backend, device in runnable]  # a list, to run all after a failure
    for dtype, budget in BUDGETS.items():
        print(table.row(("budget", "", "", _short(dtype), *map("{:.1e}".format, budget), "")))
    return all(results)


def _check_one(table: TextTable, backend: str, device: torch.device) -> bool:
    healthy = True
    try:
        for check in run_checks(backend, device):
            cells = (device, backend, check.objective, _short(check.dtype), *map("{:.1e}".format, check.errors))
            print(table.row((*cells, "ok" if check.passed else "FAIL")), flush=True)
            healthy &= check.passed
    except Exception:  # the failure of a compiler or driver is reported, and the other backends are still checked
        traceback.print_exc(file=sys.stdout)
        return False
    return healthy


def _obstacle(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on `device`, or None."""
    try:
        choose_backend(backend, device, torch.float32)
    except RuntimeError as error:
        return str(error)
    return None


def _triton_needs_interpreter() -> bool:
    return HAS_TRITON and not INTERPRETING and not torch.cuda.is_available()


def _check_interpreted() -> bool:
    """Check Triton's interpreter in another process, because Triton chooses it when a kernel is decorated."""
    if importlib.util.find_spec("numpy") is None:
        print("\nTriton not checked: its interpreter needs NumPy")
        return True
    print("\nTriton in its interpreter, in a process with TRITON_INTERPRET=1:", flush=True)
    command = [sys.executable, "-m", "drpo_kernels", "doctor", "--only", "triton"]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode == 0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
