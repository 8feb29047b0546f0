"""The pictures of the precision study, drawn from its records alone: `python -m benchmarks.precision.plots` redraws."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.colors import LogNorm

from benchmarks.harness.pictures import COLOURS, PALE, plt, save
from benchmarks.harness.records import read
from benchmarks.precision.mismatch import TRAINERS
from benchmarks.precision.tables import labels_of, of_kind, plain_label, tabulated

MARKERS = ("o", "s", "D", "^", "v", "x")
FLOOR, CEILING = 1e-8, 10.0  # what is less or more is drawn there


def draw(records: Sequence[dict], folder: Path) -> None:
    """Write the PNG files into `folder`."""
    heatmap(
        records, "ratio", 1, (1e-6, 1.0), folder / "ratio.png",
        "Relative error of the ratio π/μ against float64, 99th percentile over tokens",
    )  # fmt: skip
    heatmap(
        records, "weight", 2, (1e-6, 1.0), folder / "gradient.png",
        "Error of the gradient dW against float64, relative to its norm",
    )  # fmt: skip
    error_over_logit(records, folder / "logit.png")
    mismatch(records, folder / "mismatch.png")


def heatmap(
    records: Sequence[dict], quantity: str, statistic: int, limits: tuple[float, float], path: Path, title: str
) -> None:
    """Recipes down, regimes across, a colour on a log scale with its number in it."""
    columns, rows, values = tabulated(records, quantity, statistic)
    figure, axes = plt.subplots(figsize=(6.0 + 0.6 * len(columns), 1.9 + 0.36 * len(rows)), layout="constrained")
    norm = LogNorm(*limits, clip=True)
    grid = [[norm(max(v, limits[0])) if v is not None and v == v else math.nan for v in row] for row in values]
    colours = plt.get_cmap("viridis").with_extremes(bad="#e6e6e6")
    axes.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            shade = grid[i][j]
            colour = "black" if shade != shade or shade > 0.6 else "white"
            axes.text(j, i, _short(value), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=38, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set_xlabel("regime")
    axes.set_title(title, fontsize=11, loc="left")
    scale = plt.cm.ScalarMappable(norm, colours)
    figure.colorbar(scale, ax=axes, pad=0.01, label="relative error (log scale, clipped)", extend="both")
    save(figure, path)


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    if value != value or value > 1e4:
        return "NaN" if value != value else ">1e4"
    if value >= 0.01:
        return f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def error_over_logit(records: Sequence[dict], path: Path) -> None:
    sweep = of_kind(records, "sweep")
    figure, axes = plt.subplots(figsize=(8.2, 4.8), layout="constrained")
    largest = [record["largest_logit"] for record in sweep]
    for i, (key, colour, marker) in enumerate(zip(sweep[0]["logprob"], COLOURS, MARKERS, strict=False)):
        errors = [max(record["logprob"][key][0], FLOOR) for record in sweep]
        # hollow and ever smaller: what coincides stays visible
        style = {"marker": marker, "markersize": 13 - 1.8 * i, "markerfacecolor": "none", "linewidth": 1.3}
        axes.loglog(largest, errors, color=colour, label=plain_label(key), **style)
    bounds = [record["bound"] for record in sweep]
    axes.loglog(largest, bounds, "--", color="grey", label="bound for 16-bit inputs with fp32 logits")
    axes.set_xlabel("largest |logit| of the batch (an outlier channel moves all logits alike)")
    axes.set_ylabel("largest error of a log-prob, nats")
    axes.set_title("What the size of the logits costs", fontsize=11, loc="left")
    axes.grid(which="major", color=PALE, linewidth=0.7)
    axes.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def mismatch(records: Sequence[dict], path: Path) -> None:
    """Before and after: an engine with an fp8 head against every trainer, for its fp32 and its bf16 logits."""
    names = labels_of(records)
    figure, panels = plt.subplots(1, 2, figsize=(11.5, 1.8 + 0.33 * len(names)), sharex=True, sharey=True,
                                  layout="constrained")  # fmt: skip
    for axes, logits in zip(panels, ("fp32", "bf16"), strict=True):
        chosen = [r for r in of_kind(records, "mismatch") if (r["engine"], r["engine_logits"]) == ("both", logits)]
        for y, record in enumerate(chosen):
            values = [min(max(record["ratio"][trainer][2], FLOOR), CEILING) for trainer in TRAINERS]
            axes.plot([min(values), max(values)], [y, y], color="#dcdcdc", linewidth=9, zorder=1)
            for i, (value, colour, marker) in enumerate(zip(values, COLOURS, MARKERS, strict=False)):
                axes.scatter(value, y + 0.2 * (i - 1.5), color=colour, marker=marker, s=26, zorder=2)
        axes.set_xscale("log")
        axes.grid(axis="x", color=PALE, linewidth=0.7)
        axes.set_title(f"engine: fp8 head, {logits} logits", fontsize=10, loc="left")
        axes.set_xlabel("mean |r - 1| over tokens")
    panels[0].set_yticks(range(len(names)), list(names.values()), fontsize=9)
    panels[0].invert_yaxis()
    title = "Mean |r - 1| between an engine and a trainer with the same weights (more than 10 is drawn at 10)"
    figure.suptitle(title, fontsize=11)
    marks = [
        plt.Line2D([], [], color=colour, marker=marker, linestyle="", label=f"trainer: {name}")
        for name, colour, marker in zip(TRAINERS, COLOURS, MARKERS, strict=False)
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=9, frameon=False)
    save(figure, path)


if __name__ == "__main__":
    from benchmarks.precision.study import FOLDER, NAME

    draw(read(FOLDER / NAME), FOLDER)
    sys.exit()
