"""The five questions as docs/stability.md registered them before the runs: what is compared, with which number."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.stability.runs import Runs
from benchmarks.stability.settings import CONTROL, METHODS
from benchmarks.stability.statistics import compare, decide
from drpo_kernels import DRPO

RARE_PAIRS = (("PPO", "DPPO-TV"), ("SPO", "DRPO δ=0.2"))
RARE_NUMBER, EARNED_NUMBER = 0.05, 0.01
GAIN_NUMBER, WORKS_WITHIN = 0.02, 0.05
CORRECTION_PAIRS = (("DRPO δ=0.2", "DRPO without correction"), ("DRPO δ=0.2", "DPPO-TV"))
SAME_NUMBER = 0.01
TIE, RESAMPLES, SURE, LIKELY = 0.005, 10_000, 0.8, 0.05
PAPER = "DRPO δ=12.5"
DELTAS = [name for name, objective in METHODS.items() if isinstance(objective, DRPO)]


def off_policy(runs: Runs) -> list[str]:
    return [setting for setting in runs.settings if setting != CONTROL]


def finals(runs: Runs, outcome: str = "final") -> dict[str, pd.DataFrame]:
    """Return an outcome by seed and method, for each setting but the control."""
    return {setting: runs.by_seed(outcome, setting) for setting in off_policy(runs)}


def rare_tokens(runs: Runs) -> pd.DataFrame:
    """(a) The distortion of rare tokens, and what they earn in the end."""
    same = {
        setting: runs.same[runs.same["setting"] == setting].pivot(
            index="seed", columns="method", values="rare_distortion"
        )
        for setting in off_policy(runs)
    }
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


def correction(runs: Runs) -> pd.DataFrame:
    """(c) The final reward with DRPO's correction minus that with a mask."""
    return decide(compare(finals(runs), CORRECTION_PAIRS, SAME_NUMBER))


def paper(runs: Runs) -> pd.DataFrame:
    """(d) The final reward of the paper's δ minus that of PG."""
    return decide(compare(finals(runs), [(PAPER, "PG")], SAME_NUMBER))


class Choice(NamedTuple):
    """(e) A row for each δ: its mean final reward and regret in each setting, the "worst" regret, its "working" rates,
    and the share of resamples in which it "wins". `worse` is the share in which the paper's δ is worse by 0.01.
    """

    means: pd.DataFrame
    regrets: pd.DataFrame
    summary: pd.DataFrame
    worse: float

    @property
    def best(self) -> str:
        return winner(self.summary["worst"].to_numpy(), self.summary["working"].to_numpy())

    @property
    def named(self) -> list[str]:
        """The δ that is recommended, or all that may be where none wins often enough."""
        wins = self.summary["wins"]
        return [self.best] if wins[self.best] >= SURE else wins.index[wins >= LIKELY].tolist()


def winner(worst: np.ndarray, working: np.ndarray) -> str:
    """Return the δ with the least worst regret. Within `TIE`, more working rates win, and then the larger δ."""
    tied = [place for place in range(len(DELTAS)) if worst[place] <= worst.min() + TIE]
    return DELTAS[max(tied, key=lambda place: (working[place], place))]


def choose(runs: Runs) -> Choice:
    tables = finals(runs)
    seeds = sorted(set.intersection(*(set(table[DELTAS].dropna().index) for table in tables.values())))
    rewards = np.stack([table.loc[seeds, DELTAS].to_numpy() for table in tables.values()], 1)  # [seeds, settings, δ]
    working = working_rates(runs).loc[DELTAS].sum(axis=1)

    def worst(means: np.ndarray) -> np.ndarray:
        return (means.max(-1, keepdims=True) - means).max(-2)

    means, count = rewards.mean(0), len(seeds)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
    resampled = worst(np.einsum("rs,scd->rcd", drawn, rewards))
    won = pd.Series([winner(row, working.to_numpy()) for row in resampled]).value_counts(normalize=True)
    columns = {"worst": worst(means), "working": working, "wins": won.reindex(DELTAS).fillna(0)}
    tables_of = [pd.DataFrame(x, list(tables), DELTAS).T for x in (means, means.max(1, keepdims=True) - means)]
    choice = Choice(*tables_of, pd.DataFrame(columns, DELTAS), 0.0)
    best, last = DELTAS.index(choice.best), DELTAS.index(PAPER)
    return choice._replace(worse=float((resampled[:, last] - resampled[:, best] > SAME_NUMBER).mean()))
