"""The pictures of the precision study, drawn from its records alone by `python -m benchmarks.report`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from benchmarks.harness.pictures import plt, save
from benchmarks.harness.records import Record
from benchmarks.precision.recipes import RECIPES
from benchmarks.precision.tables import by_recipe, labels_of

ERRORS = (1e-6, 1.0)  # the errors between which a heatmap's colours change


def draw(records: Sequence[Record], folder: Path, stem: str) -> None:
    """Write the PNG files into `folder`, whatever the stem of the results."""
    ratio = "Relative error of the ratio π/μ against float64, 99th percentile over tokens"
    save(heatmap(records, "ratio", ratio), folder / "ratio.png")
    gradient = "Error of the gradient dW against float64, relative to its norm"
    save(heatmap(records, "weight", gradient), folder / "gradient.png")


def plain_label(recipe: str) -> str:
    return RECIPES[recipe].label.replace("`", "")


def heatmap(records: Sequence[Record], quantity: str, title: str) -> Figure:
    """Draw a row per recipe and a column per regime. Each cell has the error, and a colour on a log scale."""
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
