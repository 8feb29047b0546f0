"""Products are exact whatever the process has set, and its settings survive signals, threads, forks and errors.

A product on a CPU changes no setting, while one on a GPU may have to. Tests marked `guarded` imitate a GPU: around each
product on the CPU they change and restore every setting that exists.
"""

import contextlib
import functools
import itertools
import os
import select
import signal
import sys
import threading
import time

import pytest
import torch

import drpo_kernels as dk
from drpo_kernels.backends import matmul
from drpo_kernels.backends.matmul import CUDA_SETTINGS, NARROW_SUMS, PER_BACKEND, exactly, product, settings_of
from interrupted_calls import EVERY, LEVELS, allow_everything, call, guard_every_product, settings
from launcher import launch
from problems import relative

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CPU = torch.device("cpu")
needs_levels = pytest.mark.skipif(not PER_BACKEND, reason="needs torch >= 2.9")


@pytest.fixture(autouse=True)
def everything_allowed():
    """Allow every reduced precision, and afterwards restore what was set before."""
    sums = [getattr(torch.backends.cuda.matmul, name) for name in NARROW_SUMS]
    precision = torch.get_float32_matmul_precision()
    allow_everything()
    yield
    torch.set_float32_matmul_precision(precision)
    for name, allowed in zip(NARROW_SUMS, sums, strict=True):
        setattr(torch.backends.cuda.matmul, name, allowed)


@pytest.fixture(params=[False, True], ids=["cpu", "guarded"])
def way(request, monkeypatch):
    if request.param:
        guard_every_product(monkeypatch)
    return request.param


class Paused(dk.Objective):
    """This objective stops in the middle of a call, sets `inside`, and waits for `go`."""

    def __init__(self):
        self.inside, self.go = threading.Event(), threading.Event()

    def token_loss(self, tokens):
        self.inside.set()
        assert self.go.wait(60)
        return -tokens.ratio * tokens.advantages


@contextlib.contextmanager
def thread_inside(objective):
    """Hold another thread inside a call while the block runs."""
    thread = threading.Thread(target=call, args=(objective,))
    thread.start()
    try:
        assert objective.inside.wait(60)
        yield
    finally:
        objective.go.set()
        thread.join()


# ---------------------------------------------------------------------------------------------------------------
# exactness


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", [(70, 130, 90), (1, 300, 200), (64, 48, 96), (33, 0, 5), (0, 4, 4)], ids=str)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_products_of_a_cpu(precision, shape, accumulate, monkeypatch):
    """Products are exact to the rounding of float32. bf16 would be off by 2e-3, and TF32 by 3e-4."""
    monkeypatch.setattr(matmul, "DOUBLE_TILE", 48)
    monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: True, raising=False)
    torch.set_float32_matmul_precision(precision)
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(depth, rows, generator=generator).T, torch.randn(depth, columns, generator=generator)
    before = torch.randn(rows, columns, generator=generator) if accumulate else torch.full((rows, columns), torch.nan)
    out, want = before.clone(), a.double() @ b.double() + (before.double() if accumulate else 0)
    product(a, b, out, accumulate)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5 * depth**0.5)
    assert not want.norm() or relative(out, want) <= 1e-6


@needs_levels
@pytest.mark.parametrize("where", ["matmul", "parent", "generic"])
@pytest.mark.parametrize("sparse_grad", [0.0, 0.01])
def test_calls_on_a_cpu_where_bf16_is_allowed(where, sparse_grad, device):
    """Loss and gradients have float32's precision, whether oneDNN's own setting or an inherited one allows bf16."""
    torch.set_float32_matmul_precision("highest")
    for level in LEVELS:
        torch._C._set_fp32_precision_setter(*level, "none")
    level = {"matmul": ("mkldnn", "matmul"), "parent": ("mkldnn", "all"), "generic": ("generic", "all")}[where]
    generator = torch.Generator().manual_seed(0)
    hidden, weight = 0.2 * torch.randn(60, 128, generator=generator), torch.randn(300, 128, generator=generator)
    targets, old = torch.randint(300, (60,), generator=generator), -6 * torch.rand(60, generator=generator)
    results = []
    for dtype, precision in ((FP64, "none"), (FP32, "bf16")):
        torch._C._set_fp32_precision_setter(*level, precision)
        try:
            leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
            out = dk.linear_policy_loss(
                *leaves, targets.to(device), old.to(device, dtype), torch.ones(60, dtype=dtype, device=device),
                backend="torch", sparse_grad=sparse_grad,
            )  # fmt: skip
            out.loss.backward()
        finally:
            torch._C._set_fp32_precision_setter(*level, "none")
        results.append((out.logprobs.detach(), *(x.grad for x in leaves)))
    for got, want in zip(results[1], results[0], strict=True):
        assert relative(got, want) <= 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("operand, result", [*CUDA_SETTINGS, (BF16, FP32)], ids=str)
