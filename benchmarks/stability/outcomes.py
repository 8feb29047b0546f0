"""What a run comes to, number by number, and the runs of a results file by method, setting and seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.stability.grid import Record, job_of, read
from benchmarks.stability.settings import COLLAPSE, METHODS, SETTINGS, SMOKE, Size
from benchmarks.stability.statistics import Estimate, bootstrap

# Accuracy whose price in rollouts is compared. Chosen with the first runs of the sweep in view, before any comparison.
REACHED = 0.8
Outcome = Callable[[Record], float]
Cell = tuple[str, str]  # method, setting


def final(record: Record) -> float:
    """The last held-out accuracy, sampled."""
    return record["evaluations"]["sampled"][-1]


def final_greedy(record: Record) -> float:
    return record["evaluations"]["greedy"][-1]


def best(record: Record) -> float:
    return max(record["evaluations"]["sampled"])


def lowest_greedy(record: Record) -> float:
    return min(record["evaluations"]["greedy"])


def warmed_up(record: Record) -> float:
    """Before the first update."""
    return record["evaluations"]["sampled"][0]


def final_entropy(record: Record) -> float:
    return record["curve"]["entropy"][-1]


def mean_of(name: str) -> Outcome:
    """Mean over the run of one of measures.py's; NaN where it never had a token."""

    def over_run(record: Record) -> float:
        known = [value for value in record["curve"][name] if value is not None]
        return sum(known) / len(known) if known else math.nan

    return over_run


def weight_beyond(boundary: str) -> Outcome:
    """Mean weight w of the tokens beyond "shift" or "ratio": a point counts as much as it has such tokens."""

    def over_run(record: Record) -> float:
        names = ("pushed", f"beyond_{boundary}", f"weight_beyond_{boundary}")
        points = [point for point in zip(*(record["curve"][name] for name in names), strict=True) if None not in point]
        tokens = sum(pushed * share for pushed, share, _ in points)
        return sum(pushed * share * weight for pushed, share, weight in points) / tokens if tokens else math.nan

    return over_run


def largest_gradient(record: Record) -> float:
    """The largest point of the gradient norm before clipping; inf where one was no number."""
    return max(math.inf if value is None else value for value in record["curve"]["gradient_norm"])


def collapsed(record: Record) -> bool:
    """By the definition of settings.py."""
    values = record["evaluations"]["sampled"]
    return any(now < COLLAPSE * max(values[: i + 1]) for i, now in enumerate(values))


def collapsed_for_good(record: Record) -> bool:
    """By the definition of settings.py; "before" is before its last two evaluations."""
    values = record["evaluations"]["sampled"]
    return sum(values[-2:]) / 2 < COLLAPSE * max(values[:-2])


def rollouts_to(record: Record, size: Size, accuracy: float = REACHED) -> float:
    """Completions sampled until the held-out curve first crosses `accuracy`, linear between points; inf if never."""
    values = record["evaluations"]["sampled"]
    if values[0] >= accuracy:
        return 0.0
    for i, (before, after) in enumerate(itertools.pairwise(values)):
        if after >= accuracy:
            return (i + (accuracy - before) / (after - before)) * size.point * size.completions
    return math.inf


@dataclass(frozen=True)
class Runs:
    """`comparison` by (method, setting) and seed, `sweep` by (method, learning rate) and seed."""

    size: Size
    comparison: dict[Cell, dict[int, Record]]
    sweep: dict[tuple[str, float], dict[int, Record]]

    @cached_property
    def records(self) -> list[Record]:
        return [record for part in (self.sweep, self.comparison) for runs in part.values() for record in runs.values()]

    @cached_property
    def methods(self) -> list[str]:
        """Of the comparison, in the order of settings.py."""
        return [method for method in METHODS if any(method == found for found, _ in self.comparison)]

    @cached_property
    def settings(self) -> list[str]:
        return [setting for setting in SETTINGS if any(setting == found for _, found in self.comparison)]

    def of(self, method: str, setting: str) -> dict[int, Record]:
        """By seed; empty where nothing was run."""
        return self.comparison.get((method, setting), {})

    def values(self, outcome: Outcome, method: str, setting: str) -> dict[int, float]:
        """Of the seeds that have a number."""
        found = {seed: outcome(record) for seed, record in sorted(self.of(method, setting).items())}
        return {seed: value for seed, value in found.items() if not math.isnan(value)}

    def estimate(self, outcome: Outcome, method: str, setting: str) -> Estimate:
        return bootstrap(list(self.values(outcome, method, setting).values()))

    def rate(self, method: str, setting: str) -> float:
        """The learning rate of its runs there."""
        rates = {run["lr"] for run in self.of(method, setting).values()}
        if len(rates) != 1:
            raise ValueError(f"{method}, {setting}, was run at the learning rates {sorted(rates)}, not at one")
        return rates.pop()

    def chosen_rate(self, method: str) -> float | None:
        """Of the settings that leave each method its own; None where it was run in none of them."""
        rates = {self.rate(method, setting) for setting in self.free_settings if self.of(method, setting)}
        if len(rates) > 1:
            raise ValueError(f"{method} was compared at the learning rates {sorted(rates)}, not at one")
        return rates.pop() if rates else None

    @property
    def free_settings(self) -> list[str]:
        """Those in which each method has the rate that its sweep chose."""
        return [setting for setting in self.settings if SETTINGS[setting].rate is None]


def load(path: Path) -> Runs:
    """Raises ValueError where there is no run, or one of another definition than settings.py has now."""
    records = read(path)
    if not records:
        raise ValueError(f"{path} holds no run: `python -m benchmarks.stability` makes them")
    size = _size_of(records, path)
    comparison: dict[Cell, dict[int, Record]] = {}
    sweep: dict[tuple[str, float], dict[int, Record]] = {}
    for record in records:
        job = job_of(record)
        if job.method not in METHODS or job.setting not in SETTINGS or record["definition"] != job.definition(size):
            raise ValueError(f"{path} holds a run of another definition ({job})")
        part, key = (sweep, job.lr) if job.purpose == "sweep" else (comparison, job.setting)
        if part.setdefault((job.method, key), {}).setdefault(job.seed, record) is not record:
            raise ValueError(f"{path} holds two runs of {job.method}, {key}, seed {job.seed}")
    return Runs(size, comparison, sweep)


def _size_of(records: Iterable[Record], path: Path) -> Size:
    known = {repr(size): size for size in (Size(), SMOKE)}
    found = {record["definition"]["size"] for record in records}
    if len(found) != 1 or not found <= known.keys():
        raise ValueError(f"{path} holds runs of a size that settings.py does not have: {sorted(found - known.keys())}")
    return known[found.pop()]
