"""The tables of docs/stability.md, in Markdown."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from benchmarks.harness.blocks import origin
from benchmarks.harness.tables import NOTHING, table
from benchmarks.stability.comparisons import REFERENCES, differences
from benchmarks.stability.measures import RARE, RATIO_BOUNDARY, SHIFT_BOUNDARY
from benchmarks.stability.policy import build_policy
from benchmarks.stability.runs import Runs, chosen_rates
from benchmarks.stability.settings import METHODS, SETTINGS, SMOKE
from benchmarks.stability.statistics import ENOUGH, bootstrap, counted, interval

Column = Callable[[pd.DataFrame], str]  # from the runs of a method in a setting to a cell of the table


def mean(outcome: str, digits: str = ".3f", percent: bool = False) -> Column:
    return lambda runs: interval(bootstrap(runs[outcome].dropna()), digits, percent)


RESULTS: dict[str, Column] = {
    "seeds": lambda runs: str(len(runs)),
    "area under the curve": mean("area"),
    "final accuracy": mean("final"),
    "collapsed": lambda runs: counted(int(runs["collapsed"].sum()), len(runs)),
    "for good": lambda runs: str(runs["collapsed_for_good"].sum()),
}
HEALTH: dict[str, Column] = {
    "final greedy accuracy": mean("final_greedy"),
    "lowest greedy accuracy": mean("lowest_greedy"),
    "final entropy (nat)": mean("final_entropy"),
    "mean |π - μ|": mean("prob_shift", ".2g"),
    "std of log r": mean("log_ratio_std", ".2g"),
    "mean |log r| of rare tokens": mean("log_ratio_rare", ".2g"),
    "rare tokens": mean("rare", ".2g", percent=True),
    "largest gradient norm": lambda runs: f"{runs['largest_gradient'].max():.2g}",
}
BOUNDARIES: dict[str, Column] = {
    f"beyond |π - μ| = {SHIFT_BOUNDARY}": mean("beyond_shift", ".2g", percent=True),
    f"beyond |r - 1| = {RATIO_BOUNDARY}": mean("beyond_ratio", ".2g", percent=True),
    f"of these rare (μ < {RARE})": mean("beyond_ratio_rare", ".2g", percent=True),
    "weight within": mean("weight_within", ".2f"),
    "weight beyond the ratio's": mean("weight_beyond_ratio", ".2f"),
    "weight beyond the shift's": mean("weight_beyond_shift", ".2f"),
}


def cells(runs: Runs, columns: dict[str, Column]) -> str:
    """Render a row for each method in each setting."""
    found = [(s, m, runs.of(m, s)) for s in runs.settings for m in runs.methods]
    rows = [(s, m, *(column(cell) for column in columns.values())) for s, m, cell in found if len(cell)]
    return table(("setting", "method", *columns), rows, left=2)


def status(runs: Runs) -> str:
    """Say how many runs there are, and warn where they are too small or too few to say anything."""
    counts = [len(runs.of(method, setting)) for method in runs.methods for setting in runs.settings]
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    grid = f"{len(runs.methods)} methods × {len(runs.settings)} settings × {seeds} seeds"
    lines = [f"{grid}, and {len(runs.sweep)} runs to choose learning rates."]
    if min(counts) < ENOUGH:
        lines.append(f"**The grid is not complete**: methods are compared where they share {ENOUGH} seeds.")
    if runs.size == SMOKE:
        lines.append("**A rehearsal (`--smoke`): these numbers mean nothing.**")
    return " ".join(lines)


def collapses(runs: Runs) -> str:
    """Render how many runs of each method collapsed in each setting, and the lowest rate of the sweep with one."""
    lowest = runs.sweep[runs.sweep["collapsed"]].groupby("method")["lr"].min()
    rows = []
    for method in runs.methods:
        found = [runs.of(method, setting)["collapsed"] for setting in runs.settings]
        rate = f"{lowest[method]:g}" if method in lowest.index else "none"
        rows.append((method, *(f"{each.sum()} of {len(each)}" for each in found), rate))
    return table(("method", *runs.settings, "lowest rate of the sweep with a collapse"), rows)


def faster(runs: Runs) -> str:
    """Render the area under the curve of DRPO at either δ minus that of every other method, a column for each."""
    found = differences(runs)
    if found.empty:
        return f"No two methods share {ENOUGH} seeds yet."
    texts = found["estimate"].map(lambda estimate: interval(estimate, "+.3f"))
    found["cell"] = texts.where(~found["counts"], "**" + texts + "**")
    cells = found.pivot(index=["reference", "setting"], columns="other", values="cell")
    cells = cells.fillna(NOTHING).reindex(columns=[method for method in METHODS if method in cells])
    rows = [(a, s, *cells.loc[a, s]) for a in REFERENCES for s in runs.settings if (a, s) in cells.index]
    return table(("area under the curve of", "setting", *(f"minus {method}'s" for method in cells)), rows, left=2)


def setup(runs: Runs) -> str:
    """Render the sizes, and the accuracy of the policies that training starts from."""
    size, vocabulary = runs.size, runs.size.vocabulary
    start = pd.concat([runs.sweep, runs.comparison]).drop_duplicates("seed")
    sampled, greedy = (f"{start[name].min():.2f} to {start[name].max():.2f}" for name in ("start", "start_greedy"))
    rows = {
        "model": f"Qwen3, {size.layers} layers, width {size.hidden_size}, {size.heads} heads, tied, float32; "
                 f"{build_policy(size, 0).num_parameters():,} parameters",
        "vocabulary": f"{vocabulary.size}: {vocabulary.words} words, {vocabulary.remarks} remarks, operations, END",
        "warm-up": f"{size.warmup_steps} steps of {size.warmup_batch} demonstrations; an operation is a guess with "
                   f"probability {size.carelessness}",
        "held-out accuracy after it": f"sampled {sampled}, greedy {greedy} over {len(start)} seeds",
        "a run": f"{size.minibatches} minibatches of {size.prompts} problems × {size.group} completions",
        "evaluation": f"{size.evaluation} held-out problems every {size.point} minibatches, sampled and greedy",
    }  # fmt: skip
    return table(("", ""), rows.items(), left=2)


def settings(runs: Runs) -> str:
    """Describe each setting."""
    found = [(name, SETTINGS[name]) for name in runs.settings]
    rows = [(name, s.minibatches, s.epochs, s.precision, s.rate or "each method's own") for name, s in found]
    return table(("setting", "minibatches per rollout batch", "epochs", "rollout engine", "learning rate"), rows)


def methods(runs: Runs) -> str:
    """Render the objective of each method, and its learning rate."""
    rates = runs.own_rate.groupby("method")["lr"].first()
    shown = {method: f"{rate:g}" for method, rate in rates.items()}
    rows = [(method, f"`{METHODS[method]!r}`", shown.get(method, NOTHING)) for method in runs.methods]
    return table(("method", "objective", "learning rate"), rows, left=2)


def rates(runs: Runs) -> str:
    """Render the area under the curve of each method at each rate of the sweep, and which rate was chosen."""
    lrs, counts = runs.size.rates, runs.sweep["method"].value_counts()
    swept = [method for method in METHODS if counts.get(method) == len(lrs) * len(runs.size.sweep_seeds)]
    chosen = chosen_rates(runs, swept)
    groups = runs.sweep.groupby(["method", "lr"])
    rows = [(m, *(_rate(groups.get_group((m, lr)), lr == chosen[m]) for lr in lrs)) for m in swept]
    edges = " and ".join(method for method in swept if chosen[method] in (min(lrs), max(lrs)))
    note = f"The rate of {edges} was chosen at an edge of the sweep: a better one may lie beyond it."
    return "\n\n".join([table(("method", *(f"{lr:g}" for lr in lrs)), rows), *([note] if edges else [])])


def _rate(runs: pd.DataFrame, chosen: bool) -> str:
    area, fallen = runs["area"], runs["collapsed"].sum()
    text = f"{area.mean():.3f} ({area.min():.3f} to {area.max():.3f})"
    text = f"**{text}**" if chosen else text
    return f"{text}, {fallen} collapsed" if fallen else text


def source(runs: Runs) -> str:
    return f"{len(runs.records)} runs. {origin(runs.records)}"
