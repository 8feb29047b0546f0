"""Compile a kernel for a GPU that is not there, and read from the binary what it costs on that GPU.

NVIDIA: `cuobjdump`, which Triton's wheel ships, gives registers and stack; the SASS gives the memory instructions.
AMD: the assembly carries its own metadata. Nothing here needs a GPU or a driver, only a process without
TRITON_INTERPRET, in which Triton's decorators would have replaced the compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drpo_kernels.aot.loops import Instruction, Loop, amdgcn, innermost_loops, sass
from drpo_kernels.backends.devices import ARCHITECTURES

if TYPE_CHECKING:
    from drpo_kernels.aot.case import Bounds, Expected, KernelCase

# status -> what so many kernels do
FAULTS = {
    "SPILLS": "spill to local memory",
    "SHARED": "ask for more shared memory than there is",
    "NARROW": "access memory in small pieces",
    "RELOADS": "load an element twice",
    "SLOW": "take too many instructions for an element",
    "SPECIAL": "take too many special-function ones",
    "REGISTERS": "take too many registers",
}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Usage:
    """What one thread (registers, local memory) and one block (shared memory) of a compiled kernel use."""

    registers: int = 0
    local_bytes: int = 0  # per thread: stack frame and spills, in memory behind L1 and L2
    spill_loads: int = 0  # instructions that read local memory
    spill_stores: int = 0
    shared_bytes: int = 0
    load_bits: int = 0  # widest access to global memory by one thread; 0 if there is none
    store_bits: int = 0
    mma: str = ""  # the matrix instruction: HMMA (warps), HGMMA (warpgroups), UTCHMMA (tensor memory), v_mfma; or none
    loops: tuple[Loop, ...] = ()  # the innermost ones

    @property
    def loop_load_bytes(self) -> int:
        """The most that a thread loads in an iteration."""
        return max((loop.load_bytes for loop in self.loops), default=0)


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one target; `error` says why there is no binary, `faults` what is wrong with it: word -> why."""

    name: str
    target: str
    seconds: float
    usage: Usage = Usage()
    element_bytes: int = 0  # of what a row kernel loads for one element; 0: no row kernel
    error: str | None = None
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> str:
        return "FAILED" if self.error else next(iter(self.faults), "ok")

    @property
    def per_element(self) -> tuple[float, float] | None:
        """(instructions, special-function ones) for an element in the costliest whole loop of a row kernel."""
        return max(whole_loops(self.usage, self.element_bytes).values(), default=None)


def whole_loops(usage: Usage, element_bytes: int) -> dict[Loop, tuple[float, float]]:
    """A row kernel's loops over whole blocks, hence without a mask, and what each takes for an element."""
    costs = {loop: loop.per_element(element_bytes) for loop in usage.loops if not loop.masked}
    return {loop: cost for loop, cost in costs.items() if cost is not None}


def compile_case(case: KernelCase, target: str) -> CompiledKernel:
    """Compile `case` for `target` ("sm_90", "gfx942") afresh, never from Triton's cache."""
    import triton
    from triton import knobs

    knobs.compilation.always_compile = True
    start = time.perf_counter()
    try:
        binary = triton.compile(case.source(), target=gpu_target(target), options=case.launch_options())
    except Exception as error:  # whatever a compiler stage raises belongs in the table; the other cases go on
        reason = f"{type(error).__name__}: {error}" + (f"\n{error.__cause__}" if error.__cause__ else "")
        return CompiledKernel(case.name, target, time.perf_counter() - start, error=reason)
    seconds = time.perf_counter() - start
    usage, expected = read_usage(binary), case.expected
    found = dict(faults(expected, target, usage))
    return CompiledKernel(case.name, target, seconds, usage, expected.element_bytes, faults=found)


def faults(expected: Expected, target: str, usage: Usage) -> Iterator[tuple[str, str]]:
    """(status, why) of everything in which the binary falls short."""
    if usage.local_bytes > expected.local_bytes:
        yield "SPILLS", "spills to local memory: a smaller block or more warps would help"
    shared = ARCHITECTURES[target].shared_memory_bytes if target in ARCHITECTURES else usage.shared_bytes
    if usage.shared_bytes > shared:
        yield "SHARED", f"asks for {usage.shared_bytes} bytes of shared memory, where a block has {shared}"
    bits = expected.load_bits, expected.store_bits
    narrow = [x for x in usage.loops if 0 < x.load_bits < bits[0] or 0 < x.store_bits < bits[1]]
    if len(narrow) > expected.tails or usage.load_bits < bits[0] or usage.store_bits < bits[1]:
        shown = narrow or (usage.load_bits, usage.store_bits)
        yield "NARROW", f"accesses memory in less than {bits[0]} (loads) or {bits[1]} (stores) bits: {shown}"
    most = expected.loop_load_bytes
    if most is not None and (found := max(_reloaded(expected, most, usage.loops), default=0)):
        yield "RELOADS", f"loads {found} bytes per thread and iteration, where {most} are enough"
    if expected.bounds is not None and target in expected.bounds.targets:
        yield from _exceeded(expected.bounds, usage, whole_loops(usage, expected.element_bytes))


