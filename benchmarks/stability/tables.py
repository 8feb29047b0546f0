"""The tables of docs/stability.md, in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

from benchmarks.harness.blocks import NOT_YET, Block, origin
from benchmarks.harness.records import Record
from benchmarks.harness.tables import NOTHING, table
from benchmarks.stability import answers
from benchmarks.stability.runs import Runs, by_seed, chosen_rates, load_all
from benchmarks.stability.settings import CONTROL, RATES, SEEDS
from benchmarks.stability.statistics import interval, mean_of

SIGNED = "+.3f"


def status(runs: Runs) -> str:
    """Say how many runs there are, and warn where seeds are missing."""
    counts = runs.comparison.groupby(["method", "setting"]).size()
    seeds = " to ".join(map(str, sorted({counts.min(), counts.max()})))
    grid = f"{len(runs.methods)} methods × {len(answers.off_policy(runs))} settings × {seeds} seeds"
    incomplete = "" if counts.min() >= len(SEEDS) else " **The grid is not complete.**"
    return f"{grid}, each method at its best rate, and {len(runs.sweep)} runs to choose these rates.{incomplete}"


def decided(found: pd.DataFrame) -> str:
    """Render comparisons: a row for each setting, and a column for each pair. What counts is bold."""
    if found.empty:
        return NOT_YET
    pairs = [f"{row.a} minus {row.b}" for row in found.itertuples()]
    cells = [_counted(row.estimate, row.verdict) for row in found.itertuples()]
    wide = found.assign(pair=pairs, cell=cells).pivot(index="setting", columns="pair", values="cell").fillna(NOTHING)
    wide = wide.loc[found["setting"].unique(), found.assign(pair=pairs)["pair"].unique()]
    return table(("setting", *wide.columns), wide.itertuples())


def _counted(estimate, verdict: str) -> str:
    text = interval(estimate, SIGNED)
    return f"**{text}**" if verdict in ("above", "below") else text


def rare(runs: Runs) -> str:
    found = answers.rare_tokens(runs)
    parts = [found[found["number"] == number] for number in (answers.RARE_NUMBER, answers.EARNED_NUMBER)]
    return "Their mean distortion:\n\n{}\n\nThe final reward that they earn:\n\n{}".format(*map(decided, parts))


def distortion(runs: Runs) -> str:
    """Render the mean distortion of rare and of common tokens by every method, on the tokens of PG's runs."""
    means = runs.same.groupby(["method", "setting"])[["rare", "common"]].mean()
    methods, settings = [m for m in runs.methods if m in means.index], answers.off_policy(runs)
    rows = [(m, *("{:.2f} and {:.2f}".format(*means.loc[m, s]) for s in settings)) for m in methods]
    return table(("rare and common tokens", *settings), rows)


def gains(runs: Runs) -> str:
    """Render the final reward of PG, and what each method has beyond it."""
    found, rewards = answers.gains(runs), answers.finals(runs)
    cells = {(row.a, row.setting): _counted(row.estimate, row.verdict) for row in found.itertuples()}
    rows = [("PG", *(interval(mean_of(found["PG"])) for found in rewards.values()))]
    rows += [(m, *(cells.get((m, s), NOTHING) for s in rewards)) for m in runs.methods if m != "PG"]
    return table(("method", *rewards), rows)


def control(runs: Runs) -> str:
    start = pd.DataFrame(runs.comparison["reward"].tolist())[0]
    return (
        f"Before training the expected reward is {start.mean():.3f}. On-policy, where all losses are one, the final "
        f"reward is {interval(mean_of(by_seed(runs.comparison, CONTROL, 'final')['PG']))}."
    )


