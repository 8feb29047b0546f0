"""The one way a method is measured, on a CPU and on a GPU.

    records = measure(plan, provenance(command, device), device=device, budget_seconds=120, out=Path("speed.jsonl"))

A case is measured from start to end before the next one begins, and its record is then final: gradients first (a wrong
method gets no time), then its peak memory, then its times, interleaved with those of its floor. So what a later case
does to the machine costs no earlier number, and a clock that drifts meets a method and its floor alike. What starts
from logits comes after the rest of its workload. After `budget_seconds` nothing is started: what has samples keeps
them, what has none is a record with the status "not run: time budget".
"""

from __future__ import annotations

import gc
import math
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
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
class Attempt:
    """What has become of a case: callable while nothing has failed, a record at the end.

    status      "ok", "ok, gradient error 4 %", or why there are no numbers
    step        None until prepared, and again once the case has failed
    """

    case: Case
    method: Method
    status: str = OVER_BUDGET
    step: Step | None = None
    gradient_error: dict[str, float] | None = None
    metrics: dict[str, float] | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)  # samples of its floor, taken between its own

    def __call__(self) -> object:
        """One step; a failure is this row's end, not the run's."""
        if self.step is None:
            return None
        try:
            return self.step()
        except Exception as error:
            self.fail(error)
            return None

    def fail(self, error: Exception) -> None:
        """The status in a word: messages name paths of this machine."""
        self.step, self.peak_bytes, self.seconds, self.floor_seconds = None, None, [], []
        if self.method.package is not None and isinstance(error, ModuleNotFoundError):
            self.status = f"{(error.name or self.method.package).split('.')[0]} not installed"
        elif isinstance(error, Unsupported):
            self.status = str(error)
        elif isinstance(error, torch.OutOfMemoryError):
            self.status = "out of memory"
        else:
            traceback.print_exception(error)
            self.status = f"{FAILED}: {type(error).__name__}"


def is_broken(method: str, status: str) -> bool:
    """Whether what comes with this repository failed or has wrong gradients; a peer's failure is its own."""
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
    """A record per case, in the order of `in_order`, each with the fields of `source` (see `provenance`)."""
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
    """Workload by workload, in each what starts from hidden states first; neighbours share their exact gradients."""
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
    """The records of `measure`, each as soon as its case is done; `begin` is told of a case before it is started."""
    inputs = Prepared(device)
    for case in in_order(plan):
        begin(case)
        attempt = Attempt(case, METHODS[case.method])
        if time.monotonic() <= deadline:
            try:
                chosen, exact = inputs.of(case)
                check(attempt, chosen, exact)
                _take_peak(attempt, chosen)
                _take_times(attempt, chosen, device, rounds, deadline)
            except torch.OutOfMemoryError as error:  # The inputs or the exact gradients do not fit.
                attempt.fail(error)
        yield _record(attempt, inputs.made) | source


class Prepared:
    """The inputs of one workload and the exact gradients of one loss at a time: at large shapes each is gigabytes."""

    def __init__(self, device: torch.device):
        self.made: Inputs | None = None
        self._device, self._workload, self._exact, self._key = device, None, None, None

    def of(self, case: Case) -> tuple[Inputs, Exact]:
        method = METHODS[case.method]
        if case.workload != self._workload:
            self.made = self._workload = self._exact = self._key = None
            torch.compiler.reset()  # or the limit on recompilations is met after a few workloads
            self.made, self._workload = case.workload.inputs(self._device), case.workload
        if method.takes == "logits" and self.made.logits is None:
            self.made, self._exact, self._key = self.made.with_logits(), None, None
        key = case.active_share, method.same_loss
        if key != self._key:
            self._exact, self._key = None, key
            self._exact = Exact(self.made.with_active_share(case.active_share), method.same_loss)
        return self._exact.inputs, self._exact


