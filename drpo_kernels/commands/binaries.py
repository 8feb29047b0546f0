"""Compile a kernel for a GPU that is not there, and read from the binary what it costs on that GPU.

NVIDIA: `cuobjdump`, which Triton's wheel ships, gives registers and stack; the SASS gives the memory instructions.
AMD: the assembly carries its own metadata. Nothing here needs a GPU or a driver, only a process without
TRITON_INTERPRET, in which Triton's decorators would have replaced the compiler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drpo_kernels.backends.triton.aot import KernelCase

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

    @property
    def spills(self) -> bool:
        return bool(self.local_bytes or self.spill_loads or self.spill_stores)


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one target; `error` says why there is no binary."""

    name: str
    target: str
    seconds: float
    usage: Usage = Usage()
    error: str | None = None

    @property
    def status(self) -> str:
        return "FAILED" if self.error else "SPILLS" if self.usage.spills else "ok"


def compile_case(case: KernelCase, target: str) -> CompiledKernel:
    """Compile `case` for `target` ("sm_90", "gfx942") afresh, never from Triton's cache."""
    import triton

    triton.knobs.compilation.always_compile = True
    start = time.perf_counter()
    try:
        binary = triton.compile(case.source(), target=gpu_target(target), options=case.launch_options())
    except Exception as error:  # whatever a compiler stage raises belongs in the table; the other cases go on
        return CompiledKernel(case.name, target, time.perf_counter() - start, error=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    return CompiledKernel(case.name, target, seconds, read_usage(binary))


def gpu_target(name: str) -> Any:
    """Triton's description of a GPU, from the name that its vendor gives the architecture."""
    from triton.backends.compiler import GPUTarget

    if match := re.fullmatch(r"sm_(\d+)", name):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx9\w+", name):
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
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
    return Usage(
        registers=registers,
        local_bytes=stack + local,
        spill_loads=sum(opcode.split(".")[0] == "LDL" for opcode in opcodes),
        spill_stores=sum(opcode.split(".")[0] == "STL" for opcode in opcodes),
        load_bits=_widest_sass(opcodes, {"LDG", "LDGSTS"}),
        store_bits=_widest_sass(opcodes, {"STG"}),
        mma=next((name for name in (opcode.split(".")[0] for opcode in opcodes) if name.endswith("MMA")), ""),
    )


def _widest_sass(opcodes: list[str], bases: set[str]) -> int:
    return max((_sass_bits(opcode) for opcode in opcodes if opcode.split(".")[0] in bases), default=0)


def _sass_bits(opcode: str) -> int:
    """Width of an access such as LDG.E.128 or LDG.E.U16.CONSTANT; 32 bits where none is written."""
    widths = (re.fullmatch(r"[US]?(8|16|64|128|256)", part) for part in opcode.split("."))
    return next((int(width[1]) for width in widths if width), 32)


def parse_amdgcn(text: str) -> Usage:
    """Usage from AMD assembly. Only scratch is memory: scalars spill into vector registers, those into AGPRs first."""

    def field(name: str) -> int:
        match = re.search(rf"^\s*\.{name}:\s+(\d+)", text, re.MULTILINE)
        if match is None:
            raise ValueError(f"the assembly's metadata has no .{name}")
        return int(match[1])

    return Usage(
        registers=field("vgpr_count"),  # on CDNA this includes the AGPRs
        local_bytes=field("private_segment_fixed_size"),
        spill_loads=len(re.findall(r"^\s*scratch_load_", text, re.MULTILINE)),
        spill_stores=len(re.findall(r"^\s*scratch_store_", text, re.MULTILINE)),
        load_bits=_widest_amdgcn(text, "load"),
        store_bits=_widest_amdgcn(text, "store"),
        mma="v_mfma" if re.search(r"^\s*v_mfma_", text, re.MULTILINE) else "",
    )


def _widest_amdgcn(text: str, access: str) -> int:
    """Widest access among instructions such as global_load_dwordx4, buffer_store_short_d16_hi, global_load_ubyte."""
    kinds = re.findall(rf"^\s*(?:global|buffer|flat)_{access}_[us]?(byte|short|dword(?:x\d)?)", text, re.MULTILINE)
    bits = {"byte": 8, "short": 16, "dword": 32}
    return max((bits.get(kind) or 32 * int(kind[-1]) for kind in kinds), default=0)
