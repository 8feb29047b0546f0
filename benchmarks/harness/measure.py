"""This is the one way in which a method is measured, on a CPU and on a GPU.

    records = measure(plan, provenance(command, device), device=device, budget_seconds=120, out=Path("speed.jsonl"))

A case is measured from start to end before the next one begins, and its record is then final: gradients first (a wrong
method gets no time), then its peak memory, then its times, interleaved with those of its floor. So what a later case
does to the machine costs no earlier number, and a clock that drifts meets a method and its floor alike. Methods that
start from logits come after the rest of their workload. After `budget_seconds` nothing is started: a case with samples
keeps them, and one without becomes a record with the status "not run: time budget".
"""

from __future__ import annotations

import gc
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.harness.exact import WRONG, Exact, verdict
from benchmarks.harness.memory import peak_in_fresh_process, peak_on_device
from benchmarks.harness.method import OBJECTIVE, Method, Step, Unsupported
from benchmarks.harness.methods import METHODS
from benchmarks.harness.mixes import quantiles
from benchmarks.harness.progress import Progress
from benchmarks.harness.records import Record, write
from benchmarks.harness.timing import clock, interleaved_seconds
from benchmarks.harness.workloads import Inputs, Workload

OVER_BUDGET, FAILED = "not run: time budget", "failed"
DIED = f"{FAILED}: the process ended or gave no answer"


@dataclass(frozen=True)
class Case:
    """A method on a workload of which a share of the rows has an advantage."""

    method: str
    workload: Workload
    active_share: float = 1.0


@dataclass
class Outcome:
    """What has become of a case.

    status         "ok", "ok, gradient error 4 %", or why there are no numbers
    step           None unless its gradients are right
    floor_seconds  samples of its floor, taken between its own
    """

    status: str = OVER_BUDGET
    step: Step | None = None
    gradient_error: dict[str, float] | None = None
    metrics: dict[str, float] | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)


def failure(error: Exception, method: Method) -> str:
    """Return the status of a failure in a word, because messages name paths of this machine."""
    if method.package is not None and isinstance(error, ModuleNotFoundError):
        return f"{(error.name or method.package).split('.')[0]} not installed"
    if isinstance(error, Unsupported):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    traceback.print_exception(error)
    return f"{FAILED}: {type(error).__name__}"


def is_broken(method: str, status: str) -> bool:
    """Return whether a method of this repository failed or has wrong gradients. A peer's failure does not count."""
    return METHODS[method].package is None and (status == WRONG or status.startswith(FAILED))


def measure(
    plan: Sequence[Case],
    source: Record,
    *,
    device: torch.device,
    rounds: int = 5,
    budget_seconds: float = math.inf,
    out: Path | None = None,
) -> list[Record]:
    """Return a record per case, in the order of `in_order`, each with the fields of `source` (see `provenance`)."""
    records: list[Record] = []
    progress = Progress(len(plan))

    def begin(case: Case) -> None:
        workload = case.workload
        progress.say(f"{workload.model} T={workload.tokens} {workload.kind} {workload.dtype} {case.method}")

    for record in measured(plan, source, device, rounds, time.monotonic() + budget_seconds, begin):
        records.append(record)
        progress.advance()
        if out is not None:
            write(out, records)
    progress.close()
    return records


def in_order(plan: Sequence[Case]) -> list[Case]:
    """Sort the cases by workload, and in each put those that start from hidden states first. Neighbours share their
    exact gradients.
    """
    workloads = list(dict.fromkeys(case.workload for case in plan))

    def key(case: Case) -> tuple:
        method = METHODS[case.method]
        return workloads.index(case.workload), method.takes == "logits", -case.active_share, not method.same_loss

    return sorted(plan, key=key)


def measured(
    plan: Sequence[Case],
    source: Record,
    device: torch.device,
    rounds: int,
    deadline: float = math.inf,
    begin: Callable[[Case], object] = lambda case: None,
) -> Iterator[Record]:
    """Yield the records of `measure`, each as soon as its case is done; `begin` is told of a
    case before it is started.
    """
    prepared = Prepared(device)
    for case in in_order(plan):
        begin(case)
        outcome = attempt(case, prepared, rounds, deadline) if time.monotonic() <= deadline else Outcome()
        yield _record(case, outcome, prepared.made) | source


def attempt(case: Case, prepared: Prepared, rounds: int, deadline: float) -> Outcome:
    """Measure the gradients, peak and times of a case. A failure ends this row, not the run."""
    method, outcome = METHODS[case.method], Outcome()
    try:
        inputs, exact = prepared.of(case)
    except torch.OutOfMemoryError as error:  # any other error is not the method's, and ends the run
        return Outcome(failure(error, method))
    try:
        outcome = check(method, inputs, exact)
        if outcome.step is None:
            return outcome
        if not method.floor:
            outcome.peak_bytes = peak_of(outcome.step, case.method, inputs)
        release(inputs.hidden.device)
        functions = {"own": outcome.step}
        if method.held_to is not None:
            functions["floor"] = METHODS[method.held_to].prepare(inputs)
        seconds = interleaved_seconds(functions, rounds, clock(inputs.hidden.device), deadline)
        outcome.seconds, outcome.floor_seconds = seconds["own"], seconds.get("floor", [])
        if not outcome.seconds:
            outcome.status = OVER_BUDGET
    except Exception as error:
        outcome.status, outcome.peak_bytes = failure(error, method), None
    finally:
        outcome.step = None  # the step holds the inputs, which must be gone before the next ones are made
    return outcome


