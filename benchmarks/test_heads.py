"""`pytest benchmarks` times one forward and backward of our heads, PyTorch's, TRL's, Liger's and cut-cross-entropy's.

A group is a workload, from hidden states or from logits, and its cases are those of `python -m benchmarks.speed`. The
gradients are compared with float64 first: a wrong method of ours fails, and no wrong method is timed. `extra_info` has
the tokens per second, the peak of the extra memory and the gradient's error. On a CPU all of it takes minutes; on a GPU
the cases are at real models' sizes, and `-k` chooses among them. `--quick` goes through all of it at tiny shapes.
"""

import functools
import time

import pytest
import torch

from benchmarks.harness import plans
from benchmarks.harness.measure import Case, Prepared, check, is_broken, peak_of
from benchmarks.harness.methods import METHODS
from benchmarks.harness.timing import DeviceSeconds

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The rounds of a case take about so many seconds together, so that a slow method costs no more than a fast one.
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 4.0, 2, 20


def pytest_generate_tests(metafunc):
    cases = plans.front_door(DEVICE.type, metafunc.config.getoption("--quick"))
    metafunc.parametrize("case", cases, ids=map(name_of, cases))


def name_of(case: Case) -> str:
    workload = case.workload
    rows = "all" if case.active_share == 1 else f"active{100 * case.active_share:.0f}"
    return f"{case.method}-{workload.model}_{workload.tokens}-{workload.dtype}-{workload.kind}-{rows}"


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    """Return the inputs of a workload and its exact gradients, which neighbouring cases share."""
    return Prepared(DEVICE)


@functools.cache
def device_clock() -> DeviceSeconds:
    return DeviceSeconds(DEVICE)


def test_forward_backward(benchmark, prepared, case):
    workload, method = case.workload, METHODS[case.method]
    rows = "" if case.active_share == 1 else f", {case.active_share:.0%} of the rows active"
    start = "logits" if method.takes == "logits" else "hidden states"
    size = f"T={workload.tokens} H={workload.shape.hidden} V={workload.shape.vocab}"
    benchmark.group = f"{workload.model} {size}, {workload.dtype}, {workload.kind}, from {start}{rows}"
    inputs, exact = prepared.of(case)
    outcome = check(method, inputs, exact)
    assert not is_broken(case.method, outcome.status), outcome.status
    if outcome.step is None:
        pytest.skip(outcome.status)

    def step() -> None:
        outcome.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def flush() -> None:
        if DEVICE.type == "cuda":
            device_clock().flush()
            torch.cuda.synchronize()

    started = time.perf_counter()
    step()
    rounds = int(SECONDS / (time.perf_counter() - started))
    peak = None if method.floor else peak_of(outcome.step, case.method, inputs)
    benchmark.pedantic(step, setup=flush, rounds=min(max(rounds, LEAST_ROUNDS), MOST_ROUNDS))
    benchmark.extra_info |= {
        "status": outcome.status,
        "gradient_error": max((outcome.gradient_error or {}).values(), default=None),
        "peak_extra_mib": None if peak is None else round(peak / 2**20, 1),
    }
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["tokens_per_second"] = round(workload.tokens / benchmark.stats.stats.median, 1)
