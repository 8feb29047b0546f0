"""The pictures of the sparsity benchmark, drawn from its records alone by `python -m benchmarks.report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.harness.measure import ratio
from benchmarks.harness.pictures import GREY, SKY, STYLES, new_axes, plt, save
from benchmarks.harness.records import Record
from benchmarks.sparsity.tables import DENSE, FLOOR, LABELS, SIZE, SPARSE, TIGHT, by_kind, of_part

# What has a bar: its colour and its name.
BARS = {
    SPARSE: (STYLES[DENSE][0], "sparse_grad=0.01"),
    TIGHT: (SKY, "sparse_grad=0.003"),
    "cce": (STYLES["cce"][0], "cut-cross-entropy"),
}


def draw(records: Sequence[Record], folder: Path, stem: str) -> None:
    """Write {stem}_speed.png and {stem}_error.png into `folder`, each where there is something to show."""
    timed, studied = of_part(records, "speed"), of_part(records, "regimes")
    if any(record["median_s"] for record in timed):
        save(speed_figure(timed), folder / f"{stem}_speed.png", timed[:1])
    if studied:
        save(error_figure(studied), folder / f"{stem}_error.png", studied[:1])


def speed_figure(records: Sequence[Record]) -> Figure:
    """A group of bars per kind of rows: time over the dense path's; a mark where the bare products lie."""
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


def error_figure(records: Sequence[Record]) -> Figure:
    """float32 inputs: the larger error of dX and dW, over what rounding dlogits to bf16 makes of it, against τ."""
    title = "How far off is a sparse gradient? Regimes of the precision study with sparse rows, float32"
    figure, axes = new_axes(title)
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2])
    ends = []
    for record in (record for record in records if record["dtype"] == "float32"):
        points = [
            (float(tolerance), max(found["errors"][name] / record["rounded"][name] for name in record["rounded"]))
            for tolerance, found in record["over_tolerance"].items()
            if found["drpo/sparse_share"] > 0
        ]
        if points:
            (line,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.5)
            ends.append((points[-1][1], line, record["label"]))
    axes.axhline(1, color=GREY, linewidth=1)
    axes.axhline(2, color=GREY, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_xlabel("τ, the share of 1 - p_y that a row may leave out")
    axes.set_ylabel("error of the gradient, over that of bf16 dlogits")
    for i, (_, line, label) in enumerate(sorted(ends, key=lambda end: -end[0])):
        place = (1.01, 1 - 0.062 * i)
        axes.annotate(label, place, xycoords="axes fraction", va="top", fontsize=9, color=line.get_color())
    return figure
