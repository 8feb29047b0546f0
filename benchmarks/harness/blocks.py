"""Blocks of pages: the part between two markers, which `benchmarks.report` writes from the records of a study."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.records import Record

NOT_YET = "Not measured yet."


@dataclass(frozen=True)
class Block:
    """A part of a page, and the results from which it is written."""

    name: str
    benchmark: str  # the name in the records: longrun_sparse is that of benchmarks.longrun.sparse
    results: str  # a file in bench_results/, or the folder of a run of `benchmarks.device`
    page: str
    render: Callable[[Any], str]  # takes the records of the file, or the `Run` of the folder
    absent: str | None = None  # what the page says while there are no results
    plots: str | None = None  # the module whose `draw` makes PNG files beside the results

    @property
    def module(self) -> str:
        """The module that measures the results."""
        return f"benchmarks.{self.benchmark.replace('_', '.')}"

    @property
    def markers(self) -> tuple[str, str]:
        return markers("benchmarks", self.name)


def markers(group: str, name: str) -> tuple[str, str]:
    """Return the comments before and after a block."""
    return f"<!-- {group}:{name} -->", f"<!-- /{group}:{name} -->"


def rewrite(page: Path, markers: tuple[str, str], text: str) -> bool:
    """Put the text between the two markers, and return False if the page does not have them."""
    start, end = markers
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    if not pattern.search(before):
        return False
    page.write_text(pattern.sub(lambda _: f"{start}\n{text}\n{end}", before), encoding="utf-8")
    return True


def origin(records: Sequence[Record], samples: object = None) -> str:
    """Return a sentence that says where records come from; it lists whatever is not the same in all of them."""
    machines = _distinct(_machine(record["device"]) for record in records)
    software = _distinct(f"{k} {v}" for record in records for k, v in record["versions"].items() if v)
    commits = _distinct(
        (record["commit"] or "unknown")[:12] + (" with uncommitted changes" if record["dirty"] else "")
        for record in records
    )
    commands = _distinct(f"`{record['command']}`" for record in records)
    dates = _distinct(record["date"][:10] for record in records)
    return (
        f"Measured on {machines}; {software}; commit {commits}; {commands}; {dates}"
        f"{f'; {samples} samples each' if samples else ''}."
    )


def origin_with_samples(records: Sequence[Record]) -> str:
    """Return the same sentence, with the number of samples that the records have."""
    counts = {len(record["seconds"]) for record in records} - {0}
    samples = "no" if not counts else str(max(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return origin(records, samples)


def _distinct(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def _machine(device: dict) -> str:
    if "gpu" in device:
        return f"{device['gpu']}, driver {device['driver']}, CUDA {device['cuda']}"
    return f"{device['cpu']}, {device['cores']} cores, {device['threads']} threads"
