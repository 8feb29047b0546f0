"""This module has what the cases of shard_cases.py and batch_cases.py share: a process's place in the world, and
comparisons.

A case is a function of its process's `World`. It asserts only after its collectives, so that no rank waits for one that
has failed.
"""

import gc
from dataclasses import dataclass

import torch
import torch.distributed as dist

from problems import relative, replace

CASES = {}


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    def everyone(self, value) -> list:
        """Return every rank's value. Tensors should be on the CPU."""
        gathered = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def own(self, tensors) -> list:
        return [x.to(self.device) for x in tensors]


def leave() -> None:
    """End the process group. Call this when no local variable holds a wrapped model any more.

    A thread of gloo that still releases its last tensors when Python ends would abort the process (pytorch#190489).
    Destroying the group joins these threads. But if DDP's reducer is the last to hold the group, it joins them without
    releasing the interpreter's lock, which they wait for: a deadlock. So everything that holds the group is released
    first.
    """
    gc.collect()
    dist.destroy_process_group()


def case(*names, **options):
    """Register a function of (world, **options) as a case, named by the function and `names`, with these options."""

    def register(function):
        CASES["-".join((function.__name__, *names))] = lambda world: function(world, **options)
        return function

    return register


def agree(found, want, bound, exact=None, exact_bound=0.0, label="gradient"):
    """Assert that `found` is within `bound` of one process's tensors, and within `exact_bound` of float64, by norm."""
    for name, value in found.items():
        error = relative(value, want[name])
        assert error <= bound, f"{label} of {name}: {error:.1e} from one process, more than {bound:.0e}"
        if exact is not None:
            error = relative(value, exact[name])
            assert error <= exact_bound, f"{label} of {name}: {error:.1e} from float64, more than {exact_bound:.0e}"


def local_head(problem, shard):
    """Return the problem with only this rank's rows of the head."""
    mine = slice(shard.start, shard.start + shard.sizes[shard.rank])
    return replace(problem, weight=problem.weight[mine], bias=None if problem.bias is None else problem.bias[mine])
