"""The precision study as a GPU's run leaves it: what `benchmarks.report` writes into docs/precision.md."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.blocks import NOT_YET, Block, origin
from benchmarks.harness.records import Record
from benchmarks.harness.tables import two_figures
from benchmarks.precision.tables import BARS, labels_of, of_kind, render_bars, render_mismatch


def render(records: Sequence[Record]) -> str:
    """The bars of the default path, and the mismatch with an engine that has an fp8 head."""
    bars, labels = of_kind(records, "bar"), labels_of(records)
    if not bars:
        return NOT_YET
    done = {record["regime"] for record in bars}
    cut = [label for name, label in labels.items() if name not in done]
    return "\n\n".join([
        f"Of the default path, {_missed(bars, labels)}",
        *([f"The run ended before: {', '.join(cut)}."] if cut else []),
        render_bars(records),
        "Mismatch between engines and trainers, mean (99th percentile) of |r - 1|:",
        render_mismatch(records),
        origin(of_kind(records, "run")),
    ])  # fmt: skip


def _missed(bars: Sequence[Record], labels: dict[str, str]) -> str:
    """A sentence about the bars that are not met."""
    missed: dict[str, list[str]] = {}
    for record in bars:
        if not record["met"]:
            numbers = f"{BARS[record['bar']]} {two_figures(record['value'])} > {two_figures(record['bound'])}"
            missed.setdefault(labels[record["regime"]], []).append(numbers)
    if not missed:
        return f"all {len(bars)} bars are met."
    regimes = "; ".join(f"{label}: {', '.join(numbers)}" for label, numbers in missed.items())
    return f"**{sum(map(len, missed.values()))} of {len(bars)} bars are not met**: {regimes}."


BLOCKS = (Block("precision-gpu", "precision", "gpu/precision.jsonl", "docs/precision.md", render, NOT_YET),)
