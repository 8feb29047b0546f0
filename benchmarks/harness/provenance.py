"""The origin of a number: device, versions and commit, without paths and host names."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import drpo_kernels
from drpo_kernels.triton_support import triton

ROOT = Path(__file__).resolve().parents[2]
# A change elsewhere (README, results) does not change what is measured.
MEASURED = ("drpo_kernels", "benchmarks", "examples")
# This environment variable names the commit of a copy whose own repository, if there is one, does not know it.
COMMIT = "DRPO_COMMIT"
PACKAGES = ("transformers", "trl", "liger_kernel", "cut_cross_entropy", "nvidia_cutlass_dsl")


def provenance(command: str, device: torch.device | None = None) -> dict[str, object]:
    """Return the fields that every line of results has; `device` is a GPU where one is measured."""
    commit, changes = os.environ.get(COMMIT), None
    if commit is None:
        commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", *MEASURED)
    return {
        "device": describe(device or torch.device("cpu")),
        "versions": versions(),
        "commit": commit,
        "dirty": None if changes is None else changes != "",
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def describe(device: torch.device) -> dict[str, object]:
    host = {"cpu": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type != "cuda":
        return host
    properties = torch.cuda.get_device_properties(device)
    gpu = {"gpu": properties.name, "memory_bytes": properties.total_memory, "sms": properties.multi_processor_count}
    runtime = {"driver": _driver(), "cuda": torch.version.cuda, "hip": torch.version.hip}
    return gpu | runtime | host


def versions() -> dict[str, str | None]:
    """Return the version of each package, or None if it is not installed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "drpo_kernels": drpo_kernels.__version__,
        **{name: _installed(name) for name in PACKAGES},
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _driver() -> str | None:
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


def _git(*arguments: str) -> str | None:
    """Return git's output, or None outside a repository or without git."""
    return _output("git", *arguments)


def _output(*command: str) -> str | None:
    """Return a command's output, or None if the program is missing or fails."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
