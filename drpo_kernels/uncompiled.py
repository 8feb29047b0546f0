"""What must not be traced. Only imported while a graph is being compiled."""

import torch


@torch.compiler.disable
def outside_graph(function, *args):
    """Call `function` outside the graph: an unregistered objective cannot travel through an op's schema (see
    `register_objective`).
    """
    return function(*args)
