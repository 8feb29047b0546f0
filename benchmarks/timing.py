"""Times of several functions, interleaved in one process, so that a change of the machine's load meets all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping


def interleaved_seconds(
    functions: Mapping[str, Callable], rounds: int, after_each: Callable[[], None]
) -> dict[str, list[float]]:
    """`rounds` samples of each function after one round to warm up; every round starts with another function."""
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            start = time.perf_counter()
            result = functions[name]()
            elapsed = time.perf_counter() - start
            del result  # freed outside the time
            if number:
                seconds[name].append(elapsed)
            after_each()
    return seconds