class Prepared:
    """The inputs of one workload and the exact gradients of one loss at a time: at large shapes each is gigabytes."""

    def __init__(self, device: torch.device):
        self.made: Inputs | None = None
        self._device, self._workload, self._exact, self._key = device, None, None, None

    def of(self, case: Case) -> tuple[Inputs, Exact]:
        method = METHODS[case.method]
        if case.workload != self._workload:
            self.made = self._workload = self._exact = self._key = None
            torch.compiler.reset()  # otherwise the limit on recompilations is met after a few workloads
            self.made, self._workload = case.workload.inputs(self._device), case.workload
        if method.takes == "logits" and self.made.logits is None:
            self.made, self._exact, self._key = self.made.with_logits(), None, None
        key = case.active_share, method.same_loss
        if key != self._key:
            self._exact, self._key = None, key
            self._exact = Exact(self.made.with_active_share(case.active_share), method.same_loss)
        return self._exact.inputs, self._exact


def check(method: Method, inputs: Inputs, exact: Exact) -> Outcome:
    """Run the method once and compare its gradients with the exact ones. Only a right method keeps its step."""
    dtype = inputs.hidden.dtype
    if reason := _unsuited(method, dtype, inputs.hidden.device):
        return Outcome(reason)
    try:
        step = method.prepare(inputs)
        found = step()
        if method.floor:
            return Outcome("ok", step)
        errors = exact.errors(found, method)
    except Exception as error:
        return Outcome(failure(error, method))
    status = verdict(errors, method, dtype)
    metrics = found.metrics and {name: value.item() for name, value in found.metrics.items()}
    return Outcome(status, None if status == WRONG else step, errors, metrics)


def _unsuited(method: Method, dtype: torch.dtype, device: torch.device) -> str | None:
    if method.gpu and device.type == "cpu":
        return "needs a GPU"
    names = [getattr(torch, name) for name in method.dtypes]
    return None if dtype in names else f"takes {' and '.join(method.dtypes)} only"


def peak_of(step: Step, method: str, inputs: Inputs) -> int | None:
    """Return the bytes that a step takes at its peak, its gradients included. On a CPU only a
    fresh process can tell.
    """
    if inputs.hidden.device.type == "cpu":
        return peak_in_fresh_process(inputs, method)
    release(inputs.hidden.device)
    return peak_on_device(step, inputs.hidden.device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def started(case: Case) -> Record:
    """Return the record that stands for a case until its own does. It says that the process has
    not survived the case.
    """
    return _record(case, Outcome(DIED), None)


def _record(case: Case, outcome: Outcome, inputs: Inputs | None) -> Record:
    """Return the record without its source."""
    method, seconds, beyond = METHODS[case.method], outcome.seconds, None
    if outcome.peak_bytes is not None:
        made = sum(getattr(inputs, name).nbytes for name in method.wrt if name not in method.reuses)
        beyond = max(outcome.peak_bytes - made, 0)
    return {
        "benchmark": "speed",
        **case.workload.fields,
        "entropy_nats": None if inputs is None else round(inputs.entropy, 3),
        "entropy_quantiles": None if inputs is None else quantiles(inputs.entropies),
        "objective": str(OBJECTIVE),
        "method": case.method,
        "active_share": case.active_share,
        "takes": method.takes,
        "floor": method.floor,
        "held_to": method.held_to,
        "same_loss": method.same_loss,
        "rounds_away": method.rounds,
        "status": outcome.status,
        "gradient_error": outcome.gradient_error,
        "metrics": outcome.metrics,
        "seconds": [round(sample, 7) for sample in seconds],
        "median_s": statistics.median(seconds) if seconds else None,
        "min_s": min(seconds, default=None),
        "max_s": max(seconds, default=None),
        "floor_median_s": statistics.median(outcome.floor_seconds) if outcome.floor_seconds else None,
        "peak_extra_bytes": outcome.peak_bytes,
        "peak_beyond_gradients_bytes": beyond,
    }


def largest_error(record: Record) -> float | None:
    errors = record["gradient_error"]
    return None if errors is None else max(errors.values())


def ratio(record: Record, method: str | None, group: Sequence[Record]) -> float | None:
    """Return how many times as long as `method` with all rows active the record's method takes; None where nothing says
    so.

    The samples of a method's own floor were interleaved with its own. Another method of the same process is compared by
    medians; one of another process, at the same commit, by the ratio of each to the floor that was measured beside it.
    """
    if record["median_s"] is None:
        return None
    if method == record["held_to"] and record.get("floor_median_s"):
        return record["median_s"] / record["floor_median_s"]
    others = [r for r in group if (r["method"], r["active_share"]) == (method, 1) and r["median_s"] is not None]
    for other in others:
        if all(record[name] == other[name] for name in ("command", "date")):
            return record["median_s"] / other["median_s"]
    for other in others:
        floors = record.get("floor_median_s"), other.get("floor_median_s")
        if all(floors) and record["held_to"] == other["held_to"] and record.get("commit") == other.get("commit"):
            return (record["median_s"] / floors[0]) / (other["median_s"] / floors[1])
    return None
