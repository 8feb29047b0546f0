"""Lines of results: one JSON object each, written as soon as it is known, so that what ends a run costs one line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

Record = dict[str, object]


def read(path: Path) -> list[Record]:
    """The records of a file, none where there is no file. A line that was not written to its end is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def write(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def append(path: Path, record: Record) -> None:
    """On a line of its own, also where the last one was not written to its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        broken = False
        if file.tell():
            file.seek(-1, 2)
            broken = file.read() != b"\n"
        file.write((b"\n" if broken else b"") + json.dumps(record).encode() + b"\n")
