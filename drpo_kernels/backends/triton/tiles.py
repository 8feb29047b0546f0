"""Tile choice: pure functions of the row's width, the element size and the device's shared memory."""

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


@dataclass(frozen=True)
class MatmulTile:
    """One program's part of a product, `rows` x `columns`, `depth` of the inner dimension per step; `num_stages` steps
    are in flight. `group` tiles of rows walk the columns together.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    group: int = 8


LEAST_SHARED_MEMORY = 64 * 1024  # gfx942's


def matmul_tile(itemsize: int, stored: int, shared_bytes: int, accumulates: bool) -> MatmulTile:
    """A function of the dtypes and the device, never of a shape: the order of the sums must not follow the batch.

    itemsize  of what is multiplied; `stored` of the widest operand in memory, rounded on its way to the product
    accumulates  whether the totals are read back first, whose addresses take registers beside them

    16-bit operands: 128 x 256 is two warpgroups' wgmma on sm_90, 128 fp32 totals a thread, and its stages take 144 KiB
    of shared memory (96 on sm_80, of 163); totals that are read back would spill, so there 128 x 128. Wider operands in
    memory, or less room (sm_86, sm_89, sm_120, gfx942): a shallow 128 x 128. fp32 operands: FMAs, 64 totals a thread.
    """
    if itemsize >= 4:
        return MatmulTile(128, 128, 16, num_warps=8, num_stages=3)
    if shared_bytes < 160 * 1024 or stored > itemsize:
        return MatmulTile(128, 128, 32, num_warps=8, num_stages=2)
    if accumulates:
        return MatmulTile(128, 128, 64, num_warps=8, num_stages=4)
    return MatmulTile(128, 256, 64, num_warps=8, num_stages=3)
