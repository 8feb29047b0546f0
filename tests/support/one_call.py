"""This finds what one call of the package passes through: its files, its functions, and how
deep they call each other.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import drpo_kernels

PACKAGE = Path(drpo_kernels.__file__).parent
# A frame with such a name counts as a part of the function that it stands in.
INNER = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<lambda>")


class Passage(NamedTuple):
    """`files` are relative to the package, and `deepest` is the largest stack of the package's own functions."""

    files: list[str]
    functions: list[str]
    deepest: list[str]


def passage(call: Callable[[], object]) -> Passage:
    """Run `call`, and return what it passes through. Run it once before, so that no import is counted."""
    stack: list[CodeType] = []
    deepest: list[CodeType] = []
    entered: set[CodeType] = set()

    def watch(frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)) or code.co_name in INNER:
            return
        if event == "return":
            stack.pop()
        elif event == "call":
            stack.append(code)
            entered.add(code)
            if len(stack) > len(deepest):
                deepest[:] = stack

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Passage(sorted({_file(code) for code in entered}), sorted(map(_name, entered)), list(map(_name, deepest)))


def _file(code: CodeType) -> str:
    return Path(code.co_filename).relative_to(PACKAGE).as_posix()


def _name(code: CodeType) -> str:
    return f"{_file(code)}:{code.co_firstlineno} {code.co_name}"
