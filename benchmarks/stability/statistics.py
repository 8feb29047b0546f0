"""Means over seeds with bootstrap intervals, paired differences, corrected p-values, intervals of a share.

Every method and setting of a seed starts from the same warmed-up policy and is judged on the same held-out problems, so
two cells are compared by the differences of their seeds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from mpmath import betainc  # PyTorch brings it, with sympy

LEVEL = 0.95
RESAMPLES = 10_000
ENOUGH = 5  # seeds: a verdict is given on no fewer


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds and its bootstrap interval; NaN for the mean of none, and for the interval of one."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval is above or below zero; 0 where it includes zero."""
        return int(self.low > 0) - int(self.high < 0)


def bootstrap(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Percentile interval of the mean; the same resamples every time."""
    if len(values) < 2:
        return Estimate(values[0] if len(values) else math.nan, math.nan, math.nan, len(values))
    low, high = _percentiles(np.asarray(values, dtype=float)[:, None], level)
    return Estimate(float(np.mean(values)), float(low[0]), float(high[0]), len(values))


def differences(a: Mapping[int, float], b: Mapping[int, float]) -> list[float]:
    """a - b of the seeds that both have."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def coverage(count: int, level: float = LEVEL, trials: int = 2000) -> float:
    """How often the interval of `count` seeds holds the true mean where seeds are normally distributed."""
    samples = np.random.default_rng(0).standard_normal((count, trials))
    low, high = _percentiles(samples, level)
    return float(np.mean((low <= 0) & (high >= 0)))


def _percentiles(samples: np.ndarray, level: float) -> np.ndarray:
    """[count, trials] -> the two ends of the interval of each trial's mean, [2, trials]."""
    means = _resamples(len(samples)) @ samples
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)


@functools.cache
def _resamples(count: int) -> np.ndarray:
    """How much each of `count` values weighs in each resample's mean, [RESAMPLES, count]."""
    return np.random.default_rng(0).multinomial(count, [1 / count] * count, RESAMPLES) / count


def paired_p(values: Sequence[float]) -> float:
    """Two-sided p-value of Student's t for a mean of zero; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    mean, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))
    if error == 0:
        return float(mean == 0)
    freedom = len(values) - 1
    return float(betainc(freedom / 2, 0.5, 0, freedom / (freedom + (mean / error) ** 2), regularized=True))


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected for being one of several questions, by Holm's step-down; NaN stays, and is no question."""
    corrected = [math.nan] * len(p_values)
    asked = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for rank, (p, i) in enumerate(asked):
        largest = max(largest, min(1.0, p * (len(asked) - rank)))
        corrected[i] = largest
    return corrected


def wilson(hits: int, trials: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval of a share, Wilson's; (0, 1) without a trial."""
    if not trials:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = hits / trials, z * z / trials
    half = math.sqrt(spread * share * (1 - share) + spread * spread / 4)
    low, high = ((share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)
