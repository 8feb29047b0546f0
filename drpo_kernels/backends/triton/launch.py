"""Row operations as Triton launches: grid, tile and flags for the kernels of this folder."""

import contextlib

import torch
from torch import Tensor

from drpo_kernels.backends.devices import device_properties
from drpo_kernels.backends.rows import Outcome, RowBatch, Selection, Stat, Terms
from drpo_kernels.backends.triton import kernels, sparse
from drpo_kernels.backends.triton.tiles import RowTile, row_tile
from drpo_kernels.kl import KL_ESTIMATORS

# fused multiply-adds, whatever the default of the installed Triton
LAUNCH_OPTIONS = {"enable_fp_fusion": True}
# to a multiprocessor, of a kernel that walks over a tensor
PROGRAMS = 8


class TritonRows:
    """`RowOps` in Triton. `tile` overrides the tile choice (tests)."""

    def __init__(self, tile: RowTile | None = None):
        self.tile = tile

    def statistics(self, batch: RowBatch) -> Tensor:
        statistics = batch.rows.new_empty(len(Stat), batch.rows.shape[1])
        self._launch(kernels.statistics_kernel, batch, statistics, statistics.stride(0))
        return statistics

    def consume(self, batch: RowBatch) -> tuple[Tensor, RowBatch]:
        return self.statistics(batch), batch

    def select(self, batch: RowBatch, statistics: Tensor, tolerance: float, limit: int) -> Selection:
        count, miss = batch.rows.shape[1], statistics[Stat.MISS]
        capacity = 1 << (3 * limit - 1).bit_length()
        columns = torch.empty(count, capacity, dtype=torch.int32, device=batch.logits.device)
        shares = batch.rows.new_empty(count, capacity)
        counts, left_out = columns.new_empty(count), batch.rows.new_empty(count)
        self._launch(
            sparse.select_kernel, batch, statistics, statistics.stride(0), float(tolerance), limit, columns, shares,
            counts, left_out, CAPACITY=capacity,
        )  # fmt: skip
        chosen = counts >= 0
        kept = counts.clamp(min=0).to(torch.int64)
        total = int(kept.sum())
        owner = torch.arange(count, device=kept.device).repeat_interleave(kept, output_size=total)
        place = torch.arange(total, device=kept.device) - (kept.cumsum(0) - kept)[owner]
        mass = (left_out * miss).where(chosen, 0)
        return Selection(
            chosen, kept, columns[owner, place].to(torch.int64), shares[owner, place] * miss[owner], mass
        )

    def write_gradient(self, batch: RowBatch, statistics: Tensor, slopes: Tensor, out: Tensor) -> None:
        if batch.order is not None:
            batch = batch._replace(logits=batch.logits[batch.order], order=None)
        self._launch(
            kernels.gradient_kernel, batch, statistics, statistics.stride(0), slopes, slopes.stride(0),
            out, out.stride(0), out.shape[1], HAS_ENTROPY=slopes.shape[0] > 1,
        )  # fmt: skip

    def fuses(self, terms: Terms) -> bool:
        return terms.objective.twin is not None

    def policy(self, batch: RowBatch, terms: Terms, out: Tensor | None) -> Tensor:
        outcome = batch.rows.new_empty(len(Outcome), batch.rows.shape[1])
        written = outcome if out is None else out  # without `out` nothing is written, and logits may have any strides
        self._launch(
            kernels.policy_kernel, batch, outcome, outcome.stride(0), written, written.stride(0), written.shape[1],
            terms.objective.hyper, OBJECTIVE=terms.objective.twin,
            KL=None if terms.kl_estimator is None else KL_ESTIMATORS[terms.kl_estimator].twin,
            KL_IMPORTANCE=terms.kl_importance,
            HAS_ENTROPY=terms.entropy_bonus, WRITE=out is not None,
        )  # fmt: skip
        return outcome

    def scale(self, values: Tensor, factor: Tensor) -> None:
        device = device_properties(values.device)
        tile = self.tile or row_tile(values.numel(), values.element_size(), device)
        programs = min(-(-values.numel() // tile.block), PROGRAMS * max(device.multiprocessors, 1))
        if programs:
            with _on(values):
                kernels.scale_kernel[(programs,)](
                    values, values.numel(), factor, BLOCK=tile.block, num_warps=tile.num_warps, **LAUNCH_OPTIONS
                )

    def _launch(self, kernel, batch: RowBatch, *arguments, **flags) -> None:
        """One program per row, on the tensors' device; every kernel starts with the arguments of a batch."""
        logits, targets, rows, transform, bias = batch[:5]
        count, vocab = logits.shape
        if not count:
            return
        tensors = [x for x in (targets, rows, *arguments) if isinstance(x, Tensor)]
        if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in tensors):
            raise ValueError(
                "the kernels take logits of any strides; everything else must be contiguous along its last axis"
            )
        tile = self.tile or row_tile(vocab, logits.element_size(), device_properties(logits.device))
        with _on(logits):
            kernel[(count,)](
                logits, *logits.stride(), vocab, bias, float(transform.logit_scale), float(transform.softcap or 1.0),
                targets, rows, rows.stride(0), *arguments, **flags, HAS_BIAS=bias is not None,
                HAS_SOFTCAP=transform.softcap is not None, BLOCK=tile.block, num_warps=tile.num_warps, **LAUNCH_OPTIONS,
            )  # fmt: skip


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
