"""Means over seeds with bootstrap intervals, and paired comparisons corrected for their number, by scipy.stats.

Every method and setting of a seed starts from the same warmed-up policy and is judged on the same held-out problems.
Two cells are therefore compared by the differences between their runs of the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from benchmarks.harness.tables import NOTHING

LEVEL = 0.95
RESAMPLES = 10_000
ENOUGH = 5  # no verdict is given on fewer seeds


class Estimate(NamedTuple):
    """A mean over seeds and its interval. The mean of no seed is NaN, and so is the interval of one seed."""

    mean: float
    low: float
    high: float


def bootstrap(values: ArrayLike) -> Estimate:
    """Return the mean over the first axis and its percentile interval; the resamples are the same in every call."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return Estimate(values[0] if len(values) else math.nan, math.nan, math.nan)
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=0
    ).confidence_interval
    return Estimate(values.mean(0), found.low, found.high)


def paired_p(differences: ArrayLike) -> float:
    """Return the two-sided p-value of Student's paired t test; 1 if no seed shows a difference."""
    return float(stats.ttest_1samp(differences, 0).pvalue) if np.any(differences) else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values that belong to one family of comparisons by Holm's step-down method."""
    order = np.argsort(p_values)
    steps = np.take(p_values, order) * np.arange(len(order), 0, -1)
    return np.minimum(np.maximum.accumulate(steps), 1)[np.argsort(order)].tolist()


def counted(hits: int, trials: int) -> str:
    """Format a share with Wilson's interval, as in "3 of 5 [23%, 88%]"."""
    low, high = stats.binomtest(hits, trials).proportion_ci(LEVEL, method="wilson")
    return f"{hits} of {trials} [{low:.0%}, {high:.0%}]"


def interval(estimate: Estimate, digits: str = ".3f", percent: bool = False) -> str:
    """Format an estimate as in "0.912 [0.901, 0.920]", without an interval where there is none, and as a dash for no
    number.
    """
    mean, low, high = (format(100 * number if percent else number, digits) for number in estimate)
    mean = NOTHING if math.isnan(estimate.mean) else f"{mean}%" if percent else mean
    return mean if math.isnan(estimate.low) else f"{mean} [{low}, {high}]"
