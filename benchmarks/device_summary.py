"""What a run of `benchmarks.device` found, in the words of a page: bars first, then tests, parts and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks import speed
from benchmarks.bars import verdicts
from benchmarks.device_parts import DEVICE, INVARIANCE, PRECISION, SPEED
from benchmarks.invariance import broken
from benchmarks.measure import Record


def summary(files: Mapping[str, Sequence[Record]], short: bool = False) -> str:
    """Of the lines of every file of a run; the short one leaves out what takes a screen of its own."""
    device = files[DEVICE]
    sections = {
        "Bars": _bars(files[SPEED]),
        "Tests": _tests(device),
        "Parts": _parts(device),
        "Floors": _floors(device),
        "Batch invariance": _invariance(files[INVARIANCE]),
        "Precision": _precision(files[PRECISION]),
    }
    if not short:
        sections["Row tiles"] = _tiles(device)
        sections["Kernels of one step"] = _kernels(device)
        sections["Speed and memory"] = _speed(files[SPEED])
    text = "\n\n".join(f"## {title}\n\n{chr(10).join(lines)}" for title, lines in _present(sections))
    return f"# {_device(device)}\n\n{text}\n"


def _present(sections: Mapping[str, Iterator[str]]) -> Iterator[tuple[str, list[str]]]:
    return ((title, lines) for title, found in sections.items() if (lines := list(found)))


def _device(records: Sequence[Record]) -> str:
    for record in records:
        if "device" in record:
            name = record["device"].get("gpu", "A rehearsal on a CPU: numbers mean nothing")
            return "{}, torch {torch}, triton {triton}".format(name, **record["versions"])
    return "Device unknown: the part `environment` has not run"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    if rows:
        for row in (head, ["---"] * len(head), *rows):
            yield f"| {' | '.join(map(str, row))} |"


def _bars(records: Sequence[Record]) -> Iterator[str]:
    rows = [
        (v.bar.what, f"{'≥' if v.bar.at_least else '≤'} {v.bar.form.format(v.bar.limit)}", v.number, v.word, v.remark)
        for v in verdicts(records)
    ]
    return _table(("bar", "limit", "measured", "verdict", "remark"), rows)


def _tests(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if "tests" in record:
            end = f", exit {record['exit']}" if record["finished"] else ", stopped before the end"
            counts = f"{record['passed']} passed, {len(record['failed'])} failed, {record['skipped']} skipped"
            yield f"* `pytest {record['tests']}`: {counts}{end}"
            yield from (f"    * failed: `{name}`" for name in record["failed"])
        if "memcheck" in record:
            yield f"* compute-sanitizer: {record['memcheck']}, exit {record['exit']}"


def _parts(records: Sequence[Record]) -> Iterator[str]:
    rows = [(r["part"], r["end"], f"{r['seconds']:.0f} of {r['box']:.0f} s") for r in records if "end" in r]
    return _table(("part", "end", "time"), rows)


def _floors(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if "floor" in record:
            unit = "TB/s" if "TB/s" in record else "TFLOP/s"
            yield f"* {record['floor']}: {record[unit]:.3g} {unit}, {1e3 * record['median_s']:.3g} ms"


def _tiles(records: Sequence[Record]) -> Iterator[str]:
    rows = []
    for record in records:
        if "tile" in record:
            speed = "–" if record["TB/s"] is None else f"{record['TB/s']:.3f}"
            tile = "{block} logits, {num_warps} warps".format(**record["tile"])
            rows.append((record["logits"], tile, speed, record["status"], "chosen" if record["chosen"] else ""))
    return _table(("logits", "tile", "TB/s", "status", ""), rows)


def _kernels(records: Sequence[Record]) -> Iterator[str]:
    rows = [(f"{r['microseconds']:.0f}", r["calls"], f"`{r['kernel']}`") for r in records if "kernel" in r]
    return _table(("µs", "calls", "kernel"), rows)


def _invariance(records: Sequence[Record]) -> Iterator[str]:
    if records:
        wrong = [record for record in records if broken(record)]
        yield f"* {len(records)} cases, {len(wrong)} promises broken"
        yield from (f"    * {r['method']} {r['dtype']} {r['variation']} at {r['shape']}" for r in wrong)


def _precision(records: Sequence[Record]) -> Iterator[str]:
    bars = [record for record in records if record.get("kind") == "bar"]
    if bars:
        yield f"* {sum(record['met'] for record in bars)} of {len(bars)} bars met"
        missed = [record for record in bars if not record["met"]]
        yield from (f"    * {r['regime']} {r['bar']}: {r['value']:.2e} > {r['bound']:.2e}" for r in missed)


def _speed(records: Sequence[Record]) -> Iterator[str]:
    if records:
        yield "```"
        yield from speed.summary(records)
        yield "```"
