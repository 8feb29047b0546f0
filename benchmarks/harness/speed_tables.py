"""Tables of the speed benchmark's records, which the pages of several studies show, and the methods' names in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.harness.exact import WRONG
from benchmarks.harness.measure import largest_error, ratio
from benchmarks.harness.methods import METHODS
from benchmarks.harness.records import Record
from benchmarks.harness.tables import NOTHING, milliseconds, size, table, three_figures, times
from benchmarks.harness.workloads import KINDS

HEADER = (
    "method", "median ms (min to max)", "× its floor", "× eager", "peak extra memory", "beyond gradients",
    "gradient error",
)  # fmt: skip
EAGER = {"hidden": "eager", "logits": "eager_from_logits"}


class Setting(NamedTuple):
    """What the records of one table have in common."""

    model: str
    tokens: int
    inputs: str
    dtype: str
    takes: str


def setting_of(record: Record) -> Setting:
    return Setting(record["workload"], record["shape"]["tokens"], record["inputs"], record["dtype"], record["takes"])


def by_setting(records: Sequence[Record]) -> dict[Setting, list[Record]]:
    """Group the records into tables, in the order in which they were measured."""
    groups: dict[Setting, list[Record]] = {}
    for record in records:
        groups.setdefault(setting_of(record), []).append(record)
    return groups


def label_of(method: str) -> str:
    """Return what tables call the method, which is its own name if it is gone from METHODS."""
    return METHODS[method].label if method in METHODS else method


def label(record: Record) -> str:
    name = label_of(record["method"])
    return name if record["same_loss"] else name + " (same cost, other loss)"


def plain(method: str) -> str:
    """Return a method's label without Markdown."""
    return label_of(method).replace("`", "")


def dense(group: Sequence[Record]) -> list[Record]:
    """Return the records with all rows active, each method once. A record with a time comes before one without."""
    found: dict[str, Record] = {}
    for record in group:
        if record["active_share"] == 1:
            known = found.setdefault(record["method"], record)
            if known["median_s"] is None and record["median_s"] is not None:
                found[record["method"]] = record
    return list(found.values())


def render_all(records: Sequence[Record]) -> str:
    """Render all settings in which something has a time."""
    groups = [group for group in by_setting(records).values() if any(r["median_s"] for r in group)]
    return "\n".join(line for group in groups for line in section(group))


def section(group: Sequence[Record]) -> Iterator[str]:
    """Yield a table of the methods that have a time or should have one, a sentence about the rest, and a table of the
    shares.
    """
    yield f"{title(group[0])}:"
    yield ""
    records = dense(group)
    absent = [r for r in records if r["median_s"] is None and r["status"] != WRONG]
    yield table(HEADER, [_cells(record, group) for record in records if record not in absent])
    yield ""
    if absent:
        yield "No numbers: " + "; ".join(f"{label(record)} ({record['status']})" for record in absent) + "."
        yield ""
    yield from _shares(group)


def _shares(group: Sequence[Record]) -> Iterator[str]:
    """Yield medians by active share, beside their ratio to the same method with all rows active."""
    timed = {(r["active_share"], r["method"]): r for r in group if r["median_s"] is not None}
    shares = sorted({share for share, _ in timed if share < 1}, reverse=True)
    methods = dict.fromkeys(method for share, method in timed if share < 1)
    if not shares:
        return
    rows = []
    for share in shares:
        records = [timed.get((share, method)) for method in methods]
        rows.append((f"{share:.0%}", *(NOTHING if r is None else _median_and_ratio(r, group) for r in records)))
    yield table(("rows with an advantage", *(f"{label_of(name)}, ms" for name in methods)), rows, left=0)
    yield ""


def _median_and_ratio(record: Record, group: Sequence[Record]) -> str:
    median = three_figures(1e3 * record["median_s"])
    return f"{median} ({times(ratio(record, record['method'], group))} of all rows)"


def title(record: Record) -> str:
    shape = "T={tokens} H={hidden} V={vocab}".format(**record["shape"])
    entropy = "" if record["entropy_nats"] is None else f" (mean entropy {record['entropy_nats']:.2g} nat)"
    start = "from hidden states" if record["takes"] == "hidden" else "from logits"
    model = "" if record["workload"].startswith("cpu") else f"{record['workload']}, "
    return f"{model}{shape}, {record['dtype']}, {start}, {KINDS[record['inputs']]}{entropy}"


def _cells(record: Record, group: Sequence[Record]) -> tuple[str, ...]:
    if record["median_s"] is None:
        return (label(record), record["status"], *[NOTHING] * 4, _error(record))
    return (
        label(record),
        milliseconds(record),
        times(ratio(record, record["held_to"], group)),
        times(ratio(record, EAGER[record["takes"]], group)),
        size(record["peak_extra_bytes"]),
        size(record["peak_beyond_gradients_bytes"]),
        _error(record),
    )


def _error(record: Record) -> str:
    error = largest_error(record)
    if error is None:
        return NOTHING
    text = f"{100 * error:.2g} %" if error >= 1e-4 else f"{error:.0e}"
    return text if record["status"] in ("ok", WRONG) else f"{text} ({record['rounds_away']})"
