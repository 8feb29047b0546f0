"""The demo's two figures: the run, and the weight w of each objective."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from drpo_kernels import Objective, Tokens
from drpo_kernels.demo.settings import OBJECTIVES

INK, MUTED, GRID = "#1b1f24", "#6b7280", "#e5e7eb"
BLUE, ORANGE, GREEN = "#2563eb", "#ea580c", "#059669"
OLD_PROBS = {0.05: "#fbbf24", 0.2: "#f97316", 0.5: "#db2777", 0.8: "#4c1d95"}  # μ, light to dark
DPI = 150


def plot_run(history: list[dict[str, float]], evaluations: tuple[dict, dict], title: str, path: Path) -> None:
    """Reward, entropy and |π - μ| over the steps of a run; `evaluations` were made before and after it."""
    figure = Figure(figsize=(12, 3.9), dpi=DPI, layout="constrained")
    reward, entropy, shift = figure.subplots(1, 3)
    steps = np.arange(1, len(history) + 1)

    def series(name: str) -> np.ndarray:
        return np.array([statistics[name] for statistics in history])

    _trend(reward, steps, series("reward"), BLUE, "rollouts")
    before_after = [evaluation["sampled"] for evaluation in evaluations]
    reward.plot([0, len(history)], before_after, "D", color=INK, markersize=6, label="held-out problems", zorder=4)
    reward.set_ylim(0, 1)
    reward.legend(frameon=False, loc="upper left", fontsize=9)
    label_axes(reward, "Reward", "share of right answers")

    _trend(entropy, steps, series("entropy"), ORANGE)
    entropy.set_ylim(bottom=0)
    label_axes(entropy, "Entropy", "nats per token")

    _trend(shift, steps, series("drpo/prob_shift_mean"), GREEN)
    shift.set_ylim(bottom=0)
    label_axes(shift, "How far the policy moves from its rollouts", "mean |π - μ|")
    for axes in (reward, entropy, shift):
        axes.set_xlabel("step", color=MUTED)
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path)


def gradient_weight(objective: Objective, probs: Tensor, old_prob: float, advantage: float) -> Tensor:
    """w = (dℓ/dlogπ) / (-A r) at each π, [N] float64, by autograd through the objective's formula."""
    logprobs = probs.double().log().requires_grad_()
    old_logprobs = torch.full_like(logprobs, old_prob).log()
    advantages = torch.full_like(logprobs, advantage)
    loss = objective.token_loss(Tokens(logprobs, old_logprobs, advantages)).sum()
    (slope,) = torch.autograd.grad(loss, logprobs)
    return -slope / (advantages * (logprobs.detach() - old_logprobs).exp())


def plot_weights(path: Path) -> None:
    """The weight w of each objective as a function of π for several μ, for A > 0 and A < 0."""
    bounds = {"ppo": ("ε", "clip_high"), "spo": ("ε", "epsilon"), "dppo": ("δ", "delta_high"), "drpo": ("δ", "delta")}
    shown = {
        f"{name.upper()} ({symbol} = {getattr(OBJECTIVES[name], field)})": OBJECTIVES[name]
        for name, (symbol, field) in bounds.items()
    }
    figure = Figure(figsize=(13, 6.4), dpi=DPI, layout=ConstrainedLayoutEngine(wspace=0.05))
    grid = figure.subplots(2, len(shown), sharex=True, sharey=True)
    probs = torch.linspace(1e-4, 1 - 1e-4, 4001, dtype=torch.float64)
    for row, advantage in zip(grid, (1.0, -1.0), strict=True):
        for axes, (name, objective) in zip(row, shown.items(), strict=True):
            axes.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
            for width, (old_prob, color) in zip((3.4, 2.8, 2.2, 1.6), OLD_PROBS.items(), strict=True):
                weight = gradient_weight(objective, probs, old_prob, advantage)
                axes.plot(probs, weight, color=color, linewidth=width, label=f"μ = {old_prob}", zorder=2)
                axes.plot(old_prob, 1, "o", color=color, markersize=6, markeredgecolor="white", zorder=3)
            label_axes(axes, f"{name}, A {'>' if advantage > 0 else '<'} 0", "")
    grid[0, 0].set(xlim=(0, 1), ylim=(-2.6, 3.6), xticks=np.linspace(0, 1, 6))
    for axes in grid[:, 0]:
        axes.set_ylabel("gradient weight w", color=MUTED)
    for axes in grid[1]:
        axes.set_xlabel("π, current probability of the token", color=MUTED)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        "How much of the gradient -A r each loss keeps (dots: π = μ, where every loss keeps all of it)",
        color=INK, fontsize=13, fontweight="bold", x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path)


def _trend(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str | None = None) -> None:
    """Plot the values in a faint colour under their centred moving average."""
    width = max(1, len(values) // 12)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    axes.plot(steps, np.convolve(padded, np.full(width, 1 / width), "valid"), color=color, linewidth=2.2, label=label)


def label_axes(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_ylabel(unit, color=MUTED)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
