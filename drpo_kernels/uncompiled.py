"""What must not be traced. Only imported while a graph is being compiled."""

import torch


@torch.compiler.disable
def outside_graph(function, *args):
    """Call `function` outside the graph: an unregistered objective (see `register_objective`) and the process group of
    a vocabulary shard cannot travel through an op's schema, and a model's head is exchanged while it is probed.
    """
    return function(*args)
