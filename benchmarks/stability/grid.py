"""The runs of the experiment: the list of all of them, and the processes that make those that are missing."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.harness.provenance import provenance
from benchmarks.harness.records import Record, append, read, write
from benchmarks.stability.policy import warmed_policy
from benchmarks.stability.settings import METHODS, SETTINGS, SWEEP_SETTING, Size
from benchmarks.stability.training import run

DIGITS = 5  # significant digits of a number in the file


@dataclass(frozen=True, order=True)
class Job:
    """One run. Its purpose is the "sweep" of learning rates or the "comparison" of methods."""

    purpose: str
    method: str
    setting: str
    seed: int
    lr: float

    def definition(self, size: Size) -> dict[str, str]:
        """Return what the names stand for. Results of another definition are not mixed in."""
        names = {"objective": METHODS[self.method], "conditions": SETTINGS[self.setting], "size": size}
        return {name: repr(value) for name, value in names.items()}


def sweep_jobs(methods: Iterable[str], size: Size) -> list[Job]:
    return [Job("sweep", m, SWEEP_SETTING, seed, lr) for lr in size.rates for seed in size.sweep_seeds for m in methods]


def comparison_jobs(
    methods: Iterable[str], settings: Sequence[str], seeds: Sequence[int], rates: dict[str, float]
) -> list[Job]:
    """Return the jobs seed by seed, so that an interrupted grid has as many whole seeds as possible."""
    cells = [(method, setting) for setting in settings for method in methods]
    return [Job("comparison", m, s, seed, SETTINGS[s].rate or rates[m]) for seed in seeds for m, s in cells]


def recorded(path: Path, size: Size) -> dict[Job, Record]:
    """Return the records of a file by job. This raises ValueError if one is of another definition than settings.py has
    now.
    """
    records = {}
    for record in read(path):
        job = Job(*(record[name] for name in Job.__dataclass_fields__))
        if job.method not in METHODS or job.setting not in SETTINGS or record["definition"] != job.definition(size):
            raise ValueError(f"{path} holds a run of another definition ({job}): move the file away or choose --out")
        records[job] = record
    return records


def run_missing(jobs: Sequence[Job], size: Size, path: Path, cache: Path, workers: int, command: str) -> None:
    """Run the jobs that `path` does not hold, and add each as it ends.

    This raises ValueError, and changes nothing, if `path` holds a run of another definition.
    """
    done = recorded(path, size)
    missing = [job for job in jobs if job not in done]
    if not missing:
        return
    source = provenance(command)
    with _pool(min(workers, len(missing))) as pool:
        seeds = sorted({job.seed for job in missing})  # Each policy is made once, before runs of its seed need it.
        warmed = pool.map(partial(_warm_up, size, cache), seeds)
        list(tqdm(warmed, total=len(seeds), desc="warm-up", unit="seed"))
        futures = [pool.submit(_run, job, size, cache) for job in missing]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="runs", unit="run"):
                append(path, future.result() | source)
        except BaseException:  # Ctrl-C, or a run that failed: the next call goes on from the runs that ended.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    done = recorded(path, size)
    write(path, [done[job] for job in sorted(done)])


def _pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of new processes of one thread each, so that a run's numbers do not depend on the number of
    processes.
    """
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent stops the grid.


def _warm_up(size: Size, cache: Path, seed: int) -> None:
    warmed_policy(size, seed, cache)


def _run(job: Job, size: Size, cache: Path) -> Record:
    result = run(job.method, job.setting, job.seed, job.lr, size, cache)
    rounded = {
        part: {name: [_rounded(x) for x in values] for name, values in curves.items()}
        for part, curves in result.items()
    }
    return {**asdict(job), **rounded, "definition": job.definition(size)}


def _rounded(value: float) -> float | None:
    """Return the rounded value, or None for NaN and infinity, which JSON does not have."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