def test_products_of_a_gpu(operand, result, accumulate, device):
    """Products are exact to the rounding of the result. TF32 would be off by 3e-4, and sums in float16 by more than
    1e-3.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 4096, generator=generator).to(device, operand) for _ in range(2))
    out, before = torch.ones(256, 256, dtype=result, device=device), settings()
    product(a, b.T, out, accumulate)
    assert relative(out, a.double() @ b.double().T + accumulate) <= {FP32: 2e-6, FP16: 2**-11, BF16: 2**-8}[result]
    assert settings() == before


def test_what_a_product_depends_on():
    cuda = torch.device("cuda")
    for operand, result in itertools.product((BF16, FP16, FP32, FP64), repeat=2):
        assert settings_of(CPU, operand, result) == ()
        assert bool(settings_of(cuda, operand, result)) == ((operand, result) in CUDA_SETTINGS)
    # On a GPU every chunk has these products: logits, dX, and dW accumulated from bf16 operands.
    assert settings_of(cuda, BF16, FP32) == settings_of(cuda, FP64, FP64) == ()


def test_settings_are_exact_inside():
    seen = []
    exactly(EVERY, lambda: seen.append(settings()))
    assert seen[0][: len(NARROW_SUMS)] == [False] * len(NARROW_SUMS)
    assert seen[0][-len(LEVELS) :][:3] == ["none"] * 3 if PER_BACKEND else seen[0][-1] == "highest"


# ---------------------------------------------------------------------------------------------------------------
# settings are restored afterwards


@needs_levels
def test_every_level_gets_its_own_precision_back():
    """A level without a precision of its own inherits one before and after the call, whatever its parents are changed
    to later.
    """
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    levels = LEVELS[:3]
    try:
        for own in itertools.product(("none", "ieee", "tf32"), repeat=3):
            for level, precision in zip(levels, own, strict=True):
                write(*level, precision)
            exactly(EVERY, list)
            for level, precision in zip(levels, own, strict=True):
                assert read(*level) == precision  # by now its parents have no precision of their own
                write(*level, "none")
    finally:
        for level in levels:
            write(*level, "none")


@pytest.mark.parametrize("name", NARROW_SUMS)
@pytest.mark.parametrize("allowed", [False, True])
def test_sums_get_back_what_was_allowed(name, allowed):
    setattr(torch.backends.cuda.matmul, name, allowed)
    before = settings()
    exactly(EVERY, list)
    assert settings() == before


@pytest.mark.skipif(not any(setting.paired for setting in EVERY), reason="has no setting of split-K")
@pytest.mark.parametrize("name", NARROW_SUMS[:2])
def test_split_k_stays_forbidden(name):
    setattr(torch.backends.cuda.matmul, name, (False, False))
    before, seen = settings(), []
    exactly(EVERY, lambda: seen.append(getattr(torch.backends.cuda.matmul, f"{name}_split_k")))
    assert seen == [False] and settings() == before


def test_after_an_error_in_a_product():
    before = settings()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        exactly(EVERY, functools.partial(torch.mm, torch.ones(2, 3), torch.ones(2, 3)))
    assert settings() == before
    thread = threading.Thread(target=exactly, args=(EVERY, list))  # this thread gets the lock only if it is free
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.skipif(sys.platform == "win32", reason="needs setitimer")
@pytest.mark.parametrize("guarded", [False, True], ids=["cpu", "guarded"])
def test_ctrl_c_at_any_moment(guarded):
    status, output = launch("interrupted_calls", "guarded" if guarded else "cpu")
    assert status == 0, output
    count, changed = eval(output.splitlines()[-1])
    assert count >= 100 and not changed, f"{len(changed)} of {count}"


@pytest.mark.skipif(sys.platform == "win32", reason="needs setitimer")
def test_ctrl_c_while_another_thread_has_the_lock():
    before = settings()
    thread = threading.Thread(target=exactly, args=(EVERY, functools.partial(time.sleep, 1.0)))
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        thread.start()
        while settings() == before:
            time.sleep(0.01)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            exactly(EVERY, list)
        assert settings() != before  # the other thread's settings still hold
        thread.join()
        assert settings() == before
        exactly(EVERY, list)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("name", [*NARROW_SUMS, "precision"])
def test_what_another_thread_sets_during_a_call(name, way):
    with thread_inside(Paused()):
        if name == "precision":
            torch.set_float32_matmul_precision("high")
        else:
            setattr(torch.backends.cuda.matmul, name, False)
        expected = settings()
    assert settings() == expected


def test_threads_take_turns():
    before, seen = settings(), []
    reads = [setting.read for setting in EVERY]

    def work():
        for _ in range(200):
            exactly(EVERY, lambda: (seen.append([read() for read in reads]), time.sleep(0)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 800 and all(x == seen[0] for x in seen)
    assert settings() == before


def in_a_child(function):
    """Return what the function returns in a forked child, as text. Fail after 30 s."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, repr(function()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    try:
        answered = select.select([reading], [], [], 30)[0]
        return os.read(reading, 10_000).decode() if answered else pytest.fail("the child hangs")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork") or torch.cuda.is_available(), reason="forks without a GPU")


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fork_while_a_thread_is_inside_a_call(way):
    want, before = call(), settings()
    with thread_inside(Paused()):
        found, loss, after = eval(in_a_child(lambda: (settings(), call(), settings())))
    assert found == after == before and loss == want


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fork_while_a_setting_is_changed():
    """The fork waits until the product is finished."""
    before, stop = settings(), threading.Event()

    def work():
        while not stop.is_set():
            exactly(EVERY, functools.partial(time.sleep, 0.005))

    def child():
        exactly(EVERY, list)
        return settings()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            assert eval(in_a_child(child)) == before
    finally:
        stop.set()
        thread.join()
    assert settings() == before
