"""Predictions beside the times and peaks that a GPU's run has measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.records import Record
from benchmarks.harness.runs import once
from benchmarks.roofline.chips import CHIPS, Chip
from benchmarks.roofline.methods import METHODS
from benchmarks.roofline.predict import Prediction, predict
from benchmarks.roofline.work import Problem

ITEMSIZES = {"float32": 4, "bfloat16": 2}
# Cards of these forms have other rates than those of CHIPS.
OTHER_FORMS = ("PCIe", "NVL")


@dataclass(frozen=True)
class Comparison:
    """A record and what was predicted for it."""

    record: Record
    prediction: Prediction

    @property
    def ratio(self) -> float:
        """The measured time over the least that was predicted."""
        return self.record["median_s"] / self.prediction.least

    @property
    def within(self) -> bool:
        return self.prediction.least <= self.record["median_s"] <= self.prediction.most

    @property
    def peak_off(self) -> float | None:
        """The measured peak over the predicted one, minus 1; None if no peak was measured or none was predicted."""
        peak, predicted = self.record["peak_extra_bytes"], self.prediction.cost.extra
        return peak / predicted - 1 if peak is not None and predicted else None


def compared(records: Sequence[Record]) -> list[Comparison]:
    """Every timed case of trained-looking inputs on a chip that the model knows. Other inputs take the same work."""
    found = []
    for record in once(records):
        chip = chip_of(record)
        if chip and record["median_s"] and record["method"] in METHODS and record["inputs"] == "trained":
            problem = Problem(
                **record["shape"], itemsize=ITEMSIZES[record["dtype"]], active_share=record["active_share"]
            )
            found.append(Comparison(record, predict(chip, record["method"], problem)))
    return found


def chip_of(record: Record) -> Chip | None:
    """The chip by the name of the record's device; None for any other device."""
    gpu = record["device"].get("gpu", "")
    if any(form in gpu for form in OTHER_FORMS):
        return None
    return next((chip for name, chip in CHIPS.items() if re.search(rf"\b{name}\b", gpu)), None)
