"""Tile choice: pure functions of the row's width, the element sizes and the device."""

from dataclasses import dataclass

from drpo_kernels.backends.devices import DeviceProperties

# a block may ask for 227 KiB of shared memory on sm_90 and sm_100, for 163 on sm_80, and for less elsewhere
HOPPER_SHARED_MEMORY = 200 * 1024


@dataclass(frozen=True)
class RowTile:
    """`block` logits per loop iteration of one row's program, by `num_warps` warps; `registers`: at most so many to a
    thread, where the compiler is told.
    """

    block: int
    num_warps: int
    registers: int | None = None

    def launch_options(self, has_bias: bool) -> dict[str, int]:
        """With a bias, whose loads wait in registers too, 64 would spill."""
        limit = {} if self.registers is None or has_bias else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps} | limit


def row_tile(
    vocab: int, itemsize: int, device: DeviceProperties, threads: int | None = None, bytes_per_thread: int = 32
) -> RowTile:
    """`threads` to a row, two 16-byte loads in flight each: the sums of 8 lanes do not spill, a lane to each fp32
    element or to two of 16 bits.

    Several rows share a multiprocessor, where one row's loads hide another's reductions. On an H200 512 threads are
    best, for one read and for two (docs/gpu.md). On sm_80 512 would spill: GPUs before Hopper take 256.
    Two rows of 512 threads share the 65,536 registers of a multiprocessor if a thread has 64: the compiler would take
    up to 116 for 16-bit logits.
    """
    hopper = device.shared_memory_bytes >= HOPPER_SHARED_MEMORY
    if threads is None:
        threads = 512 if hopper else 256
    elements = bytes_per_thread // itemsize
    block = max(16, min(1 << (max(vocab, 1) - 1).bit_length(), threads * elements))
    return RowTile(block, max(1, block // (elements * device.warp_size)), 64 if hopper and itemsize == 2 else None)


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


def matmul_tile(itemsize: int, stored: int, device: DeviceProperties, accumulates: bool) -> MatmulTile:
    """A function of the dtypes and the device, never of a shape: the order of the sums must not follow the batch.

    itemsize  of what is multiplied; `stored` of the widest operand in memory, rounded on its way to the product
    accumulates  whether the totals are read back first, whose addresses take registers beside them

    16-bit operands: 128 x 256 is two warpgroups' wgmma on sm_90, 128 fp32 totals a thread, in steps of 32, as 64 would
    spill under Triton 3.6. So would totals that are read back, and sm_80's operands, which are in registers too: there
    128 x 128. Wider operands in memory, or less room (sm_86, sm_89, sm_120, gfx942): a shallow 128 x 128. fp32
    operands: FMAs, 64 totals a thread.
    """
    if itemsize >= 4:
        return MatmulTile(128, 128, 16, num_warps=8, num_stages=3)
    if device.shared_memory_bytes < 160 * 1024 or stored > itemsize:
        return MatmulTile(128, 128, 32, num_warps=8, num_stages=2)
    if accumulates or device.shared_memory_bytes < HOPPER_SHARED_MEMORY:
        return MatmulTile(128, 128, 64, num_warps=8, num_stages=4)
    return MatmulTile(128, 256, 32, num_warps=8, num_stages=4)
