"""The innermost loops of a compiled kernel, from its listing, and what one thread moves in an iteration of each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Access:
    """One instruction that reads or writes global memory; `store` or else a load."""

    bits: int  # by one thread
    store: bool


@dataclass(frozen=True)
class Instruction:
    """`address` orders the listing; `target` is where it may branch to."""

    address: int
    opcode: str
    target: int | None = None
    access: Access | None = None


@dataclass(frozen=True)
class Loop:
    """An iteration's accesses to global memory by one thread."""

    load_bytes: int
    store_bytes: int
    load_bits: int  # of the narrowest load, 0 without any
    store_bits: int


def innermost_loops(listing: Sequence[Instruction]) -> tuple[Loop, ...]:
    """Those that move something, in order. A branch backwards closes a loop: all that lies between, skipped or not."""
    ends: dict[int, int] = {}  # by head: several branches to one are one loop
    for instruction in listing:
        if instruction.target is not None and instruction.target < instruction.address:
            ends[instruction.target] = instruction.address
    spans = [(head, end) for head, end in ends.items() if not any(head < h and e <= end for h, e in ends.items())]
    loops = (_loop(listing, head, end) for head, end in sorted(spans))
    return tuple(loop for loop in loops if loop.load_bytes or loop.store_bytes)


def _loop(listing: Sequence[Instruction], head: int, end: int) -> Loop:
    accesses = [i.access for i in listing if head <= i.address <= end and i.access is not None]
    loads = [access.bits for access in accesses if not access.store]
    stores = [access.bits for access in accesses if access.store]
    return Loop(sum(loads) // 8, sum(stores) // 8, min(loads, default=0), min(stores, default=0))


# --- NVIDIA: `cuobjdump --dump-sass` ----------------------------------------------------------------------------------

SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def sass(text: str) -> Iterator[Instruction]:
    for address, opcode, operands in SASS.findall(text):
        base = opcode.split(".")[0]
        targets = re.findall(r"\b0x[0-9a-f]+", operands) if base in ("BRA", "JMP") else ()
        target = int(targets[-1], 16) if targets else None
        yield Instruction(int(address, 16), opcode, target, _sass_access(base, opcode))


def _sass_access(base: str, opcode: str) -> Access | None:
    if base in ("LDG", "LDGSTS"):
        return Access(_sass_bits(opcode), store=False)
    return Access(_sass_bits(opcode), store=True) if base == "STG" else None


def _sass_bits(opcode: str) -> int:
    """Width of an access such as LDG.E.128 or LDG.E.U16.CONSTANT; 32 bits where none is written."""
    widths = (re.fullmatch(r"[US]?(8|16|64|128|256)", part) for part in opcode.split("."))
    return next((int(width[1]) for width in widths if width), 32)


# --- AMD: assembly ----------------------------------------------------------------------------------------------------

# global_load_dwordx4, buffer_store_short_d16_hi, global_load_ubyte
GCN_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?[us]?(byte|short|dword(?:x\d)?)")
GCN_BITS = {"byte": 8, "short": 16, "dword": 32}


def amdgcn(text: str) -> Iterator[Instruction]:
    """Lines are addresses."""
    lines = text.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\.LBB\w+):", line))}
    for i, line in enumerate(lines):
        opcode, *operands = line.split() or ("",)
        target = labels[operands[0]] if opcode.startswith(("s_branch", "s_cbranch")) else None
        yield Instruction(i, opcode, target, _gcn_access(opcode))


def _gcn_access(opcode: str) -> Access | None:
    match = GCN_ACCESS.match(opcode)
    if match is None:
        return None
    return Access(GCN_BITS.get(match[2]) or 32 * int(match[2][-1]), store=match[1] == "store")
