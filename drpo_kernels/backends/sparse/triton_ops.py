"""`EntryOps` as Triton launches."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drpo_kernels.backends.devices import DeviceProperties
from drpo_kernels.backends.rows import RowBatch, Stat
from drpo_kernels.backends.sparse import kernels
from drpo_kernels.backends.sparse.contract import GatheredSums, Selection, most_entropy
from drpo_kernels.backends.triton.launch import LAUNCH_OPTIONS, TritonRows, on_device
from drpo_kernels.backends.triton.softmax import Matrix
from drpo_kernels.backends.triton.tiles import RowTile, row_tile
from drpo_kernels.triton_support import INTERPRETING


def select_tile(vocab: int, itemsize: int, device: DeviceProperties) -> RowTile:
    """One 16-byte load to a thread: a scan over the block takes the registers of the second."""
    return replace(row_tile(vocab, itemsize, device, bytes_per_thread=16), registers=None)


def entry_capacity(limit: int) -> int:
    """Candidates that a row of at most `limit` entries may have, three times as many: a power of two, for one block."""
    return 1 << (3 * limit).bit_length()


@dataclass(frozen=True)
class GatherTile:
    """`rows` gathered at a time, `columns` of each, by one program: that many loads are in flight."""

    rows: int
    columns: int
    num_warps: int


def gather_tile(width: int) -> GatherTile:
    """A warp to 256 columns, 16 bytes a thread of 16-bit rows, in two loads of fp32 ones, so that all rows of a column
    are one thread's: with several warps to as many columns, each sum would cross them.
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
        dense, entries = torch.stack([is_dense.sum(), counts.sum()]).tolist()  # the one synchronisation
        rows = torch.arange(count, device=device).repeat_interleave(counts, output_size=entries)
        place = torch.arange(entries, device=device) - (counts.cumsum(0) - counts)[rows]
        miss = statistics[Stat.MISS]
        return Selection(
            is_dense.to(torch.int8).argsort(descending=True, stable=True)[:dense], counts, rows,
            columns[rows, place].to(torch.int64), shares[rows, place] * miss[rows],
            torch.where(counts > 0, left_out * miss, 0),
        )  # fmt: skip

    def gathered_sums(
        self,
        table: Tensor,
        sums: GatheredSums,
        out: Tensor,
        dtype: torch.dtype,
        base: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        if not len(sums.places):
            return
        if INTERPRETING and out.dtype == torch.bfloat16:  # to which the interpreter truncates
            wide = out.float()
            self.gathered_sums(table, sums, wide, dtype, base)
            out.copy_(wide)
            return
        table, width, tile = _rounded(table, dtype), out.shape[1], gather_tile(out.shape[1])
        row, factors = base or (None, None)
        with on_device(out):
            kernels.gathered_sums_kernel[(len(sums.places), -(-width // tile.columns))](
                Matrix(table, *table.stride()), sums.rows, sums.factors, sums.offsets, sums.places, out, out.stride(0),
                width, row, factors, ROUNDED=kernels.TYPES[dtype], ROWS=tile.rows, COLUMNS=tile.columns,
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
                    left.shape[1], ROUNDED=kernels.TYPES[dtype], COLUMNS=tile.columns, num_warps=tile.num_warps,
                    **LAUNCH_OPTIONS,
                )  # fmt: skip
        return out


def _rounded(table: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to bf16 before the launch where the kernel would truncate, which is in the interpreter."""
    return table.to(dtype) if INTERPRETING and dtype == torch.bfloat16 else table
