"""The picture of the sparsity benchmark, drawn from its records alone by `python -m benchmarks.report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.harness.measure import ratio
from benchmarks.harness.pictures import GREY, SKY, STYLES, plt, save
from benchmarks.harness.records import Record
from benchmarks.sparsity.tables import DENSE, FLOOR, LABELS, SIZE, SPARSE, TIGHT, by_kind, of_part

# Each of these has a bar, with its colour and its name.
BARS = {
    SPARSE: (STYLES[DENSE][0], "sparse_grad=0.01"),
    TIGHT: (SKY, "sparse_grad=0.003"),
}


def draw(records: Sequence[Record], folder: Path, stem: str) -> None:
    """Write {stem}_speed.png into `folder`, where there is something to show."""
    timed = of_part(records, "speed")
    if any(record["median_s"] for record in timed):
        save(speed_figure(timed), folder / f"{stem}_speed.png", timed[:1])


def speed_figure(records: Sequence[Record]) -> Figure:
    """Draw a group of bars per kind of rows: time over that of the dense path, with a mark
    where the bare products lie.
    """
    groups = list(reversed(by_kind(records).items()))
    figure, axes = plt.subplots(figsize=(9.2, 1.4 + 0.62 * len(groups)), layout="constrained")
    height, names = 0.8 / len(BARS), []
    for y, (kind, methods) in enumerate(groups):
        found = {name: ratio(record, DENSE, list(methods.values())) for name, record in methods.items()}
        for place, (name, (colour, label)) in enumerate(BARS.items()):
            if found.get(name) is not None:
                at = y + height * (1 - place)
                axes.barh(at, found[name], height * 0.9, color=colour, label=None if y else label)
                axes.annotate(
                    f"{found[name]:.2f}", (found[name], at), (3, 0), textcoords="offset points", va="center", fontsize=8
                )
        if found.get(FLOOR) is not None:
            style = {"color": GREY, "linewidth": 2, "linestyle": ":", "label": None if y else "three bare GEMMs"}
            axes.plot([found[FLOOR]] * 2, [y - 0.42, y + 0.42], **style)
        median, most = methods[SPARSE]["entropy_quantiles"][:2]
        names.append(f"{LABELS[kind]}\nmedian {median:.2g}, 80 % below {most:.2g} nat")
    axes.set_yticks(range(len(groups)), names, fontsize=9)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_xlim(0, None)
    axes.set_xlabel("time of forward and backward, over that of the exact dense path")
    size = SIZE.format(**records[0]["shape"])
    axes.set_title(f"What does a sparse gradient save? {size}{records[0]['dtype']}", fontsize=12, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure
