"""The picture of docs/roofline.md: where the predicted time of every method that is predicted goes, and the time that
was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.pictures import BLACK, COLOURS, frame, new_axes, save
from benchmarks.harness.records import Record
from benchmarks.roofline.ours import METHODS
from benchmarks.roofline.predict import Prediction, compared
from benchmarks.roofline.tables import MODEL, TOKENS

# Each kind of work has the names of its stages.
KINDS = {
    "logits (2F)": ("logits",),
    "logits again (2F)": ("logits again",),
    "dX and dW (2F each)": ("dX", "dW"),
    "row kernels, softmax": (
        "rows", "rows again", "statistics", "gradient", "log_softmax", "gather backward", "log_softmax backward",
    ),
}  # fmt: skip
REST = "casts, sums, scaling, launches"


def draw(records: Sequence[Record], folder: Path, stem: str) -> None:
    """Write roofline.png into `folder`, if there is a measurement of the case that is predicted for every chip."""
    rows = {
        row.prediction.method: row
        for row in compared(records)
        if (row.record["workload"], row.record["shape"]["tokens"], row.record["active_share"]) == (MODEL, TOKENS, 1)
        and row.record["takes"] == "hidden"
    }
    if not rows:
        return
    ordered = [rows[name] for name in METHODS if name in rows]
    shape = "T={tokens} H={hidden} V={vocab}".format(**ordered[0].record["shape"])
    figure, axes = new_axes(f"Predicted and measured on an {ordered[0].prediction.chip.name}: {MODEL}, {shape}, bf16")
    for y, row in enumerate(ordered):
        _stack(axes, y, row.prediction)
        label = "measured" if y == 0 else None
        axes.plot(row.record["median_s"] * 1e3, y, linestyle="", marker="D", color=BLACK, markersize=5, label=label)
    frame(axes, "x")
    axes.set_axisbelow(True)
    axes.set_xlim(0, None)
    labels = [METHODS[row.prediction.method].label.replace("`", "") for row in ordered]
    axes.set_yticks(range(len(ordered)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("ms (bar: predicted, everything overlaps that can; line: nothing does; diamond: measured)")
    axes.legend(fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=4)
    save(figure, folder / "roofline.png", [{**row.record, "seconds": None} for row in ordered])


def _stack(axes, y: int, found: Prediction) -> None:
    """Draw the least times by kind of work, and a line to the most."""
    start = 0.0
    for kind, colour in zip((*KINDS, REST), COLOURS, strict=False):
        width = sum(stage.least for stage in found.stages if _kind(stage.name) == kind) * 1e3
        axes.barh(y, width, left=start, color=colour, height=0.62, label=kind if y == 0 else None, alpha=0.75)
        start += width
    axes.plot([start, found.most * 1e3], [y, y], color=BLACK, linewidth=1.2)


def _kind(name: str) -> str:
    return next((kind for kind, names in KINDS.items() if name in names), REST)
