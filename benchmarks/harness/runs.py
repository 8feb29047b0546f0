"""The folder in which `benchmarks.device` leaves a run on a GPU, such as bench_results/gpu: its files and its lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.plans import STANDARD
from benchmarks.harness.records import Record, read, select
from benchmarks.harness.workloads import Workload

DEVICE, SPEED, INVARIANCE, PRECISION = FILES = ("device.jsonl", "speed.jsonl", "invariance.jsonl", "precision.jsonl")
# The workload on which every method is measured.
MAIN = STANDARD["cuda"].main
# Parts of a run may measure the same case. The record of the part that stands first here is the one that counts.
SPEED_PARTS = ("ours", "small", "peers", "sparse", "memory", "liger_sm90", "slow_peers", "real", "sweep")

Run = dict[str, list[Record]]


def read_run(folder: Path) -> Run:
    """Return {file name: its lines}, without lines where there is no file. In speed.jsonl a case's last line replaces
    earlier ones.
    """
    return {name: latest(read(folder / name)) if name == SPEED else read(folder / name) for name in FILES}


def latest(records: Sequence[Record]) -> list[Record]:
    """Return the last record of every case of every part."""
    return list({key_of(record): record for record in records}.values())


def key_of(record: Record) -> tuple:
    """Return the part and the case of a line of speed.jsonl."""
    names = ("part", "workload", "inputs", "dtype", "method", "active_share")
    return (*(record[name] for name in names), record["shape"]["tokens"])


def once(records: Sequence[Record]) -> list[Record]:
    """Return each case once: a record with a time comes before one without, then the parts' order decides. The result
    is sorted by model; of each model the cases at the T of `MAIN` come first, then the others by T.
    """
    models = list(dict.fromkeys(record["workload"] for record in records))
    found: dict[tuple, Record] = {}
    for record in sorted(latest(records), key=lambda r: (r["median_s"] is None, SPEED_PARTS.index(r["part"]))):
        found.setdefault(key_of(record)[1:], record)

    def place(record: Record) -> tuple:
        tokens = record["shape"]["tokens"]
        return models.index(record["workload"]), (record["workload"], tokens) != (MAIN.model, MAIN.tokens), tokens

    return sorted(found.values(), key=place)


def record_of(run: Run, method: str, workload: Workload = MAIN, share: float = 1.0) -> Record | None:
    """Return the record that counts for a case, if there is one."""
    found = once(select(run[SPEED], method=method, active_share=share, **workload.fields))
    return found[0] if found else None
