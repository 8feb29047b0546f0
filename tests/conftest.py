"""Shared set-up: without a GPU the Triton kernels run in the interpreter, which must be chosen before any import."""

import os

import pytest
import torch

torch.set_num_threads(1)  # the tensors here are tiny: on a busy machine a second thread costs a hundredfold

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device():
    """Where the tests put their tensors."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
