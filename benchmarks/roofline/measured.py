"""Predictions beside the measurements of bench_results/."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.device.parts import SPEED
from benchmarks.device.results import once, read_run
from benchmarks.harness.records import Record, read
from benchmarks.roofline.chips import CHIPS, Assumption, Chip, Figure
from benchmarks.roofline.methods import METHODS
from benchmarks.roofline.predict import Prediction, predict
from benchmarks.roofline.work import Problem

RESULTS = Path(__file__).resolve().parents[2] / "bench_results"
ITEMSIZES = {"float32": 4, "bfloat16": 2}
# bare products that give a chip's FLOP/s, the ones of the same shape first
PRODUCT_FLOORS = ("gemms_whole", "gemms")
# a card of another form has other rates
OTHER_FORMS = ("PCIe", "NVL")


@dataclass(frozen=True)
class Comparison:
    """A record and what was predicted for it."""

    record: Record
    prediction: Prediction

    @property
    def ratio(self) -> float:
        """Measured time to the least predicted."""
        return self.record["median_s"] / self.prediction.least


def records_of(folder: Path = RESULTS) -> list[Record]:
    """Every line of results about the time of a method on a shape; a case that several parts of a GPU's run have
    measured once.
    """
    records = [record for path in sorted(folder.glob("*.jsonl")) for record in read(path)]
    return timed(records + once(read_run(folder / "gpu")[SPEED]))


def timed(records: Sequence[Record]) -> list[Record]:
    wanted = {"method", "shape", "dtype", "active_share", "median_s", "peak_extra_bytes", "device"}
    return [record for record in records if wanted <= record.keys() and record["median_s"] is not None]


def compared(records: Sequence[Record]) -> Iterator[tuple[Chip, list[Comparison]]]:
    """Of each set of inputs on a device that the model knows or can be calibrated to: its chip, and its methods."""
    groups: dict[str, list[Record]] = {}
    for record in timed(records):
        key = json.dumps([record["device"], record["shape"], record["dtype"], inputs_of(record)])
        groups.setdefault(key, []).append(record)
    for group in groups.values():
        chip = chip_of(group)
        methods = [record for record in group if record["method"] in METHODS and METHODS[record["method"]].held_to]
        if chip is not None and methods:
            yield chip, [Comparison(record, predict(chip, record["method"], problem_of(record))) for record in methods]


def inputs_of(record: Record) -> str:
    """The kind of inputs; older lines have it as their workload."""
    return record["inputs"] if "inputs" in record else record["workload"]


def problem_of(record: Record) -> Problem:
    itemsize = ITEMSIZES[record["dtype"]]
    return Problem(**record["shape"], itemsize=itemsize, active_share=record["active_share"])


def chip_of(group: Sequence[Record]) -> Chip | None:
    """A published chip by its name, or the CPU, calibrated to the floors of the same run; None for anything else."""
    device = group[0]["device"]
    if "gpu" not in device:
        return calibrated(group)
    if any(form in device["gpu"] for form in OTHER_FORMS):
        return None
    return next((chip for name, chip in CHIPS.items() if re.search(rf"\b{name}\b", device["gpu"])), None)


def calibrated(group: Sequence[Record]) -> Chip | None:
    """A chip that does products, and copies where those were measured, at this run's rates; None without floors.

    float32 only: a CPU computes with 16-bit inputs in a way of its own.
    """
    if group[0]["dtype"] != "float32":
        return None
    floors = {record["method"]: record for record in group}
    products = next((floors[name] for name in PRODUCT_FLOORS if name in floors), None)
    if products is None:
        return None
    work = {name: METHODS["gemms_whole" if name == "gemms" else name].cost for name in (*PRODUCT_FLOORS, "copy")}
    flops = work[products["method"]](problem_of(products)).flops
    copies = floors.get("copy")
    bandwidth = None
    if copies is not None:
        bandwidth = Figure(work["copy"](problem_of(copies)).moved / copies["median_s"], _source(copies))
    measured = Assumption(1.0, "the rate is measured")
    return Chip(
        name=products["device"]["cpu"],
        preset="cpu",
        matrix=None,
        vector=Figure(flops / products["median_s"], _source(products)),
        bandwidth=bandwidth,
        capacity=None,
        cache=None,
        processors=None,
        matmul_efficiency=measured,
        memory_efficiency=measured,
    )


def _source(record: Record) -> str:
    return f"`{record['method']}` of `{record['command']}`, {record['date'][:10]}"
