"""The paper's Table 1 as pictures: the gradient weight w of each method over (μ, π) and the sign of A.

Straight from `weights.gradient_weight`, so from the formulas that train.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes

from benchmarks.harness.pictures import save
from benchmarks.stability.ablations import DRPOWithoutAbsA
from benchmarks.stability.drawing import colour, new_figure
from benchmarks.stability.settings import CORE_METHODS, METHODS
from benchmarks.stability.weights import gradient_weight
from drpo_kernels import Objective

POINTS = 240  # a side of a picture
LIMIT = 2.0  # of the colours
SMALL_ADVANTAGE = 0.25  # the size of A shows in one method only, whose weight depends on it
SLICES = (0.01, 0.1, 0.5, 0.9)
WEIGHTS = (-1.6, 2.6)  # of a slice
SIGNS = {1: "A > 0: pushed up", -1: "A < 0: pushed down"}
PICTURED = ("PPO", "SPO", "DPPO-TV", "DPPO-KL", "DRPO δ=0.2", "DRPO δ=12.5", "Mask-DRPO", "DRPO without |A|")


def weights(objective: Objective, mu: np.ndarray, pi: np.ndarray, advantage: float) -> np.ndarray:
    """w, of the shape that μ and π broadcast to, in float64."""
    old, new = np.broadcast_arrays(mu, pi)
    flat = [torch.from_numpy(np.log(values)).flatten() for values in (new, old)]
    advantages = torch.full_like(flat[0], advantage)
    return gradient_weight(objective, *flat, advantages).reshape(new.shape).numpy()


def draw_surface(path: Path) -> bool:
    """A colour map over the unit square per method and sign, two rows of methods."""
    columns = len(PICTURED) // 2
    figure, panels = new_figure(4, columns, 10.6, 9.6, sharex=True, sharey=True)
    side = (np.arange(POINTS) + 0.5) / POINTS
    for i, method in enumerate(PICTURED):
        for j, (sign, label) in enumerate(SIGNS.items()):
            axes = panels[2 * (i // columns) + j][i % columns]
            image = _panel(axes, METHODS[method], sign, side)
            if i % columns == 0:
                axes.set_ylabel(f"{label}\n\nπ, now")
        small = isinstance(METHODS[method], DRPOWithoutAbsA)
        title = f"{method} at |A| = {SMALL_ADVANTAGE:g}" if small else method
        panels[2 * (i // columns)][i % columns].set_title(title, fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("μ, when sampled")
    bar = figure.colorbar(image, ax=panels, pad=0.01, extend="both", ticks=(-2, -1, 0, 1, 2), aspect=40)
    bar.ax.set_yticklabels(["-2", "-1 pushed back", "0 dropped", "1 left alone", "2"])
    figure.suptitle("How much of a token's policy gradient does each loss keep? Black: the boundary", fontsize=12)
    save(figure, path)
    return True


def _panel(axes: Axes, objective: Objective, sign: int, side: np.ndarray):
    advantage = sign * (SMALL_ADVANTAGE if isinstance(objective, DRPOWithoutAbsA) else 1.0)
    values = weights(objective, side[None, :], side[:, None], advantage)
    image = axes.imshow(values, origin="lower", extent=(0, 1, 0, 1), cmap="PuOr", vmin=-LIMIT, vmax=LIMIT)
    if values.min() < 0.5:  # just above 0: where a mask drops and where a weight crosses zero
        axes.contour(side, side, values, levels=[1e-3], colors="black", linewidths=1.0)
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xticks((0, 0.5, 1), ("0", "½", "1"))
    axes.set_yticks((0, 0.5, 1), ("0", "½", "1"))
    return image


def draw_slices(path: Path) -> bool:
    """The same along π for a rare, an uncommon, a common and a nearly certain token."""
    figure, panels = new_figure(2, len(SLICES), 11.6, 6.0, sharex="col", sharey=True)
    for axes_row, (sign, label) in zip(panels, SIGNS.items(), strict=True):
        for axes, mu in zip(axes_row, SLICES, strict=True):
            pi = np.geomspace(mu / 30, 1, 1500) if mu < 0.2 else np.linspace(1e-3, 1, 1500)
            for method in CORE_METHODS:
                values = weights(METHODS[method], np.full_like(pi, mu), pi, float(sign))
                axes.plot(pi, values, color=colour(method), linewidth=1.8, label=method)
            axes.axvline(mu, color="#888888", linewidth=0.8, linestyle=":")
            if mu < 0.2:
                axes.set_xscale("log")
            axes.set_ylim(*WEIGHTS)
            axes.grid(color="#e8e8e8", linewidth=0.6)
        axes_row[0].set_ylabel(f"{label}\nweight w")
    for axes, mu in zip(panels[0], SLICES, strict=True):
        axes.set_title(f"μ = {mu}" + (" (log scale)" if mu < 0.2 else ""), fontsize=10, loc="left")
    for axes in panels[1]:
        axes.set_xlabel("π, now (dotted: π = μ)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle("When does a rare token hit the boundary, and when a common one?", fontsize=12)
    save(figure, path)
    return True
