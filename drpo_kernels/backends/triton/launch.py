"""Row operations as Triton launches: grid, tile and flags for the kernels of this folder."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from drpo_kernels.backends.devices import device_properties
from drpo_kernels.backends.row_loss import row_losses
from drpo_kernels.backends.rows import Outcome, RowBatch, Slope, Stat, Terms
from drpo_kernels.backends.triton import kernels
from drpo_kernels.backends.triton.softmax import Logits
from drpo_kernels.backends.triton.tiles import RowTile, row_tile
from drpo_kernels.evidence import EVIDENCE_METRICS
from drpo_kernels.kl import KL_ESTIMATORS
from drpo_kernels.metrics import (
    COUNTS,
    MEASURES,
    MetricTerms,
    metric_constants,
    named_metrics,
    policy_metrics_kernel,
)
from drpo_kernels.objective import Objective
from drpo_kernels.triton_support import tl

# Kernels use fused multiply-adds, whatever the installed Triton does by default.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}
TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# A kernel that walks over a tensor has so many programs for each multiprocessor.
PROGRAMS = 8
# Two programs reduce the metrics of a batch. Each takes so many tokens at a time, one per thread of a warp of 32, as it
# has many sums. The second half of an AMD wavefront repeats the first.
METRICS_BLOCK = 512
# A program of the kernel that computes losses alone takes so many rows.
LOSSES_BLOCK = 128
# The compile-time constants for False and True. In a tuple a bool would be an argument at run time.
FLAGS = tl.constexpr(False), tl.constexpr(True)


class TritonRows:
    """`RowOps` in Triton. Tests override the choice of a tile with `tile`. With `from_rollout`, `policy` takes a row's
    scale from its old log-prob. `statistics` does not, so that the two differ in their last bits.
    """

    def __init__(self, tile: RowTile | None = None, from_rollout: bool = True):
        self.tile, self.from_rollout = tile, from_rollout

    def invariant(self) -> "TritonRows":
        """These operations for `batch_invariant`: a row's log-prob has the same bits whether `policy` or `statistics`
        computes it.
        """
        return TritonRows(self.tile, from_rollout=False)

    def statistics(self, batch: RowBatch) -> Tensor:
        statistics = batch.rows.new_empty(len(Stat), batch.rows.shape[1])
        self.launch(kernels.statistics_kernel, batch, statistics, statistics.stride(0))
        return statistics

    def write_gradient(self, batch: RowBatch, statistics: Tensor, slopes: Tensor, out: Tensor) -> None:
        self.launch(
            kernels.gradient_kernel, batch, statistics, statistics.stride(0), slopes, slopes.stride(0), _output(out),
            batch.order, HAS_ENTROPY=len(slopes) > Slope.ENTROPY, HAS_Z_LOSS=len(slopes) > Slope.LOGSUMEXP,
        )  # fmt: skip

    def fuses(self, terms: Terms) -> bool:
        return terms.objective.twin is not None

    def losses(self, statistics: Tensor, rows: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
        if not self.fuses(terms):
            return row_losses(statistics, rows, terms)
        count = rows.shape[1]
        outcome = rows.new_empty(len(Outcome), count)
        slopes = rows.new_empty(len(Slope) if terms.entropy_bonus else 1 + terms.z_loss, count)
        if count:
            with on_device(rows):
                kernels.losses_kernel[(-(-count // LOSSES_BLOCK),)](
                    statistics, statistics.stride(0), rows, rows.stride(0), outcome, outcome.stride(0), slopes,
                    slopes.stride(0), count, _loss_terms(terms), BLOCK=LOSSES_BLOCK, num_warps=LOSSES_BLOCK // 32,
                    **LAUNCH_OPTIONS,
                )  # fmt: skip
        return outcome, slopes

    def factors(self, terms: Terms, logits: torch.dtype, dlogits: torch.dtype) -> bool:
        one_read = self.from_rollout and self.fuses(terms) and not (terms.entropy_bonus or terms.z_loss)
        return one_read and (logits, dlogits) == (torch.float32, torch.bfloat16)

    def policy(self, batch: RowBatch, terms: Terms, out: Tensor | None, factors: Tensor | None = None) -> Tensor:
        outcome = batch.rows.new_empty(len(Outcome), batch.rows.shape[1])
        self.launch(
            kernels.policy_kernel,
            batch,
            outcome,
            outcome.stride(0),
            _output(out),
            factors,
            _loss_terms(terms),
            FROM_ROLLOUT=self.from_rollout,
        )
        return outcome

    def metrics(
        self,
        objective: Objective,
        rows: Tensor,
        outcome: Tensor,
        valid: Tensor,
        unscorable: Tensor,
        given: Tensor | None,
        ref_kl: str | None,
        kl_cap: float,
    ) -> dict[str, Tensor]:
        """The metrics of a call. `given` [N] are the old log-probs as the caller gave them, or None. `ref_kl` names the
        estimator of the KL to the reference, or is None.
        """
        given = given if given is None else given.contiguous()
        flags = (flag.contiguous().view(torch.uint8) for flag in (valid, unscorable))
        constants = {name: tl.constexpr(value) for name, value in metric_constants(objective).items()}
        terms = MetricTerms(_kl_twin(ref_kl), kl_cap, **constants)
        values = rows.new_empty(MEASURES + 1 + len(EVIDENCE_METRICS))
        counts = torch.empty(COUNTS, dtype=torch.int64, device=rows.device)
        with on_device(rows):
            policy_metrics_kernel[(2,)](
                rows, rows.stride(0), outcome, outcome.stride(0), *flags, given, values, counts, rows.shape[1], terms,
                BLOCK=METRICS_BLOCK, num_warps=METRICS_BLOCK // 32, **LAUNCH_OPTIONS,
            )  # fmt: skip
        return named_metrics(values, counts, ref_kl is not None)

    def scale(self, values: Tensor, factor: Tensor) -> None:
        device = device_properties(values.device)
        tile = self.tile or row_tile(values.numel(), values.element_size(), device)
        programs = min(-(-values.numel() // tile.block), PROGRAMS * max(device.multiprocessors, 1))
        if programs:
            with on_device(values):
                kernels.scale_kernel[(programs,)](
                    values, values.numel(), factor, BLOCK=tile.block, num_warps=tile.num_warps, **LAUNCH_OPTIONS
                )

    def launch(self, kernel, batch: RowBatch, *arguments, choose: Callable = row_tile, **flags) -> None:
        """Launch one program per row, on the tensors' device. The first arguments of every row kernel are the batch."""
        count, vocab = batch.rows.shape[1], batch.logits.shape[1]
        if not count:
            return
        tensors = [batch.targets, batch.rows]
        for argument in arguments:
            fields = argument if isinstance(argument, tuple) else (argument,)
            tensors += [x for x in fields if isinstance(x, Tensor)]
        if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in tensors):
            raise ValueError(
                "the kernels take logits of any strides; everything else must be contiguous along its last axis"
            )
        tile = self.tile or choose(vocab, batch.logits.element_size(), device_properties(batch.logits.device))
        with on_device(batch.logits):
            kernel[(count,)](
                _logits(batch), batch.targets, batch.rows, batch.rows.stride(0), *arguments, **flags, BLOCK=tile.block,
                **tile.launch_options(batch.bias is not None), **LAUNCH_OPTIONS,
            )  # fmt: skip


def _logits(batch: RowBatch) -> Logits:
    """The first argument of a row kernel."""
    transform = batch.transform
    softcap = None if transform.softcap is None else float(transform.softcap)
    scale = float(transform.logit_scale)
    row_stride, column_stride = batch.logits.stride()
    return Logits(batch.logits, row_stride, column_stride, batch.logits.shape[1], batch.bias, scale, softcap)


def _output(out: Tensor | None) -> kernels.Output | None:
    return None if out is None else kernels.Output(out, out.stride(0), out.shape[1])


def _loss_terms(terms: Terms) -> kernels.LossTerms:
    objective, kl = terms.objective, _kl_twin(terms.kl_estimator)
    flags = (FLAGS[flag] for flag in (terms.kl_importance, terms.entropy_bonus, terms.z_loss))
    return kernels.LossTerms(objective.twin, objective.hyper, kl, terms.kl_cap, *flags)


def _kl_twin(estimator: str | None) -> Callable | None:
    return None if estimator is None else KL_ESTIMATORS[estimator].twin


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context in which the tensor's device is the current one, because Triton launches on that."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
