"""The tables of docs/stability.md, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd

from benchmarks.harness.blocks import origin
from benchmarks.harness.tables import NOTHING, table
from benchmarks.stability.claims import with_references
from benchmarks.stability.measures import RARE, RATIO_BOUNDARY, SHIFT_BOUNDARY
from benchmarks.stability.policy import build_policy
from benchmarks.stability.runs import Runs, chosen_rates
from benchmarks.stability.settings import METHODS, REACHED, SETTINGS, SMOKE
from benchmarks.stability.statistics import ENOUGH, bootstrap, counted, interval

Column = Callable[[pd.DataFrame], str]  # from the runs of a method in a setting to a cell of the table


def mean(outcome: str, digits: str = ".3f", percent: bool = False) -> Column:
    return lambda runs: interval(bootstrap(runs[outcome].dropna()), digits, percent)


def _price(runs: pd.DataFrame) -> str:
    """The median, and how many runs reached the accuracy."""
    median, reached = runs["price"].median(), runs["price"].lt(math.inf).sum()
    return f"{f'{median:,.0f}' if median < math.inf else 'not reached'} ({reached} of {len(runs)})"


RESULTS: dict[str, Column] = {
    "seeds": lambda runs: str(len(runs)),
    "area under the curve": mean("area"),
    "final accuracy": mean("final"),
    f"rollouts to {REACHED:g} (runs that did)": _price,
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
    """A row for each method in each setting."""
    found = [(s, m, runs.of(m, s)) for s in runs.settings for m in runs.methods]
    rows = [(s, m, *(column(cell) for column in columns.values())) for s, m, cell in found if len(cell)]
    return table(("setting", "method", *columns), rows, left=2)


def status(runs: Runs) -> str:
    """Which cells have how many seeds."""
    lines = ["**A rehearsal (`--smoke`): these numbers mean nothing.**"] if runs.size == SMOKE else []
    counts = [[len(runs.of(method, setting)) for setting in runs.settings] for method in runs.methods]
    if {count for row in counts for count in row} == {ENOUGH}:
        grid = f"{len(runs.methods)} methods × {len(runs.settings)} settings × {ENOUGH} seeds"
        return "\n\n".join([*lines, f"{grid}, and {len(runs.sweep)} runs to choose learning rates."])
    lines.append(f"**The grid is not complete.** A verdict needs {ENOUGH} seeds. So far there are:")
    rows = [(method, *map(str, row)) for method, row in zip(runs.methods, counts, strict=True)]
    return "\n\n".join([*lines, table(("method", *runs.settings), rows)])


def setup(runs: Runs) -> str:
    """Sizes, and the accuracy of the policies that training starts from."""
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
    """What each setting is."""
    found = [(name, SETTINGS[name]) for name in runs.settings]
    rows = [(name, s.minibatches, s.epochs, s.precision, s.rate or "each method's own") for name, s in found]
    return table(("setting", "minibatches per rollout batch", "epochs", "rollout engine", "learning rate"), rows)


def methods(runs: Runs) -> str:
    """Every method of settings.py, and the learning rate of those that were run."""
    rates = runs.own_rate.groupby("method")["lr"].first()
    shown = {method: f"{rate:g}" for method, rate in rates.items()}
    rows = [(method, f"`{objective!r}`", shown.get(method, NOTHING)) for method, objective in METHODS.items()]
    return table(("method", "objective", "learning rate"), rows, left=2)


def rates(runs: Runs) -> str:
    """The area under the curve of each method at each rate of the sweep, and which rate was chosen."""
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


def differences(runs: Runs) -> str:
    """Every comparison with a DRPO at either δ."""
    rows = []
    for setting in runs.settings:
        for area, final in zip(*(with_references(runs, name, setting) for name in ("area", "final")), strict=True):
            columns = [text for c in (area, final) for text in (_difference(c), _p(c.p))]
            rows.append((setting, f"{area.cell[0]} minus {area.other[0]}", *columns))
    header = ("setting", "difference", "area under the curve", "p, corrected", "final accuracy", "p, corrected")
    return table(header, rows, left=2) if rows else f"No two methods share {ENOUGH} seeds yet."


def _difference(comparison) -> str:
    text = interval(comparison.difference, "+.3f")
    return f"**{text}**" if comparison.sign else text


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def source(runs: Runs) -> str:
    return f"{len(runs.records)} runs. {origin(runs.records)}"
