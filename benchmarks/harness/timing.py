"""Several functions are timed interleaved in one process, so that a change of the machine's load meets all of them."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
# This many bytes are written before each sample on a GPU, more than its last-level cache.
FLUSH_BYTES = 512 << 20


def host_seconds(function: Callable) -> float:
    start = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - start
    del result  # its memory is freed outside the time
    return elapsed


class DeviceSeconds:
    """Seconds between two events on the device, whose caches are overwritten first. The host's part counts where it is
    late.
    """

    def __init__(self, device: torch.device):
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def flush(self) -> None:
        self._flush.zero_()

    def __call__(self, function: Callable) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        start.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end) / 1e3


def clock(device: torch.device) -> Callable[[Callable], float]:
    return DeviceSeconds(device) if device.type == "cuda" else host_seconds


def interleaved_seconds(
    functions: Mapping[Key, Callable],
    rounds: int,
    seconds_of: Callable[[Callable], float] = host_seconds,
    deadline: float = math.inf,
) -> dict[Key, list[float]]:
    """Take `rounds` samples of each function after one round to warm up. Every round starts with another function.

    No round is started after `deadline`, a time of `time.monotonic`.
    """
    names = list(functions)
    seconds: dict[Key, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # otherwise each collection below would walk all that exists now
    try:
        for number in range(rounds + 1):
            if time.monotonic() > deadline:
                break
            turn = number % max(len(names), 1)
            for name in names[turn:] + names[:turn]:
                gc.collect()
                elapsed = seconds_of(functions[name])
                if number:
                    seconds[name].append(elapsed)
    finally:
        gc.unfreeze()
    return seconds
