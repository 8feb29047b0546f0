"""What `benchmarks.device` has left in a folder, read in one place: bench_results/gpu/ is such a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.device.parts import DEVICE, INVARIANCE, MAIN, PARTS, PRECISION, SPEED, key_of
from benchmarks.harness.records import Record, read

FILES = (DEVICE, SPEED, INVARIANCE, PRECISION)
Run = dict[str, list[Record]]


def read_run(folder: Path) -> Run:
    """File name -> its lines; none where there is no file. Of a case's lines in speed.jsonl the last one counts."""
    run = {name: read(folder / name) for name in FILES}
    run[SPEED] = list({key_of(record): record for record in run[SPEED]}.values())
    return run


def once(records: Sequence[Record]) -> list[Record]:
    """Each case once, though several parts measure it: what has a time before what has none, then in the order of the
    parts. Model by model; of each the T of the bars, then the others in ascending order.
    """
    parts, models = list(PARTS), list(dict.fromkeys(record["workload"] for record in records))
    found: dict[tuple, Record] = {}
    for record in sorted(records, key=lambda r: (r["median_s"] is None, parts.index(r["part"]))):
        found.setdefault(key_of(record)[1:], record)

    def place(record: Record) -> tuple:
        tokens = record["shape"]["tokens"]
        return models.index(record["workload"]), (record["workload"], tokens) != (MAIN.model, MAIN.tokens), tokens

    return sorted(found.values(), key=place)