def ranges(runs: Runs) -> str:
    """Render the rates that work, the best rate, and the runs at it that collapsed, in bold if the loss collapses."""
    settings, working = answers.off_policy(runs), answers.working_rates(runs)
    best = chosen_rates(runs, runs.methods, settings)

    def cell(method: str, setting: str) -> str:
        collapsed = runs.comparison.query("method == @method and setting == @setting")["collapsed"]
        fallen = f"{collapsed.sum()} of {len(collapsed)} collapsed"
        fallen = f", **{fallen}**" if collapsed.mean() > answers.COLLAPSES else f", {fallen}" if collapsed.any() else ""
        return f"{working.loc[method, setting]} of {len(RATES)} ({best[method, setting]:g}){fallen}"

    return table(("method", *settings), [(m, *(cell(m, s) for s in settings)) for m in runs.methods])


def chosen(choice: answers.Choice) -> str:
    settings = choice.means.columns
    rows = [
        (
            row.Index,
            *(f"{choice.means.loc[row.Index, s]:.3f} ({choice.regrets.loc[row.Index, s]:.3f})" for s in settings),
            f"{row.worst:.3f}",
            f"{row.working:.0f} of {len(RATES) * len(settings)}",
            f"{row.wins:.0%}",
        )
        for row in choice.summary.itertuples()
    ]
    said = (
        f"By the rule: {' or '.join(choice.named)}. The worst regret of the paper's δ is over {answers.SAME_NUMBER} "
        f"above the least in {choice.worse:.0%} of the resamples, so the default "
        f"{'leaves' if choice.worse >= answers.LEAVES else 'stays at'} 12.5."
    )
    return table(("δ", *settings, "worst regret", "working rates", "wins"), rows) + f"\n\n{said}"


def source(runs: Runs) -> str:
    return f"{len(runs.table)} runs. {origin(runs.sources)}"


def toy(records: list[Record]) -> str:
    """Render the mean accuracy over the runs of the earlier experiment, and how many fell below half of their best."""

    def cell(runs: pd.DataFrame) -> str:
        curves = np.array(runs["curve"].tolist())
        fallen = (curves < np.maximum.accumulate(curves, 1) / 2).any(1).sum()
        mean = trapezoid(curves).mean() / (curves.shape[1] - 1)
        return f"{mean:.3f}, {fallen} of {len(runs)} collapsed" if fallen else f"{mean:.3f}"

    runs = pd.DataFrame((r["method"], r["setting"], r["evaluations"]["sampled"]) for r in records)
    runs.columns = ["method", "setting", "curve"]
    cells = runs.groupby(["method", "setting"], sort=False).apply(cell, include_groups=False).unstack(sort=False)
    return f"{table(('method', *cells.columns), cells.itertuples())}\n\n{len(records)} runs. {origin(records)}"


PARTS: dict[str, Callable[[Runs], str]] = {
    "status": status, "control": control, "rare": rare, "distortion": distortion, "gains": gains, "ranges": ranges,
    "correction": lambda runs: decided(answers.best_rates(runs, answers.CORRECTION_PAIRS)),
    "amended-correction": lambda runs: decided(answers.same_rate(runs, answers.CORRECTION_PAIRS)),
    "paper": lambda runs: decided(answers.best_rates(runs, answers.PAPER_PAIRS)),
    "amended-paper": lambda runs: decided(answers.same_rate(runs, answers.PAPER_PAIRS)),
    "deltas": lambda runs: chosen(answers.choose(runs)),
    "amended-deltas": lambda runs: chosen(answers.choose_amended(runs)) if len(runs.amended) else NOT_YET,
    "source": source,
}  # fmt: skip
BLOCKS = [
    Block(f"stability-{name}", "stability", "stability/runs.jsonl", "docs/stability.md",
          lambda records, part=part: part(load_all(records)), NOT_YET)
    for name, part in PARTS.items()
] + [Block("stability-toy", "stability", "stability/toy.jsonl", "docs/stability.md", toy)]  # fmt: skip
BLOCKS[0] = replace(BLOCKS[0], plots="benchmarks.stability.figures")
