"""The pictures of docs/stability.md, one for each question. A title is the question that its picture answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes

from benchmarks.harness.pictures import BLACK, BLUE, GREEN, GREY, OLIVE, ORANGE, PINK, SKY, VERMILION, frame, save
from benchmarks.harness.records import Record
from benchmarks.stability import answers
from benchmarks.stability.runs import Runs, load_all
from benchmarks.stability.settings import CONTROL, METHODS, RATES
from benchmarks.stability.statistics import mean_of
from benchmarks.stability.training import weight

# Losses clipped by the ratio have warm colours, and those bounded by |π - μ| cold ones.
COLOURS = {
    "PG": GREY, "PPO": ORANGE, "PPO clip-higher": OLIVE, "SPO": VERMILION, "CISPO": PINK, "DPPO-TV": GREEN,
    "DPPO-KL": BLACK, "DRPO δ=0.2": BLUE, "DRPO δ=12.5": SKY,
}  # fmt: skip
PANELS = ("64 updates", "4-bit head")
SLICES = (0.01, 0.1, 0.5, 0.9)  # the μ of a rare, an uncommon, a common and a nearly certain token


def draw_rare(runs: Runs, path: Path) -> None:
    """(a) Draw the mean distortion of rare and of common tokens by every method, in the two hardest settings."""
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 5.2), layout="constrained", sharey=True)
    methods = [method for method in METHODS if method != "PG"][::-1]
    for panel, setting in zip(axes, PANELS, strict=True):
        for kind, label, colour in (("rare", "μ < 0.01", VERMILION), ("common", "μ ≥ 0.01", BLUE)):
            found = runs.same[runs.same["setting"] == setting].groupby("method")[f"{kind}_distortion"].apply(mean_of)
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
        cells = {s: runs.by_seed("final", s) for s in runs.settings if s == CONTROL or word in s}
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


def _forest(found: pd.DataFrame, title: str, number: float, path: Path) -> None:
    """Draw differences with their intervals, a line for each setting and a colour for each pair, and ± the number."""
    settings = found["setting"].unique().tolist()[::-1]
    figure, axes = plt.subplots(figsize=(9.2, 3.6), layout="constrained")
    pairs = found[["a", "b"]].drop_duplicates().itertuples(index=False)
    for place, ((a, b), colour) in enumerate(zip(pairs, (BLUE, ORANGE), strict=False)):
        chosen = found[(found["a"] == a) & (found["b"] == b)].set_index("setting")["estimate"]
        _dots(axes, [chosen[s] for s in settings], colour, f"{a} minus {b}", -0.15 * place)
    axes.axvspan(-number, number, color="#dddddd", alpha=0.6, linewidth=0, label=f"± {number}")
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(settings)), settings)
    axes.set_xlabel("difference of the final held-out reward")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    frame(axes, "x")
    save(figure, path)


def draw_correction(runs: Runs, path: Path) -> None:
    title = "(c) Does the correction beyond the boundary help? 95 % intervals"
    _forest(answers.correction(runs), title, answers.SAME_NUMBER, path)


def draw_paper(runs: Runs, path: Path) -> None:
    _forest(answers.paper(runs), "(d) Is δ = 12.5 the policy gradient? 95 % intervals", answers.SAME_NUMBER, path)


def draw_deltas(runs: Runs, path: Path) -> None:
    """(e) Draw the final reward against δ, a line for each setting, and PG's beside it."""
    figure, axes = plt.subplots(figsize=(9.2, 4.8), layout="constrained")
    deltas = [METHODS[name].delta for name in answers.DELTAS]
    for (setting, table), colour in zip(
        answers.finals(runs).items(), (SKY, BLUE, BLACK, OLIVE, ORANGE, VERMILION), strict=False
    ):
        mean, low, high = np.array([mean_of(table[name]) for name in answers.DELTAS]).T
        axes.errorbar(
            deltas, mean, yerr=(mean - low, high - mean), fmt="o-", color=colour, label=setting, capsize=2, markersize=4
        )
        axes.plot([40], [table["PG"].mean()], "s", color=colour)
    axes.set_xscale("log")
    axes.set_xticks([*deltas, 40], [*(f"{delta:g}" for delta in deltas), "PG"])
    axes.minorticks_off()
    axes.set(xlabel="δ (log scale)", ylabel="final held-out reward")
    axes.set_title("(e) Which δ? Each at its best rate in each setting, 95 % intervals", loc="left", fontsize=11)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    frame(axes)
    save(figure, path)


def draw_slices(runs: Runs, path: Path) -> None:
    """Draw Table 1 of the paper: the gradient weight w of some methods along π. It needs no run."""
    figure, panels = plt.subplots(2, len(SLICES), figsize=(11.6, 6), layout="constrained", sharex="col", sharey=True)
    for row, sign in zip(panels, (1.0, -1.0), strict=True):
        row[0].set_ylabel(f"A {'>' if sign > 0 else '<'} 0: pushed {'up' if sign > 0 else 'down'}\nweight w")
        for axes, mu in zip(row, SLICES, strict=True):
            pi = torch.from_numpy(np.geomspace(mu / 30, 1, 1500) if mu < 0.2 else np.linspace(1e-3, 1, 1500))
            old, advantages = torch.full_like(pi, np.log(mu)), torch.full_like(pi, sign)
            for method in ("PG", "PPO", "SPO", "DPPO-TV", "DRPO δ=0.2", "DRPO δ=12.5"):
                axes.plot(pi, weight(METHODS[method], pi.log(), old, advantages), color=COLOURS[method], label=method)
            axes.axvline(mu, color=GREY, linewidth=0.8, linestyle=":")
            axes.set(xscale="log" if mu < 0.2 else "linear", ylim=(-1.6, 2.6))
            frame(axes)
    for axes, below, mu in zip(*panels, SLICES, strict=True):
        axes.set_title(f"μ = {mu}" + (" (log scale)" if mu < 0.2 else ""), fontsize=10, loc="left")
        below.set_xlabel("π, now (dotted: π = μ)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle("When does a rare token hit the boundary, and when a common one?", fontsize=12)
    save(figure, path)


PICTURES = {
    "rare": draw_rare, "rewards": draw_rewards, "rates": draw_rates, "correction": draw_correction, "paper": draw_paper,
    "deltas": draw_deltas, "slices": draw_slices,
}  # fmt: skip


def draw(records: Sequence[Record], folder: Path, stem: str) -> None:
    """Draw all pictures beside the runs."""
    runs = load_all(records)
    for name, picture in PICTURES.items():
        picture(runs, folder / f"{name}.png")
