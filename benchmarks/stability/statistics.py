"""Paired comparisons over seeds, by scipy.stats: intervals, tests against a deciding number, and what follows.

All methods of a seed have the same rule, the same contexts and the same order of contexts. Two of them are therefore
compared by the differences between their runs of the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from benchmarks.harness.tables import NOTHING

LEVEL = 0.95
ENOUGH = 5  # no verdict is given on fewer seeds
COLUMNS = ["setting", "a", "b", "number", "estimate", "p"]


class Estimate(NamedTuple):
    """A mean over seeds and its interval. The mean of no seed is NaN, and so is the interval of one seed."""

    mean: float
    low: float
    high: float


def mean_of(values: ArrayLike) -> Estimate:
    """Return the mean of the values that are not NaN, and Student's t interval."""
    found = np.asarray(values, dtype=float)
    found = found[~np.isnan(found)]
    if len(found) < 2:
        return Estimate(found[0] if len(found) else math.nan, math.nan, math.nan)
    if np.ptp(found) == 0:  # all seeds agree, which scipy has no interval for
        return Estimate(found[0], found[0], found[0])
    interval = stats.ttest_1samp(found, 0).confidence_interval(LEVEL)
    return Estimate(found.mean(), interval.low, interval.high)


def p_beyond(differences: ArrayLike, number: float) -> float:
    """Return the p-value of the one-sided t test that the mean difference is beyond ±number, on its own side of 0."""
    found = np.asarray(differences, dtype=float)
    side = math.copysign(1, found.mean())
    if np.ptp(found) == 0:
        return float(abs(found[0]) <= number)
    return float(stats.ttest_1samp(side * found, number, alternative="greater").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values that belong to one family of comparisons by Holm's step-down method."""
    order = np.argsort(p_values)
    steps = np.take(p_values, order) * np.arange(len(order), 0, -1)
    return np.minimum(np.maximum.accumulate(steps), 1)[np.argsort(order)].tolist()


def compare(tables: dict[str, pd.DataFrame], pairs: Sequence[tuple[str, str]], number: float) -> pd.DataFrame:
    """Return the differences a - b of pairs of methods in every setting beside their deciding number, as `COLUMNS`.

    A table has a row for each seed and a column for each method. Pairs with fewer than `ENOUGH` seeds are left out.
    """
    rows = []
    for setting, table in tables.items():
        for a, b in pairs:
            if {a, b} <= set(table.columns) and len(found := (table[a] - table[b]).dropna()) >= ENOUGH:
                rows.append((setting, a, b, number, mean_of(found), p_beyond(found, number)))
    return pd.DataFrame(rows, columns=COLUMNS)


def decide(*parts: pd.DataFrame) -> pd.DataFrame:
    """Return the comparisons of one question with p-values that are corrected together, and the "verdict": "above" or
    "below" the deciding number, "within" ± the number, or "open".
    """
    together = pd.concat(parts, ignore_index=True)
    together["p"] = holm(together["p"].tolist())
    return together.assign(verdict=[_verdict(row.estimate, row.number, row.p) for row in together.itertuples()])


def _verdict(estimate: Estimate, number: float, p: float) -> str:
    if -number <= estimate.low and estimate.high <= number:
        return "within"
    if p >= 1 - LEVEL:
        return "open"
    return "above" if estimate.low > number else "below" if estimate.high < -number else "open"


def interval(estimate: Estimate, digits: str = ".3f") -> str:
    """Format an estimate as in "0.912 [0.901, 0.920]", without an interval where there is none, and as a dash for no
    number.
    """
    mean, low, high = (format(number, digits) for number in estimate)
    mean = NOTHING if math.isnan(estimate.mean) else mean
    return mean if math.isnan(estimate.low) else f"{mean} [{low}, {high}]"
