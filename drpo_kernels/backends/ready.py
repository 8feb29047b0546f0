"""Row operations on logits that are ready: a chunk of the linear sweep, or the caller's own whatever its strides."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from drpo_kernels.backends.rows import Outcome, Row, RowBatch, RowKind, RowOps, Stat, Terms, float16_scale


def matrices(logits: Tensor, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """[..., V] logits as 2-D views with the range of rows each covers: `logits[:, :-1]` must not cost a copy."""
    count = logits.shape[:-1].numel()
    if logits.dim() == 2:  # a view would give a single row another stride, and Triton would compile another kernel
        yield slice(start, start + count), logits
        return
    try:
        view = logits.view(count, logits.shape[-1])
    except RuntimeError:
        step = logits.shape[1:-1].numel()
        for i, part in enumerate(logits):
            yield from matrices(part, start + i * step)
    else:
        yield slice(start, start + count), view


def _parts(batch: RowBatch, vocab: int, out: Tensor | None) -> Iterator[tuple[slice, RowBatch, Tensor | None]]:
    """(range of rows, their batch with logits [n, vocab], their part of `out` [n, V])."""
    count = batch.rows.shape[1]
    flat = out if out is None or out.dim() == 2 else out.view(count, out.shape[-1])
    for part, view in matrices(batch.logits):
        gradient = view if out is batch.logits else None if flat is None else flat[part]
        piece = batch._replace(logits=view[:, :vocab], targets=batch.targets[part], rows=batch.rows[:, part])
        yield part, piece, gradient


def in_one(parts: Sequence[Tensor], rows: Tensor) -> Tensor:
    """What consecutive rows report, side by side: [K, n] each -> [K, N]; no copy of a single one."""
    if not parts:
        return rows.new_empty(len(Outcome), 0)
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), 1)


def statistics_rows(ops: RowOps, batch: RowBatch, vocab: int) -> Tensor:
    """Logits [..., V] of which `vocab` columns are real -> [len(Stat), N]."""
    statistics = batch.rows.new_empty(len(Stat), batch.rows.shape[1])
    for part, piece, _ in _parts(batch, vocab, None):
        statistics[:, part] = ops.statistics(piece)
    return statistics


def gradient_rows(
    ops: RowOps, batch: RowBatch, vocab: int, statistics: Tensor, slopes: Tensor, out: Tensor
) -> Tensor | None:
    """Write the gradient into `out`, shaped like the logits [..., V] and perhaps the logits themselves.

    -> the 0-d factor that undoes a float16 scale, or None.
    """
    undo = None
    if out.dtype == torch.float16:
        # with dz/dx; a SKIPPED row's slopes may be anything
        chained = slopes * (batch.transform.logit_scale * batch.rows[Row.INV_TEMPERATURE])
        scale, undo = float16_scale(torch.where(batch.rows[Row.KIND] == RowKind.ACTIVE, chained, 0))
        slopes = slopes * scale
    for part, piece, gradient in _parts(batch, vocab, out):
        ops.write_gradient(piece, statistics[:, part], slopes[:, part], gradient)
    return undo


def policy_rows(
    ops: RowOps, batch: RowBatch, vocab: int, terms: Terms, out: Tensor | None, factors: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The loss of every row -> (outcome [len(Outcome), N], undo factor as in `gradient_rows`).

    One launch where the backend fuses these terms; else statistics, the loss on [N] in PyTorch, and the gradient.
    `factors`, of a matrix of logits [N, V], as in `RowOps.policy`.
    """
    if ops.fuses(terms) and (out is None or out.dtype != torch.float16):
        parts = [ops.policy(piece, terms, gradient, factors) for _, piece, gradient in _parts(batch, vocab, out)]
        return in_one(parts, batch.rows), None
    statistics = statistics_rows(ops, batch, vocab)
    outcome, slopes = ops.losses(statistics, batch.rows, terms)
    return outcome, None if out is None else gradient_rows(ops, batch, vocab, statistics, slopes, out)
