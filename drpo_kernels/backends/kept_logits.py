"""Logits of each row's kept ids, [N, K], and their gradients, without the logits [N, V] of the whole vocabulary.

An entry is a row t with one of its kept ids v = ids[t, k]. An id below 0 marks a place without an entry.
    logits[t, k] = W[v] · x_t + b[v]
    dX[t] = Σ_k d[t, k] W[v]        dW[v] = Σ d[t, k] x_t over the entries of v, in row order        db[v] = Σ d[t, k]
An entry costs 6H FLOP. A row of the whole vocabulary costs 6VH.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_kernels.backends.planning import NeedsGrad
from drpo_kernels.backends.sparse.contract import GatheredSums, entry_ops
from drpo_kernels.backends.sparse.sweep import offsets_of
from drpo_kernels.backends.spec import Execution, Spec
from drpo_kernels.backends.sweep import Gradients
from drpo_kernels.collectives import summed


class KeptEntries(NamedTuple):
    """The M entries whose ids this rank holds, row by row, int64."""

    rows: Tensor  # [M]
    columns: Tensor  # [M], as rows of this rank's weight
    places: tuple[Tensor, Tensor]  # the places of the entries among ids [N, K]

    def where(self, wanted: Tensor) -> "KeptEntries":
        rows, columns = self.places
        return KeptEntries(self.rows[wanted], self.columns[wanted], (rows[wanted], columns[wanted]))


def _entries(ids: Tensor, weight: Tensor, execution: Execution) -> KeptEntries:
    first = 0 if execution.vocab_shard is None else execution.vocab_shard.start
    rows, places = ((ids >= first) & (ids < first + weight.shape[0])).nonzero(as_tuple=True)
    return KeptEntries(rows, ids[rows, places] - first, (rows, places))


def kept_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, spec: Spec) -> Tensor:
    """hidden [..., H], ids [N, K] int64 -> [N, K], 0 where an id is below 0; float32, or float64 for float64 inputs.

    Operands are rounded to the compute dtype; products and sums have the precision of the result. With a shard every
    rank gets the same result.
    """
    execution = spec.execution
    entries, rows = _entries(ids, weight, execution), hidden.reshape(-1, hidden.shape[-1])
    operands = rows, entries.rows, weight, entries.columns
    values = entry_ops(execution.backend).gathered_dots(*operands, execution.compute_dtype)
    if bias is not None:
        values += bias[entries.columns]
    found = values.new_zeros(ids.shape).index_put_(entries.places, values)
    return found if execution.vocab_shard is None else summed(found, execution.vocab_shard.group)


def kept_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    slopes: Tensor,
    spec: Spec,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`slopes` [N, K] of the logits -> gradients for hidden, weight and bias in their dtypes, each rounded once. An
    empty tensor stands for one that is not needed.
    """
    execution, needs_grad = spec.execution, NeedsGrad(*needs_grad)
    entries, ops = _entries(ids, weight, execution), entry_ops(execution.backend)
    values = slopes[entries.places]
    with_gradient = values != 0  # rows that were left out have none
    entries, values = entries.where(with_gradient), values[with_gradient]
    found: list[Tensor | None] = [None, None, None]
    if needs_grad.hidden:
        shard = execution.vocab_shard
        if shard is not None and shard.partial_hidden_gradient:
            shard = None
        dtype = hidden.dtype if shard is None else slopes.dtype
        out = torch.zeros_like(hidden, dtype=dtype, memory_format=torch.contiguous_format).view(-1, hidden.shape[-1])
        places, counts = entries.rows.unique_consecutive(return_counts=True)
        terms = GatheredSums(entries.columns, values, offsets_of(counts), places)
        ops.gathered_sums(weight, terms, out, execution.compute_dtype)
        out = out if shard is None else summed(out, shard.group)
        found[0] = out.to(hidden.dtype).view(hidden.shape)
    if needs_grad.weight or needs_grad.bias:
        order = entries.columns.argsort(stable=True)  # by column, and by row within a column
        columns, counts = entries.columns[order].unique_consecutive(return_counts=True)
        ordered, offsets = values[order], offsets_of(counts)
    if needs_grad.weight:
        out = found[1] = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        terms = GatheredSums(entries.rows[order], ordered, offsets, columns)
        ops.gathered_sums(hidden.reshape(-1, hidden.shape[-1]), terms, out, execution.compute_dtype)
    if bias is not None and needs_grad.bias:
        out = found[2] = torch.zeros_like(bias)
        out[columns] = torch.segment_reduce(ordered, "sum", offsets=offsets).to(bias.dtype)
    return Gradients(*found).as_tensors(hidden)
