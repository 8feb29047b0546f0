"""The calls of torch.distributed that the package makes, and how the vocabulary of a head is split over ranks.

They serve gloo and NCCL alike. In a group of one, or if torch.distributed was not built or not initialised, no
collective is called.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # a PyTorch without distributed has no such class
    from torch.distributed import ProcessGroup


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def group_size(group: ProcessGroup | None) -> int:
    """The number of processes in `group` (None: of all processes); 1 without an initialised process group."""
    size = dist.get_world_size(group) if _initialized() else 1
    if size < 1:
        raise ValueError("group must contain this process, got one of which it is not a member")
    return size


def group_rank(group: ProcessGroup | None) -> int:
    """This process's place in `group`, -1 if it is not a member; 0 without an initialised process group."""
    return dist.get_rank(group) if _initialized() else 0


def gather(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The tensor of every rank of the group, in rank order: [...] -> [group size, ...]."""
    size = group_size(group)
    if size == 1:
        return tensor[None]
    gathered = tensor.new_empty(size, *tensor.shape)
    # PyTorch 2.13 renamed this function.
    into_one = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    into_one(gathered.view(-1), tensor.contiguous().view(-1), group=group)
    return gathered


def start_sum(tensor: Tensor, group: ProcessGroup | None) -> Callable[[], object]:
    """Start to sum a contiguous tensor over the group, in place. Call the returned function before using the tensor."""
    if group_size(group) == 1:
        return lambda: None
    work = dist.all_reduce(tensor, group=group, async_op=True)
    assert work is not None
    return work.wait


def summed(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The tensor, summed over the group in place."""
    start_sum(tensor, group)()
    return tensor


@dataclass(frozen=True)
class VocabShard:
    """How the rows of an output head [V, H] are split over the ranks of a group (Megatron's vocabulary-parallel head).

    group  process group of the ranks that hold one head together; None: all processes
    sizes  number of rows on each rank, in rank order, padding included. They may differ, but none may be 0
    partial_hidden_gradient  True: the gradient of hidden is only this rank's part of the sum over the ranks. Use it if
           hidden was gathered by a function whose backward adds the ranks (Megatron's gather from its sequence-parallel
           region)

    Rank r holds the rows [Σ sizes[:r], Σ sizes[:r + 1]) of the head. In a group of one, or without a process group, the
    head is not split. Raises TypeError or ValueError for sizes that are not a tuple of ints >= 1.
    """

    group: ProcessGroup | None
    sizes: tuple[int, ...]
    partial_hidden_gradient: bool = field(default=False, kw_only=True)

    def __post_init__(self):
        if not isinstance(self.sizes, tuple) or any(isinstance(n, bool) or not isinstance(n, int) for n in self.sizes):
            raise TypeError(f"VocabShard: sizes must be a tuple of ints, got {self.sizes!r}")
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"VocabShard: sizes must name at least 1 row for every rank, got {self.sizes}")

    @classmethod
    def gather(
        cls, weight: Tensor, group: ProcessGroup | None = None, *, partial_hidden_gradient: bool = False
    ) -> VocabShard:
        """The split of the head of which this rank holds `weight` [V/n, H]. It takes one collective, so call it once at
        set-up, on every rank. The group's backend must serve the device of the weight (CUDA for NCCL).
        """
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
        if weight.dim() != 2:
            raise ValueError(f"weight must be [V/n, H], this rank's rows of the head, got shape {tuple(weight.shape)}")
        rows = torch.tensor([weight.shape[0]], dtype=torch.int64, device=weight.device)
        return cls(group, tuple(gather(rows, group)[:, 0].tolist()), partial_hidden_gradient=partial_hidden_gradient)

    @property
    def rank(self) -> int:
        return group_rank(self.group)

    @property
    def starts(self) -> tuple[int, ...]:
        """Every rank's first row in the whole head."""
        return tuple(itertools.accumulate(self.sizes[:-1], initial=0))

    @property
    def start(self) -> int:
        """This rank's first row in the whole head."""
        return self.starts[self.rank]

    @property
    def total(self) -> int:
        """Rows of the whole head, padding included."""
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        """Rows of the largest shard."""
        return max(self.sizes)

    def real_rows(self, vocab: int) -> int:
        """The number of this rank's rows that are real entries of a vocabulary of `vocab`, not padding."""
        return min(max(vocab - self.start, 0), self.sizes[self.rank])

    def owner(self, targets: Tensor) -> Tensor:
        """The rank that holds the row of each target, [N] int64. A target outside the vocabulary gets any rank."""
        # The comparisons take Python numbers, because a tensor of boundaries would have to be copied to the device.
        return sum((targets >= start).to(torch.int64) for start in self.starts[1:]) + torch.zeros_like(targets)
