"""Fixtures and hooks of all tests. Without a GPU the Triton kernels run in the interpreter, which is chosen before any
import.
"""

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

# The tensors are tiny. On a busy machine a second thread makes an operation a hundred times slower.
torch.set_num_threads(1)

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not ON_GPU:
    import quick_interpreter

    quick_interpreter.quicken()

# The tests marked `gpu` in these files run first, in this order.
FIRST = ("test_scale.py", "test_cases.py", "test_invariance.py", "test_fp8.py", "test_exact_products.py")


@pytest.hookimpl(trylast=True)  # after `-m` has selected the tests
def pytest_collection_modifyitems(items):
    unfit, reason = ("interpreted", "the tensors are on the CPU") if ON_GPU else ("gpu", "needs a GPU")
    for item in items:
        if unfit in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
    if not ON_GPU:
        return
    gpu = [item for item in items if "gpu" in item.keywords]
    # pytest-xdist gives each process a part of the list. The large tests wait for each other, so one process gets them.
    gpu.sort(key=lambda item: ("large" not in item.keywords, [*FIRST, item.path.name].index(item.path.name)))
    items[:] = gpu + [item for item in items if "gpu" not in item.keywords]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A GPU test frees its memory, because several processes share the device. Tests marked `large` take turns."""
    if not ON_GPU or "gpu" not in item.keywords:
        return (yield)
    with _turn() if "large" in item.keywords else contextlib.nullcontext():
        try:
            return (yield)
        finally:
            traceback.clear_frames(getattr(sys, "last_traceback", None))  # the frames of a failed test hold its tensors
            gc.collect()
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _turn():
    import fcntl  # this module is not on Windows

    with Path(tempfile.gettempdir(), f"drpo_kernels-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(autouse=True)
def kernels_run_on_the_device(request, monkeypatch):
    """Without a GPU, fail a test whose kernels would get CPU tensors on a machine that has one."""
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
    """Return the device on which tests put their tensors."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def without_metrics(monkeypatch):
    """Leave the metrics out of a call, because they take most of the time in which PyTorch traces it."""
    monkeypatch.setattr(sys.modules["drpo_kernels.policy_loss"], "_metrics", lambda *_: {})


@pytest.fixture
def tensor_cores(monkeypatch):
    """Make a CPU multiply 16-bit operands into float32, as tensor cores do, so that the sweep runs as on a GPU."""

    from drpo_kernels.backends import matmul

    def product(a, b, out, accumulate=False):
        assert a.dtype == b.dtype and (out.dtype == torch.float32 or (out.dtype == a.dtype and not accumulate))
        out.copy_(torch.addmm(out, a.float(), b.float()) if accumulate else a.float() @ b.float())

    monkeypatch.setattr(matmul, "float32_outputs", lambda *_: (True, True))
    monkeypatch.setattr(matmul, "product", product)
