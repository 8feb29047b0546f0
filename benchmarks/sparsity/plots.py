"""The pictures of the sparsity benchmark, drawn from its records alone by `python -m benchmarks.report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.harness.measure import ratio
from benchmarks.harness.pictures import GREY, SKY, STYLES, new_axes, plt, save
from benchmarks.harness.records import Record
from benchmarks.sparsity.tables import DENSE, FLOOR, LABELS, SPARSE, TIGHT, by_kind, of_part

COLOURS = {SPARSE: STYLES[DENSE][0], TIGHT: SKY, "cce": STYLES["cce"][0]}
NAMES = {SPARSE: "sparse_grad=0.01", TIGHT: "sparse_grad=0.003", "cce": "cut-cross-entropy"}


def draw(records: Sequence[Record], folder: Path, stem: str) -> None:
    """Write {stem}_speed.png and {stem}_error.png into `folder`, each where there is something to show."""
    timed, studied = of_part(records, "speed"), of_part(records, "regimes")
    if any(record["median_s"] for record in timed):
        save(speed_figure(timed), folder / f"{stem}_speed.png", timed[:1])
    if studied:
        save(error_figure(studied), folder / f"{stem}_error.png", studied[:1])


def speed_figure(records: Sequence[Record]) -> Figure:
    """A group of bars per kind of rows: time over the dense path's; a mark where the bare products lie."""
    groups = by_kind(records)
    figure, axes = plt.subplots(figsize=(9.2, 1.4 + 0.62 * len(groups)), layout="constrained")
    height = 0.8 / len(COLOURS)
    for y, methods in enumerate(reversed(groups.values())):
        group = list(methods.values())
        for place, name in enumerate(COLOURS):
            value = ratio(methods[name], DENSE, group) if name in methods else None
            if value is not None:
                at = y + height * (1 - place)
                axes.barh(at, value, height * 0.9, color=COLOURS[name], label=NAMES[name] if y == 0 else None)
                axes.annotate(f"{value:.2f}", (value, at), (3, 0), textcoords="offset points", va="center", fontsize=8)
        floor = ratio(methods[FLOOR], DENSE, group) if FLOOR in methods else None
        if floor is not None:
            label = "three bare GEMMs" if y == 0 else None
            axes.plot([floor, floor], [y - 0.42, y + 0.42], color=GREY, linewidth=2, linestyle=":", label=label)
    names = [f"{LABELS[kind]}\n{_entropies(methods[SPARSE])}" for kind, methods in reversed(groups.items())]
    axes.set_yticks(range(len(groups)), names, fontsize=9)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_xlim(0, None)
    axes.set_xlabel("time of forward and backward, over that of the exact dense path")
    shape = records[0]["shape"]
    size = "T={tokens} H={hidden} V={vocab}".format(**shape)
    axes.set_title(f"What does a sparse gradient save? {size}, {records[0]['dtype']}", fontsize=12, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def _entropies(record: Record) -> str:
    median, most = record["entropy_quantiles"][:2]
    return f"median {median:.2g}, 80 % below {most:.2g} nat"


def error_figure(records: Sequence[Record]) -> Figure:
    """float32 inputs: the larger error of dX and dW, over what rounding dlogits to bf16 makes of it, against τ."""
    title = "How far off is a sparse gradient? Regimes of the precision study with sparse rows, float32"
    figure, axes = new_axes(title)
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2])
    ends = []
    for record in (record for record in records if record["dtype"] == "float32"):
        over = record["over_tolerance"].items()
        points = [
            (float(tolerance), max(found["errors"][name] / record["rounded"][name] for name in record["rounded"]))
            for tolerance, found in over
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
    place = 1.0
    for _, line, label in sorted(ends, key=lambda end: -end[0]):
        axes.annotate(label, (1.01, place), xycoords="axes fraction", va="top", fontsize=9, color=line.get_color())
        place -= 0.062
    return figure
