"""The runs of a results file as pandas tables: a row for each run, a column for each of its outcomes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import pandas as pd

from benchmarks.harness.records import Record
from benchmarks.stability.grid import amendment_jobs, cells, runs_by_job
from benchmarks.stability.settings import AMENDMENT, METHODS, QUICK, RATES, SEEDS, SETTINGS, SWEEP_SEEDS, Size
from benchmarks.stability.statistics import ENOUGH


def outcomes(record: Record) -> dict[str, object]:
    """Return the outcomes of a run.

    final       mean of the last two held-out rewards, and the same of the part that rare tokens earn in "final_rare"
    collapsed   whether the last reward is below the first
    """
    rewards, rare = record["reward"], record["rare"]
    return {
        "reward": rewards,
        "final": sum(rewards[-2:]) / 2,
        "final_rare": sum(rare[-2:]) / 2,
        "collapsed": rewards[-1] < rewards[0],
    }


def distortions(record: Record, weights: Record) -> dict[str, float]:
    """Return the mean distortion of "rare" and of "common" tokens; NaN of no token."""
    counts = {kind: record[f"{kind}_tokens"] for kind in ("rare", "common")}
    return {kind: weights[f"{kind}_distortion"] / count if count else math.nan for kind, count in counts.items()}


@dataclass(frozen=True)
class Runs:
    """The runs of a file. Methods and settings are in the order of settings.py.

    table    a row for each run: what a `Job` has, and `outcomes`
    same     a row for each method on the tokens of a run of PG: setting, seed, method, and `distortions`
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
        return self.table[self.table["seed"].isin(SEEDS)]

    @cached_property
    def amended(self) -> pd.DataFrame:
        found = self.table[self.table["seed"].isin(AMENDMENT.seeds)]
        return found.groupby("seed").filter(lambda runs: len(runs) == len(amendment_jobs()) / len(AMENDMENT.seeds))

    @property
    def settings(self) -> list[str]:
        return [setting for setting in SETTINGS if setting in set(self.table["setting"])]

    @property
    def methods(self) -> list[str]:
        return [method for method in METHODS if method in set(self.table["method"])]


def by_seed(table: pd.DataFrame, setting: str, outcome: str) -> pd.DataFrame:
    """Return an outcome in a setting, with a row for each seed that all methods have, and a column for each method."""
    return table[table["setting"] == setting].pivot(index="seed", columns="method", values=outcome).dropna()


def load(records: Sequence[Record]) -> Runs:
    """Return the runs of a file's records. Raises ValueError if there is none, or one of another definition than
    settings.py has now, or if a method has two rates in a setting.
    """
    sizes = {record["definitions"]["size"] for record in records if "definitions" in record}
    known = {repr(size): size for size in (Size(), QUICK)}
    if len(sizes) != 1 or not sizes <= known.keys():
        raise ValueError(f"the runs must be of one size that settings.py has, got {sorted(sizes) or 'no run'}")
    size = known[sizes.pop()]
    found, sources = runs_by_job(records, size)
    runs = sorted(found.items())
    table = pd.DataFrame([asdict(job) | outcomes(record) for job, record in runs])
    same = [
        {"setting": job.setting, "seed": job.seed, "method": name, **distortions(record, weights)}
        for job, record in runs
        for name, weights in record.get("compared", {}).items()
    ]
    loaded = Runs(size, sources, table, pd.DataFrame(same))
    for (method, setting), rates in loaded.comparison.groupby(["method", "setting"])["rate"].unique().items():
        if len(rates) > 1:
            raise ValueError(f"{method} in {setting} is compared at the rates {sorted(rates.tolist())}, not at one")
    return loaded


def load_all(records: Sequence[Record]) -> Runs:
    """Return the runs of a whole experiment. Raises ValueError if a cell has fewer than `ENOUGH` seeds."""
    runs = load(records)
    counts = runs.comparison.groupby(["method", "setting"])["seed"].nunique()
    counts = counts.reindex(pd.MultiIndex.from_tuples(cells(METHODS, SETTINGS)), fill_value=0)
    if counts.min() < ENOUGH:
        raise ValueError(f"{' in '.join(counts.idxmin())} has {counts.min()} seeds, the page needs {ENOUGH}")
    return runs


def chosen_rates(runs: Runs, methods: Iterable[str], settings: Iterable[str]) -> dict[tuple[str, str], float]:
    """Return the learning rate of each method and setting with the largest mean final reward over `SWEEP_SEEDS`.

    Raises ValueError for an incomplete sweep.
    """
    means = runs.sweep.pivot_table(index=["method", "setting"], columns="rate", values="final")
    means = means.reindex(index=pd.MultiIndex.from_tuples(cells(methods, settings)), columns=RATES)
    for cell, found in means.iterrows():
        if found.isna().any():
            raise ValueError(f"the sweep of {cell} has no run for {list(found.index[found.isna()])}")
    return means.idxmax(axis=1).to_dict()
