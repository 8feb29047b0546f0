"""Shared set-up: without a GPU the Triton kernels run in the interpreter, which must be chosen before any import."""

import contextlib
import gc
import importlib.util
import os
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch

from launcher import INTERPRETER_FAILS, WHY

torch.set_num_threads(1)  # the tensors here are tiny: on a busy machine a second thread costs a hundredfold

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

# the files whose tests marked `gpu` come first, in order of importance
FIRST = ("test_scale.py", "test_cases.py", "test_invariance.py", "test_fp8.py", "test_exact_products.py")


@pytest.hookimpl(trylast=True)  # when `-m` has made its choice
def pytest_collection_modifyitems(items):
    unfit, reason = ("interpreted", "the tensors are on the CPU") if ON_GPU else ("gpu", "needs a GPU")
    for item in items:
        if unfit in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
    if not ON_GPU:
        return
    gpu = [item for item in items if "gpu" in item.keywords]
    # pytest-xdist hands each process a stretch of the list: the large ones, which wait for each other, stay together
    gpu.sort(key=lambda item: ("large" not in item.keywords, [*FIRST, item.path.name].index(item.path.name)))
    items[:] = gpu + [item for item in items if "gpu" not in item.keywords]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A GPU test gives back the device's memory, which several processes share; those marked `large` take turns."""
    if not ON_GPU or "gpu" not in item.keywords:
        return (yield)
    with _turn() if "large" in item.keywords else contextlib.nullcontext():
        try:
            return (yield)
        finally:
            traceback.clear_frames(getattr(sys, "last_traceback", None))  # of a failure, whose tensors it holds
            gc.collect()
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _turn():
    import fcntl  # not on Windows

    with Path(tempfile.gettempdir(), f"drpo_kernels-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(autouse=True)
def kernels_run_on_the_device(request, monkeypatch):
    """A test whose kernels would get CPU tensors on a machine with a GPU fails on one without."""
    if not ON_GPU and HAS_TRITON and "device" not in request.fixturenames and "interpreted" not in request.keywords:

        def refuse(*_, **__):
            pytest.fail("a test that launches a kernel takes `device` for its tensors, or is marked `interpreted`")

        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", refuse)


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
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def tensor_cores(monkeypatch):
    """16-bit operands multiplied into float32, or rounded once, as on a GPU: the sweep takes its way there on a CPU."""

    from drpo_kernels.backends import matmul

    def product(a, b, out, accumulate=False):
        assert a.dtype == b.dtype and (out.dtype == torch.float32 or (out.dtype == a.dtype and not accumulate))
        out.copy_(torch.addmm(out, a.float(), b.float()) if accumulate else a.float() @ b.float())

    monkeypatch.setattr(matmul, "float32_outputs", lambda *_: (True, True))
    monkeypatch.setattr(matmul, "product", product)
