"""The five questions as docs/stability.md registered them before the runs: what is compared, with which number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.stability.runs import Runs, by_seed
from benchmarks.stability.settings import AMENDMENT, CONTROL, METHODS
from benchmarks.stability.statistics import compare, decide
from drpo_kernels import DRPO

RARE_PAIRS = (("PPO", "DPPO-TV"), ("SPO", "DRPO δ=0.2"))
RARE_NUMBER, EARNED_NUMBER = 0.05, 0.01
GAIN_NUMBER, WORKS_WITHIN = 0.02, 0.05
CORRECTION_PAIRS = (("DRPO δ=0.2", "DRPO without correction"), ("DRPO δ=0.2", "DPPO-TV"))
SAME_NUMBER = 0.01
PAPER_PAIRS = (("DRPO δ=12.5", "PG"),)
TIE, RESAMPLES, SURE, LIKELY, LEAVES, COLLAPSES = 0.005, 10_000, 0.8, 0.05, 0.95, 0.05
PAPER = "DRPO δ=12.5"
DELTAS = [name for name, objective in METHODS.items() if isinstance(objective, DRPO)]


def off_policy(runs: Runs) -> list[str]:
    return [setting for setting in runs.settings if setting != CONTROL]


def finals(runs: Runs, outcome: str = "final") -> dict[str, pd.DataFrame]:
    """Return an outcome by seed and method, for each setting but the control."""
    return {setting: by_seed(runs.comparison, setting, outcome) for setting in off_policy(runs)}


def amended_finals(runs: Runs) -> dict[str, dict[float, pd.DataFrame]]:
    """Return the final reward by seed and method of the amendment's runs, for each setting and rate."""
    return {
        setting: {rate: by_seed(found, setting, "final") for rate, found in runs.amended.groupby("rate")}
        for setting in AMENDMENT.settings
        if len(runs.amended)
    }


def rare_tokens(runs: Runs) -> pd.DataFrame:
    """(a) The distortion of rare tokens, and what they earn in the end."""
    same = {setting: by_seed(runs.same, setting, "rare") for setting in off_policy(runs)}
    earned = [pair[::-1] for pair in RARE_PAIRS]
    return decide(compare(same, RARE_PAIRS, RARE_NUMBER), compare(finals(runs, "final_rare"), earned, EARNED_NUMBER))


def gains(runs: Runs) -> pd.DataFrame:
    """(b) The final reward of each method minus that of PG."""
    return decide(compare(finals(runs), [(m, "PG") for m in runs.methods if m != "PG"], GAIN_NUMBER))


def working_rates(runs: Runs) -> pd.DataFrame:
    """(b) The number of rates that work, with a row for each method and a column for each setting."""
    means = runs.sweep.pivot_table(index="method", columns=["setting", "rate"], values="final")
    enough = means.loc["PG"].groupby("setting").max() - WORKS_WITHIN
    works = means.ge(enough.reindex(means.columns.get_level_values("setting")).to_numpy())
    return works.T.groupby("setting").sum().T.reindex(runs.methods)[off_policy(runs)]


def same_rate(runs: Runs, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """(c) and (d) by the amendment: differences at each of its rates."""
    tables = {
        f"{s}, rate {rate:g}": table for s, found in amended_finals(runs).items() for rate, table in found.items()
    }
    return decide(compare(tables, pairs, SAME_NUMBER))


def best_rates(runs: Runs, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """(c) and (d) as registered: differences at each method's best rate."""
    return decide(compare(finals(runs), pairs, SAME_NUMBER))


class Choice(NamedTuple):
    """(e) A row for each δ: its mean final reward and regret in each setting, and in `summary` its "worst" regret, its
    "working" rates, and the share of resamples in which it "wins". `worse` is the share in which the worst regret of
    the paper's δ is over `SAME_NUMBER` above that of the best.
    """

    means: pd.DataFrame
    regrets: pd.DataFrame
    summary: pd.DataFrame
    worse: float

    @property
    def named(self) -> list[str]:
        """The δ that is recommended, or all that may be where none wins often enough."""
        wins = self.summary["wins"]
        return wins.index[wins >= (SURE if wins.max() >= SURE else LIKELY)].tolist()


def winner(worst: np.ndarray, working: np.ndarray) -> int:
    """Return the place of the δ with the least worst regret. Within `TIE`, more working rates win, then a larger δ."""
    tied = [place for place in range(len(worst)) if worst[place] <= worst.min() + TIE]
    return max(tied, key=lambda place: (working[place], place))


def choose(runs: Runs) -> Choice:
    """(e) as registered."""
    return _choose(runs, {setting: [table] for setting, table in finals(runs).items()}, DELTAS)


def choose_amended(runs: Runs) -> Choice:
    """(e) by the amendment: each δ has the better of two rates, which every resample chooses again."""
    tables = {setting: list(found.values()) for setting, found in amended_finals(runs).items()}
    return _choose(runs, tables, [delta for delta in DELTAS if delta in AMENDMENT.methods])


def _choose(runs: Runs, tables: dict[str, list[pd.DataFrame]], deltas: list[str]) -> Choice:
    seeds = sorted(set.intersection(*(set(table.index) for rates in tables.values() for table in rates)))
    rewards = np.array([[table.loc[seeds, deltas].to_numpy() for table in rates] for rates in tables.values()])
    working = working_rates(runs).loc[deltas, list(tables)].sum(axis=1)
    count = rewards.shape[2]  # [settings, rates, seeds, δ]
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
    means = rewards.mean(2).max(1)
    resampled = np.einsum("rs,cqsd->rcqd", drawn, rewards).max(2)
    worst, resampled = ((x.max(-1, keepdims=True) - x).max(-2) for x in (means, resampled))
    won = np.bincount([winner(row, working.to_numpy()) for row in resampled], minlength=len(deltas)) / RESAMPLES
    summary = pd.DataFrame({"worst": worst, "working": working, "wins": won}, deltas)
    best, last = winner(worst, working.to_numpy()), deltas.index(PAPER)
    frames = [pd.DataFrame(x, list(tables), deltas).T for x in (means, means.max(1, keepdims=True) - means)]
    return Choice(*frames, summary, float((resampled[:, last] - resampled[:, best] > SAME_NUMBER).mean()))
