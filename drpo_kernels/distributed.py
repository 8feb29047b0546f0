"""Losses, gradients and metrics over ranks and accumulation steps that equal those of one big batch on one process.

    vocabulary-parallel head   `VocabShard`, the `vocab_shard` keyword of the linear functions
    data parallel              `global_normalizer`, the `normalizer` keyword of the policy losses
    context parallel           `sequence_coefficients`, the `reduction` keyword of the policy losses
    logging                    `reduce_loss`, `reduce_metrics`

`group` always holds the ranks with *different* tokens, whose gradients are combined: the data-parallel group, or data
and context parallel together if sequences are split. It must not hold two ranks that share a split head, because those
have the same tokens. Without torch.distributed, or before it is initialised, a group is this process alone.

A rank may have no micro-batch, and a micro-batch may have no valid token. All functions return tensors without waiting
for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from drpo_kernels import validation
from drpo_kernels.aggregation import TokenCoefficients
from drpo_kernels.collectives import VocabShard, gather, group_size, summed
from drpo_kernels.evidence import EVIDENCE_METRICS
from drpo_kernels.metrics import EVERY_METRIC, METRICS, REFERENCE_METRICS, SPARSITY_METRICS, combined_metrics
from drpo_kernels.reductions import PREFIX
from drpo_kernels.tokens import Sequences, scorable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["VocabShard", "global_normalizer", "reduce_loss", "reduce_metrics", "sequence_coefficients"]


def global_normalizer(
    masks: Tensor | Sequence[Tensor],
    reduction: str = "token-mean",
    *,
    cu_seqlens: Tensor | Sequence[Tensor] | None = None,
    old_logprobs: Tensor | Sequence[Tensor] | None = None,
    group: ProcessGroup | None = None,
    gradients: str = "mean",
    loss_divisor: float = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """The `normalizer` that gives one optimizer step the gradient of its whole batch, however the batch is split.

    masks         [...] bool or 0/1, this rank's micro-batches of the step: one mask, or a list that may be empty
    reduction     the reduction that the loss takes together with this normalizer
    cu_seqlens    the offsets of packed micro-batches, needed for a "seq-..." reduction
    old_logprobs  shaped like the masks; needed if some may be NaN, or -100 and below, because the loss then treats the
                  token as masked
    group         ranks that hold different tokens; None: all processes
    gradients     how the wrapper combines the gradients of the ranks: "mean" (DDP, FSDP and ZeRO divide by the number
                  of ranks) or "sum". Gradients of micro-batches are always added
    loss_divisor  the number by which the trainer divides each micro-batch's loss before its backward: the accumulation
                  steps under DeepSpeed, Accelerate and the HF Trainer; 1 if the trainer does not divide
    device        the device of this rank's tensors; only needed if `masks` may be empty

    -> 0-d float64 (float32 on MPS): N / (ranks · loss_divisor) with "mean", N / loss_divisor with "sum". N is the
    number of valid tokens for "token-mean" and of non-empty sequences for the "seq-..." reductions, over all ranks and
    micro-batches and at least 1; it is 1 for "token-sum". This is one collective, which every rank of the group must
    join.

    Raises TypeError or ValueError, naming the argument.
    """
    masks = _batches("masks", masks)
    count = torch.zeros((), dtype=torch.int64, device=_device(masks, device))
    validation.check_named_reduction(reduction)
    offsets = _aligned_or_none("cu_seqlens", cu_seqlens, masks)
    olds = _aligned_or_none("old_logprobs", old_logprobs, masks)
    for mask, offset, old in zip(masks, offsets, olds, strict=True):
        valid = _valid(mask, old)
        if reduction == "token-mean":
            count += valid.sum()
        elif reduction != "token-sum":
            if offset is not None:
                validation.check_packing(offset, "masks", mask)
            elif mask.dim() < 2:
                raise ValueError(f"cu_seqlens must be given with reduction {reduction!r} and masks {tuple(mask.shape)}")
            count += (Sequences(mask.shape, offset).sum(valid.reshape(-1).to(torch.int64)) > 0).sum()
    count = count + 1 if reduction == "token-sum" else summed(count, group)
    return _wide(count.clamp(min=1)) / _excess(group, gradients, loss_divisor)


def sequence_coefficients(
    masks: Tensor | Sequence[Tensor],
    reduction: str,
    *,
    context_group: ProcessGroup | None,
    group: ProcessGroup | None = None,
    sequence_ids: Tensor | Sequence[Tensor] | None = None,
    sequence_counts: int | Sequence[int] | None = None,
    old_logprobs: Tensor | Sequence[Tensor] | None = None,
    horizon: float | None = None,
    gradients: str = "mean",
    loss_divisor: float = 1,
    device: torch.device | str | None = None,
) -> TokenCoefficients | list[TokenCoefficients]:
    """The `reduction` to pass if every rank of a context-parallel group holds a slice of each sequence.

    masks            [B, L / n] bool or 0/1, this rank's slices: one mask, or a list of the step's micro-batches in the
                     same order on all ranks of `context_group`
    reduction        the named reduction of the whole sequences: "token-mean", "token-sum", "seq-mean-token-mean", ...
    context_group    the ranks that hold slices of the same sequences
    group            as in `global_normalizer`: all ranks whose gradients are combined, every context group included
    sequence_ids     integer, shaped like the masks: the sequence of each token, if slices are packed or striped. By
                     default each row of a mask is a slice of one sequence
    sequence_counts  with `sequence_ids`: the number of sequences of each micro-batch, the same on all ranks of
                     `context_group`
    horizon          as in the loss, for "seq-mean-token-sum-norm"; the other arguments are those of `global_normalizer`

    -> `TokenCoefficients` shaped like each mask (a list for a list): c_t = 1 / N, or 1 / (length of t's sequence · N),
    ... Lengths are over `context_group` and N is over `group`; both factors of `global_normalizer` are applied. This
    takes two collectives. An objective on the ratio of whole sequences (GSPO) has no such form: gather its sequences
    first.

    Raises TypeError or ValueError, naming the argument.
    """
    single = isinstance(masks, Tensor)
    masks = _batches("masks", masks)
    device = _device(masks, device)
    validation.check_named_reduction(reduction)
    validation.check_horizon(horizon, reduction)
    valid = list(map(_valid, masks, _aligned_or_none("old_logprobs", old_logprobs, masks)))
    ids, counts = _sequences_of(masks, sequence_ids, sequence_counts)
    flat = torch.zeros(sum(counts), dtype=torch.int64, device=device)
    for of_batch, v, i in zip(flat.split(counts), valid, ids, strict=True):
        of_batch.index_add_(0, i, v.reshape(-1).to(torch.int64))
    flat = summed(flat, context_group) if flat.numel() else flat
    # Every rank of a context group has counted all sequences, or all tokens, of the group.
    count = summed(flat.sum() if reduction == "token-mean" else (flat > 0).sum(), group)
    size = group_size(context_group)
    number: Tensor | float = _wide((count // size).clamp(min=1)) if reduction != "token-sum" else 1
    normalizer = number / _excess(group, gradients, loss_divisor)
    if reduction == "seq-mean-token-sum-norm":
        assert horizon is not None
        normalizer = normalizer * horizon
    coefficients = []
    for v, i, of_sequence in zip(valid, ids, flat.split(counts), strict=True):
        per_token = _wide(v) / normalizer
        if reduction == "seq-mean-token-mean":
            per_token = per_token / of_sequence.clamp(min=1)[i].reshape(v.shape)
        coefficients.append(TokenCoefficients(per_token))
    return coefficients[0] if single else coefficients


def reduce_loss(
    losses: Tensor | Sequence[Tensor],
    group: ProcessGroup | None = None,
    *,
    gradients: str = "mean",
    loss_divisor: float = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """The loss of the whole batch, for a log: 0-d, detached, float64 (float32 on MPS). It takes one collective.

    losses  `out.loss` of this rank's micro-batches, 0-d: one or a list that may be empty. They were computed with
            `global_normalizer` or `sequence_coefficients`, and are not yet divided by the trainer
    The other arguments are the ones that were given to that function.
    """
    losses = _batches("losses", losses)
    nothing = _wide(torch.zeros((), device=_device(losses, device)))
    total = nothing + sum(_wide(loss.detach()) for loss in losses)
    return summed(total, group) / _excess(group, gradients, loss_divisor)


def reduce_metrics(
    metrics: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    group: ProcessGroup | None = None,
    *,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The metrics of the whole batch, from `out.metrics` of this rank's micro-batches: one or a list that may be empty.

    Means are weighted by the number of their rows, extremes are taken over the ranks that have any rows, and counts are
    added (`drpo_kernels.metrics` says which is which). -> the same keys, 0-d float64 (float32 on MPS). A metric is NaN
    if it is NaN on a rank. The keys of `sparse_grad` and of a reference are returned if this rank has them; the
    reference's are NaN if some batches lack them. This takes one collective.

    Raises TypeError for metrics that are not `out.metrics`, and ValueError for missing or additional keys.
    """
    records = [metrics] if isinstance(metrics, Mapping) else list(metrics)
    tables = METRICS | EVIDENCE_METRICS, SPARSITY_METRICS, EVERY_METRIC
    always, sparse, every = ([PREFIX + name for name in table] for table in tables)
    found = set(always)
    for record in records:
        if not isinstance(record, Mapping):
            raise TypeError(f"metrics must be out.metrics or a list of them, got {type(record).__name__}")
        expected = {*always, *(record.keys() & {PREFIX + "ref_kl"}), *(sparse if sparse[-1] in record else ())}
        if record.keys() != expected:
            amiss = sorted(record.keys() ^ expected)
            raise ValueError(f"metrics must have the keys of out.metrics, got missing or additional ones: {amiss}")
        found |= expected
    keys = [key for key in every if key in found]
    device = _device([record[keys[0]] for record in records], device)
    # All ranks send all metrics that can exist. A batch of no rows changes nothing; a rank without micro-batches sends
    # only that.
    nothing = torch.zeros(len(every), device=device)
    # NaN marks a reference metric that a batch lacks. Metrics of sparse gradients need no mark: their counts are 0.
    absent = {PREFIX + name: nothing[0] + torch.nan for name in REFERENCE_METRICS}
    rows = [torch.stack([_wide(record.get(k, absent.get(k, nothing[0]))) for k in every]) for record in records]
    stacked = torch.stack([_wide(nothing), *rows])
    local = torch.stack(list(combined_metrics(dict(zip(every, stacked.T, strict=True))).values()))
    of_all = combined_metrics(dict(zip(every, gather(local, group).T, strict=True)))
    return {key: of_all[key] for key in keys}


def _batches(name: str, values: Tensor | Sequence[Tensor]) -> list[Tensor]:
    values = [values] if isinstance(values, Tensor) else list(values)
    for value in values:
        validation.check_tensor(name, value)
    return values


def _aligned(name: str, values: Tensor | Sequence[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """The values as a list with one entry per mask. Raises ValueError if their number differs."""
    given = _batches(name, values)
    if len(given) != len(masks):
        raise ValueError(f"{name} must be given for each of the {len(masks)} masks, got {len(given)}")
    return given


def _aligned_or_none(
    name: str, values: Tensor | Sequence[Tensor] | None, masks: list[Tensor]
) -> list[Tensor] | list[None]:
    return [None] * len(masks) if values is None else _aligned(name, values, masks)


def _valid(mask: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """The tokens that the losses treat as valid: bool, shaped like the mask."""
    valid = (mask != 0) & (mask == mask)
    if old_logprobs is None:
        return valid
    if old_logprobs.shape != mask.shape:
        raise ValueError(
            f"old_logprobs must be shaped like its mask {tuple(mask.shape)}, got {tuple(old_logprobs.shape)}"
        )
    return valid & scorable(old_logprobs)


def _sequences_of(
    masks: list[Tensor],
    sequence_ids: Tensor | Sequence[Tensor] | None,
    sequence_counts: int | Sequence[int] | None,
) -> tuple[list[Tensor], list[int]]:
    """-> (the sequence of each token [N] int64, the number of sequences), a list each with one entry per micro-batch.

    Without sequence_ids, each row of a mask is a sequence.
    """
    if (sequence_ids is None) != (sequence_counts is None):
        raise ValueError("sequence_ids and sequence_counts must be given together, got one of them")
    if sequence_ids is None or sequence_counts is None:
        for mask in masks:
            if mask.dim() < 2:
                raise ValueError(f"sequence_ids must be given with masks of shape {tuple(mask.shape)}, got None")
        counts = [mask.shape[:-1].numel() for mask in masks]
        ids = [torch.arange(n, device=m.device).repeat_interleave(m.shape[-1]) for m, n in
               zip(masks, counts, strict=True)]  # fmt: skip
        return ids, counts
    ids = _aligned("sequence_ids", sequence_ids, masks)
    counts = [sequence_counts] if isinstance(sequence_counts, int) else list(sequence_counts)
    if len(counts) != len(masks):
        raise ValueError(f"sequence_counts must be given for each of the {len(masks)} masks, got {len(counts)}")
    for i, mask in zip(ids, masks, strict=True):
        validation.check_tensor("sequence_ids", i, floating=False)
        if i.shape != mask.shape:
            raise ValueError(f"sequence_ids must be shaped like its mask {tuple(mask.shape)}, got {tuple(i.shape)}")
    return [i.reshape(-1).to(torch.int64) for i in ids], counts


def _device(tensors: list[Tensor], device: torch.device | str | None) -> torch.device:
    if tensors:
        return tensors[0].device
    return torch.get_default_device() if device is None else torch.device(device)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def _excess(group: ProcessGroup | None, gradients: str, loss_divisor: float) -> float:
    """The number by which the wrapper and the trainer together divide the gradient later."""
    if gradients not in ("mean", "sum"):
        raise ValueError(f"gradients must be 'mean' or 'sum', got {gradients!r}")
    validation.check_number("loss_divisor", loss_divisor)
    return (group_size(group) if gradients == "mean" else 1) * loss_divisor
