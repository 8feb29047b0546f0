"""The runs of the experiment: which there are, and running those that are not there yet, one per core."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.harness.provenance import provenance
from benchmarks.harness.records import Record, append, read, write
from benchmarks.stability.policy import warmed_policy
from benchmarks.stability.settings import METHODS, RATES, SETTINGS, SWEEP_SEEDS, SWEEP_SETTING, Size
from benchmarks.stability.training import run

DIGITS = 5  # significant, of a number in the file


@dataclass(frozen=True, order=True)
class Job:
    """One run."""

    purpose: str  # "sweep" of learning rates, or "comparison"
    method: str
    setting: str
    seed: int
    lr: float

    def definition(self, size: Size) -> dict[str, str]:
        """What the names stand for: results of another definition are not mixed in."""
        names = {"objective": METHODS[self.method], "conditions": SETTINGS[self.setting], "size": size}
        return {name: repr(value) for name, value in names.items()}


def sweep_jobs(methods: Iterable[str]) -> list[Job]:
    return [Job("sweep", m, SWEEP_SETTING, seed, lr) for lr in RATES for seed in SWEEP_SEEDS for m in methods]


def comparison_jobs(
    methods: Iterable[str], settings: Sequence[str], seeds: Sequence[int], rates: dict[str, float]
) -> list[Job]:
    """Seed by seed, so that an interrupted grid has as many whole seeds as possible."""
    methods = list(methods)
    return [
        Job("comparison", m, s, seed, SETTINGS[s].rate or rates[m]) for seed in seeds for s in settings for m in methods
    ]


def area(record: Record) -> float:
    """Mean held-out accuracy over the run: the area under its curve, by trapezoids, over its length."""
    values = record["evaluations"]["sampled"]
    return (sum(values) - (values[0] + values[-1]) / 2) / (len(values) - 1)


def chosen_rates(records: Iterable[Record], methods: Iterable[str]) -> dict[str, float]:
    """The learning rate of each method, by the rule of settings.py. Raises ValueError for an incomplete sweep."""
    areas: dict[tuple[str, float], list[float]] = {}
    for record in records:
        if record["purpose"] == "sweep":
            areas.setdefault((record["method"], record["lr"]), []).append(area(record))
    rates = {}
    for method in methods:
        means = {lr: sum(found) / len(found) for lr in RATES if (found := areas.get((method, lr)))}
        if len(means) < len(RATES):
            raise ValueError(f"the sweep of {method} has no run for {sorted(set(RATES) - set(means))}")
        rates[method] = max(means, key=means.get)
    return rates


def job_of(record: Record) -> Job:
    return Job(*(record[name] for name in Job.__dataclass_fields__))


def run_missing(jobs: Sequence[Job], size: Size, path: Path, cache: Path, workers: int, command: str) -> list[Record]:
    """Run the jobs that `path` does not hold, adding each as it ends -> all its records, sorted.

    Raises ValueError, and changes nothing, if `path` holds a run of another definition.
    """
    records = {}
    for record in read(path):
        job = job_of(record)
        if job.method in METHODS and job.setting in SETTINGS and record["definition"] == job.definition(size):
            records[job] = record
        else:
            raise ValueError(f"{path} holds a run of another definition ({job}): move the file away or choose --out")
    missing = [job for job in jobs if job not in records]
    if missing:
        source = provenance(command)
        with _pool(min(workers, len(missing))) as pool:
            _warm_up(pool, sorted({job.seed for job in missing}), size, cache)
            for record in _finished(pool, missing, size, cache):
                record |= source
                records[job_of(record)] = record
                append(path, record)
    ordered = [records[job] for job in sorted(records)]
    if missing:  # in one order, whatever order the runs ended in
        write(path, ordered)
    return ordered


def _pool(workers: int) -> ProcessPoolExecutor:
    """Fresh processes of one thread each: as many as cores, and a run's numbers do not depend on how many there are."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the grid


def _warm_up(pool: ProcessPoolExecutor, seeds: Sequence[int], size: Size, cache: Path) -> None:
    """Every seed's policy once, before two runs of the same seed could both make it."""
    made = [pool.submit(_warmed, size, seed, cache) for seed in seeds]
    for future in tqdm(as_completed(made), total=len(made), desc="warm-up", unit="seed"):
        future.result()


def _warmed(size: Size, seed: int, cache: Path) -> None:
    warmed_policy(size, seed, cache)


def _finished(pool: ProcessPoolExecutor, jobs: Sequence[Job], size: Size, cache: Path) -> Iterable[Record]:
    submitted = [pool.submit(_run, job, size, cache) for job in jobs]
    progress = tqdm(as_completed(submitted), total=len(jobs), desc="runs", unit="run")
    try:
        for future in progress:
            record = future.result()
            progress.set_postfix_str("{method}, {setting}, seed {seed}".format(**record))
            yield record
    except BaseException:  # Ctrl-C, or a run that failed: what is done is in the file, the next call goes on from there
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _run(job: Job, size: Size, cache: Path) -> Record:
    result = run(job.method, job.setting, job.seed, job.lr, size, cache)
    rounded = {
        part: {name: [_rounded(x) for x in values] for name, values in curves.items()}
        for part, curves in result.items()
    }
    return {**asdict(job), **rounded, "definition": job.definition(size)}


def _rounded(value: float) -> float | None:
    """None for what is no number: JSON has no NaN."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
