"""Tests that the benchmark measures, and that it refuses to time what is wrong."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import exact, measure, methods, plans, timing
from benchmarks.harness.exact import LARGEST, TOLERANCE, Exact, verdict
from benchmarks.harness.measure import Case
from benchmarks.harness.memory import peak_on_device
from benchmarks.harness.method import FROZEN_HEAD, HEAD, LOGITS, Method, Result, Unsupported, differentiated
from benchmarks.harness.methods import METHODS
from benchmarks.harness.mixes import MIXES
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.records import read
from benchmarks.harness.timing import clock, interleaved_seconds
from benchmarks.harness.workloads import TRAINED_ENTROPY, Shape, Workload, logit_blocks, make_inputs
from benchmarks.speed import study as speed

FIELDS = {
    "benchmark", "workload", "inputs", "shape", "dtype", "entropy_nats", "objective", "method", "active_share", "takes",
    "floor", "held_to", "same_loss", "rounds_away", "status", "gradient_error", "metrics", "seconds", "median_s",
    "min_s", "max_s", "floor_median_s", "peak_extra_bytes", "peak_beyond_gradients_bytes", "entropy_quantiles",
    "device", "versions", "commit", "dirty", "command", "date",
}  # fmt: skip
TINY = Workload("cpu_small", 48, "random", "float32")
CPU = torch.device("cpu")


def run(tmp_path, *arguments):
    out = tmp_path / "results" / "cpu.jsonl"
    code = speed.main(["--quick", "--device", "cpu", "--inputs", "random", "--out", str(out), *arguments])
    return code, read(out)


@pytest.fixture
def no_memory(monkeypatch):
    """Leave out the processes that measure memory, whose start takes seconds."""
    monkeypatch.setattr(measure, "peak_in_fresh_process", lambda inputs, method: None)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Return the records of one run with a floor and one measured process."""
    return run(tmp_path_factory.mktemp("quick"), "--methods", "gemms_whole", "eager")


def test_quick_run_writes_every_field(quick, tmp_path):
    code, records = quick
    assert code == 0
    assert [record["method"] for record in records] == ["gemms_whole", "eager"]
    for record in records:
        assert set(record) == FIELDS
        assert record["status"] == "ok"
        assert len(record["seconds"]) == 2
        assert 0 < record["min_s"] <= record["median_s"] <= record["max_s"]
        command = record["command"].replace(" --device cpu", "")  # On a machine with a GPU this is not the default.
        assert command == "python -m benchmarks.speed --methods gemms_whole eager --inputs random --quick"
        assert str(tmp_path.parent) not in json.dumps(record)
    floor, eager = records
    assert floor["gradient_error"] is floor["peak_extra_bytes"] is floor["floor_median_s"] is None
    assert eager["floor_median_s"] > 0  # from samples of the floor between its own
    assert max(eager["gradient_error"].values()) < TOLERANCE[torch.float32]
    if sys.platform == "linux":
        gradients = 4 * (128 + 512) * 16
        assert eager["peak_beyond_gradients_bytes"] == max(eager["peak_extra_bytes"] - gradients, 0)


# --- what gets a time -------------------------------------------------------------------------------------------------


def wrong_weight(inputs):
    step = methods.fused(inputs)

    def wrong():
        result = step()
        return result._replace(weight=2 * result.weight)

    return wrong


def measured(method, monkeypatch, *, workload=TINY, share=1.0, **options):
    """Return the record of one method, measured in two rounds."""
    monkeypatch.setitem(METHODS, "one", method)
    plan = [Case("one", workload, share)]
    [record] = measure.measure(plan, {"command": "", "date": ""}, device=CPU, rounds=2, **options)
    return record


@pytest.mark.parametrize("rounds", [None, "logits"])
def test_wrong_gradients_get_no_time(rounds, monkeypatch, no_memory):
    record = measured(Method(wrong_weight, rounds=rounds), monkeypatch)
    assert record["status"] == "wrong gradients"
    assert record["gradient_error"]["weight"] == pytest.approx(1, rel=1e-4)
    assert record["seconds"] == [] and record["median_s"] is record["peak_extra_bytes"] is None
    assert measure.is_broken("one", record["status"])


