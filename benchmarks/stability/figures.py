"""The figures of docs/stability.md that runs decide: each title is the question that the figure answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from benchmarks.harness.pictures import BLACK, BLUE, SKY, VERMILION, save
from benchmarks.stability import verdicts
from benchmarks.stability.ablations import DRPOWithoutAbsA, MaskDRPO
from benchmarks.stability.drawing import MARKERS, colour, end_labels, new_figure
from benchmarks.stability.grid import area
from benchmarks.stability.measures import RATIO_BOUNDARY, SHIFT_BOUNDARY
from benchmarks.stability.outcomes import Outcome, Runs, final, mean_of, warmed_up, weight_beyond
from benchmarks.stability.settings import CORE_METHODS, METHODS, RATES, SETTINGS, SWEEP_SETTING
from benchmarks.stability.statistics import bootstrap
from benchmarks.stability.surface import draw_slices, draw_surface
from drpo_kernels import DRPO

SHAPES = dict(zip(SETTINGS, "osPDv^", strict=True))  # where methods have the colours
GRID = {"color": "#e6e6e6", "linewidth": 0.6}
# a shade per setting where lines are settings
SHADES = ("#888888", VERMILION, "#7b3294", SKY, BLUE, BLACK)
SETTING_STYLES = dict(zip(SETTINGS, zip(SHADES, ("-", "-", "-", "--", "--", ":"), strict=True), strict=True))


def draw_curves(runs: Runs, path: Path) -> bool:
    """Held-out accuracy of the core methods against rollouts."""
    return _curves(runs, path, {
        "clipped by the ratio, or not at all": [m for m in CORE_METHODS if m not in verdicts.BOUNDED],
        "bounded by |π - μ|": [m for m in CORE_METHODS if m in verdicts.BOUNDED],
    })  # fmt: skip


def draw_others(runs: Runs, path: Path) -> bool:
    """The same of every other method."""
    others = [method for method in METHODS if method not in CORE_METHODS]
    drpos = [method for method in others if isinstance(METHODS[method], (DRPO, DRPOWithoutAbsA, MaskDRPO))]
    return _curves(runs, path, {
        "variants": [method for method in others if method not in drpos],
        "DRPO, and its ablations": drpos,
    })  # fmt: skip


def _curves(runs: Runs, path: Path, rows: dict[str, list[str]]) -> bool:
    """Settings across, a row of panels per group of methods, the other group in grey."""
    groups = [[method for method in methods if method in runs.methods] for methods in rows.values()]
    if not any(groups):
        return False
    figure, panels = new_figure(2, len(runs.settings), 3.7 * len(runs.settings) + 0.6, 6.6, sharex=True, sharey=True)
    last = runs.size.minibatches * runs.size.completions / 1000
    for row, name, methods, others in zip(panels, rows, groups, reversed(groups), strict=True):
        row[0].set_ylabel(f"{name}\nheld-out accuracy, sampled")
        for axes, setting in zip(row, runs.settings, strict=True):
            _accuracy_panel(runs, axes, setting, methods, others)
            axes.set_xlim(0, last * 1.6)
            axes.set_xticks([tick for tick in MaxNLocator(4).tick_values(0, last) if tick <= last])
    for axes, setting in zip(panels[0], runs.settings, strict=True):
        axes.set_title(setting, fontsize=11, loc="left")
    for axes in panels[-1]:
        axes.set_xlabel("rollouts (thousands of completions)")
    figure.suptitle(
        "Does learning hold? Mean over seeds, bands: 95 % bootstrap intervals; grey: the other row", fontsize=12
    )
    figure.draw_without_rendering()
    for row, methods in zip(panels, groups, strict=True):
        for axes, setting in zip(row, runs.settings, strict=True):
            ends = [
                (runs.estimate(final, method, setting).mean, method) for method in methods if runs.of(method, setting)
            ]
            end_labels(axes, last, ends)
    save(figure, path)
    return True


def _accuracy_panel(runs: Runs, axes: Axes, setting: str, methods: Sequence[str], others: Sequence[str]) -> None:
    for method in others:
        x, mean, _, _ = _accuracy(runs, method, setting)
        axes.plot(x, mean, color="#d5d5d5", linewidth=1.0, zorder=1)
    for method in methods:
        x, mean, low, high = _accuracy(runs, method, setting)
        axes.plot(x, mean, color=colour(method), linewidth=1.9, zorder=3)
        axes.fill_between(x, low, high, color=colour(method), alpha=0.18, linewidth=0, zorder=2)
    axes.set_ylim(0, 1.08)  # room for names
    axes.grid(**GRID)


def _accuracy(runs: Runs, method: str, setting: str) -> tuple[np.ndarray, ...]:
    """-> thousands of rollouts, mean, low, high: [points + 1] each, empty where nothing was run."""
    curves = [run["evaluations"]["sampled"] for run in runs.of(method, setting).values()]
    estimates = [bootstrap(values) for values in zip(*curves, strict=True)]
    x = np.arange(len(estimates)) * runs.size.point * runs.size.completions / 1000
    return x, *(np.array([getattr(e, part) for e in estimates]) for part in ("mean", "low", "high"))


def draw_updates(runs: Runs, path: Path) -> bool:
    """Against updates: a panel per method, a line per setting; two passes over a batch are twice the updates."""
    methods = [method for method in CORE_METHODS if method in runs.methods]
    if not methods:
        return False
    columns = min(3, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure, panels = new_figure(rows, columns, 11.4, 3.0 * rows + 0.9, sharex=True, sharey=True)
    for axes, method in zip(panels.flat, methods, strict=False):
        for setting in runs.settings:
            rollouts, mean, low, high = _accuracy(runs, method, setting)
            x = rollouts * 1000 / runs.size.completions * SETTINGS[setting].epochs
            shade, dashes = SETTING_STYLES[setting]
            axes.plot(x, mean, color=shade, linestyle=dashes, linewidth=1.8, label=setting)
            axes.fill_between(x, low, high, color=shade, alpha=0.15, linewidth=0)
        axes.set_title(method, fontsize=11, loc="left", color=colour(method))
        axes.set_ylim(0, 1.02)
        axes.grid(**GRID)
    for axes in panels.flat[len(methods) :]:
        axes.set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("updates")
    for axes in panels[:, 0]:
        axes.set_ylabel("held-out accuracy, sampled")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("What does an update buy? Stale settings pass twice over a batch: twice the updates from the same "
                    "rollouts", fontsize=12)  # fmt: skip
    save(figure, path)
    return True


def draw_rates(runs: Runs, path: Path) -> bool:
    """Area under the curve against the learning rate, from the sweep."""
    methods = [method for method in METHODS if any(method == found for found, _ in runs.sweep)]
    if not methods:
        return False
    figure, ((axes,),) = new_figure(1, 1, 8.6, 4.8)
    ends = []
    for method in methods:
        swept = [(lr, [area(run) for run in runs.sweep.get((method, lr), {}).values()]) for lr in RATES]
        swept = [(lr, found) for lr, found in swept if found]
        x, means = [lr for lr, _ in swept], [float(np.mean(found)) for _, found in swept]
        axes.plot(x, means, color=colour(method), marker=MARKERS[method], linewidth=1.8, markersize=6)
        for lr, found in swept:
            axes.plot([lr, lr], [min(found), max(found)], color=colour(method), linewidth=1, alpha=0.5)
        if x[-1] == RATES[-1]:
            ends.append((means[-1], method))
    start = float(np.mean([warmed_up(run) for found in runs.sweep.values() for run in found.values()]))
    axes.axhline(start, color="#888888", linestyle=":", linewidth=1)
    axes.annotate("before the first update", (RATES[0], start), xytext=(0, -12), textcoords="offset points", fontsize=9,
                  color="#666666")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(RATES, [f"{lr:g}" for lr in RATES])
    axes.minorticks_off()
    axes.set_xlim(RATES[0] / 1.12, RATES[-1] * 1.55)
    axes.set_ylim(0, 1.02)
    axes.grid(**GRID)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("area under the held-out curve")
    axes.set_title(f"Over how wide a range of rates does a method learn? ({SWEEP_SETTING}; bars: least to most)",
                   fontsize=12, loc="left")  # fmt: skip
    figure.draw_without_rendering()
    end_labels(axes, RATES[-1], ends)
    save(figure, path)
    return True


def draw_settings(runs: Runs, path: Path) -> bool:
    """|π - μ| and the spread of log r by setting and method."""
    panels = {"mean |π - μ|": "prob_shift", "standard deviation of log r": "log_ratio_std"}
    marks = {label: (mean_of(name), None) for label, name in panels.items()}
    title = "Do the settings do what they say? Means over a run, 95 % intervals over seeds"
    return _dots(runs, path, marks, runs.settings, title, logarithmic=True)


def draw_boundaries(runs: Runs, path: Path) -> bool:
    """Shares beyond the boundaries, and the weight that tokens get there."""
    marks = {
        f"share beyond |r - 1| = {RATIO_BOUNDARY}": (mean_of("beyond_ratio"), (0, None)),
        f"share beyond |π - μ| = {SHIFT_BOUNDARY}": (mean_of("beyond_shift"), (0, None)),
        "weight w beyond the ratio's": (weight_beyond("ratio"), None),
        "weight w beyond the shift's": (weight_beyond("shift"), None),
    }
    title = "How many tokens lie beyond the boundaries, and what does each loss do to them?"
    return _dots(runs, path, marks, [s for s in runs.settings if s != verdicts.BASELINE], title)


def _dots(runs: Runs, path: Path, marks: dict[str, tuple[Outcome, tuple | None]], settings: Sequence[str], title: str,
          logarithmic: bool = False) -> bool:  # fmt: skip
    """A panel per outcome: a row per method, in it a mark per setting with its interval."""
    if not any(runs.of(method, setting) for method in runs.methods for setting in settings):
        return False
    figure, panels = new_figure(1, len(marks), 11.6, 1.5 + 0.44 * len(runs.methods), sharey=True)
    for axes, (label, (outcome, limits)) in zip(panels[0], marks.items(), strict=True):
        for i, method in enumerate(runs.methods):
            for j, setting in enumerate(settings):
                _dot(
                    axes,
                    runs.estimate(outcome, method, setting),
                    i + min(0.24, 0.8 / len(settings)) * (j - (len(settings) - 1) / 2),
                    method,
                    setting,
                )
        if logarithmic:
            axes.set_xscale("log")
        if limits:
            axes.set_xlim(*limits)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        if label.startswith("weight"):
            axes.axvline(0, color="#999999", linewidth=0.9)
            axes.axvline(1, color="#999999", linewidth=0.9, linestyle=":")
        axes.set_xlabel(label, fontsize=10)
        axes.grid(axis="x", **GRID)
    panels[0][0].set_yticks(range(len(runs.methods)), runs.methods, fontsize=10)
    for tick, method in zip(panels[0][0].get_yticklabels(), runs.methods, strict=True):
        tick.set_color(colour(method))
    panels[0][0].set_ylim(len(runs.methods) - 0.4, -0.6)
    handles = [
        panels[0][0].plot([], [], linestyle="", color="#444444", marker=SHAPES[setting], label=setting, markersize=6)[0]
        for setting in settings
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
    figure.suptitle(title, fontsize=12)
    save(figure, path)
    return True


def _dot(axes: Axes, estimate, y: float, method: str, setting: str) -> None:
    if math.isnan(estimate.mean):
        return
    axes.plot(estimate.mean, y, SHAPES[setting], color=colour(method), markersize=5.5)
    if estimate.count > 1:
        axes.plot([estimate.low, estimate.high], [y, y], color=colour(method), linewidth=1.6)


def draw_delta(runs: Runs, path: Path) -> bool:
    """What δ does, from the DRPO runs at three values or more."""
    methods = [method for method in verdicts.DRPOS if method in runs.methods]
    if len(methods) < 3:
        return False
    outcomes = {
        "area under the curve": area,
        "mean |π - μ|": mean_of("prob_shift"),
        f"weight beyond |π - μ| = {SHIFT_BOUNDARY}": weight_beyond("shift"),
    }
    deltas = [METHODS[method].delta for method in methods]
    figure, panels = new_figure(1, len(outcomes), 11.6, 4.2)
    for axes, (label, outcome) in zip(panels[0], outcomes.items(), strict=True):
        for setting in runs.settings:
            _delta_line(axes, deltas, [runs.estimate(outcome, method, setting) for method in methods], setting)
        axes.set_xscale("log")
        axes.set_xticks(deltas, [f"{delta:g}" for delta in deltas])
        axes.minorticks_off()
        axes.set_xlabel("δ")
        axes.set_title(label, fontsize=11, loc="left")
        axes.grid(**GRID)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("What does δ do? Mean and 95 % interval over seeds", fontsize=12)
    save(figure, path)
    return True


def _delta_line(axes: Axes, deltas: Sequence[float], estimates: Sequence, setting: str) -> None:
    shade, dashes = SETTING_STYLES[setting]
    known = [(delta, e) for delta, e in zip(deltas, estimates, strict=True) if not math.isnan(e.mean)]
    axes.plot(
        [d for d, _ in known], [e.mean for _, e in known], color=shade, linestyle=dashes, marker="o", label=setting
    )
    for delta, estimate in known:
        axes.plot([delta, delta], [estimate.low, estimate.high], color=shade, linewidth=1.4)


FIGURES: dict[str, Callable[[Runs, Path], bool]] = {
    "curves_rollouts": draw_curves,
    "curves_others": draw_others,
    "curves_updates": draw_updates,
    "learning_rates": draw_rates,
    "settings": draw_settings,
    "boundaries": draw_boundaries,
    "delta": draw_delta,
    "table1": lambda runs, path: draw_surface(path),
    "table1_slices": lambda runs, path: draw_slices(path),
}
