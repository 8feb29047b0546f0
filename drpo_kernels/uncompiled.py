"""What must not be traced. Only imported while a graph is being compiled."""

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
    """Call `function` outside the graph: an unregistered objective (see `register_objective`) and the process group of
    a vocabulary shard cannot travel through an op's schema, and a model's head is exchanged while it is probed.
    """
    return function(*args)


@torch.compiler.disable(reason=NOT_EXPORTED)
def refuse_export() -> None:
    """Outside the graph too: from inside, PyTorch 2.8 would not pass the message on."""
    raise NotImplementedError(NOT_EXPORTED)
