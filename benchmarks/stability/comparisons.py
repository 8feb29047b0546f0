"""Differences between methods, each over the seeds of both and corrected for the number of comparisons."""

from __future__ import annotations

from itertools import product

import pandas as pd

from benchmarks.stability.runs import Runs
from benchmarks.stability.settings import METHODS
from benchmarks.stability.statistics import ENOUGH, LEVEL, bootstrap, holm, paired_p

REFERENCES = ("DRPO δ=0.2", "DRPO δ=12.5")
PAIRS = [(a, b) for a, b in product(REFERENCES, METHODS) if a != b and (a, b) != REFERENCES[::-1]]
COLUMNS = ["setting", "reference", "other", "estimate", "p", "counts"]


def differences(runs: Runs) -> pd.DataFrame:
    """Return the area under the curve of each reference minus that of every other method with which it shares enough
    seeds.

    A row has its "setting", "reference" and "other", the "estimate" of the mean difference, and "p", corrected for the
    comparisons of the same setting. It "counts" if its interval excludes zero and the corrected test agrees.
    """
    return pd.DataFrame([row for setting in runs.settings for row in _family(runs, setting)], columns=COLUMNS)


def _family(runs: Runs, setting: str) -> list[tuple]:
    """Return the comparisons of one setting, as rows."""
    chosen = runs.comparison[runs.comparison["setting"] == setting]
    areas = chosen.pivot(index="seed", columns="method", values="area")
    paired = {(a, b): (areas[a] - areas[b]).dropna() for a, b in PAIRS if {a, b} <= set(areas.columns)}
    paired = {pair: values for pair, values in paired.items() if len(values) >= ENOUGH}
    corrected = holm([paired_p(values) for values in paired.values()])
    rows = []
    for ((reference, other), values), p in zip(paired.items(), corrected, strict=True):
        estimate = bootstrap(values)
        counts = p < 1 - LEVEL and not estimate.low <= 0 <= estimate.high
        rows.append((setting, reference, other, estimate, p, counts))
    return rows