def _reloaded(expected: Expected, most: int, loops: Sequence[Loop]) -> Iterator[int]:
    """What each loop that loads more than `most` bytes in an iteration loads there.

    A compiler may unroll a loop that stores nothing, which then computes as many more exponentials. A loop that
    computes none beside others that do is not looked at: it takes a maximum, and may be unrolled at will.
    """
    elements = most // expected.element_bytes if expected.element_bytes else 0
    exponentials = elements * (expected.bounds.special if expected.bounds else 1)
    computing = [loop for loop in loops if loop.special] if elements else []
    for loop in computing or loops:
        unrolled = max(loop.special // exponentials, 1) if elements and not loop.store_bytes else 1
        if loop.load_bytes > most * unrolled:
            yield loop.load_bytes


def _exceeded(bounds: Bounds, usage: Usage, loops: dict[Loop, tuple[float, float]]) -> Iterator[tuple[str, str]]:
    slow = []
    for stores, what, allowed in ((False, "loads alone", bounds.reading), (True, "loads and stores", bounds.writing)):
        if allowed is None:
            continue
        found = [instructions for loop, (instructions, _) in loops.items() if (loop.store_bytes > 0) == stores]
        if not found:  # then the bound holds nothing
            slow.append(f"has no loop over whole blocks that {what}")
        elif max(found) > allowed:
            takes = f"takes {max(found):.2f} instructions per element in a loop that {what}"
            slow.append(f"{takes}, where {allowed:g} are allowed")
    if slow:
        yield "SLOW", "; ".join(slow)
    special = max((special for _, special in loops.values()), default=0)
    if special > bounds.special:
        takes = f"takes {special:.2f} special-function instructions per element"
        yield "SPECIAL", f"{takes}, where {bounds.special:g} are allowed"
    if bounds.registers is not None and usage.registers > bounds.registers:
        yield "REGISTERS", f"takes {usage.registers} registers per thread, where {bounds.registers} are allowed"


def gpu_target(name: str) -> Any:
    """Triton's description of a GPU, from the name that its vendor gives the architecture."""
    from triton.backends.compiler import GPUTarget

    if match := re.fullmatch(r"sm_(\d+)", name):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx9\w+", name):
        # its assembly is what is read, and the wheel of Triton 3.4 has no linker: `true` leaves the binary empty
        os.environ.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true") or "")
        return GPUTarget("hip", name, 64)  # CDNA: 64 lanes in a wavefront
    raise ValueError(f"target {name!r} is neither an NVIDIA sm_<number> nor an AMD gfx9<...>")


def read_usage(binary: Any) -> Usage:
    """Usage of a `triton.compiler.CompiledKernel`."""
    if "cubin" in binary.asm:
        usage = parse_cuobjdump(_cuobjdump(binary.asm["cubin"]))
    else:
        usage = parse_amdgcn(binary.asm["amdgcn"])
    return replace(usage, shared_bytes=binary.metadata.shared)  # dynamic, so in neither vendor's listing


def _cuobjdump(cubin: bytes) -> str:
    """Resource usage and SASS of a cubin, as text."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = knobs.nvidia.cuobjdump.path
        calls = ([tool, option, str(path)] for option in ("-res-usage", "--dump-sass"))
        return "\n".join(subprocess.run(call, check=True, capture_output=True, text=True).stdout for call in calls)


def parse_cuobjdump(text: str) -> Usage:
    """Usage from the output of `cuobjdump -res-usage` followed by that of `cuobjdump --dump-sass`."""
    resources = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if resources is None:
        raise ValueError("cuobjdump printed no resource usage")
    registers, stack, local = map(int, resources.groups())
    instructions = list(sass(text))
    opcodes = [instruction.opcode for instruction in instructions]
    return Usage(
        registers=registers,
        local_bytes=stack + local,
        spill_loads=sum(opcode.split(".")[0] == "LDL" for opcode in opcodes),
        spill_stores=sum(opcode.split(".")[0] == "STL" for opcode in opcodes),
        load_bits=_widest(instructions, store=False),
        store_bits=_widest(instructions, store=True),
        mma=next((name for name in (opcode.split(".")[0] for opcode in opcodes) if name.endswith("MMA")), ""),
        loops=innermost_loops(instructions),
    )


def _widest(instructions: list[Instruction], store: bool) -> int:
    accesses = (i.access for i in instructions if i.access is not None)
    return max((access.bits for access in accesses if access.store == store), default=0)


def parse_amdgcn(text: str) -> Usage:
    """Usage from AMD assembly. Only scratch is memory: scalars spill into vector registers, those into AGPRs first."""

    def metadata(name: str) -> int:
        match = re.search(rf"^\s*\.{name}:\s+(\d+)", text, re.MULTILINE)
        if match is None:
            raise ValueError(f"the assembly's metadata has no .{name}")
        return int(match[1])

    instructions = list(amdgcn(text))
    return Usage(
        registers=metadata("vgpr_count"),  # on CDNA this includes the AGPRs
        local_bytes=metadata("private_segment_fixed_size"),
        spill_loads=sum(instruction.opcode.startswith("scratch_load") for instruction in instructions),
        spill_stores=sum(instruction.opcode.startswith("scratch_store") for instruction in instructions),
        load_bits=_widest(instructions, store=False),
        store_bits=_widest(instructions, store=True),
        mma="v_mfma" if any(instruction.opcode.startswith("v_mfma") for instruction in instructions) else "",
        loops=innermost_loops(instructions),
    )
