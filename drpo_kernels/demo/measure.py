"""Time and memory of a function, on the CPU or a CUDA device."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def median_times(functions: Sequence[Callable], device: torch.device, repeats: int) -> tuple[float, ...]:
    """The median seconds of each function over `repeats` interleaved calls. The functions must be warm."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, times in zip(functions, seconds, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            function()
            _synchronize(device)
            times.append(time.perf_counter() - start)
    return tuple(statistics.median(times) for times in seconds)


def peak_extra_bytes(function: Callable, device: torch.device) -> int:
    """The most memory that PyTorch held during a call beyond what it held before the call; results are included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(_held_bytes(function), default=0)


def _held_bytes(function: Callable) -> list[int]:
    """Bytes held by PyTorch's CPU allocator after each allocation and release during a call, from the profiler's trace.

    Unlike the resident size of the process, they do not depend on malloc's caching and are the same in every run.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's messages on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    held, total = [], 0
    for change in sorted(changes, key=lambda event: event["ts"]):
        total += change["args"]["Bytes"]
        held.append(total)
    return held


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
