"""The one way a method is measured, on a CPU and on a GPU.

    records = measure(plan, provenance(command, device), device=device, budget_seconds=120, out=Path("gpu.jsonl"))

Of each workload's cases: gradients first (a wrong method gets no time), then the peak memory of each method, then the
times of all of them interleaved, floors among them. What starts from logits is a round of its own, after the rest.
After `budget_seconds` nothing is started: what has samples keeps them, what has none is a record with the status "not
run: time budget". A workload's gradients may take 60 % of what is left. `out` holds what has been measured whenever the
run ends.
"""

from __future__ import annotations

import gc
import json
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

from benchmarks.exact import WRONG, Exact, verdict
from benchmarks.memory import peak_in_fresh_process, peak_on_device
from benchmarks.method import OBJECTIVE, Method, Step, Unsupported
from benchmarks.methods import METHODS
from benchmarks.mixes import quantiles
from benchmarks.progress import Progress
from benchmarks.timing import clock, interleaved_seconds
from benchmarks.workloads import Inputs, Workload

OVER_BUDGET, FAILED = "not run: time budget", "failed"
# of the time left, for the gradients, and of what is then left, for memory
CHECKED, WEIGHED = 0.6, 0.5
Record = dict[str, object]


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
        self.step, self.peak_bytes, self.seconds = None, None, []
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
    """A record per case, in the order of the plan's workloads, each with the fields of `source` (see `provenance`)."""
    deadline = time.monotonic() + budget_seconds
    records: list[Record] = []
    progress = Progress(len(plan) * (rounds + 3))
    for workload in dict.fromkeys(case.workload for case in plan):
        progress.say(f"{workload.model} T={workload.tokens} {workload.kind} {workload.dtype}")
        cases = [case for case in plan if case.workload == workload]
        for group in _measure_workload(workload, cases, device, rounds, deadline, progress):
            records += [record | source for record in group]
            if out is not None:
                write(out, records)
    progress.close()
    return records


def write(out: Path, records: Sequence[Record]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _measure_workload(
    workload: Workload, cases: Sequence[Case], device: torch.device, rounds: int, deadline: float, progress: Progress
) -> Iterator[list[Record]]:
    """The records of what starts from hidden states, then of what starts from logits."""
    inputs = None
    torch.compiler.reset()  # or the limit on recompilations is met after a few workloads
    for takes in ("hidden", "logits"):
        attempts = [Attempt(case, METHODS[case.method]) for case in cases if METHODS[case.method].takes == takes]
        if not attempts:
            continue
        try:
            if time.monotonic() <= deadline:
                inputs = inputs or workload.inputs(device)
                inputs = inputs.with_logits() if takes == "logits" else inputs
                check(attempts, inputs, _before(deadline, CHECKED), progress.advance)
                _take_peaks(attempts, inputs, _before(deadline, WEIGHED), progress)
                _take_times(attempts, device, rounds, deadline, progress)
        except torch.OutOfMemoryError as error:  # of the inputs or the exact gradients: the device is too small
            for attempt in attempts:
                attempt.fail(error)
        yield [_record(attempt, inputs) for attempt in attempts]


def _before(deadline: float, share: float) -> float:
    """The time at which a share of what is left has passed: a slow check must not leave nothing to measure with."""
    return time.monotonic() + share * (deadline - time.monotonic())


def check(
    attempts: Sequence[Attempt],
    inputs: Inputs,
    deadline: float = math.inf,
    advance: Callable[[], object] = lambda: None,
) -> None:
    """Run each once and compare its gradients with the exact ones: only what is right keeps its step."""
    # one set of exact gradients at a time: at large shapes each is gigabytes
    for share, same_loss in dict.fromkeys((a.case.active_share, a.method.same_loss) for a in attempts):
        chosen = inputs.with_active_share(share)
        exact = Exact(chosen, same_loss)
        for attempt in attempts:
            if (attempt.case.active_share, attempt.method.same_loss) == (share, same_loss):
                if time.monotonic() <= deadline:
                    _check_one(attempt, chosen, exact)
                advance()


def _check_one(attempt: Attempt, inputs: Inputs, exact: Exact) -> None:
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


def _take_peaks(attempts: Sequence[Attempt], inputs: Inputs, deadline: float, progress: Progress) -> None:
    """On a GPU in this process, on a CPU in a fresh one each."""
    device = inputs.hidden.device
    with tempfile.TemporaryDirectory() as folder:
        saved: dict[float, Path] = {}
        for attempt in attempts:
            progress.advance()
            if attempt.step is None or attempt.method.floor or time.monotonic() > deadline:
                continue
            if device.type == "cuda":
                _release(device)
                peak = peak_on_device(attempt, device)
                attempt.peak_bytes = None if attempt.step is None else peak
                continue
            share = attempt.case.active_share
            if share not in saved:
                saved[share] = Path(folder, f"{share}.pt")
                inputs.with_active_share(share).save(saved[share])
            try:
                attempt.peak_bytes = peak_in_fresh_process(saved[share], attempt.case.method)
            except subprocess.CalledProcessError as error:
                attempt.fail(error)


def _take_times(
    attempts: Sequence[Attempt], device: torch.device, rounds: int, deadline: float, progress: Progress
) -> None:
    ready = {attempt.case: attempt for attempt in attempts if attempt.step is not None}
    progress.advance((len(attempts) - len(ready)) * (rounds + 1))
    _release(device)
    seconds = interleaved_seconds(ready, rounds, progress.advance, clock(device), deadline)
    for case, attempt in ready.items():
        if attempt.step is None:
            continue  # it failed meanwhile
        attempt.seconds = seconds[case]
        if not attempt.seconds:
            attempt.status = OVER_BUDGET


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
        "peak_extra_bytes": peak,
        "peak_beyond_gradients_bytes": beyond,
    }
