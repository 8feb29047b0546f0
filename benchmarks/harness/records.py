"""JSON lines: one record of results on each, written as soon as it is known, so that a crash costs one line at most."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

Record = dict[str, object]


def read(path: Path) -> list[Record]:
    """Return the records of a file, or none if there is no file. A line that was not written to its end is left out."""
    records = []
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for text in file:
                with contextlib.suppress(json.JSONDecodeError):
                    records.append(json.loads(text))
    return records


def select(records: Iterable[Record], **fields: object) -> list[Record]:
    """Return the records that have these fields with these values."""
    return [record for record in records if fields.items() <= record.items()]


def line(record: Record) -> str:
    """Return the record as one line, without the newline."""
    return json.dumps(record, ensure_ascii=False)


def write(path: Path, records: Iterable[Record]) -> None:
    """Replace the whole file at once: an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text("".join(line(record) + "\n" for record in records), encoding="utf-8")
    new.replace(path)


def append(path: Path, record: Record) -> None:
    """Add the record on a line of its own, also where the last line was not written to its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        broken = False
        if file.tell():
            file.seek(-1, 2)
            broken = file.read() != b"\n"
        file.write((b"\n" if broken else b"") + line(record).encode() + b"\n")


def replace_part(path: Path, part: str, records: Sequence[Record], order: Sequence[str] | None = None) -> None:
    """Put the records at the end, in place of those whose "part" is this one. `order` then sorts all records by part,
    those of a part that it does not name last.
    """
    old = read(path)
    kept = [record for record in old if record["part"] != part]
    if records or len(kept) < len(old):
        found = [*kept, *records]
        rank = {name: place for place, name in enumerate(order or ())}
        write(path, sorted(found, key=lambda record: rank.get(record["part"], len(rank))))
