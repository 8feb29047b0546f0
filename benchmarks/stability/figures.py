"""The pictures of docs/stability.md, one for each question. A title is the question that its picture answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.harness.pictures import BLACK, BLUE, GREEN, GREY, OLIVE, ORANGE, PINK, SKY, VERMILION, frame, save
from benchmarks.harness.records import Record
from benchmarks.stability import answers
from benchmarks.stability.runs import Runs, by_seed, load_all
from benchmarks.stability.settings import CONTROL, METHODS, RATES
from benchmarks.stability.statistics import mean_of

# Losses clipped by the ratio have warm colours, and those bounded by the divergence cold ones.
COLOURS = {
    "PG": GREY, "PPO": ORANGE, "PPO clip-higher": OLIVE, "SPO": VERMILION, "CISPO": PINK, "DPPO-TV": GREEN,
    "DPPO-KL": BLACK, "DRPO δ=0.2": BLUE, "DRPO δ=12.5": SKY,
}  # fmt: skip
PANELS = ("64 updates", "4-bit head")


def draw_rare(runs: Runs, path: Path) -> None:
    """(a) Draw the mean distortion of rare and of common tokens by every method, in the two hardest settings."""
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 5.2), layout="constrained", sharey=True)
    methods = [method for method in METHODS if method in set(runs.same["method"])][::-1]
    for panel, setting in zip(axes, PANELS, strict=True):
        for kind, label, colour in (("rare", "μ < 0.01", VERMILION), ("common", "μ ≥ 0.01", BLUE)):
            found = runs.same[runs.same["setting"] == setting].groupby("method")[kind].apply(mean_of)
            _dots(panel, [found[method] for method in methods], colour, label)
        panel.set_yticks(range(len(methods)), methods)
        panel.set(title=setting, xlim=(-0.02, 1.02), xlabel="mean distortion of the gradient, min(|w - 1|, 1)")
        frame(panel, "x")
    axes[1].legend(loc="lower right")
    figure.suptitle("(a) Which losses distort the gradient of rare tokens? The same tokens for all, 95 % intervals")
    save(figure, path)


def _dots(axes: Axes, estimates, colour: str, label: str | None = None, offset: float = 0.0) -> None:
    mean, low, high = np.array(estimates, dtype=float).T
    y = np.arange(len(mean)) + offset
    axes.errorbar(mean, y, xerr=(mean - low, high - mean), fmt="o", color=colour, label=label, capsize=2, markersize=5)


def draw_rewards(runs: Runs, path: Path) -> None:
    """(b) Draw the final reward at each method's best rate, against staleness and against mismatch."""
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 5), layout="constrained", sharey=True)
    for panel, word in zip(axes, ("updates", "head"), strict=True):
        cells = {s: by_seed(runs.comparison, s, "final") for s in runs.settings if s == CONTROL or word in s}
        for method in COLOURS:
            means = [mean_of(table["PG" if s == CONTROL else method]) for s, table in cells.items()]
            mean, low, high = np.array(means).T
            panel.plot(range(len(cells)), mean, "o-", color=COLOURS[method], label=method, markersize=4)
            panel.fill_between(range(len(cells)), low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
        panel.set_xticks(range(len(cells)), cells)
        frame(panel)
    axes[0].set(ylabel="final held-out reward", title="staleness: updates for each rollout batch")
    axes[1].set(title="mismatch: the head that samples")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.suptitle("(b) Who loses reward as staleness and mismatch grow? Each method at its best rate, 95 % intervals")
    save(figure, path)


def draw_rates(runs: Runs, path: Path) -> None:
    """(b) Draw the final reward of the sweep against the learning rate."""
    figure, axes = plt.subplots(2, 3, figsize=(11.5, 6.4), layout="constrained", sharex=True, sharey=True)
    for panel, setting in zip(axes.flat, answers.off_policy(runs), strict=True):
        means = runs.sweep[runs.sweep["setting"] == setting].pivot_table(index="rate", columns="method", values="final")
        for method in COLOURS:
            panel.plot(means.index, means[method], "o-", color=COLOURS[method], label=method, markersize=3)
        panel.set(title=setting, xscale="log")
        panel.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        panel.minorticks_off()
        frame(panel)
    figure.supxlabel("learning rate")
    figure.supylabel("final held-out reward")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle("(b) How wide is the range of rates that work?")
    save(figure, path)


def _forest(runs: Runs, title: str, pairs: Sequence[tuple[str, str]], path: Path) -> None:
    """Draw differences with their intervals, and ± the deciding number: as registered, and by the amendment."""
    panels = {"each method at its best rate": answers.best_rates(runs, pairs)}
    panels |= {"the same rate (the amendment)": answers.same_rate(runs, pairs)} if len(runs.amended) else {}
    figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels) + 2, 4), layout="constrained", squeeze=False)
    for panel, (name, found) in zip(axes[0], panels.items(), strict=True):
        settings = found["setting"].unique().tolist()[::-1]
        for place, ((a, b), colour) in enumerate(zip(pairs, (BLUE, ORANGE)[: len(pairs)], strict=True)):
            chosen = found[(found["a"] == a) & (found["b"] == b)].set_index("setting")["estimate"]
            _dots(panel, [chosen[s] for s in settings], colour, f"{a} minus {b}", -0.15 * place)
        panel.axvspan(-answers.SAME_NUMBER, answers.SAME_NUMBER, color="#dddddd", alpha=0.6, linewidth=0)
        panel.axvline(0, color=GREY, linewidth=0.8)
        panel.set_yticks(range(len(settings)), settings)
        panel.set(title=name, xlabel="difference of the final held-out reward")
        frame(panel, "x")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"{title} 95 % intervals; shaded: ± {answers.SAME_NUMBER}")
    save(figure, path)


