"""The runs of a results file as a pandas table: a row for each run, a column for each of its outcomes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from scipy.integrate import trapezoid

from benchmarks.harness.records import Record, read
from benchmarks.stability.grid import recorded
from benchmarks.stability.settings import COLLAPSE, METHODS, SETTINGS, SMOKE, Size


def outcomes(record: Record) -> dict[str, object]:
    """Return every outcome of a run. What measures.py measures at each update is averaged over those that had such
    tokens.
    """
    sampled, greedy = record["evaluations"]["sampled"], record["evaluations"]["greedy"]
    curve = pd.DataFrame(record["curve"], dtype=float)
    return {
        **curve.mean(),
        "sampled": sampled,
        "area": trapezoid(sampled) / (len(sampled) - 1),
        "start": sampled[0],
        "final": sampled[-1],
        "start_greedy": greedy[0],
        "final_greedy": greedy[-1],
        "lowest_greedy": min(greedy),
        "final_entropy": curve["entropy"].iloc[-1],
        "weight_beyond_shift": _weight(curve, "shift"),
        "weight_beyond_ratio": _weight(curve, "ratio"),
        "largest_gradient": curve["gradient_norm"].fillna(math.inf).max(),
        "collapsed": collapsed(sampled),
        "collapsed_for_good": collapsed_for_good(sampled),
    }


def _weight(curve: pd.DataFrame, boundary: str) -> float:
    """Return the mean weight of the tokens beyond a boundary. A point counts as much as it has such tokens."""
    weight = curve[f"weight_beyond_{boundary}"]
    tokens = (curve["pushed"] * curve[f"beyond_{boundary}"]).where(weight.notna(), 0.0)
    return (tokens * weight).sum() / tokens.sum() if tokens.any() else math.nan


def collapsed(sampled: list[float]) -> bool:
    """Return whether some accuracy fell below the share COLLAPSE of the best before it."""
    return any(now < COLLAPSE * best for now, best in zip(sampled, itertools.accumulate(sampled, max), strict=True))


def collapsed_for_good(sampled: list[float]) -> bool:
    """Return whether the mean of the last two accuracies is below the share COLLAPSE of the best before them."""
    return sum(sampled[-2:]) / 2 < COLLAPSE * max(sampled[:-2])


@dataclass(frozen=True)
class Runs:
    """The runs of a file, and their outcomes by purpose. Methods and settings are in the order of settings.py."""

    size: Size
    records: list[Record]
    comparison: pd.DataFrame
    sweep: pd.DataFrame

    @property
    def settings(self) -> list[str]:
        return [setting for setting in SETTINGS if setting in set(self.comparison["setting"])]

    @property
    def methods(self) -> list[str]:
        return [method for method in METHODS if method in set(self.comparison["method"])]

    def of(self, method: str, setting: str) -> pd.DataFrame:
        """Return one cell of the comparison, which is empty where nothing was run."""
        return self.comparison.query("method == @method and setting == @setting")

    @property
    def own_rate(self) -> pd.DataFrame:
        """The runs in settings that leave each method the learning rate of its own."""
        own = [name for name, setting in SETTINGS.items() if setting.rate is None]
        return self.comparison[self.comparison["setting"].isin(own)]


def load(path: Path) -> Runs:
    """Load the runs of a file. This raises ValueError if there is no run, or one of another definition than settings.py
    has now.
    """
    size = _size_of(read(path), path)
    runs = dict(sorted(recorded(path, size).items()))
    table = pd.DataFrame(asdict(job) | outcomes(record) for job, record in runs.items())
    parts = (table[table["purpose"] == purpose] for purpose in ("comparison", "sweep"))
    found = Runs(size, list(runs.values()), *parts)
    for together in (found.comparison.groupby(["method", "setting"]), found.own_rate.groupby("method")):
        for name, rates in together["lr"].unique().items():
            if len(rates) > 1:
                raise ValueError(f"{path} compares {name} at the learning rates {sorted(rates.tolist())}, not at one")
    return found


def _size_of(records: Iterable[Record], path: Path) -> Size:
    known = {repr(size): size for size in (Size(), SMOKE)}
    found = {record["definition"]["size"] for record in records}
    if not found:
        raise ValueError(f"{path} holds no run: `python -m benchmarks.stability` makes them")
    if len(found) != 1 or not found <= known.keys():
        raise ValueError(f"{path} holds runs of a size that settings.py does not have: {sorted(found - known.keys())}")
    return known[found.pop()]


def chosen_rates(runs: Runs, methods: Iterable[str]) -> dict[str, float]:
    """Return each method's learning rate with the largest mean area. This raises ValueError for an incomplete sweep."""
    areas = runs.sweep.pivot_table(index="method", columns="lr", values="area")
    areas = areas.reindex(index=methods, columns=runs.size.rates)
    for method, found in areas.iterrows():
        if found.isna().any():
            raise ValueError(f"the sweep of {method} has no run for {list(found.index[found.isna()])}")
    return areas.idxmax(axis=1).to_dict()