@pytest.mark.parametrize(
    "error, rounds, status",
    [
        (TOLERANCE[torch.bfloat16], None, "ok"),
        (TOLERANCE[torch.bfloat16], "logits", "ok"),
        (0.0421, "logits", "ok, gradient error 4.2 %"),
        (0.0421, None, "wrong gradients"),
        (1.1 * LARGEST, "logits", "wrong gradients"),
        (float("nan"), "logits", "wrong gradients"),
    ],
)
def test_verdict(error, rounds, status):
    method = Method(methods.eager, rounds=rounds)
    assert verdict({"hidden": 1e-5, "weight": error}, method, torch.bfloat16) == status
    assert verdict({"hidden": error, "weight": 1e-5}, method, torch.bfloat16) == status


def test_a_gradient_that_is_missing_is_a_failure(monkeypatch, no_memory):
    """The method says that it differentiates the weight and does not."""
    found = measured(Method(methods.METHODS["linear_policy_loss_frozen_head"].prepare, wrt=HEAD), monkeypatch)
    assert found["status"].startswith("failed") and not found["seconds"]


def failing(error, after=0):
    def prepare(inputs):
        count = iter(range(100))
        step = methods.fused(inputs)

        def fails():
            if next(count) >= after:
                raise error
            return step()

        return fails

    return prepare


def refusing(inputs):
    raise Unsupported("no such feature")


@pytest.mark.parametrize(
    "method, status, broken",
    [
        (Method(failing(ModuleNotFoundError(name="theirs.kernels")), package="theirs"), "theirs not installed", False),
        (Method(failing(ModuleNotFoundError(name="other")), package="theirs"), "other not installed", False),
        (Method(failing(torch.OutOfMemoryError())), "out of memory", False),
        (Method(failing(ValueError("/a/path"), after=2)), "failed: ValueError", True),
        (Method(failing(ValueError("/a/path")), package="theirs"), "failed: ValueError", False),
        (Method(refusing), "no such feature", False),
        (Method(failing(ValueError()), gpu=True), "needs a GPU", False),
        (Method(failing(ValueError()), dtypes=("bfloat16",)), "takes bfloat16 only", False),
    ],
)
def test_a_method_without_numbers_is_a_row(method, status, broken, monkeypatch, no_memory):
    record = measured(method, monkeypatch)
    assert record["status"] == status
    assert record["seconds"] == [] and record["median_s"] is None
    assert measure.is_broken("one", record["status"]) == broken


def test_memory_that_cannot_be_measured_is_a_row(monkeypatch):
    def killed(inputs, method):
        raise subprocess.CalledProcessError(-9, "python")

    monkeypatch.setattr(measure, "peak_in_fresh_process", killed)
    record = measured(Method(methods.fused), monkeypatch)
    assert record["status"] == "failed: CalledProcessError" and record["seconds"] == []


@pytest.mark.parametrize("reuses, made", [((), 48 * 16 + 512 * 16), (("weight",), 48 * 16)])
def test_gradients_that_are_made_are_not_extra_memory(reuses, made, monkeypatch):
    monkeypatch.setattr(measure, "peak_in_fresh_process", lambda inputs, method: 1 << 20)
    record = measured(Method(methods.fused, reuses=reuses), monkeypatch)
    assert record["peak_extra_bytes"] == 1 << 20
    assert record["peak_beyond_gradients_bytes"] == (1 << 20) - 4 * made


def test_after_the_budget_nothing_is_started(monkeypatch, no_memory):
    monkeypatch.setattr(Workload, "inputs", lambda *_: pytest.fail("inputs were made"))
    record = measured(Method(methods.fused), monkeypatch, budget_seconds=-1)
    assert record["status"] == "not run: time budget" and record["seconds"] == []


def test_rounds_are_interleaved_and_the_first_is_dropped():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = interleaved_seconds(functions, rounds=2)
    assert "".join(calls) == "abbaab"
    assert [len(samples) for samples in seconds.values()] == [2, 2]


def test_a_deadline_keeps_whole_rounds(monkeypatch):
    """The clock moves by one at each reading: rounds 0 (to warm up), 1 and 2 begin in time."""
    ticks = itertools.count()
    monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic=lambda: next(ticks), perf_counter=time.perf_counter))
    seconds = interleaved_seconds(dict.fromkeys("ab", list), 1000, deadline=2.5)
    assert [len(samples) for samples in seconds.values()] == [2, 2]


