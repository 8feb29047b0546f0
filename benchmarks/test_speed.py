"""`pytest benchmarks`: every method on every workload under pytest-benchmark, gradients compared first.

On a CPU the shapes are tiny and say that all of it runs. On a GPU they are real models', thousands of cases: choose
with `-k`, for instance `-k "linear_policy_loss-Qwen3-8B_8192-bfloat16"`. `extra_info` has status, gradient error and
peak memory (None on a CPU, where only a fresh process tells, as `python -m benchmarks.speed` starts them).
"""

import functools
import itertools

import pytest
import torch

from benchmarks.harness import plans
from benchmarks.harness.measure import Attempt, Case, check, is_broken
from benchmarks.harness.memory import peak_on_device
from benchmarks.harness.method import DTYPES
from benchmarks.harness.methods import METHODS
from benchmarks.harness.timing import DeviceSeconds
from benchmarks.harness.workloads import Inputs, Workload

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = {"cpu": 2, "cuda": 10}


def workloads() -> list[tuple[str, int]]:
    """Models and T."""
    if DEVICE.type == "cpu":
        return [(plans.QUICK_MODEL, 64)]
    standard = plans.STANDARD["cuda"]
    at_one_size = [(model, standard.tokens) for model in (standard.model, *standard.other_models)]
    return [*at_one_size, *((standard.model, tokens) for tokens in standard.sweep)]


def cases() -> list:
    found = []
    for (model, tokens), dtype, takes in itertools.product(workloads(), DTYPES, ("hidden", "logits")):
        workload = Workload(model, tokens, "trained", dtype)
        for share, (name, method) in itertools.product(plans.SHARES, METHODS.items()):
            if method.takes != takes or (method.floor and share < 1):
                continue
            size = "" if model == plans.QUICK_MODEL else f"_{tokens}"
            rows = "all" if share == 1 else f"active{100 * share:.0f}"
            found.append(pytest.param(Case(name, workload, share), id=f"{name}-{model}{size}-{dtype}-{rows}"))
    return found


@functools.lru_cache(maxsize=1)
def inputs_of(workload: Workload, takes: str) -> Inputs:
    torch.compiler.reset()  # or its limit on recompilations is met
    inputs = workload.inputs(DEVICE)
    return inputs.with_logits() if takes == "logits" else inputs


@functools.cache
def device_clock() -> DeviceSeconds:
    return DeviceSeconds(DEVICE)


@pytest.mark.parametrize("case", cases())
def test_forward_backward(benchmark, case):
    attempt = Attempt(case, METHODS[case.method])
    check(attempt, inputs_of(case.workload, attempt.method.takes))
    assert not is_broken(case.method, attempt.status), attempt.status
    if attempt.step is None:
        pytest.skip(attempt.status)
    peak = None if DEVICE.type == "cpu" else peak_on_device(attempt.step, DEVICE)
    benchmark.extra_info |= {"status": attempt.status, "gradient_error": attempt.gradient_error}
    benchmark.extra_info["peak_extra_bytes"] = peak
    options = {"rounds": ROUNDS[DEVICE.type], "warmup_rounds": 1}
    if DEVICE.type == "cpu":
        benchmark.pedantic(attempt.step, **options)
        return

    def step() -> None:
        attempt.step()
        torch.cuda.synchronize()

    def setup() -> None:
        device_clock().flush()
        torch.cuda.synchronize()

    benchmark.pedantic(step, setup=setup, **options)
