"""The graph that `torch.compile` makes of a call, and an autograd graph of our own that the caller does not see."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def traced(tensor: Tensor) -> bool:
    """Whether this call is compiled or exported, or its tensors have shapes and no values (`FakeTensorMode`)."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


def check_not_exported() -> None:
    """Raises NotImplementedError inside `torch.export`."""
    if torch.compiler._is_exporting_flag:  # before torch 2.12, is_exporting() is always True inside a graph
        # The import stands here because torch.compiler.disable loads all of torch._dynamo.
        from drpo_kernels.uncompiled import refuse_export

        refuse_export()


def positions(wanted: Tensor) -> Tensor:
    """Where a mask [N] is True; every place of a fake mask, which has no values."""
    if traced(wanted) and not torch.compiler.is_compiling():
        return torch.arange(len(wanted), device=wanted.device)
    return wanted.nonzero()[:, 0]


def own_graph() -> contextlib.AbstractContextManager:
    """A context with autograd on for a graph of our own, whatever mode the caller is in. It is written in C, unlike
    `torch.enable_grad`, so that a Ctrl-C cannot leave the caller's mode changed.

    The caller's hooks on saved tensors do not see the graph, because those of activation checkpointing would run the
    checkpointed model again for it.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    return torch._C._InferenceMode(False) if hooks is None else _unhooked_graph()


@contextlib.contextmanager
def _unhooked_graph() -> Iterator[None]:
    with torch._C._InferenceMode(False), torch.autograd.graph.saved_tensors_hooks(_kept, _kept):
        yield


def _kept(saved: Tensor) -> Tensor:
    return saved
