"""What the figures share: one colour per method everywhere, labels at the ends of lines, small files."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.pictures import BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILION, plt

# losses clipped by the ratio are warm, those bounded by |π - μ| cold
COLOURS = {
    "PG": GREY,
    "PPO": ORANGE,
    "PPO clip-higher": "#a06800",
    "SPO": VERMILION,
    "DPPO-TV": GREEN,
    "DPPO-KL": "#00634a",
    "DRPO δ=0.05": "#08306b",
    "DRPO δ=0.2": BLUE,
    "DRPO δ=1": "#4a6fe3",
    "DRPO δ=12.5": SKY,
    "DRPO without |A|": PINK,
    "Mask-DRPO": "#7b3294",
}
MARKERS = dict(zip(COLOURS, "osPDv<d^XhP*", strict=True))


def colour(method: str) -> str:
    return COLOURS[method]


def new_figure(rows: int, columns: int, width: float, height: float, **shared) -> tuple[Figure, Sequence]:
    """-> (figure, panels [rows, columns]); sizes in inches."""
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **shared)


def end_labels(axes: Axes, x: float, ends: Sequence[tuple[float, str]], size: float = 9) -> None:
    """A method's name beside the end (y, method) of its line, moved apart where names would overlap.

    The figure must be laid out (`draw_without_rendering`): the distance between lines of text is known only then.
    """
    bottom, top = axes.get_ylim()
    gap = (top - bottom) * size * 1.3 / 72 / (axes.get_window_extent().height / axes.figure.dpi)
    ordered = sorted(ends)
    for height, (_, method) in zip(spread([y for y, _ in ordered], gap), ordered, strict=True):
        axes.annotate(method, (x, min(height, top)), xytext=(5, 0), textcoords="offset points", color=colour(method),
                      fontsize=size, va="center", annotation_clip=False)  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Sorted heights, at least `gap` apart: those too close are stacked around their mean."""
    stacks: list[list[float]] = []
    for height in heights:
        stacks.append([height])
        while len(stacks) > 1 and _stacked(stacks[-1], gap)[0] < _stacked(stacks[-2], gap)[-1] + gap:
            stacks[-2:] = [stacks[-2] + stacks[-1]]
    return [height for stack in stacks for height in _stacked(stack, gap)]


def _stacked(stack: Sequence[float], gap: float) -> list[float]:
    lowest = sum(stack) / len(stack) - gap * (len(stack) - 1) / 2
    return [lowest + gap * i for i in range(len(stack))]
