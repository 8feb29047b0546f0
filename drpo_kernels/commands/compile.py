"""`python -m drpo_kernels compile`: every kernel, ahead of time, for every target, on a machine without a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drpo_kernels.aot.binaries import FAULTS, TARGETS, CompiledKernel, compile_case
from drpo_kernels.commands.table import TextTable
from drpo_kernels.triton_support import HAS_TRITON
from drpo_kernels.version import __version__

if TYPE_CHECKING:
    from drpo_kernels.aot.case import KernelCase

NUMBERS = (
    "regs", "local B", "spill ld/st", "shared B", "load bits", "store bits", "loop ld B", "ins/elem", "special/elem",
    "mma", "seconds",
)  # fmt: skip
DEFAULT_CASES = "drpo_kernels.aot.cases:kernel_cases"


def main(argv: Sequence[str]) -> int:
    """Compile, print the table, and return 1 if a kernel does not compile or its binary is not what is expected."""
    options = _parse(argv)
    if "TRITON_INTERPRET" in os.environ:
        return _run_without_interpreter(argv)
    if not HAS_TRITON:
        print("error: Triton is not installed", file=sys.stderr)
        return 2
    every = load_cases(options.cases)
    known = {start for case in every for start in case.targets}
    unknown = [target for target in options.targets if known and not target.startswith(tuple(known))]
    if unknown:
        families = sorted(start for start in known if not start.startswith(tuple(known - {start})))
        print(f"error: no tiles for {', '.join(unknown)}: a target begins with {', '.join(families)}", file=sys.stderr)
        return 2
    cases = [case for case in every if options.kernels in case.name]
    if not cases:
        print(f"error: no kernel's name contains {options.kernels!r}", file=sys.stderr)
        return 2

    start = time.perf_counter()
    compiled = list(_print_rows(cases, options.targets))
    if options.json:
        options.json.write_text(json.dumps(as_json(compiled), indent=2) + "\n")
    return _summarise(compiled, time.perf_counter() - start)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m drpo_kernels compile", description=__doc__)
    parser.add_argument(
        "--targets",
        default=",".join(TARGETS),
        type=lambda text: text.split(","),
        help="GPU architectures, separated by commas (default: %(default)s)",
    )
    parser.add_argument("--kernels", default="", metavar="TEXT", help="only the kernels whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    parser.add_argument(
        "--cases",
        default=DEFAULT_CASES,
        metavar="MODULE:FUNCTION",
        help="a function that returns KernelCases, for kernels or objectives of your own (default: %(default)s)",
    )
    return parser.parse_args(argv)


def load_cases(path: str) -> list[KernelCase]:
    """Call the function that "module:function" names."""
    module, _, function = path.partition(":")
    make: Callable[[], list[KernelCase]] = getattr(importlib.import_module(module), function)
    return make()


def as_json(compiled: Iterable[CompiledKernel]) -> dict[str, object]:
    import triton

    kernels = [_kernel_as_json(kernel) for kernel in compiled]
    versions = {"drpo_kernels": __version__, "triton": triton.__version__, "python": platform.python_version()}
    return {"versions": versions, "kernels": kernels}


def _kernel_as_json(kernel: CompiledKernel) -> dict[str, Any]:
    """With what each loop takes for an element, in the order of `usage.loops`; None where it loads none."""
    fields = dataclasses.asdict(kernel)
    for loop, found in zip(fields["usage"]["loops"], kernel.usage.loops, strict=True):
        cost = found.per_element(kernel.element_bytes)
        loop["per_element"] = cost and dict(zip(("instructions", "special"), cost, strict=True))
    return {**fields, "status": kernel.status}


def _run_without_interpreter(argv: Sequence[str]) -> int:
    """Kernels decorated under TRITON_INTERPRET cannot be compiled any more: start again without it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", "drpo_kernels", "compile", *argv], env=environment).returncode


def _print_rows(cases: Sequence[KernelCase], targets: Sequence[str]) -> Iterator[CompiledKernel]:
    """Compile one by one and print each row when it is known: a whole table takes minutes."""
    names = max(len(case.name) for case in cases), max(map(len, targets)), max(map(len, (*FAULTS, "FAILED")))
    numbers = (max(len(header), 7) for header in NUMBERS)
    table = TextTable(("kernel", "target", "status", *NUMBERS), (*names, *numbers), left=3)
    print(table.header())
    for case in cases:
        for target in targets:
            if not case.launched_on(target):
                continue
            kernel = compile_case(case, target)
            print(table.row(_cells(kernel)), flush=True)
            yield kernel


def _cells(kernel: CompiledKernel) -> tuple[object, ...]:
    use, seconds = kernel.usage, f"{kernel.seconds:.1f}"
    if kernel.error:
        return (kernel.name, kernel.target, kernel.status, *["-"] * (len(NUMBERS) - 1), seconds)
    spills = f"{use.spill_loads}/{use.spill_stores}"
    widths = use.load_bits, use.store_bits, use.loop_load_bytes
    costs = ("-", "-") if kernel.per_element is None else (f"{cost:.2f}" for cost in kernel.per_element)
    numbers = (use.registers, use.local_bytes, spills, use.shared_bytes, *widths, *costs, use.mma or "-")
    return (kernel.name, kernel.target, kernel.status, *numbers, seconds)


def _summarise(compiled: Sequence[CompiledKernel], seconds: float) -> int:
    failed = [kernel for kernel in compiled if kernel.error]
    for kernel in failed:
        print(f"\n{kernel.name} for {kernel.target}:\n{kernel.error}")
    for kernel in compiled:
        for why in kernel.faults.values():
            print(f"\n{kernel.name} for {kernel.target} {why}")
    counts = {fault: sum(fault in kernel.faults for kernel in compiled) for fault in FAULTS}
    found = ", ".join(f"{counts[fault]} {words}" for fault, words in FAULTS.items())
    print(f"\n{len(compiled)} kernels in {seconds:.0f} s: {len(failed)} failed, {found}")
    return 1 if failed or any(counts.values()) else 0