def draw_correction(runs: Runs, path: Path) -> None:
    _forest(runs, "(c) Does the correction beyond the boundary help?", answers.CORRECTION_PAIRS, path)


def draw_paper(runs: Runs, path: Path) -> None:
    _forest(runs, "(d) Is δ = 12.5 the policy gradient?", answers.PAPER_PAIRS, path)


def draw_deltas(runs: Runs, path: Path) -> None:
    """(e) Draw the final reward against δ, a line for each setting, and PG's beside it."""
    figure, axes = plt.subplots(figsize=(9.2, 4.8), layout="constrained")
    deltas = [METHODS[name].delta for name in answers.DELTAS]
    colours = (SKY, BLUE, BLACK, OLIVE, ORANGE, VERMILION)
    for (setting, table), colour in zip(answers.finals(runs).items(), colours, strict=True):
        mean, low, high = np.array([mean_of(table[name]) for name in answers.DELTAS]).T
        style = {"color": colour, "label": setting, "capsize": 2, "markersize": 4}
        axes.errorbar(deltas, mean, yerr=(mean - low, high - mean), fmt="o-", **style)
        axes.plot([40], [table["PG"].mean()], "s", color=colour)
    axes.set_xscale("log")
    axes.set_xticks([*deltas, 40], [*(f"{delta:g}" for delta in deltas), "PG"])
    axes.minorticks_off()
    axes.set(xlabel="δ (log scale)", ylabel="final held-out reward")
    axes.set_title("(e) Which δ? Each at its best rate in each setting, 95 % intervals", loc="left", fontsize=11)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    frame(axes)
    save(figure, path)


PICTURES = {
    "rare": draw_rare, "rewards": draw_rewards, "rates": draw_rates, "correction": draw_correction, "paper": draw_paper,
    "deltas": draw_deltas,
}  # fmt: skip


def draw(records: Sequence[Record], folder: Path, stem: str) -> None:
    """Draw all pictures beside the runs."""
    runs = load_all(records)
    for name, picture in PICTURES.items():
        picture(runs, folder / f"{name}.png")
