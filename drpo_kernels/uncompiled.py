"""Functions that `torch.compile` must not trace. This module is only imported while a graph is being compiled."""

import torch

NOT_EXPORTED = (
    "torch.export of the functions of drpo_kernels is not supported: they exist for training, and an exported program "
    "has no backward of theirs. torch.compile(fullgraph=True) is"
)
UNREGISTERED = (
    "an objective of a class without @drpo_kernels.register_objective, a vocab_shard or a head that is being probed "
    "cannot be used in one graph (fullgraph=True)"
)


@torch.compiler.disable(reason=UNREGISTERED)
def outside_graph(function, *args):
    """Call `function` outside the graph. The schema of an op can carry neither an unregistered objective (see
    `register_objective`) nor the process group of a vocabulary shard, and a probed model has its head exchanged.
    """
    return function(*args)


@torch.compiler.disable(reason=NOT_EXPORTED)
def refuse_export() -> None:
    """Raise NotImplementedError outside the graph, because PyTorch 2.8 would not pass on a message from inside."""
    raise NotImplementedError(NOT_EXPORTED)
