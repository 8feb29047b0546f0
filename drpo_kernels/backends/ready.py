"""Row operations on logits that are ready: a chunk of the linear sweep, or the caller's own whatever its strides."""

from collections.abc import Iterator

import torch
from torch import Tensor

from drpo_kernels.backends import row_ops
from drpo_kernels.backends.rows import Field, Outcome, RowBatch, RowKind, RowOps, Stat, Terms, float16_scale
from drpo_kernels.backends.spec import Spec


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
    unscale = None
    if out.dtype == torch.float16:
        # with dz/dx; a SKIPPED row's slopes may be anything
        chained = slopes * (batch.transform.logit_scale * batch.rows[Field.INV_TEMPERATURE])
        scale, unscale = float16_scale(torch.where(batch.rows[Field.KIND] == RowKind.ACTIVE, chained, 0))
        slopes = slopes * scale
    for part, piece, gradient in _parts(batch, vocab, out):
        assert gradient is not None  # it is a part of `out`
        ops.write_gradient(piece, statistics[:, part], slopes[:, part], gradient)
    return unscale


def policy_rows(
    ops: RowOps, vocab: int, terms: Terms, batch: RowBatch, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The loss of every row -> (outcome [len(Outcome), N], the 0-d factor of `gradient_rows`).

    One launch if the backend fuses these terms. Otherwise statistics, the loss on [N] in PyTorch, and the gradient.
    """
    if ops.fuses(terms) and (out is None or out.dtype != torch.float16):
        parts = [ops.policy(piece, terms, gradient) for _, piece, gradient in _parts(batch, vocab, out)]
        return parts[0] if len(parts) == 1 else torch.cat([batch.rows.new_empty(len(Outcome), 0), *parts], 1), None
    statistics = statistics_rows(ops, batch, vocab)
    outcome, slopes = ops.losses(statistics, batch.rows, terms)
    return outcome, None if out is None else gradient_rows(ops, batch, vocab, statistics, slopes, out)


def ready_policy(
    logits: Tensor, targets: Tensor, rows: Tensor, spec: Spec, with_gradient: bool, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The policy loss of logits [..., V] -> (outcome [len(Outcome), N], gradient or an empty tensor, 0-d factor on it).
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
    """The log-probs' forward: statistics [len(Stat), N]."""
    batch = RowBatch(logits, targets, rows, spec.transform)
    return statistics_rows(row_ops(spec.execution.backend), batch, spec.vocab)


def ready_gradient(
    logits: Tensor, targets: Tensor, rows: Tensor, statistics: Tensor, slopes: Tensor, spec: Spec
) -> tuple[Tensor, Tensor]:
    """The log-probs' backward -> (gradient [..., V], 0-d factor on it)."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    batch = RowBatch(logits, targets, rows, spec.transform)
    unscale = gradient_rows(row_ops(spec.execution.backend), batch, spec.vocab, statistics, slopes, out)
    return out, rows.new_ones(()) if unscale is None else unscale
