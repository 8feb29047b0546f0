"""The runs of the experiment: the list of all of them, and the processes that make those that are missing."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.harness.provenance import provenance
from benchmarks.harness.records import Record, append, read
from benchmarks.stability.settings import AMENDMENT, CONTROL, METHODS, RATES, SEEDS, SETTINGS, SWEEP_SEEDS, Size
from benchmarks.stability.training import run

DIGITS = 4  # significant digits of a number in the file


@dataclass(frozen=True, order=True)
class Job:
    """One run. Runs of `SWEEP_SEEDS` choose learning rates, and those of other seeds compare methods."""

    method: str
    setting: str
    seed: int
    rate: float


def cells(methods: Iterable[str], settings: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of method and setting that are run: on-policy, all methods are PG."""
    return [(m, s) for s in settings for m in methods if s != CONTROL or m == "PG"]


def sweep_jobs(methods: Sequence[str], settings: Sequence[str]) -> list[Job]:
    return [Job(m, s, seed, rate) for seed in SWEEP_SEEDS for rate in RATES for m, s in cells(methods, settings)]


def comparison_jobs(rates: dict[tuple[str, str], float], seeds: Iterable[int]) -> list[Job]:
    """Return the jobs seed by seed, so that an interrupted grid has as many whole seeds as possible."""
    return [Job(*cell, seed, rate) for seed in seeds for cell, rate in rates.items()]


def amendment_jobs() -> list[Job]:
    chosen = [(m, s) for s in AMENDMENT.settings for m in AMENDMENT.methods]
    return [Job(*cell, seed, rate) for seed in AMENDMENT.seeds for rate in AMENDMENT.rates for cell in chosen]


def definitions(size: Size) -> dict[str, object]:
    """Return what the names of methods and settings stand for. Runs of another definition are not mixed in."""
    named = {"methods": METHODS, "settings": SETTINGS}
    return {"size": repr(size)} | {key: {k: repr(v) for k, v in names.items()} for key, names in named.items()}


def runs_by_job(records: Iterable[Record], size: Size) -> tuple[dict[Job, Record], list[Record]]:
    """Return (the runs among the records by job, the sources of these runs).

    A source has the definitions, device, versions, commit and command of the runs below it. Raises ValueError if a run
    is of another definition than settings.py has now.
    """
    runs, sources, now = {}, [], definitions(size)
    for record in records:
        if "definitions" in record:
            sources.append(record)
            continue
        job = Job(*(record[name] for name in Job.__dataclass_fields__))
        then = sources[-1]["definitions"] if sources else {}
        same = then.get("size") == now["size"] and all(
            name in now[kind] and then[kind].get(name) == now[kind][name]
            for kind, name in (("methods", job.method), ("settings", job.setting))
        )
        if not same:
            raise ValueError(f"the file holds a run of another definition ({job}): move it away or choose an --out")
        runs[job] = record
    return runs, sources


def run_missing(jobs: Sequence[Job], size: Size, path: Path, workers: int, command: str, title: str) -> None:
    """Run the jobs that `path` does not hold, and add each as it ends.

    This raises ValueError, and changes nothing, if `path` holds a run of another definition.
    """
    done, _ = runs_by_job(read(path), size)
    missing = [job for job in jobs if job not in done]
    if not missing:
        return
    append(path, {"benchmark": "stability", "definitions": definitions(size), **provenance(command)})
    with _pool(min(workers, len(missing))) as pool:
        futures = [pool.submit(_run, job, size) for job in missing]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=title, unit="run"):
                append(path, future.result())
        except BaseException:  # Ctrl-C, or a run that failed: the next call goes on from the runs that ended.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of new processes of one thread each, so that a run's numbers do not depend on the number of
    processes.
    """
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent stops the grid.


def _run(job: Job, size: Size) -> Record:
    """Run a job. Runs of PG also say what every other method would do with the same tokens."""
    compare = [name for name in METHODS if name != "PG"] if job.method == "PG" and job.seed in SEEDS else []
    return asdict(job) | _rounded(run(job.method, job.setting, job.seed, job.rate, size, compare))


def _rounded(value):
    """Round the numbers in nested lists and dicts."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items() if inner != {}}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    return value
