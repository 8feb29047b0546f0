"""How many rows a chunk holds: a pure function of the problem's size and the workspace."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

MIB = 1 << 20
# enough rows to keep the GEMMs near their peak, little enough to be forgotten beside the model
DEVICE_WORKSPACE = 1024 * MIB
CPU_WORKSPACE, CPU_WORKSPACE_MOST, CPU_ROWS = 64 * MIB, 128 * MIB, 256
# a GEMM tile: full tiles waste nothing
ROW_MULTIPLE = 128


@dataclass(frozen=True)
class ChunkPlan:
    """Consecutive chunks of `chunk_rows` rows."""

    rows: int
    chunk_rows: int
    retain: bool = False

    def __iter__(self) -> Iterator[slice]:
        return (slice(s, min(s + self.chunk_rows, self.rows)) for s in range(0, self.rows, self.chunk_rows))


def plan_chunks(rows: int, vocab: int, bytes_per_logit: int, workspace_bytes: int, row_multiple: int = 1) -> ChunkPlan:
    """The fewest equal chunks of a multiple of rows whose logits fit the workspace; one such multiple at least."""
    fitting = max(workspace_bytes // max(vocab * bytes_per_logit, 1) // row_multiple, 1) * row_multiple
    chunks = max(-(-rows // fitting), 1)
    even = _up(-(-rows // chunks), row_multiple)
    rounded = _up(even, ROW_MULTIPLE)
    return ChunkPlan(rows, max(rounded if rounded <= fitting else even, 1))


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def retain_dlogits(rows: int, hidden: int) -> bool:
    """One dW product over retained bf16 dlogits (2·T·V bytes), or re-read a float32 dW (4·V·H bytes) per chunk?"""
    return rows <= 2 * hidden


def workspace_bytes(device: torch.device, vocab: int, bytes_per_logit: int, requested: int | None) -> int:
    """What was asked for, or 1 GiB on an accelerator; on a CPU 64 MiB, and up to 128 to hold 256 rows."""
    if requested is not None:
        return requested
    if device.type != "cpu":
        return DEVICE_WORKSPACE
    return min(max(CPU_ROWS * vocab * bytes_per_logit, CPU_WORKSPACE), CPU_WORKSPACE_MOST)
