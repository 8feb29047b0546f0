"""How a sweep cuts its rows and which buffers it holds: `plan`, a pure function of sizes, dtypes, device and workspace.

Rows with a gradient come in *windows*: dX and dW of a window are one product each. Its logits come in *chunks*.
`python -m drpo_kernels plan` prints the plan of any problem on any device.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.backends.devices import GIB, MIB, DeviceProperties
from drpo_kernels.backends.matmul import CPU_CAST_BYTES

# A workspace holds enough rows to keep the products near their peak, and is small beside the model.
DEVICE_WORKSPACE = 1024 * MIB
CPU_WORKSPACE, CPU_WORKSPACE_MOST, CPU_ROWS = 64 * MIB, 128 * MIB, 256
# The rows of a tile of a product. Full tiles waste nothing.
ROW_MULTIPLE = 128
# If dlogits have a buffer of their own, logits take a quarter of the workspace and at least these rows: 512 FLOP for
# every byte of a 16-bit weight that is read. By their peak rates an H100 needs 295, and the other presets need no more.
# The dlogits of a window take the other three quarters, because every window reads and writes dW once.
CHUNK_ROWS = 512
# cuBLAS multiplies in tiles of so many rows and columns, in waves of one tile to a processor. Processors that are idle
# in dX's last wave cost half of their time. This was measured on an H200 (docs/gpu.md): at H=4096 windows of 2432 rows,
# which fill 77 % of their waves, take 1.33 times as long as windows of 2048 rows, which fill 97 %, with 1.19 times the
# arithmetic. One more window reads and writes a float32 dW once more, 8VH bytes. On an H200 (4.8 TB/s, products at 700
# TFLOP/s on 132 processors) that takes as long as H / 7400 waves.
TILE_ROWS, TILE_COLUMNS, IDLE, WINDOW_WAVES = 128, 256, 0.5, 1 / 7400
# Copies of a window's hidden rows may take so many bytes beside the workspace, and a piece of its dX as many again.
COPY_BYTES = 32 * MIB
# What a CPU holds for a moment: two float32 blocks of logits (CPU_BLOCK of torch_rows.py), and a block of a weight that
# is cast.
CPU_ROW_SCRATCH, CPU_CAST_SCRATCH = 8 * MIB, CPU_CAST_BYTES
# By measurement, the products' library packs so many columns with so many numbers of each, and a token takes so many
# bytes.
PACKED_COLUMNS, PACKED_DEPTH, TOKEN_BYTES = 10_240, 512, 92


class NeedsGrad(NamedTuple):
    """Which gradients a linear sweep computes."""

    hidden: bool
    weight: bool
    bias: bool

    def returned(self, main_grad: Tensor | None) -> "NeedsGrad":
        """Which of them the sweep returns: not dW if it is added to `main_grad`."""
        return NeedsGrad(self.hidden, self.weight and main_grad is None, self.bias)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one sweep: `active` rows have a gradient, `forward` rows have none; `vocab` of the largest shard."""

    active: int
    forward: int
    hidden: int
    vocab: int


@dataclass(frozen=True)
class Storage:
    """The dtypes that a plan depends on. Copies of a hidden row take `copied` bytes for each of its elements."""

    logits: torch.dtype
    dlogits: torch.dtype  # the operand of dX and dW
    accumulator: torch.dtype
    weight: torch.dtype
    copied: int = 0


class WeightGradient(Enum):
    """How dW [V, H] comes about."""

    NONE = "not wanted"
    PRODUCT = "one product, rounded once"
    OWN_SUM = "a sum over windows in the gradient itself, which is wide enough"
    WIDE_SUM = "a sum over windows in an accumulator, cast at the end"
    MAIN_GRAD = "added to main_grad, window by window"


