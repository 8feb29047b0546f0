"""`EntryOps` as Triton launches."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drpo_kernels.backends.devices import DeviceProperties
from drpo_kernels.backends.rows import RowBatch, Stat
from drpo_kernels.backends.sparse import kernels
from drpo_kernels.backends.sparse.contract import Base, GatheredSums, Selection, most_entropy
from drpo_kernels.backends.triton.launch import LAUNCH_OPTIONS, TRITON_TYPES, TritonRows, on_device
from drpo_kernels.backends.triton.softmax import Matrix
from drpo_kernels.backends.triton.tiles import RowTile, row_tile
from drpo_kernels.triton_support import INTERPRETING


def select_tile(vocab: int, itemsize: int, device: DeviceProperties) -> RowTile:
    """A row tile with one 16-byte load for each thread. A scan over the block takes the registers of a second load."""
    return replace(row_tile(vocab, itemsize, device, bytes_per_thread=16), registers=None)


def entry_capacity(limit: int) -> int:
    """The candidates that a sparse row may have: at least three times `limit`, and a power of two to fit one block."""
    return 1 << (3 * limit).bit_length()


@dataclass(frozen=True)
class GatherTile:
    """One program gathers `columns` columns of `rows` rows at a time. So many loads are in flight."""

    rows: int
    columns: int
    num_warps: int


def gather_tile(width: int) -> GatherTile:
    """A warp takes 256 columns: each of its threads reads 16 bytes of a 16-bit row in one load, or 32 bytes of an fp32
    row in two. One thread then sums a column. With more warps for these columns, each sum would cross warps.
    """
    columns = max(16, min(1 << (max(width, 1) - 1).bit_length(), 1024))
    return GatherTile(8, columns, max(columns // 256, 1))


class TritonEntries(TritonRows):
    """`EntryOps` in Triton."""

    def consume(self, batch: RowBatch) -> tuple[Tensor, RowBatch]:
        return self.statistics(batch), batch

    def select(self, batch: RowBatch, statistics: Tensor, tolerance: float, limit: int) -> Selection:
        count, device = batch.rows.shape[1], batch.logits.device
        capacity = entry_capacity(limit)
        columns = torch.empty(count, capacity, dtype=torch.int32, device=device)
        shares, left_out = batch.rows.new_empty(count, capacity), batch.rows.new_empty(count)
        counts = torch.empty(count, dtype=torch.int64, device=device)
        self.launch(
            kernels.select_kernel, batch, statistics, statistics.stride(0), float(tolerance), limit,
            most_entropy(batch.logits.shape[1], tolerance, limit), kernels.Selected(columns, shares, counts, left_out),
            CAPACITY=capacity, choose=select_tile,
        )  # fmt: skip
        is_dense = counts < 0
        counts.clamp_(min=0)
        dense, entries = torch.stack([is_dense.sum(), counts.sum()]).tolist()  # the only synchronisation
        rows = torch.arange(count, device=device).repeat_interleave(counts, output_size=entries)
        place = torch.arange(entries, device=device) - (counts.cumsum(0) - counts)[rows]
        miss = statistics[Stat.MISS]
        return Selection(
            is_dense.to(torch.int8).argsort(descending=True, stable=True)[:dense], counts, rows,
            columns[rows, place].to(torch.int64), shares[rows, place] * miss[rows],
            torch.where(counts > 0, left_out * miss, 0),
        )  # fmt: skip

    def gathered_sums(
        self, table: Tensor, sums: GatheredSums, out: Tensor, dtype: torch.dtype, base: Base | None = None
    ) -> None:
        if not len(sums.places):
            return
        if INTERPRETING and out.dtype == torch.bfloat16:  # the interpreter truncates to bf16
            wide = out.float()
            self.gathered_sums(table, sums, wide, dtype, base)
            out.copy_(wide)
            return
        table, width, tile = _rounded(table, dtype), out.shape[1], gather_tile(out.shape[1])
        row, factors = base or (None, None)
        with on_device(out):
            kernels.gathered_sums_kernel[(len(sums.places), -(-width // tile.columns))](
                Matrix(table, *table.stride()), sums.rows, sums.factors, sums.offsets, sums.places, out, out.stride(0),
                width, row, factors, ROUNDED=TRITON_TYPES[dtype], ROWS=tile.rows, COLUMNS=tile.columns,
                num_warps=tile.num_warps, **LAUNCH_OPTIONS,
            )  # fmt: skip

    def gathered_dots(
        self, left: Tensor, left_index: Tensor, right: Tensor, right_index: Tensor, dtype: torch.dtype
    ) -> Tensor:
        out = torch.empty(len(left_index), dtype=torch.float32, device=left.device)
        if len(out):
            left, right, tile = _rounded(left, dtype), _rounded(right, dtype), gather_tile(left.shape[1])
            with on_device(out):
                kernels.gathered_dots_kernel[(len(out),)](
                    Matrix(left, *left.stride()), left_index, Matrix(right, *right.stride()), right_index, out,
                    left.shape[1], ROUNDED=TRITON_TYPES[dtype], COLUMNS=tile.columns, num_warps=tile.num_warps,
                    **LAUNCH_OPTIONS,
                )  # fmt: skip
        return out


def _rounded(table: Tensor, dtype: torch.dtype) -> Tensor:
    """The table, rounded to bf16 before a launch in the interpreter, where the kernel would truncate."""
    return table.to(dtype) if INTERPRETING and dtype == torch.bfloat16 else table
