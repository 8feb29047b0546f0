"""The picture of the rollout engines, drawn from the records alone by `python -m benchmarks.report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.harness.pictures import BLUE, GREEN, VERMILION, frame, plt, save
from benchmarks.harness.recording import ENGINES
from benchmarks.harness.records import Record
from benchmarks.precision.tables import P99, of_kind

COLOURS = dict(zip(ENGINES, (BLUE, GREEN, VERMILION), strict=True))
TICKS = {1e-5: "1e-5", 1e-4: "1e-4", 1e-3: "0.001", 1e-2: "0.01", 0.1: "0.1", 0.5: "0.5", 0.9: "0.9", 0.99: "0.99"}
PANELS = {
    "ratio": ("Rare tokens have the ratios furthest from 1 ...", "|r - 1|"),
    "prob_shift": ("... and the probabilities that move least", "|π - μ|"),
}


def draw(records: Sequence[Record], folder: Path, stem: str) -> None:
    """Write engines.png into `folder`, where engines were measured."""
    found = of_kind(records, "engine")
    if found:
        save(engines_figure(found), folder / "engines.png", of_kind(records, "run"))


def engines_figure(records: Sequence[Record]) -> Figure:
    """Draw the median and the 99th percentile of both distances over the token's probability, a colour per engine."""
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 4.6), layout="constrained")
    for axes, (quantity, (title, name)) in zip(panels, PANELS.items(), strict=True):
        for record in records:
            colour, bins = COLOURS[record["engine"]], record["bins"]
            at = [_middle(b["from"], b["to"]) for b in bins]
            axes.plot(at, [b[quantity][P99] for b in bins], "o-", color=colour, label=ENGINES[record["engine"]])
            axes.plot(at, [b[quantity][0] for b in bins], "o:", color=colour, markersize=3, linewidth=1.2)
        axes.set(xscale="logit", yscale="log")
        axes.set_xticks(*zip(*TICKS.items(), strict=True))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="probability μ of the sampled token", ylabel=name)
        axes.set_title(title, fontsize=12, loc="left")
        frame(axes)
    panels[0].legend(frameon=False, fontsize=9, title="solid: 99th percentile, dotted: median", title_fontsize=9)
    figure.suptitle("SmolLM2-135M: rollout engines against the float32 trainer, same weights", fontsize=12)
    return figure


def _middle(low: float, high: float) -> float:
    """Return where a range of probabilities is drawn: its geometric mean."""
    return (max(low, high / 10) * min(high, 1.0)) ** 0.5
