"""This is what all pictures share: matplotlib without a window, one palette, the frame of the axes, small PNG files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from PIL import Image

from benchmarks.harness.records import Record

DPI = 110
# The colours of Okabe and Ito can be told apart by readers who do not see red and green.
BLUE, ORANGE, GREEN, VERMILION, PINK, BLACK = COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#000000",
)  # fmt: skip
SKY, OLIVE = "#56b4e9", "#b0a000"
GREY, LIGHT_GREY, PALE = "#555555", "#777777", "#e0e0e0"  # text, what bounds the methods, grids
# A method of the speed benchmark has the same colour and marker in every picture.
STYLES = {
    "linear_policy_loss": (BLUE, "o"),
    "linear_policy_loss_frozen_head": (SKY, "v"),
    "linear_token_logprobs": (GREEN, "^"),
    "eager": (VERMILION, "s"),
    "trl": (ORANGE, "D"),
    "liger_scaled_sm90": (PINK, "P"),
    "cce": (OLIVE, "X"),
    "gemms_whole": (LIGHT_GREY, "."),
}
LABEL_STEP = 0.055  # distance between two labels at the ends of lines, in heights of the axes


def new_axes(title: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(9.2, 4.8), layout="constrained")
    axes.set_title(title, fontsize=12, loc="left", wrap=True)
    frame(axes)
    return figure, axes


def frame(axes: Axes, grid: str = "both") -> None:
    """Draw a pale grid along "x", "y" or both, and no line above and to the right."""
    axes.grid(axis=grid, color=PALE, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def finish(axes: Axes, tokens: Sequence[int], ylabel: str) -> None:
    """Make an x axis of tokens, and put each line's name at its right end, moved apart where names would overlap."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens T in the batch (log scale)")
    axes.set_ylabel(ylabel)
    axes.figure.canvas.draw()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [(to_axes.transform(line.get_xydata()[-1])[1], line) for line in axes.get_lines()]
    height = float("-inf")
    for end, line in sorted(ends, key=lambda pair: pair[0]):
        height = max(end, height + LABEL_STEP)
        axes.annotate(line.get_label(), (1.01, height), xycoords="axes fraction", va="center", fontsize=9.5,
                      color=line.get_color(), annotation_clip=False)  # fmt: skip


def save(figure: Figure, path: Path, records: Sequence[Record] = ()) -> None:
    """Write a PNG file. Below the picture stand the device, commits and date of the records that were drawn."""
    if records:
        figure.supxlabel(_source(records), fontsize=8, color=GREY, x=0.99, ha="right")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=DPI)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(picture) as image:  # a palette takes a third of the bytes
        image.convert("RGB").quantize(255).save(path, optimize=True)


def _source(records: Sequence[Record]) -> str:
    first, device = records[0], records[0]["device"]
    commits = ((r["commit"] or "unknown")[:12] + (" with changes" if r["dirty"] else "") for r in records)
    samples = f"; median of {len(first['seconds'])} samples" if first.get("seconds") else ""
    commit = ", ".join(dict.fromkeys(commits))
    return f"{device.get('gpu', device['cpu'])}, commit {commit}, {first['date'][:10]}{samples}"
