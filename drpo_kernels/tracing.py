"""Whether tensors have values: not while a graph is made of the calls, nor where they are fake (memory estimates)."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def traced(tensor: Tensor) -> bool:
    """Whether this call is compiled or exported, or its tensors have shapes alone (`FakeTensorMode`)."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)
