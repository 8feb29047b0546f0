"""The tables of docs/stability.md, in Markdown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

from benchmarks.harness.blocks import NOT_YET, Block, origin
from benchmarks.harness.records import Record
from benchmarks.harness.tables import NOTHING, table
from benchmarks.stability import answers
from benchmarks.stability.runs import Runs, chosen_rates, load_all
from benchmarks.stability.settings import CONTROL, RATES, SEEDS
from benchmarks.stability.statistics import interval, mean_of

SIGNED = "+.3f"


def status(runs: Runs) -> str:
    """Say how many runs there are, and warn where they are too small or too few to say anything."""
    counts = runs.comparison.groupby(["method", "setting"]).size()
    seeds = " to ".join(map(str, sorted({counts.min(), counts.max()})))
    lines = [
        f"{len(runs.methods)} methods × {len(answers.off_policy(runs))} settings × {seeds} seeds, each method at its "
        f"best rate in each setting, and {len(runs.sweep)} runs to choose these rates."
    ]
    if counts.min() < len(SEEDS):
        lines.append("**The grid is not complete.**")
    return " ".join(lines)


def decided(found: pd.DataFrame) -> str:
    """Render comparisons: a row for each setting, and a column for each pair. What counts is bold."""
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
    return "Mean distortion of rare tokens:\n\n{}\n\nFinal reward that rare tokens earn:\n\n{}".format(
        *map(decided, parts)
    )


def distortion(runs: Runs) -> str:
    """Render the mean distortion of rare and of common tokens by every method, on the tokens of PG's runs."""
    means = runs.same.groupby(["method", "setting"])[["rare_distortion", "common_distortion"]].mean()
    settings = answers.off_policy(runs)
    pairs = {m: ["{:.2f} and {:.2f}".format(*means.loc[m, s]) for s in settings] for m in runs.methods if m != "PG"}
    rows = [(method, *found) for method, found in pairs.items()]
    return table(("rare and common tokens", *settings), rows)


def gains(runs: Runs) -> str:
    """Render the final reward of PG, and what each method has beyond it."""
    found, settings = answers.gains(runs), answers.off_policy(runs)
    cells = {(row.a, row.setting): _counted(row.estimate, row.verdict) for row in found.itertuples()}
    alone = {setting: interval(mean_of(runs.by_seed("final", setting)["PG"])) for setting in settings}
    rows = [("PG", *alone.values())]
    rows += [(m, *(cells.get((m, s), NOTHING) for s in settings)) for m in runs.methods if m != "PG"]
    return table(("method", *settings), rows)


def control(runs: Runs) -> str:
    rewards = runs.by_seed("final", CONTROL)["PG"]
    start = pd.DataFrame(runs.comparison["reward"].tolist())[0]
    return (
        f"Before training the expected reward is {start.mean():.3f}. On-policy, where all losses are one, the final "
        f"reward is {interval(mean_of(rewards))}."
    )


def ranges(runs: Runs) -> str:
    """Render the rates that work, the best rate, and the runs at it that collapsed."""
    settings, working = answers.off_policy(runs), answers.working_rates(runs)
    best = chosen_rates(runs, runs.methods, settings)

    def cell(method: str, setting: str) -> str:
        collapsed = runs.comparison.query("method == @method and setting == @setting")["collapsed"]
        fallen = f", {collapsed.sum()} of {len(collapsed)} collapsed" if collapsed.any() else ""
        return f"{working.loc[method, setting]} of {len(RATES)} ({best[method, setting]:g}){fallen}"

    return table(("method", *settings), [(m, *(cell(m, s) for s in settings)) for m in runs.methods])


def deltas(runs: Runs) -> str:
    choice = answers.choose(runs)
    rows = [
        (
            name,
            *(f"{choice.means.loc[name, s]:.3f} ({choice.regrets.loc[name, s]:.3f})" for s in choice.means.columns),
            f"{row.worst:.3f}",
            f"{row.working:.0f} of {len(RATES) * len(choice.means.columns)}",
            f"{row.wins:.0%}",
        )
        for name, row in zip(choice.summary.index, choice.summary.itertuples(), strict=True)
    ]
    said = (
        f"By the registered rule: {' or '.join(choice.named)}. The paper's δ is worse by over {answers.SAME_NUMBER} in "
        f"{choice.worse:.0%} of the resamples."
    )
    return table(("δ", *choice.means.columns, "worst regret", "working rates", "wins"), rows) + f"\n\n{said}"


def correction(runs: Runs) -> str:
    return decided(answers.correction(runs))


def paper(runs: Runs) -> str:
    return decided(answers.paper(runs))


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


PARTS = (status, control, rare, distortion, gains, ranges, correction, paper, deltas, source)
BLOCKS = [
    Block(f"stability-{part.__name__}", "stability", "stability/runs.jsonl", "docs/stability.md",
          lambda records, part=part: part(load_all(records)), NOT_YET)
    for part in PARTS
] + [Block("stability-toy", "toy", "stability/toy.jsonl", "docs/stability.md", toy)]  # fmt: skip
BLOCKS[0] = replace(BLOCKS[0], plots="benchmarks.stability.figures")
