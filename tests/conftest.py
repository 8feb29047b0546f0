"""Shared set-up: without a GPU the Triton kernels run in the interpreter, which must be chosen before any import."""

import os

import pytest
import torch

from launcher import INTERPRETER_FAILS, WHY

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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except Exception as error:
        if INTERPRETER_FAILS and "only 0-dimensional arrays can be converted to Python scalars" in str(error):
            pytest.skip(WHY)
        raise


@pytest.fixture(scope="session")
def device():
    """Where the tests put their tensors."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
