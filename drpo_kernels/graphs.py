"""The graphs around a call: one that is being made of it, and one of its own that nobody else may see."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def traced(tensor: Tensor) -> bool:
    """Whether this call is compiled or exported, or its tensors have shapes and no values (`FakeTensorMode`)."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


def positions(wanted: Tensor) -> Tensor:
    """Where a mask [N] is True; every place of a fake one, of which nobody knows it."""
    if traced(wanted) and not torch.compiler.is_compiling():
        return torch.arange(len(wanted), device=wanted.device)
    return wanted.nonzero()[:, 0]


def own_graph() -> contextlib.AbstractContextManager:
    """Autograd for a graph that ends where it begins, whatever mode the caller is in. In C, unlike `torch.enable_grad`,
    so that no Ctrl-C leaves autograd off.

    The caller's hooks on saved tensors do not see the graph: those of activation checkpointing would run the
    checkpointed model again for it.
    """
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return _unhooked_graph() if hooked else torch._C._InferenceMode(False)


@contextlib.contextmanager
def _unhooked_graph() -> Iterator[None]:
    with torch._C._InferenceMode(False), torch.autograd.graph.saved_tensors_hooks(_kept, _kept):
        yield


def _kept(saved: Tensor) -> Tensor:
    return saved