def test_what_is_measured_is_written_before_the_next_workload(monkeypatch, no_memory, tmp_path):
    out = tmp_path / "out.jsonl"
    monkeypatch.setitem(METHODS, "interrupted", Method(failing(KeyboardInterrupt())))
    plan = [Case("gemms_whole", TINY), Case("interrupted", dataclasses.replace(TINY, tokens=8))]
    with pytest.raises(KeyboardInterrupt):
        measure.measure(plan, {}, device=CPU, rounds=1, out=out)
    assert [record["method"] for record in read(out)] == ["gemms_whole"]


@pytest.mark.gpu
def test_a_gpu_is_timed_and_its_memory_read():
    device = torch.device("cuda")
    square = torch.randn(4096, 4096, device=device)
    products = {n: functools.partial(lambda n: [square @ square for _ in range(n)], n) for n in (2, 20)}
    seconds = interleaved_seconds(products, 10, clock(device))  # other tests may run beside this one
    assert 0 < 4 * min(seconds[2]) < min(seconds[20])
    assert peak_on_device(lambda: torch.empty(3 << 20, device=device), device) == 12 << 20


# --- inputs and exact gradients ---------------------------------------------------------------------------------------

ON_A_CPU = [name for name, m in METHODS.items() if not (m.floor or m.gpu or m.package) and name != "eager_compiled"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("name", ON_A_CPU)
def test_own_methods_agree_with_float64(name, softcap, dtype):
    """Our methods agree also where logits are capped and most rows have no advantage; methods that round on purpose
    stay near.
    """
    method, dtype = METHODS[name], getattr(torch, dtype)
    inputs = make_inputs("trained", Shape(48, 32, 96), dtype=dtype, softcap=softcap).with_logits()
    inputs = inputs.with_active_share(0.25)
    assert (inputs.advantages != 0).sum() == 12
    outcome = measure.check(method, inputs, Exact(inputs, method.same_loss))
    if outcome.status in ("takes bfloat16 only", "no soft-cap") or "has no chunked" in outcome.status:
        pytest.skip(outcome.status)
    assert outcome.status == "ok" or (method.rounds and outcome.status.startswith("ok"))
    assert set(outcome.gradient_error) == set(method.wrt)


@pytest.mark.parametrize("wrt", [HEAD, FROZEN_HEAD, LOGITS])
@pytest.mark.parametrize("same_loss", [True, False])
def test_exact_gradients_by_blocks(wrt, same_loss, monkeypatch):
    """Exact gradients agree with naive autograd over the whole batch in float64, and show an error of a hundredth."""
    monkeypatch.setitem(exact.BLOCK, "cpu", 5 * 96)
    inputs = make_inputs("random", Shape(48, 8, 96), softcap=5.0).with_logits()
    wide = dataclasses.replace(inputs, **{name: getattr(inputs, name).double() for name in wrt})

    def loss(first, weight=wide.weight):
        logits = first if wrt == LOGITS else 5 * torch.tanh(first @ weight.double().T / 5)
        logprobs = torch.log_softmax(logits, -1).gather(1, inputs.targets[:, None])[:, 0]
        return methods.mean_token_loss(logprobs, inputs) if same_loss else -logprobs.mean()

    found = differentiated(wide, loss, wrt)()
    method = Method(methods.eager, wrt=wrt, same_loss=same_loss)
    # The behaviour policy's log-probs are float32 in both, as in the formula's Tokens.
    assert max(Exact(inputs, same_loss).errors(found, method).values()) < 1e-6
    off = Result(found.loss, **{name: 1.01 * getattr(found, name) for name in wrt})
    errors = Exact(inputs, same_loss).errors(off, method)
    assert list(errors) == list(wrt)
    assert list(errors.values()) == pytest.approx([0.01] * len(wrt), rel=1e-3)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_trained_inputs_are_peaked(softcap):
    inputs = make_inputs("trained", Shape(200, 64, 2000), softcap=softcap)
    assert inputs.entropy == pytest.approx(TRAINED_ENTROPY, rel=0.01)
    [(_, logits)] = logit_blocks(inputs.hidden, inputs.weight, softcap)
    distribution = torch.distributions.Categorical(logits=logits)
    assert inputs.entropy == pytest.approx(distribution.entropy().mean().item(), rel=1e-3)
    assert (inputs.old_logprobs - distribution.log_prob(inputs.targets)).abs().mean() < 0.3


def test_a_softcap_that_allows_no_peak_is_an_error():
    with pytest.raises(ValueError, match=r"softcap=0\.1"):
        make_inputs("trained", Shape(8, 8, 1000), softcap=0.1)


def test_a_mix_has_no_softcap():
    with pytest.raises(ValueError, match=r"softcap=30.*mixed"):
        make_inputs("mixed", Shape(8, 8, 100), softcap=30.0)


@pytest.mark.parametrize("kind", MIXES)
def test_rows_of_a_mix_have_its_entropies(kind):
    mix = MIXES[kind]
    wanted = mix.entropies(4000, torch.Generator().manual_seed(3)).sort().values
    for share, nats in mix.knots[1:-1]:
        assert (wanted < nats).float().mean().item() == pytest.approx(share, abs=0.03)
    assert mix.knots[0][1] * 0.999 <= wanted[0] and wanted[-1] <= mix.knots[-1][1] * 1.001
    inputs = make_inputs(kind, Shape(64, 32, 500), seed=1)
    logp = (inputs.hidden.double() @ inputs.weight.double().T).log_softmax(-1)
    entropies = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(inputs.entropies.double(), entropies, rtol=1e-3, atol=1e-6)
    assert entropies.max() <= mix.knots[-1][1] * 1.01 and entropies.min() >= mix.knots[0][1] * 0.9


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_logits_are_those_of_the_head(kind):
    inputs = make_inputs(kind, Shape(20, 32, 30), softcap=20.0, dtype=torch.bfloat16).with_logits()
    expected = 20 * torch.tanh(inputs.hidden.double() @ inputs.weight.double().T / 20)
    assert inputs.logits.dtype == torch.bfloat16
    torch.testing.assert_close(inputs.logits.double(), expected, rtol=2**-8, atol=1e-5)


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", plans.STANDARD)
def test_standard_plan(device):
    """The plan begins with every method at one workload, keeps a workload's cases together, has no case twice, and is
    tiny when rehearsed.
    """
    standard = plans.STANDARD[device]
    cases = standard.cases()
    assert [case.method for case in cases[: len(METHODS)]] == list(METHODS)
    assert len({case.workload for case in cases[: len(METHODS)]}) == 1
    assert len(set(cases)) == len(cases)
    assert {case.active_share for case in cases} == set(plans.SHARES)
    rehearsal = plans.quick(cases)
    assert max(case.workload.tokens for case in rehearsal) <= 128
    assert {case.method for case in rehearsal} == {case.method for case in cases}
    swept = {case.workload.tokens for case in rehearsal if case.method == "linear_policy_loss"}
    assert len(swept) == len({case.workload.tokens for case in cases})


def test_options_are_a_product():
    arguments = (
        "--device cuda --workloads Gemma-3-12B Qwen3-4B --dtypes float32 --active-shares 1 0.25 --methods eager gemms"
    )
    cases = speed.plan(speed._parser().parse_args(arguments.split()))
    workloads = [Workload(model, 8192, "trained", "float32") for model in ("Gemma-3-12B", "Qwen3-4B")]
    expected = [case for w in workloads for case in (Case("gemms", w), Case("eager", w), Case("eager", w, 0.25))]
    assert cases == expected


def test_pytest_benchmarks(tmp_path):
    """Every head runs under pytest-benchmark at tiny shapes, in groups by workload and start, with notes on each."""
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    out = tmp_path / "heads.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "-q", "-p", "no:cacheprovider"]
    chosen = "eager- or eager_from or linear_policy_loss- or policy_loss- or gemms_whole"
    # Inside a process of pytest-xdist, pytest-benchmark would measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command += ["-k", chosen, "--benchmark-json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(out.read_text())["benchmarks"]
    names = {benchmark["name"].partition("[")[2].partition("-")[0] for benchmark in found}
    assert {"eager", "eager_from_logits", "linear_policy_loss", "policy_loss", "gemms_whole"} <= names
    starts = {benchmark["group"].partition("from ")[2] for benchmark in found}
    assert {"hidden states", "logits", "hidden states, 25% of the rows active"} <= starts
    for benchmark in found:
        told = benchmark["extra_info"]
        assert told["status"].startswith("ok") and told["tokens_per_second"] > 0
        if "gemms" not in benchmark["name"]:
            assert told["gradient_error"] <= 1e-3 and told["peak_extra_mib"] >= 0