@dataclass(frozen=True)
class ChunkPlan:
    """Consecutive chunks of `chunk_rows` rows, the last one perhaps shorter."""

    rows: int
    chunk_rows: int

    def __iter__(self) -> Iterator[slice]:
        return (slice(s, min(s + self.chunk_rows, self.rows)) for s in range(0, self.rows, self.chunk_rows))

    def __len__(self) -> int:
        return -(-self.rows // self.chunk_rows)

    @property
    def largest(self) -> int:
        return min(self.rows, self.chunk_rows)


@dataclass(frozen=True)
class SweepPlan:
    """The plan that `LinearSweep` follows."""

    sizes: Sizes
    storage: Storage
    windows: ChunkPlan  # the windows of the rows with a gradient
    chunk_rows: int  # the rows of a chunk within a window
    forward: ChunkPlan  # the chunks of the rows without a gradient
    retained: bool  # one window holds all rows, in place of a float32 dW
    weight_gradient: WeightGradient
    on_cpu: bool = False
    processors: int = 0  # each takes one tile of dX in a wave; 0: windows are not fitted to waves
    fitting: int | None = None  # the rows that fit into a window, if fewer fill the waves better

    @property
    def in_place(self) -> bool:
        """Whether dlogits overwrite the logits.

        If both have one dtype, a value is stored where it was loaded from, so that no store comes too early. A bf16
        store over float32 logits lands on another element, which another thread of the row's program may not have
        loaded yet, and nothing orders the two. Then dlogits have a buffer of their own.
        """
        return self.storage.logits == self.storage.dlogits

    @property
    def logits_rows(self) -> int:
        return max(min(self.chunk_rows, self.windows.largest), self.forward.largest)

    @property
    def dlogits_rows(self) -> int:
        """The rows of the dlogits' own buffer."""
        return 0 if self.in_place else self.windows.largest

    @property
    def piece_rows(self) -> int:
        """The rows of a piece of dX, if it cannot be written at its place: as many as fill the waves best."""
        fitting = max(COPY_BYTES // max(self.sizes.hidden * self.storage.accumulator.itemsize, 1), 1)
        if not self.processors or not self.sizes.active:
            return fitting
        return whole_waves(self.windows.largest, fitting, self.sizes.hidden, self.processors)

    @property
    def buffer_bytes(self) -> int:
        """Logits and dlogits, the retained ones included."""
        logits, dlogits = (dtype.itemsize for dtype in (self.storage.logits, self.storage.dlogits))
        return self.sizes.vocab * (self.logits_rows * logits + self.dlogits_rows * dlogits)

    @property
    def retained_bytes(self) -> int:
        return self.sizes.active * self.sizes.vocab * self.storage.dlogits.itemsize if self.retained else 0

    @property
    def scratch_bytes(self) -> int:
        """The bytes that row operations and products hold for a moment on a CPU. A GPU's kernels hold none."""
        if not self.on_cpu:
            return 0
        sizes, casts = self.sizes, self.storage.weight != self.storage.dlogits
        narrow = self.storage.logits.itemsize < self.storage.accumulator.itemsize  # logits are rounded from a block
        copies = min(sizes.hidden * self.storage.copied * self.windows.largest, COPY_BYTES)
        rows = min(CPU_ROW_SCRATCH, 8 * sizes.vocab * self.logits_rows)
        packed = 4 * min(PACKED_COLUMNS, sizes.vocab) * min(PACKED_DEPTH, sizes.hidden)
        if casts and self.weight_gradient is WeightGradient.NONE:
            packed = min(packed, CPU_CAST_SCRATCH)  # all products take such blocks
        blocks = (casts + narrow) * CPU_CAST_SCRATCH
        return rows + copies + packed + blocks + TOKEN_BYTES * (sizes.active + sizes.forward)

    @property
    def total_bytes(self) -> int:
        """All bytes that a call takes beyond its inputs and gradients. A CPU's memory counts once it is touched, so a
        gradient which is cast from its accumulator takes the memory that logits and scratch have left.
        """
        before = self.held_bytes
        cast = self.on_cpu and self.weight_gradient is WeightGradient.WIDE_SUM
        later = self.sizes.vocab * self.sizes.hidden * self.storage.weight.itemsize if cast else 0
        return self.accumulator_bytes + max(before - later, 0)

    @property
    def held_bytes(self) -> int:
        """What the chunk loop holds beside the gradients."""
        return self.buffer_bytes + self.scratch_bytes

    @property
    def accumulator_bytes(self) -> int:
        own = self.weight_gradient is WeightGradient.WIDE_SUM
        return self.sizes.vocab * self.sizes.hidden * self.storage.accumulator.itemsize if own else 0

    def chunks(self, window: slice) -> ChunkPlan:
        """The chunks of a window, as rows that are counted from the window's start."""
        return ChunkPlan(window.stop - window.start, self.chunk_rows)

    def explain(self) -> str:
        """Every choice with its bytes and its reason, a line each."""
        choices = self._choices()
        sizes = ("" if size is None else _readable(size) for _, size, _ in choices)
        return "\n".join(f"{n:<8}  {size:>9}  {text}" for (n, _, text), size in zip(choices, sizes, strict=True))

    def _choices(self) -> list[tuple[str, int | None, str]]:
        """(name, bytes or None, the reason) of each choice."""
        logits, dlogits = (str(dtype).removeprefix("torch.") for dtype in (self.storage.logits, self.storage.dlogits))
        logits_bytes = self.logits_rows * self.sizes.vocab * self.storage.logits.itemsize
        place = "over the logits" if self.in_place else "beside the logits, over which another dtype would race"
        kept = "of all rows: with the logits no more than the workspace and a float32 dW, which becomes one product"
        products = "for dX" if self.weight_gradient is WeightGradient.NONE else "each for dX and dW"
        wait = " (float32 until the backward)" if self.storage.weight == torch.float16 else ""
        return [
            ("rows", None, f"{self.sizes.active} with a gradient, {self.sizes.forward} without"),
            ("windows", None, f"{len(self.windows)} of {self.windows.largest} rows: one product {products}"),
            *([("", None, self._filled(self.fitting))] if self.fitting else []),
            ("logits", logits_bytes, f"{logits}, {self.logits_rows} rows at a time"),
            ("dlogits", self.buffer_bytes - logits_bytes, f"{dlogits}, {place}"),
            *([("", None, kept)] if self.retained else []),
            ("dW", self.accumulator_bytes, self.weight_gradient.value),
            *([("scratch", self.scratch_bytes, "blocks of rows and of the weight, copies, the library's own")]
              if self.on_cpu else []),
            ("together", self.total_bytes, f"beyond inputs and gradients{wait}"),
        ]  # fmt: skip

    def _filled(self, fitting: int) -> str:
        shares = []
        for rows in (self.windows.chunk_rows, fitting):
            tiles, waves = dx_tiles(ChunkPlan(self.sizes.active, rows), self.sizes.hidden, self.processors)
            shares.append(f"{tiles / (waves * self.processors):.0%}")
        own, other = shares
        return f"tiles of dX fill {own} of {self.processors} processors, {other} with windows of {fitting} rows"


def plan(
    device: DeviceProperties,
    sizes: Sizes,
    storage: Storage,
    needs_grad: NeedsGrad,
    *,
    workspace: int | None = None,
    row_multiple: int = 1,
    main_grad: bool = False,
) -> SweepPlan:
    """Make the plan. `workspace` is in bytes, None for the default; windows hold a multiple of `row_multiple` rows."""
    # Retained dlogits replace an accumulator of dW. A call that needs none takes its workspace and no more.
    retains = needs_grad.weight and not main_grad and storage.weight == storage.dlogits == torch.bfloat16
    retained = retains and retain_dlogits(sizes.active, sizes.hidden)
    in_place, logit_bytes = storage.logits == storage.dlogits, storage.logits.itemsize
    beside = 0 if in_place or retained or not sizes.active else storage.dlogits.itemsize
    budget = workspace_bytes(device, sizes.vocab, logit_bytes + beside, workspace)
    windows, chunk_rows, most = cut(sizes, storage, budget, beside, 4, row_multiple)
    if retained:
        windows = ChunkPlan(sizes.active, max(sizes.active, 1))
        chunk_rows = windows.chunk_rows if in_place else equal_chunks(sizes.active, most).chunk_rows
    forward = equal_chunks(sizes.forward, most)
    # Products of AMD's library, of `batch_invariant` and of float32 have other tiles.
    in_tiles = device.warp_size == 32 and row_multiple == 1 and storage.dlogits.itemsize == 2
    made = SweepPlan(
        sizes, storage, windows, chunk_rows, forward, retained,
        weight_gradient(storage, needs_grad.weight, main_grad, at_once=len(windows) <= 1),
        device.type == "cpu", device.multiprocessors if in_tiles else 0,
    )  # fmt: skip
    if len(windows) <= 1:
        return made
    return (_in_one_window(made, most, budget) if retains else None) or _in_whole_waves(made)


def cut(
    sizes: Sizes, storage: Storage, budget: int, beside: int, share: int, row_multiple: int = 1
) -> tuple[ChunkPlan, int, int]:
    """-> (windows, rows of a chunk, the most rows of logits at a time) that `budget` bytes hold.

    `beside` is the bytes of an element of dlogits if they have a buffer of their own, or 0. With such a buffer the
    logits take 1 / `share` of the budget, and the dlogits take what is left.
    """
    row, copied = sizes.vocab * storage.logits.itemsize, sizes.hidden * storage.copied
    most = _fitting(budget, row + sizes.vocab * beside, copied, row_multiple)
    windows = equal_chunks(sizes.active, most, row_multiple)
    if not beside or storage.dlogits == torch.float16:  # a float16 scale belongs to one chunk
        return windows, windows.chunk_rows, most
    most = min(most, max(CHUNK_ROWS, _up(budget // share // row, ROW_MULTIPLE)))
    room = _fitting(budget - most * row, sizes.vocab * beside, copied, row_multiple)
    windows = equal_chunks(sizes.active, room, row_multiple)
    return windows, equal_chunks(windows.largest, most).chunk_rows, most


def _in_one_window(made: SweepPlan, most: int, budget: int) -> SweepPlan | None:
    """The plan with all rows in one window, or None: it needs 2TV + 4 CHUNK_ROWS V <= budget + 4VH, and no more bytes
    than `made`. To fit, its chunks may have fewer rows, down to CHUNK_ROWS / 2: 256 FLOP for every byte of the weight.
    """
    sizes, row = made.sizes, made.sizes.vocab * made.storage.logits.itemsize
    window, dlogits = ChunkPlan(sizes.active, sizes.active), sizes.active * sizes.vocab * made.storage.dlogits.itemsize
    chunk_rows = sizes.active
    if not made.in_place:
        most = min(most, (made.total_bytes - dlogits) // row)
        if dlogits + CHUNK_ROWS * row > budget + made.accumulator_bytes or most < CHUNK_ROWS // 2:
            return None
        chunk_rows = equal_chunks(sizes.active, most).chunk_rows
    found = replace(
        made, windows=window, chunk_rows=chunk_rows, forward=equal_chunks(sizes.forward, most), retained=True,
        weight_gradient=WeightGradient.PRODUCT,
    )  # fmt: skip
    return found if found.total_bytes <= made.total_bytes else None


def _in_whole_waves(made: SweepPlan) -> SweepPlan:
    """The plan with windows that fill the waves best. Windows and chunks get no more rows, so that no buffer grows."""
    fitting = made.windows.chunk_rows
    rows = whole_waves(made.sizes.active, fitting, made.sizes.hidden, made.processors) if made.processors else fitting
    if rows == fitting:
        return made
    chunk_rows = rows if made.chunk_rows == fitting else equal_chunks(rows, made.chunk_rows).chunk_rows
    return replace(made, windows=ChunkPlan(made.sizes.active, rows), chunk_rows=chunk_rows, fitting=fitting)


@functools.lru_cache(maxsize=64)
def whole_waves(rows: int, fitting: int, hidden: int, processors: int) -> int:
    """The rows of a window, at most `fitting`, for which dX and the additions to dW of all `rows` take the least time.

    It also gives the rows of a piece of dX in a window. A piece is charged as much, though it only reads W again.
    """

    def time(size: int) -> float:
        windows = ChunkPlan(rows, size)
        tiles, waves = dx_tiles(windows, hidden, processors)
        return (1 - IDLE) * tiles / processors + IDLE * waves + WINDOW_WAVES * hidden * len(windows)

    return min((fitting, *range(fitting // TILE_ROWS * TILE_ROWS, 0, -TILE_ROWS)), key=time)


def dx_tiles(windows: ChunkPlan, hidden: int, processors: int) -> tuple[int, int]:
    """The number of tiles of dX in all windows, and of the waves that they come in."""
    columns, (count, rest) = -(-hidden // TILE_COLUMNS), divmod(windows.rows, windows.chunk_rows)
    each, last = (-(-rows // TILE_ROWS) * columns for rows in (windows.chunk_rows, rest))
    return count * each + last, count * -(-each // processors) - (-last // processors)


def weight_gradient(storage: Storage, needed: bool, main_grad: bool, at_once: bool) -> WeightGradient:
    """Choose how dW comes about. With `at_once`, one product may give all of it."""
    if not needed:
        return WeightGradient.NONE
    if main_grad:
        return WeightGradient.MAIN_GRAD
    if storage.weight == storage.accumulator:
        return WeightGradient.OWN_SUM
    # A float16 gradient waits in float32 for the upstream scale.
    rounds = at_once and storage.weight == storage.dlogits != torch.float16
    return WeightGradient.PRODUCT if rounds else WeightGradient.WIDE_SUM


def _fitting(room: int, row_bytes: int, copied_bytes: int, multiple: int = 1) -> int:
    """How many rows fit into `room` bytes. Copies of hidden rows count too if they take more than COPY_BYTES."""
    rows = min(room // max(row_bytes, 1), (room + COPY_BYTES) // max(row_bytes + copied_bytes, 1))
    return max(rows // multiple, 1) * multiple


def equal_chunks(rows: int, fitting: int, multiple: int = 1) -> ChunkPlan:
    """The fewest chunks of at most `fitting` rows, as equal as whole tiles allow."""
    even = _up(-(-rows // max(-(-rows // fitting), 1)), multiple)
    rounded = _up(even, ROW_MULTIPLE)
    return ChunkPlan(rows, max(rounded if rounded <= fitting else even, 1))


def _readable(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB or not size else f"{size / MIB:.1f} MiB"


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def retain_dlogits(rows: int, hidden: int) -> bool:
    """Whether all dlogits in bf16 (2TV bytes) take no more than a float32 dW (4VH bytes)."""
    return rows <= 2 * hidden


def workspace_bytes(
    device: DeviceProperties | torch.device, vocab: int, bytes_per_logit: int, requested: int | None
) -> int:
    """The requested bytes. By default 1 GiB on an accelerator, and on a CPU 64 MiB, or up to 128 to hold 256 rows."""
    if requested is not None:
        return requested
    if device.type != "cpu":
        return DEVICE_WORKSPACE
    return min(max(CPU_ROWS * vocab * bytes_per_logit, CPU_WORKSPACE), CPU_WORKSPACE_MOST)
