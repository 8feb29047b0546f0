"""The runs of a results file as pandas tables: a row for each run, a column for each of its outcomes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from scipy.integrate import trapezoid

from benchmarks.harness.records import Record, read
from benchmarks.stability.grid import cells, recorded
from benchmarks.stability.settings import METHODS, RATES, SETTINGS, SMOKE, SWEEP_SEEDS, Size


def outcomes(record: Record) -> dict[str, object]:
    """Return the outcomes of a run.

    final       mean of the last two held-out rewards, and the same of the part that rare tokens earn in "final_rare"
    area        mean held-out reward over the run
    collapsed   whether the last reward is below the first
    """
    rewards, rare = record["reward"], record["rare"]
    return {
        "reward": rewards,
        "final": sum(rewards[-2:]) / 2,
        "final_rare": sum(rare[-2:]) / 2,
        "area": trapezoid(rewards) / (len(rewards) - 1),
        "collapsed": rewards[-1] < rewards[0],
        "implausible": record["implausible"][-1],
        "largest_gradient": math.inf if record["largest_gradient"] is None else record["largest_gradient"],
        **shares(record, record),
    }


def shares(record: Record, weights: Record) -> dict[str, float]:
    """Return which share of rare and of common tokens is "stopped", and their mean "distortion"; NaN of no token."""
    return {
        f"{kind}_{name}": weights[f"{kind}_{name}"] / record[f"{kind}_tokens"] if record[f"{kind}_tokens"] else math.nan
        for kind in ("rare", "common")
        for name in ("stopped", "distortion")
    }


@dataclass(frozen=True)
class Runs:
    """The runs of a file. Methods and settings are in the order of settings.py.

    table    a row for each run: what a `Job` has, and `outcomes`
    same     a row for each method on the tokens of a run of PG: setting, seed, method, and `shares`
    """

    size: Size
    sources: list[Record]
    table: pd.DataFrame
    same: pd.DataFrame

    @cached_property
    def sweep(self) -> pd.DataFrame:
        return self.table[self.table["seed"].isin(SWEEP_SEEDS)]

    @cached_property
    def comparison(self) -> pd.DataFrame:
        return self.table[~self.table["seed"].isin(SWEEP_SEEDS)]

    @property
    def settings(self) -> list[str]:
        return [setting for setting in SETTINGS if setting in set(self.table["setting"])]

    @property
    def methods(self) -> list[str]:
        return [method for method in METHODS if method in set(self.table["method"])]

    def by_seed(self, outcome: str, setting: str) -> pd.DataFrame:
        """Return an outcome of the comparison with a row for each seed and a column for each method."""
        chosen = self.comparison[self.comparison["setting"] == setting]
        return chosen.pivot(index="seed", columns="method", values=outcome)


def load(path: Path) -> Runs:
    """Load the runs of a file. This raises ValueError if there is no run, or one of another definition than settings.py
    has now.
    """
    size = _size_of(read(path), path)
    found, sources = recorded(path, size)
    runs = sorted(found.items())
    table = pd.DataFrame([asdict(job) | outcomes(record) for job, record in runs])
    same = [
        {"setting": job.setting, "seed": job.seed, "method": name, **shares(record, weights)}
        for job, record in runs
        for name, weights in record.get("compared", {}).items()
    ]
    return Runs(size, sources, table, pd.DataFrame(same))


def _size_of(records: Iterable[Record], path: Path) -> Size:
    known = {repr(size): size for size in (Size(), SMOKE)}
    found = {record["definitions"]["size"] for record in records if "definitions" in record}
    if not found:
        raise ValueError(f"{path} holds no run: `python -m benchmarks.stability` makes them")
    if len(found) != 1 or not found <= known.keys():
        raise ValueError(f"{path} holds runs of a size that settings.py does not have: {sorted(found - known.keys())}")
    return known[found.pop()]


def chosen_rates(runs: Runs, methods: Iterable[str], settings: Iterable[str]) -> dict[tuple[str, str], float]:
    """Return the learning rate of each method and setting with the largest mean final reward over `SWEEP_SEEDS`. This
    raises ValueError for an incomplete sweep.
    """
    means = runs.sweep.pivot_table(index=["method", "setting"], columns="rate", values="final")
    means = means.reindex(index=pd.MultiIndex.from_tuples(cells(methods, settings)), columns=RATES)
    for cell, found in means.iterrows():
        if found.isna().any():
            raise ValueError(f"the sweep of {cell} has no run for {list(found.index[found.isna()])}")
    return means.idxmax(axis=1).to_dict()
