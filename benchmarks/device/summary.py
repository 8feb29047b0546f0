"""What a run of `benchmarks.device` found, in the words of a page: bars first, then tests, parts and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.device.bars import verdicts
from benchmarks.device.parts import DEVICE, INVARIANCE, PRECISION, SPEED
from benchmarks.harness.records import Record
from benchmarks.harness.tables import NOTHING, table
from benchmarks.invariance import broken
from benchmarks.speed import study as speed


def summary(files: Mapping[str, Sequence[Record]], short: bool = False) -> str:
    """Of the lines of every file of a run; the short one leaves out what takes a screen of its own."""
    device = files[DEVICE]
    sections = {
        "Bars": bars(files[SPEED], device),
        "Tests": tests(device),
        "Parts": _parts(device, short),
        "Floors": _floors(device),
        "Batch invariance": invariance(files[INVARIANCE]),
        "Precision": precision(files[PRECISION]),
    }
    if not short:
        sections["Bare products"] = _products(device)
        sections["Row kernels"] = _row_kernels(device)
        sections["Profiles"] = _profiles(device)
        sections["Kernels of a step"] = _kernels(device)
        sections["A run"] = demo(device)
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
        yield table(head, rows, left=len(head))


def bars(records: Sequence[Record], device: Sequence[Record]) -> Iterator[str]:
    rows = [
        (v.bar.what, f"{'≥' if v.bar.at_least else '≤'} {v.bar.form.format(v.bar.limit)}", v.number, v.word, v.remark)
        for v in verdicts(records, device)
    ]
    return _table(("bar", "limit", "measured", "verdict", "remark"), rows)


def tests(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if "tests" in record:
            end = f", exit {record['exit']}" if record["finished"] else ", stopped before the end"
            counts = f"{record['passed']} passed, {len(record['failed'])} failed, {record['skipped']} skipped"
            yield f"* `pytest {record['tests']}`: {counts}{end}"
            yield from (f"    * failed: `{name}`" for name in record["failed"])
        if "memcheck" in record:
            yield f"* compute-sanitizer: {record['memcheck']}, exit {record['exit']}"


def _parts(records: Sequence[Record], short: bool) -> Iterator[str]:
    """The short summary names those alone that have not come to their end."""
    ends = [r for r in records if "end" in r and not (short and r["end"] == "done")]
    rows = [(r["part"], r["end"], f"{r['seconds']:.0f} of {r['box']:.0f} s") for r in ends]
    return _table(("part", "end", "time"), rows)


def _floors(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if "floor" in record:
            unit = "TB/s" if "TB/s" in record else "TFLOP/s"
            yield f"* {record['floor']}: {record[unit]:.3g} {unit}, {1e3 * record['median_s']:.3g} ms"


def _rate(record: Record, unit: str) -> str:
    return NOTHING if record[unit] is None else f"{record[unit]:.3g}"


def _products(records: Sequence[Record]) -> Iterator[str]:
    rows = []
    for record in records:
        if "product" in record:
            shape = "{rows}×{inner}×{columns}".format(**record["shape"])
            out = record["out"] + (", added" if record["accumulates"] else "")
            median = NOTHING if record["median_s"] is None else f"{1e3 * record['median_s']:.3g}"
            rows.append((record["product"], shape, out, median, _rate(record, "TFLOP/s")))
    return _table(("product", "rows × inner × columns", "result", "ms", "TFLOP/s"), rows)


def _row_kernels(records: Sequence[Record]) -> Iterator[str]:
    rows = []
    for record in records:
        if "row_kernel" in record:
            tile = "" if record["tile"] is None else "{block} logits, {num_warps} warps".format(**record["tile"])
            chosen = "chosen" if record["chosen"] else ""
            rows.append((record["logits"], record["row_kernel"], tile, _rate(record, "TB/s"), record["status"], chosen))
    return _table(("logits", "kernel", "tile", "TB/s", "status", ""), rows)


def _profiles(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if "profile" in record:
            yield (
                "* `{method}`, {model} T={tokens}: ".format(**record["profile"])
                + "{kernels} kernels in {whole_us:.0f} µs, {short_kernels} of them short ({short_us:.0f} µs together), "
                "{idle_us:.0f} µs idle".format(**record)
            )
            yield from ("    * {us:.0f} µs between `{after}` and `{before}`".format(**gap) for gap in record["gaps"])


def _kernels(records: Sequence[Record]) -> Iterator[str]:
    rows = [
        ("{method} {model} T={tokens}".format(**r["shape"]), f"{r['microseconds']:.0f}", r["calls"], f"`{r['kernel']}`")
        for r in records
        if "kernel" in r
    ]
    return _table(("step", "µs", "calls", "kernel"), rows)


def demo(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if "demo" in record:
            before, after = record["demo"]["before"], record["demo"]["after"]
            gains = ", ".join(f"{name} {before[name]:.1%} before and {after[name]:.1%} after" for name in before)
            yield f"* the demo, {record['steps']} steps of {record['objective']} in {record['seconds']:.0f} s: {gains}"
        if "comparison" in record:
            eager, fused = record["seconds"]
            yield (
                f"* {record['comparison']}: fused {1e3 * fused:.2f} ms against eager's {1e3 * eager:.2f}; "
                "peaks {0:.0f} and {1:.0f} MiB".format(*(peak / 2**20 for peak in record["peak_bytes"][::-1]))
            )


def invariance(records: Sequence[Record]) -> Iterator[str]:
    if records:
        wrong = [record for record in records if broken(record)]
        yield f"* {len(records)} cases, {len(wrong)} promises broken"
        yield from (f"    * {r['method']} {r['dtype']} {r['variation']} at {r['shape']}" for r in wrong)


def precision(records: Sequence[Record]) -> Iterator[str]:
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
