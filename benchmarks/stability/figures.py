"""The pictures of docs/stability.md that the runs decide. Each title is the question that the picture answers."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from benchmarks.harness.pictures import BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILION, frame, save
from benchmarks.stability.claims import BASELINE, BOUNDED
from benchmarks.stability.measures import RATIO_BOUNDARY, SHIFT_BOUNDARY
from benchmarks.stability.runs import Runs
from benchmarks.stability.settings import METHODS, SWEEP_SETTING
from benchmarks.stability.statistics import bootstrap

# Losses clipped by the ratio are warm, those bounded by |π - μ| cold.
COLOURS = {
    "PG": GREY, "PPO": ORANGE, "PPO clip-higher": "#a06800", "SPO": VERMILION, "DPPO-TV": GREEN, "DPPO-KL": "#00634a",
    "DRPO δ=0.05": "#08306b", "DRPO δ=0.2": BLUE, "DRPO δ=1": "#4a6fe3", "DRPO δ=12.5": SKY, "DRPO without |A|": PINK,
    "Mask-DRPO": "#7b3294",
}  # fmt: skip
BARS = (SKY, BLUE, ORANGE, GREY, PINK)  # a colour for each setting


def draw_curves(runs: Runs, path: Path) -> None:
    """Held-out accuracy against rollouts: settings across, and a row of panels for each group of methods."""
    rows = {"bounded by |π - μ|": [m for m in runs.methods if m in BOUNDED]}
    rows["clipped by the ratio, and others"] = [m for m in runs.methods if m not in BOUNDED]
    shape, size = (2, len(runs.settings)), (3.2 * len(runs.settings) + 1.9, 6.4)
    figure, panels = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True)
    for row, (name, methods) in zip(panels, rows.items(), strict=True):
        row[0].set_ylabel(f"{name}\nheld-out accuracy, sampled")
        for axes, setting in zip(row, runs.settings, strict=True):
            for method in methods:
                _curve(runs, axes, method, setting)
            axes.set_ylim(0, 1.02)
            frame(axes)
        handles = [row[-1].plot([], [], color=COLOURS[method], label=method)[0] for method in methods]
        row[-1].legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for axes, below, setting in zip(*panels, runs.settings, strict=True):
        axes.set_title(setting, fontsize=11, loc="left")
        below.set_xlabel("rollouts (thousands of completions)")
    figure.suptitle("Does learning hold? Mean over seeds with 95 % bootstrap intervals")
    save(figure, path)


def _curve(runs: Runs, axes: Axes, method: str, setting: str) -> None:
    curves = runs.of(method, setting)["sampled"].tolist()
    if curves:
        estimate, colour = bootstrap(curves), COLOURS[method]
        x = np.arange(len(estimate.mean)) * runs.size.point * runs.size.completions / 1000
        axes.plot(x, estimate.mean, color=colour, linewidth=1.9)
        axes.fill_between(x, estimate.low, estimate.high, color=colour, alpha=0.18, linewidth=0)


def draw_rates(runs: Runs, path: Path) -> None:
    """The area under the curve against the learning rate, from the sweep."""
    figure, axes = plt.subplots(figsize=(9.2, 4.8), layout="constrained")
    for method in [method for method in METHODS if method in set(runs.sweep["method"])]:
        areas = runs.sweep[runs.sweep["method"] == method].groupby("lr")["area"]
        mean, style = areas.mean(), {"color": COLOURS[method], "linewidth": 1.6}
        ends = [mean - areas.min(), areas.max() - mean]
        axes.errorbar(mean.index, mean, ends, label=method, marker="o", elinewidth=1, **style)
    axes.axhline(runs.sweep["start"].mean(), color="#888888", linestyle=":", label="before the first update")
    axes.set_xscale("log")
    axes.set_xticks(runs.size.rates, [f"{lr:g}" for lr in runs.size.rates])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("area under the held-out curve")
    axes.set_title(f"Over how wide a range of rates does a method learn? ({SWEEP_SETTING}; bars: least to most)",
                   fontsize=12, loc="left")  # fmt: skip
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    frame(axes)
    save(figure, path)


def draw_boundaries(runs: Runs, path: Path) -> None:
    """A panel for each outcome, with a bar for each method in each setting off-policy."""
    outcomes = {
        f"share beyond |r - 1| = {RATIO_BOUNDARY}": "beyond_ratio",
        f"share beyond |π - μ| = {SHIFT_BOUNDARY}": "beyond_shift",
        "weight w beyond the ratio's": "weight_beyond_ratio",
        "weight w beyond the shift's": "weight_beyond_shift",
    }
    settings = [setting for setting in runs.settings if setting != BASELINE] or runs.settings
    size = (11.6, 1.5 + 0.55 * len(runs.methods))
    figure, panels = plt.subplots(1, len(outcomes), figsize=size, layout="constrained", sharey=True)
    for axes, (label, outcome) in zip(panels, outcomes.items(), strict=True):
        means = runs.comparison.pivot_table(index="method", columns="setting", values=outcome, dropna=False)
        means = means.reindex(index=runs.methods[::-1], columns=settings)
        means.plot.barh(
            ax=axes, legend=False, width=0.7, xlabel=label, ylabel="", color=[SKY, BLUE, ORANGE, GREY, PINK]
        )
        if label.startswith("share"):
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.axvline(0, color=GREY, linewidth=0.9)
        axes.set_axisbelow(True)
        frame(axes, "x")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("How many tokens lie beyond the boundaries, and what does each loss do to them?")
    save(figure, path)
