"""Tile choice: a pure function of the row's width and element size."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RowTile:
    """`block` logits per loop iteration of one row's program, by `num_warps` warps."""

    block: int
    num_warps: int


def row_tile(vocab: int, itemsize: int) -> RowTile:
    """Two 16-byte loads per thread and iteration, 8 fp32 or 16 bf16 elements: their accumulators do not spill."""
    widest = 2048 if itemsize >= 4 else 4096
    block = max(16, min(1 << (max(vocab, 1) - 1).bit_length(), widest))
    return RowTile(block, max(1, min(8, block // 256)))