def check(attempt: Attempt, inputs: Inputs, exact: Exact) -> None:
    """Run it once and compare its gradients with the exact ones. Only what is right keeps its step."""
    method, dtype = attempt.method, inputs.hidden.dtype
    reason = _unsuited(method, dtype, inputs.hidden.device)
    if reason is not None:
        attempt.status = reason
        return
    attempt.status = "ok"
    try:
        attempt.step = method.prepare(inputs)
        found = attempt()
        if attempt.step is not None and not method.floor:
            attempt.gradient_error = exact.errors(found, method)
            if found.metrics is not None:
                attempt.metrics = {name: value.item() for name, value in found.metrics.items()}
            attempt.status = verdict(attempt.gradient_error, method, dtype)
            if attempt.status == WRONG:
                attempt.step = None
    except Exception as error:
        attempt.fail(error)


def _unsuited(method: Method, dtype: torch.dtype, device: torch.device) -> str | None:
    if method.gpu and device.type == "cpu":
        return "needs a GPU"
    names = [getattr(torch, name) for name in method.dtypes]
    return None if dtype in names else f"takes {' and '.join(method.dtypes)} only"


def _take_peak(attempt: Attempt, inputs: Inputs) -> None:
    """On a GPU in this process, on a CPU in a fresh one."""
    if attempt.step is None or attempt.method.floor:
        return
    if inputs.hidden.device.type == "cuda":
        _release(inputs.hidden.device)
        peak = peak_on_device(attempt, inputs.hidden.device)
        attempt.peak_bytes = None if attempt.step is None else peak
        return
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "inputs.pt")
        inputs.save(saved)
        try:
            attempt.peak_bytes = peak_in_fresh_process(saved, attempt.case.method)
        except subprocess.CalledProcessError as error:
            attempt.fail(error)


def _take_times(attempt: Attempt, inputs: Inputs, device: torch.device, rounds: int, deadline: float) -> None:
    """Its samples, and between them those of its floor with all rows active."""
    if attempt.step is None:
        return
    _release(device)
    functions: dict[str, Callable] = {"own": attempt}
    if attempt.method.held_to is not None:
        functions["floor"] = METHODS[attempt.method.held_to].prepare(inputs)
    seconds = interleaved_seconds(functions, rounds, lambda: None, clock(device), deadline)
    if attempt.step is None:
        return  # it failed meanwhile
    attempt.seconds, attempt.floor_seconds = seconds["own"], seconds.get("floor", [])
    if not attempt.seconds:
        attempt.status = OVER_BUDGET


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def started(case: Case) -> Record:
    """What stands for a case until its own record does: it says that the process has not survived it."""
    return _record(Attempt(case, METHODS[case.method], DIED), None)


def _record(attempt: Attempt, inputs: Inputs | None) -> Record:
    """Without its source."""
    case, method, seconds, peak = attempt.case, attempt.method, attempt.seconds, attempt.peak_bytes
    beyond = None
    if peak is not None:
        made = sum(getattr(inputs, name).nbytes for name in method.wrt if name not in method.reuses)
        beyond = max(peak - made, 0)
    return {
        "benchmark": "speed",
        "workload": case.workload.model,
        "inputs": case.workload.kind,
        "shape": asdict(case.workload.shape),
        "dtype": case.workload.dtype,
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
        "status": attempt.status,
        "gradient_error": attempt.gradient_error,
        "metrics": attempt.metrics,
        "seconds": [round(sample, 7) for sample in seconds],
        "median_s": statistics.median(seconds) if seconds else None,
        "min_s": min(seconds, default=None),
        "max_s": max(seconds, default=None),
        "floor_median_s": statistics.median(attempt.floor_seconds) if attempt.floor_seconds else None,
        "peak_extra_bytes": peak,
        "peak_beyond_gradients_bytes": beyond,
    }


def largest_error(record: Record) -> float | None:
    errors = record["gradient_error"]
    return None if errors is None else max(errors.values())


def ratio(record: Record, method: str | None, group: Sequence[Record]) -> float | None:
    """How many times as long as `method` with all rows active the record's method takes; None where nothing says so.

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
