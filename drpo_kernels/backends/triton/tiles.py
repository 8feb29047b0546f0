"""Tile choice: a pure function of the row's width and element size."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RowTile:
    """`block` logits per loop iteration of one row's program, by `num_warps` warps."""

    block: int
    num_warps: int


def row_tile(vocab: int, itemsize: int) -> RowTile:
    """Eight elements per thread: two 16-byte loads of fp32 or one of bf16 in flight, and accumulators that leave two programs per SM."""
    block = max(16, min(1 << (max(vocab, 1) - 1).bit_length(), 4096 if itemsize == 4 else 8192))
    return RowTile(block, max(1, min(16, block // 256)))
