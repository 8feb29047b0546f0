"""The pictures of the precision study, drawn from its records alone by `python -m benchmarks.report`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from benchmarks.harness.pictures import COLOURS, PALE, frame, plt, save
from benchmarks.harness.records import Record
from benchmarks.precision.recipes import RECIPES
from benchmarks.precision.tables import by_recipe, labels_of, of_kind

MARKERS = ("o", "s", "D", "^", "v", "x")
STYLES = list(zip(COLOURS, MARKERS, strict=True))
FLOOR, CEILING = 1e-8, 10.0  # smaller and larger values are drawn at these
ERRORS = (1e-6, 1.0)  # the errors between which a heatmap's colours change


def draw(records: Sequence[Record], folder: Path, stem: str) -> None:
    """Write the PNG files into `folder`, whatever the stem of the results."""
    ratio = "Relative error of the ratio π/μ against float64, 99th percentile over tokens"
    save(heatmap(records, "ratio", ratio), folder / "ratio.png")
    gradient = "Error of the gradient dW against float64, relative to its norm"
    save(heatmap(records, "weight", gradient), folder / "gradient.png")
    save(error_over_logit(of_kind(records, "sweep")), folder / "logit.png")
    save(mismatch(records), folder / "mismatch.png")


def plain_label(recipe: str) -> str:
    return RECIPES[recipe].label.replace("`", "")


def heatmap(records: Sequence[Record], quantity: str, title: str) -> Figure:
    """A row per recipe, a column per regime, in each cell the error and a colour on a log scale."""
    found, names = by_recipe(records, quantity), labels_of(records)
    values = [[row.get(name, math.nan) for name in names] for row in found.values()]
    figure, axes = plt.subplots(figsize=(6.0 + 0.6 * len(names), 1.9 + 0.36 * len(values)), layout="constrained")
    colours = plt.get_cmap("viridis").with_extremes(bad="#e6e6e6")
    norm = LogNorm(*ERRORS, clip=True)
    image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto")
    for i, row in enumerate(found.values()):
        for j, name in enumerate(names):
            value = row.get(name)
            dark = value is not None and norm(value) <= 0.6
            text = "–" if value is None else _short(value)
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(len(names)), names.values(), rotation=38, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(len(found)), map(plain_label, found), fontsize=9)
    axes.set_xlabel("regime")
    axes.set_title(title, fontsize=11, loc="left")
    figure.colorbar(image, ax=axes, pad=0.01, label="relative error (log scale, clipped)", extend="both")
    return figure


def _short(value: float) -> str:
    if value != value or value > 1e4:
        return "NaN" if value != value else ">1e4"
    if value >= 0.01:
        return f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def error_over_logit(sweep: Sequence[Record]) -> Figure:
    figure, axes = plt.subplots(figsize=(8.2, 4.8), layout="constrained")
    largest = [record["largest_logit"] for record in sweep]
    for i, (key, (colour, marker)) in enumerate(zip(sweep[0]["logprob"], STYLES, strict=False)):
        errors = [max(record["logprob"][key][0], FLOOR) for record in sweep]
        # Hollow markers of decreasing size keep lines visible that coincide.
        style = {"marker": marker, "markersize": 13 - 1.8 * i, "markerfacecolor": "none", "linewidth": 1.3}
        axes.loglog(largest, errors, color=colour, label=plain_label(key), **style)
    bounds = [record["bound"] for record in sweep]
    axes.loglog(largest, bounds, "--", color="grey", label="bound for 16-bit inputs with fp32 logits")
    axes.set_xlabel("largest |logit| of the batch (an outlier channel moves all logits alike)")
    axes.set_ylabel("largest error of a log-prob, nats")
    axes.set_title("What the size of the logits costs", fontsize=11, loc="left")
    frame(axes)
    axes.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def mismatch(records: Sequence[Record]) -> Figure:
    """An engine with an fp8 head against every trainer: a panel for its fp32 logits, one for its bf16 logits."""
    names, engines = labels_of(records), of_kind(records, "mismatch")
    trainers = list(zip(engines[0]["ratio"], STYLES, strict=False))
    figure, panels = plt.subplots(
        1, 2, figsize=(11.5, 1.8 + 0.33 * len(names)), sharex=True, sharey=True, layout="constrained"
    )
    for axes, logits in zip(panels, ("fp32", "bf16"), strict=True):
        chosen = [r for r in engines if (r["engine"], r["engine_logits"]) == ("both", logits)]
        for y, record in enumerate(chosen):
            values = [min(max(mean, FLOOR), CEILING) for _, _, mean, _ in record["ratio"].values()]
            axes.plot([min(values), max(values)], [y, y], color="#dcdcdc", linewidth=9, zorder=1)
            for i, (value, (_, (colour, marker))) in enumerate(zip(values, trainers, strict=True)):
                axes.scatter(value, y + 0.2 * (i - 1.5), color=colour, marker=marker, s=26, zorder=2)
        axes.set_xscale("log")
        axes.grid(axis="x", color=PALE, linewidth=0.7)
        axes.set_title(f"engine: fp8 head, {logits} logits", fontsize=10, loc="left")
        axes.set_xlabel("mean |r - 1| over tokens")
    panels[0].set_yticks(range(len(names)), names.values(), fontsize=9)
    panels[0].invert_yaxis()
    title = "Mean |r - 1| between an engine and a trainer with the same weights (more than 10 is drawn at 10)"
    figure.suptitle(title, fontsize=11)
    marks = [
        plt.Line2D([], [], color=colour, marker=marker, linestyle="", label=f"trainer: {name}")
        for name, (colour, marker) in trainers
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=9, frameon=False)
    return figure
