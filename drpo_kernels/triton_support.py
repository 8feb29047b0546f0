"""Triton if the platform has it, and stand-ins for its decorators if not.

Objectives keep their Triton twin beside their PyTorch formula, so `objectives.py` must import on machines without
Triton too (macOS, Windows). There `jit` returns the function unchanged. Nothing calls it, because the Triton backend
refuses to run.
"""

from enum import IntEnum
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton import knobs

    HAS_TRITON = True
    # Triton reads TRITON_INTERPRET when a kernel is decorated, so it must be set before this package is imported.
    INTERPRETING = knobs.runtime.interpret
    jit = triton.jit  # pyright: ignore[reportAssignmentType]
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)  # as annotations of arguments and for constants
    HAS_TRITON = INTERPRETING = False

    def jit(function: Any = None, **_: object) -> Any:
        return jit if function is None else function


def constants(names: type[IntEnum]) -> tuple[Any, ...]:
    """The values of an enumeration as constants that a kernel may use: it can read no other global number."""
    return tuple(tl.constexpr(int(name)) for name in names)


__all__ = ["HAS_TRITON", "INTERPRETING", "constants", "jit", "tl", "triton"]
