"""The pictures of docs/stability.md. Each title is the question that the picture answers."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

from benchmarks.harness.pictures import BLUE, GREEN, GREY, ORANGE, SKY, VERMILION, frame, save
from benchmarks.stability.measures import gradient_weight
from benchmarks.stability.runs import Runs
from benchmarks.stability.settings import METHODS
from benchmarks.stability.statistics import bootstrap
from drpo_kernels import DPPO, DRPO

# Losses clipped by the ratio have warm colours, and those bounded by |π - μ| cold ones.
COLOURS = {
    "PG": GREY, "PPO": ORANGE, "SPO": VERMILION, "DPPO-TV": GREEN, "DRPO δ=0.2": BLUE, "DRPO δ=12.5": SKY,
}  # fmt: skip
BOUNDED = [name for name, objective in METHODS.items() if isinstance(objective, (DPPO, DRPO))]
SLICES = (0.01, 0.1, 0.5, 0.9)  # the μ of a rare, an uncommon, a common and a nearly certain token
SIGNS = {1: "A > 0: pushed up", -1: "A < 0: pushed down"}


def draw_curves(runs: Runs, path: Path) -> None:
    """Draw held-out accuracy against rollouts: settings across, and a row of panels for each group of methods."""
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


def draw_slices(runs: Runs, path: Path) -> None:
    """Draw Table 1 of the paper: the gradient weight w of each method along π. It needs no run."""
    size = (11.6, 6.0)
    figure, panels = plt.subplots(2, len(SLICES), figsize=size, layout="constrained", sharex="col", sharey=True)
    for row, (sign, label) in zip(panels, SIGNS.items(), strict=True):
        row[0].set_ylabel(f"{label}\nweight w")
        for axes, mu in zip(row, SLICES, strict=True):
            pi = torch.from_numpy(np.geomspace(mu / 30, 1, 1500) if mu < 0.2 else np.linspace(1e-3, 1, 1500))
            old, advantages = torch.full_like(pi, np.log(mu)), torch.full_like(pi, sign)
            for method, objective in METHODS.items():
                weights = gradient_weight(objective, pi.log(), old, advantages)
                axes.plot(pi, weights, color=COLOURS[method], label=method)
            axes.axvline(mu, color="#888888", linewidth=0.8, linestyle=":")
            axes.set_xscale("log" if mu < 0.2 else "linear")
            axes.set_ylim(-1.6, 2.6)
            frame(axes)
    for axes, below, mu in zip(*panels, SLICES, strict=True):
        axes.set_title(f"μ = {mu}" + (" (log scale)" if mu < 0.2 else ""), fontsize=10, loc="left")
        below.set_xlabel("π, now (dotted: π = μ)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle("When does a rare token hit the boundary, and when a common one?", fontsize=12)
    save(figure, path)
