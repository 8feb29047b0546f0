"""Row operations as Triton launches: grid, tile and flags for the kernels of this folder."""

import contextlib

import torch
from torch import Tensor

from drpo_kernels.backends.rows import Outcome, Stat, Terms, Transform
from drpo_kernels.backends.triton import kernels
from drpo_kernels.backends.triton.tiles import RowTile, row_tile
from drpo_kernels.kl import KL_ESTIMATORS

# fused multiply-adds, whatever the default of the installed Triton
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


class TritonRows:
    """`RowOps` in Triton. `tile` overrides the tile choice (tests)."""

    def __init__(self, tile: RowTile | None = None):
        self.tile = tile

    def statistics(
        self, logits: Tensor, targets: Tensor, rows: Tensor, transform: Transform, bias: Tensor | None
    ) -> Tensor:
        statistics = rows.new_empty(len(Stat), logits.shape[0])
        if logits.shape[0]:
            with _device_of(logits):
                kernels.statistics_kernel[(logits.shape[0],)](
                    logits, *logits.stride(), bias, targets, rows, rows.stride(0), statistics, statistics.stride(0),
                    logits.shape[1], *_transform_arguments(transform),
                    **self._flags(logits, transform, bias),
                )  # fmt: skip
        return statistics

    def write_gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        rows: Tensor,
        statistics: Tensor,
        slopes: Tensor,
        transform: Transform,
        bias: Tensor | None,
        out: Tensor,
    ) -> None:
        if not logits.shape[0]:
            return
        with _device_of(logits):
            kernels.gradient_kernel[(logits.shape[0],)](
                logits, *logits.stride(), out, out.stride(0), bias, targets, rows, rows.stride(0),
                statistics, statistics.stride(0), slopes, slopes.stride(0), logits.shape[1], out.shape[1],
                *_transform_arguments(transform), HAS_ENTROPY=slopes.shape[0] > 1,
                **self._flags(logits, transform, bias),
            )  # fmt: skip

    def fuses(self, terms: Terms) -> bool:
        return terms.objective.twin is not None

    def policy(
        self,
        logits: Tensor,
        targets: Tensor,
        rows: Tensor,
        terms: Terms,
        transform: Transform,
        bias: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        outcome = rows.new_empty(len(Outcome), logits.shape[0])
        if logits.shape[0]:
            written = logits if out is None else out
            with _device_of(logits):
                kernels.policy_kernel[(logits.shape[0],)](
                    logits, *logits.stride(), written, written.stride(0), bias, targets, rows, rows.stride(0),
                    outcome, outcome.stride(0), terms.objective.hyper, logits.shape[1], written.shape[1],
                    *_transform_arguments(transform), OBJECTIVE=terms.objective.twin,
                    KL=None if terms.kl_estimator is None else KL_ESTIMATORS[terms.kl_estimator].twin,
                    HAS_ENTROPY=terms.entropy_bonus, WRITE=out is not None, **self._flags(logits, transform, bias),
                )  # fmt: skip
        return outcome

    def _flags(self, logits: Tensor, transform: Transform, bias: Tensor | None) -> dict:
        tile = self.tile or row_tile(logits.shape[1], logits.element_size())
        return {
            "HAS_BIAS": bias is not None,
            "HAS_SOFTCAP": transform.softcap is not None,
            "BLOCK": tile.block,
            "num_warps": tile.num_warps,
            **LAUNCH_OPTIONS,
        }


def _transform_arguments(transform: Transform) -> tuple[float, float]:
    return float(transform.logit_scale), float(transform.softcap or 1.0)


def _device_of(tensor: Tensor):
    """Triton launches on the current device; make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
