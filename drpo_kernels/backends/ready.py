"""Row operations on logits that are ready: a chunk of the linear sweep, or the caller's own whatever its strides."""

from collections.abc import Iterator

import torch
from torch import Tensor

from drpo_kernels.backends.rows import Outcome, Row, RowKind, RowOps, Stat, Terms, Transform, float16_scale, row_losses


def matrices(logits: Tensor, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """[..., V] logits as 2-D views with the range of rows each covers: `logits[:, :-1]` must not cost a copy."""
    count = logits.shape[:-1].numel()
    try:
        view = logits.view(count, logits.shape[-1])
    except RuntimeError:
        step = logits.shape[1:-1].numel()
        for i, part in enumerate(logits):
            yield from matrices(part, start + i * step)
    else:
        yield slice(start, start + count), view


def _parts(logits: Tensor, out: Tensor, vocab: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(range of rows, their logits [n, vocab], their gradient [n, V])."""
    for part, view in matrices(logits):
        gradient = view if out is logits else out.view(-1, out.shape[-1])[part]
        yield part, view[:, :vocab], gradient


def statistics_rows(
    ops: RowOps, logits: Tensor, targets: Tensor, rows: Tensor, transform: Transform, bias: Tensor | None, vocab: int
) -> Tensor:
    """logits [..., V], targets [N], rows [len(Row), N] -> [len(Stat), N]."""
    statistics = rows.new_empty(len(Stat), rows.shape[1])
    for part, view in matrices(logits):
        statistics[:, part] = ops.statistics(view[:, :vocab], targets[part], rows[:, part], transform, bias)
    return statistics


def gradient_rows(
    ops: RowOps,
    logits: Tensor,
    targets: Tensor,
    rows: Tensor,
    statistics: Tensor,
    slopes: Tensor,
    transform: Transform,
    bias: Tensor | None,
    vocab: int,
    out: Tensor,
) -> Tensor | None:
    """Write the gradient into `out`, shaped like `logits` and perhaps `logits` itself.

    -> the 0-d factor that undoes a float16 scale, or None.
    """
    undo = None
    if out.dtype == torch.float16:
        # a SKIPPED row's slopes may be anything
        scale, undo = float16_scale(torch.where(rows[Row.KIND] == RowKind.ACTIVE, slopes, 0))
        slopes = slopes * scale
    for part, view, gradient in _parts(logits, out, vocab):
        ops.write_gradient(
            view, targets[part], rows[:, part], statistics[:, part], slopes[:, part], transform, bias, gradient
        )
    return undo


def policy_rows(
    ops: RowOps,
    logits: Tensor,
    targets: Tensor,
    rows: Tensor,
    terms: Terms,
    transform: Transform,
    bias: Tensor | None,
    vocab: int,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The loss of every row -> (outcome [len(Outcome), N], undo factor as in `gradient_rows`).

    One launch where the backend fuses these terms; else statistics, the loss on [N] in PyTorch, and the gradient.
    """
    if ops.fuses(terms) and (out is None or out.dtype != torch.float16):
        outcome = rows.new_empty(len(Outcome), rows.shape[1])
        for part, view, gradient in _parts(logits, logits if out is None else out, vocab):
            written = None if out is None else gradient
            outcome[:, part] = ops.policy(view, targets[part], rows[:, part], terms, transform, bias, written)
        return outcome, None
    statistics = statistics_rows(ops, logits, targets, rows, transform, bias, vocab)
    outcome, slopes = row_losses(statistics[Stat.LOGPROB], statistics[Stat.ENTROPY], rows, terms)
    if out is None:
        return outcome, None
    return outcome, gradient_rows(ops, logits, targets, rows, statistics, slopes, transform, bias, vocab, out)
