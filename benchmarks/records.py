"""Lines of results: one JSON object each, written as soon as it is known, so that what ends a run costs one line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

Record = dict[str, object]


def read(path: Path) -> list[Record]:
    """The records of a file, none where there is no file. A last line that was not written to its end is left out."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    whole, rest = lines[:-1], lines[-1:]
    records = [json.loads(line) for line in whole if line.strip()]
    try:
        return records + [json.loads(line) for line in rest if line.strip()]
    except json.JSONDecodeError:
        return records


def write(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def append(path: Path, record: Record) -> None:
    """After a line that was not written to its end, on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            broken = file.read() != b"\n"
        else:
            broken = False
        file.write((b"\n" if broken else b"") + json.dumps(record).encode() + b"\n")
