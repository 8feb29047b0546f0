"""The speed benchmark in Markdown: what `benchmarks.report` writes into README.md and docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.blocks import NOT_YET, Block, origin_with_samples
from benchmarks.harness.records import Record
from benchmarks.harness.speed_tables import by_setting, render_all, setting_of

PLOTS = ("time", "memory")


def swept(records: Sequence[Record]) -> dict[int, list[Record]]:
    """Return {T: records} of the first record's setting and of those that differ from it in T alone."""
    main = setting_of(records[0])
    groups = by_setting(records)
    return {
        setting.tokens: groups[setting] for setting in sorted(groups) if setting._replace(tokens=main.tokens) == main
    }


def pictures(records: Sequence[Record]) -> list[str]:
    """Return those of `PLOTS` that have something to show, which is all of them where several T were measured."""
    return list(PLOTS) if len(swept(records)) > 1 else []


def render_every(records: Sequence[Record]) -> str:
    return "\n".join([render_all(records), origin_with_samples(records)])


REAL = "smollm/speed.jsonl"
BLOCKS = (
    Block("cpu", "speed", REAL, "README.md", render_every, NOT_YET),
    Block("real-speed", "speed", REAL, "docs/benchmarks.md", render_every, NOT_YET),
    Block("every-cpu", "speed", "cpu.jsonl", "docs/benchmarks.md", render_every, plots="benchmarks.speed.plots"),
)
