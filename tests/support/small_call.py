"""This module has a small call with right arguments, copies with a wrong one, and the error that must name it."""

import re

import pytest
import torch

B, L, H, V = 2, 3, 4, 7


def arguments():
    g = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(B, L, H, generator=g),
        "weight": torch.randn(V, H, generator=g),
        "targets": torch.randint(V, (B, L), generator=g),
        "old_logprobs": -torch.rand(B, L, generator=g) - 0.1,
        "advantages": torch.randn(B, L, generator=g),
        "mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }


def changed(tensor, value, where=(0, 0)):
    tensor = tensor.clone()
    tensor[where] = value
    return tensor


A = arguments()
LOGITS = A["hidden"] @ A["weight"].T
PACKED = {name: A[name].reshape(B * L, *A[name].shape[2:]) for name in A if name != "weight"}
ROWS = torch.rand(B, L)


def expect(name, function, *args, **kwargs):
    with pytest.raises((ValueError, TypeError)) as caught:
        function(*args, **kwargs)
    assert re.search(rf"\b({name})\b", str(caught.value)), f"{name!r} is not named in: {caught.value}"
