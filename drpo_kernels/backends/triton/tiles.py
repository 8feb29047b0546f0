"""The choice of tiles, by pure functions of a row's width, the element sizes and the device."""

from dataclasses import dataclass

from drpo_kernels.backends.devices import DeviceProperties

# A program may ask for 227 KiB of shared memory on sm_90 and sm_100, for 163 KiB on sm_80, and for less elsewhere.
HOPPER_SHARED_MEMORY = 200 * 1024


@dataclass(frozen=True)
class RowTile:
    """A row's program reads `block` logits in an iteration of its loop, with `num_warps` warps. If `registers` is a
    number, the compiler gives a thread at most so many.
    """

    block: int
    num_warps: int
    registers: int | None = None

    def launch_options(self, has_bias: bool) -> dict[str, int]:
        """The options of the launch. The loads of a bias wait in registers too, and would spill with a limit."""
        limit = {} if self.registers is None or has_bias else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps} | limit


def row_tile(
    vocab: int, itemsize: int, device: DeviceProperties, threads: int | None = None, bytes_per_thread: int = 32
) -> RowTile:
    """`threads` threads read a row, each with `bytes_per_thread` in flight: two 16-byte loads by default. A thread adds
    in 8 lanes, one for each fp32 element or for two of 16 bits. Sums in 8 lanes do not spill.

    Several rows share a multiprocessor, where one row's loads hide another's reductions. On an H200 512 threads are
    best, whether a row is read once or twice (docs/gpu.md). On sm_80 512 would spill: GPUs with less shared memory than
    Hopper take 256. Two rows of 512 threads share the 65,536 registers of a multiprocessor if a thread has 64. Without
    a limit the compiler would take up to 116 for 16-bit logits.
    """
    hopper = device.shared_memory_bytes >= HOPPER_SHARED_MEMORY
    if threads is None:
        threads = 512 if hopper else 256
    elements = bytes_per_thread // itemsize
    block = max(16, min(1 << (max(vocab, 1) - 1).bit_length(), threads * elements))
    return RowTile(block, max(1, block // (elements * device.warp_size)), 64 if hopper and itemsize == 2 else None)


@dataclass(frozen=True)
class MatmulTile:
    """One program computes `rows` x `columns` of a product, and takes `depth` of the inner dimension in a step;
    `num_stages` steps are in flight. `group` tiles of rows walk the columns together.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    group: int = 8


def matmul_tile(itemsize: int, stored: int, device: DeviceProperties, accumulates: bool) -> MatmulTile:
    """The tile depends on the dtypes and the device, never on a shape: the order of the sums must not follow the batch.

    itemsize     bytes of an element as it is multiplied
    stored       bytes of an element of the widest operand in memory, which is rounded on its way to the product
    accumulates  whether totals are read back first; their addresses take registers beside them

    fp32 operands are multiplied by FMAs, with 64 totals in a thread. For 16-bit operands 128 x 256 is the wgmma of two
    warpgroups on sm_90, with 128 fp32 totals in a thread, in steps of 32: steps of 64 would spill under Triton 3.6.
    Totals that are read back would spill too, and so would sm_80, which has operands in registers: these take
    128 x 128. Operands that are wider in memory, and chips with less shared memory (sm_86, sm_89, sm_120, gfx942), take
    128 x 128 with fewer steps in flight.
    """
    if itemsize >= 4:
        return MatmulTile(128, 128, 16, num_warps=8, num_stages=3)
    if device.shared_memory_bytes < 160 * 1024 or stored > itemsize:
        return MatmulTile(128, 128, 32, num_warps=8, num_stages=2)
    if accumulates or device.shared_memory_bytes < HOPPER_SHARED_MEMORY:
        return MatmulTile(128, 128, 64, num_warps=8, num_stages=4)
    return MatmulTile(128, 256, 32, num_warps=8, num_stages=4)
