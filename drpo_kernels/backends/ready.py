"""Row operations on logits that are ready: a chunk of the linear sweep, or the caller's logits with any strides."""

from collections.abc import Iterator

import torch
from torch import Tensor

from drpo_kernels.backends import row_ops
from drpo_kernels.backends.rows import Field, Outcome, RowBatch, RowKind, RowOps, Stat, Terms, float16_scale
from drpo_kernels.backends.spec import Spec


def matrices(logits: Tensor, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Logits [..., V] as 2-D views, each with its range of rows, so that `logits[:, :-1]` does not cost a copy."""
    count = logits.shape[:-1].numel()
    if logits.dim() == 2:  # a view would give a single row another stride, and Triton would compile another kernel
        yield slice(start, start + count), logits
        return
    try:
        view = logits.view(count, logits.shape[-1])
    except RuntimeError:
        step = logits.shape[1:-1].numel()
        for i, inner in enumerate(logits):
            yield from matrices(inner, start + i * step)
    else:
        yield slice(start, start + count), view


def _pieces(batch: RowBatch, vocab: int, out: Tensor | None) -> Iterator[tuple[slice, RowBatch, Tensor | None]]:
    """(range of rows, their batch with logits [n, vocab], their rows of `out` [n, V]) of each piece of the batch."""
    count = batch.rows.shape[1]
    flat = out if out is None or out.dim() == 2 else out.view(count, out.shape[-1])
    for rows, view in matrices(batch.logits):
        gradient = view if out is batch.logits else None if flat is None else flat[rows]
        piece = batch._replace(logits=view[:, :vocab], targets=batch.targets[rows], rows=batch.rows[:, rows])
        yield rows, piece, gradient


def statistics_rows(ops: RowOps, batch: RowBatch, vocab: int) -> Tensor:
    """Logits [..., V] of which `vocab` columns are real -> [len(Stat), N]."""
    statistics = batch.rows.new_empty(len(Stat), batch.rows.shape[1])
    for rows, piece, _ in _pieces(batch, vocab, None):
        statistics[:, rows] = ops.statistics(piece)
    return statistics


def gradient_rows(
    ops: RowOps, batch: RowBatch, vocab: int, statistics: Tensor, slopes: Tensor, out: Tensor
) -> Tensor | None:
    """Write the gradient into `out`, which has the shape of the logits [..., V] and may be the logits themselves.

    -> the 0-d factor that undoes a float16 scale, or None.
    """
    unscale = None
    if out.dtype == torch.float16:
        # Slopes by raw logits include dz/dx. The slopes of a row that is not ACTIVE may be anything.
        chained = slopes * (batch.transform.logit_scale * batch.rows[Field.INV_TEMPERATURE])
        scale, unscale = float16_scale(torch.where(batch.rows[Field.KIND] == RowKind.ACTIVE, chained, 0))
        slopes = slopes * scale
    for rows, piece, gradient in _pieces(batch, vocab, out):
        assert gradient is not None  # it is a piece of `out`
        ops.write_gradient(piece, statistics[:, rows], slopes[:, rows], gradient)
    return unscale


def policy_rows(
    ops: RowOps, vocab: int, terms: Terms, batch: RowBatch, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The loss of every row -> (outcome [len(Outcome), N], the 0-d factor of `gradient_rows`).

    It takes one launch if the backend fuses these terms. Otherwise it computes statistics, the loss and the gradient in
    three steps.
    """
    if ops.fuses(terms) and (out is None or out.dtype != torch.float16):
        found = [ops.policy(piece, terms, gradient) for _, piece, gradient in _pieces(batch, vocab, out)]
        return found[0] if len(found) == 1 else torch.cat([batch.rows.new_empty(len(Outcome), 0), *found], 1), None
    statistics = statistics_rows(ops, batch, vocab)
    outcome, slopes = ops.losses(statistics, batch.rows, terms)
    return outcome, None if out is None else gradient_rows(ops, batch, vocab, statistics, slopes, out)


def ready_policy(
    logits: Tensor, targets: Tensor, rows: Tensor, spec: Spec, with_gradient: bool, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The policy loss of logits [..., V] -> (outcome [len(Outcome), N], gradient or an empty tensor, the 0-d factor
    that the gradient is still to be multiplied by).
    """
    assert spec.terms is not None
    out = None
    if with_gradient:
        out = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    ops = row_ops(spec.execution.backend)
    batch = RowBatch(logits, targets, rows, spec.transform)
    outcome, unscale = policy_rows(ops, spec.vocab, spec.terms, batch, out)
    if inplace and with_gradient:
        torch.autograd.graph.increment_version(logits)
    gradient = logits.new_empty(0) if out is None else out.detach()
    return outcome, gradient, rows.new_ones(()) if unscale is None else unscale


def ready_statistics(logits: Tensor, targets: Tensor, rows: Tensor, spec: Spec) -> Tensor:
    """The forward of the log-probs -> statistics [len(Stat), N]."""
    batch = RowBatch(logits, targets, rows, spec.transform)
    return statistics_rows(row_ops(spec.execution.backend), batch, spec.vocab)


def ready_gradient(
    logits: Tensor, targets: Tensor, rows: Tensor, statistics: Tensor, slopes: Tensor, spec: Spec
) -> tuple[Tensor, Tensor]:
    """The backward of the log-probs -> (gradient [..., V], the 0-d factor that it is still to be multiplied by)."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    batch = RowBatch(logits, targets, rows, spec.transform)
    unscale = gradient_rows(row_ops(spec.execution.backend), batch, spec.vocab, statistics, slopes, out)
    return out, rows.new_ones(()) if unscale is None else unscale
