"""The innermost loops of a compiled kernel, from its listing: what one thread moves and executes in an iteration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PADDING = re.compile(r"NOP\b|s_nop\b")


@dataclass(frozen=True)
class Access:
    """One instruction that reads or writes global memory; `store` or else a load."""

    bits: int  # by one thread
    store: bool
    predicated: bool = False


@dataclass(frozen=True)
class Instruction:
    """`address` orders the listing; `target` is where it may branch to; `special`: for the special-function unit."""

    address: int
    opcode: str
    target: int | None = None
    access: Access | None = None
    special: bool = False


@dataclass(frozen=True)
class Loop:
    """An iteration's accesses to global memory by one thread, and its instructions, skipped or not."""

    load_bytes: int
    store_bytes: int
    load_bits: int  # of the narrowest load, 0 without any
    store_bits: int
    instructions: int = 0
    special: int = 0
    masked: bool = False  # some load is under a condition: the tail of a row

    def per_element(self, element_bytes: int) -> tuple[float, float] | None:
        """(instructions, special-function ones) for an element of so many bytes; None where none is loaded.

        Elements are counted by the bytes that the loop loads, not by the kernel's block: a compiler may unroll it. One
        that loads an element twice looks half as costly, but is a fault of its own.
        """
        elements = self.load_bytes / element_bytes if element_bytes else 0
        return (self.instructions / elements, self.special / elements) if elements else None


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
    body = [i for i in listing if head <= i.address <= end and not PADDING.match(i.opcode)]
    moves = [(i.address, i.access) for i in body if i.access is not None]
    loads = [access.bits for _, access in moves if not access.store]
    stores = [access.bits for _, access in moves if access.store]
    skips = [(i.address, i.target) for i in body if i.target is not None and i.address < i.target <= end]
    masked = any(
        access.predicated or any(start < address < target for start, target in skips)
        for address, access in moves
        if not access.store
    )
    return Loop(
        load_bytes=sum(loads) // 8,
        store_bytes=sum(stores) // 8,
        load_bits=min(loads, default=0),
        store_bits=min(stores, default=0),
        instructions=len(body),
        special=sum(i.special for i in body),
        masked=masked,
    )


# --- NVIDIA: `cuobjdump --dump-sass` ----------------------------------------------------------------------------------

SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def sass(text: str) -> Iterator[Instruction]:
    for address, predicate, opcode, operands in SASS.findall(text):
        base = opcode.split(".")[0]
        targets = re.findall(r"\b0x[0-9a-f]+", operands) if base in ("BRA", "JMP") else ()
        target = int(targets[-1], 16) if targets else None
        access = None
        if base in ("LDG", "LDGSTS", "STG"):
            access = Access(_sass_bits(opcode), base == "STG", bool(predicate))
        yield Instruction(int(address, 16), opcode, target, access, base == "MUFU")


def _sass_bits(opcode: str) -> int:
    """Width of an access such as LDG.E.128 or LDG.E.U16.CONSTANT; 32 bits where none is written."""
    widths = (re.fullmatch(r"[US]?(8|16|64|128|256)", part) for part in opcode.split("."))
    return next((int(width[1]) for width in widths if width), 32)


# --- AMD: assembly ----------------------------------------------------------------------------------------------------

# global_load_dwordx4, buffer_store_short_d16_hi, global_load_ubyte
GCN_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?[us]?(byte|short|dword(?:x\d)?)")
GCN_BITS = {"byte": 8, "short": 16, "dword": 32}
GCN_SPECIAL = re.compile(r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_")


def amdgcn(text: str) -> Iterator[Instruction]:
    """Lines are addresses; those of labels, directives and comments hold no instruction."""
    lines = text.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\.LBB\w+):", line))}
    for i, line in enumerate(lines):
        if (match := re.match(r"\s+([a-z]\w*)\s*(\S*)", line)) is None:
            continue
        opcode, operand = match.groups()
        target = labels[operand] if opcode.startswith(("s_branch", "s_cbranch")) else None
        yield Instruction(i, opcode, target, _gcn_access(opcode), GCN_SPECIAL.match(opcode) is not None)


def _gcn_access(opcode: str) -> Access | None:
    match = GCN_ACCESS.match(opcode)
    if match is None:
        return None
    return Access(GCN_BITS.get(match[2]) or 32 * int(match[2][-1]), store=match[1] == "store")
