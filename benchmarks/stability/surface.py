"""The paper's Table 1 as pictures: the gradient weight w of each method over (μ, π) and the sign of A.

The weights are those of `weights.gradient_weight`, and so of the formulas that train.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from benchmarks.harness.pictures import frame, save
from benchmarks.stability.ablations import DRPOWithoutAbsA
from benchmarks.stability.figures import COLOURS
from benchmarks.stability.runs import Runs
from benchmarks.stability.settings import CORE_METHODS, METHODS
from benchmarks.stability.weights import gradient_weight
from drpo_kernels import Objective

POINTS = 240  # along a side of a picture
SMALL_ADVANTAGE = 0.25  # for the one method whose weight depends on the size of A
SLICES = (0.01, 0.1, 0.5, 0.9)
SIGNS = {1: "A > 0: pushed up", -1: "A < 0: pushed down"}
PICTURED = ("PPO", "SPO", "DPPO-TV", "DPPO-KL", "DRPO δ=0.2", "DRPO δ=12.5", "Mask-DRPO", "DRPO without |A|")


def weights(objective: Objective, mu: np.ndarray, pi: np.ndarray, advantage: float) -> np.ndarray:
    """w in float64, in the shape to which μ and π broadcast."""
    old, new = np.broadcast_arrays(mu, pi)
    flat = [torch.from_numpy(np.log(values)).flatten() for values in (new, old)]
    return gradient_weight(objective, *flat, torch.full_like(flat[0], advantage)).reshape(new.shape).numpy()


def draw_surface(runs: Runs, path: Path) -> None:
    """A colour map over the unit square for each method and sign, in two rows of methods. It needs no run."""
    columns = len(PICTURED) // 2
    figure, panels = plt.subplots(4, columns, figsize=(10.6, 9.6), layout="constrained", sharex=True, sharey=True)
    for i, method in enumerate(PICTURED):
        small = isinstance(METHODS[method], DRPOWithoutAbsA)
        for j, (sign, label) in enumerate(SIGNS.items()):
            axes = panels[2 * (i // columns) + j][i % columns]
            image = _panel(axes, METHODS[method], sign * (SMALL_ADVANTAGE if small else 1.0))
            if i % columns == 0:
                axes.set_ylabel(f"{label}\n\nπ, now")
        title = f"{method} at |A| = {SMALL_ADVANTAGE:g}" if small else method
        panels[2 * (i // columns)][i % columns].set_title(title, fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("μ, when sampled")
    bar = figure.colorbar(image, ax=panels, pad=0.01, extend="both", ticks=(-2, -1, 0, 1, 2), aspect=40)
    bar.ax.set_yticklabels(["-2", "-1 pushed back", "0 dropped", "1 left alone", "2"])
    figure.suptitle("How much of a token's policy gradient does each loss keep? Black: the boundary", fontsize=12)
    save(figure, path)


def _panel(axes: Axes, objective: Objective, advantage: float) -> AxesImage:
    side = (np.arange(POINTS) + 0.5) / POINTS
    values = weights(objective, side[None, :], side[:, None], advantage)
    image = axes.imshow(values, origin="lower", extent=(0, 1, 0, 1), cmap="PuOr", vmin=-2, vmax=2)
    if values.min() < 0.5:  # The level just above 0 is where a mask drops a token and where a weight crosses zero.
        axes.contour(side, side, values, levels=[1e-3], colors="black", linewidths=1.0)
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xticks((0, 0.5, 1), ("0", "½", "1"))
    axes.set_yticks((0, 0.5, 1), ("0", "½", "1"))
    return image


def draw_slices(runs: Runs, path: Path) -> None:
    """The same along π for a rare, an uncommon, a common and a nearly certain token."""
    size = (11.6, 6.0)
    figure, panels = plt.subplots(2, len(SLICES), figsize=size, layout="constrained", sharex="col", sharey=True)
    for row, (sign, label) in zip(panels, SIGNS.items(), strict=True):
        row[0].set_ylabel(f"{label}\nweight w")
        for axes, mu in zip(row, SLICES, strict=True):
            pi = np.geomspace(mu / 30, 1, 1500) if mu < 0.2 else np.linspace(1e-3, 1, 1500)
            for method in CORE_METHODS:
                axes.plot(pi, weights(METHODS[method], mu, pi, sign), color=COLOURS[method], label=method)
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
