"""The seconds that a method takes on a chip, as a range, beside what was measured on a GPU.

docs/roofline.md says how both ends of a range are counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.harness.records import Record
from benchmarks.harness.runs import once
from benchmarks.roofline.charges import ISSUE_SHARE, ISSUED, LAUNCH, READ_BACK
from benchmarks.roofline.chips import CHIPS, Chip
from benchmarks.roofline.ours import METHODS
from benchmarks.roofline.work import Cost, Problem, Stage

# Rows and columns of a product that one processor computes at a time, as cuBLAS usually does for large products.
TILE = (128, 256)
ITEMSIZES = {"float32": 4, "bfloat16": 2}
# Cards of these forms have other rates than those of CHIPS.
OTHER_FORMS = ("PCIe", "NVL")


@dataclass(frozen=True)
class StageTime:
    """Seconds, and which of "arithmetic", "memory", "instructions" and "launches" takes longest."""

    name: str
    least: float
    most: float
    bound: str


@dataclass(frozen=True)
class Prediction:
    """What a method takes on a chip. `floor` is the prediction of the floor it is held to; a floor has None."""

    method: str
    chip: Chip
    problem: Problem
    cost: Cost
    stages: tuple[StageTime, ...]
    floor: Prediction | None

    @property
    def least(self) -> float:
        return sum(stage.least for stage in self.stages)

    @property
    def most(self) -> float:
        return sum(stage.most for stage in self.stages)

    @property
    def times_floor(self) -> tuple[float, float] | None:
        """The least time over the floor's least, and the most over the floor's most."""
        return None if self.floor is None else (self.least / self.floor.least, self.most / self.floor.most)

    @property
    def fits(self) -> bool:
        """Whether it fits into the chip's memory beside hidden and weight (or the logits)."""
        floor = self.method if self.floor is None else self.floor.method
        inputs = self.problem.logits if floor == "copy" else self.problem.states + self.problem.head
        return self.cost.extra + self.problem.itemsize * inputs <= self.chip.capacity.value


def predict(chip: Chip, method: str, problem: Problem) -> Prediction:
    problem = replace(problem, device=chip.preset)
    cost, held_to = METHODS[method].cost(problem), METHODS[method].held_to
    floor = None if held_to is None else predict(chip, held_to, problem)
    return Prediction(method, chip, problem, cost, tuple(stage_time(chip, stage) for stage in cost.stages), floor)


def stage_time(chip: Chip, stage: Stage) -> StageTime:
    arithmetic = stage.flops / chip.flops_per_second(stage.itemsize) if stage.flops else 0.0
    once = stage.read + stage.written
    hit = once if chip.keeps(stage.row_bytes) else once + stage.reread
    memory, exposed = chip.seconds_for_bytes(hit), chip.seconds_for_bytes(stage.exposed)
    hidden = chip.seconds_for_bytes(max(once + stage.reread - stage.exposed, 0))
    instructions = 0.0
    if chip.clock is not None:
        instructions = stage.instructions / (ISSUED * chip.processors.value * chip.clock)
    launches = LAUNCH * stage.kernels + READ_BACK * stage.waits
    bounds = {"arithmetic": arithmetic, "memory": memory, "instructions": instructions}
    longest = max(bounds, key=bounds.get)
    return StageTime(
        stage.name,
        least=bounds[longest] + launches,
        most=max(arithmetic / occupied(chip, stage.results), hidden, instructions / ISSUE_SHARE) + exposed + launches,
        bound=longest if bounds[longest] >= launches else "launches",
    )


def occupied(chip: Chip, results: Sequence[tuple[int, int]]) -> float:
    """Return the share of the processors' time that products with these results use, in whole waves of tiles."""
    if not results:
        return 1.0
    count = int(chip.processors.value)
    tiles = [-(-rows // TILE[0]) * -(-columns // TILE[1]) for rows, columns in results]
    return sum(tiles) / sum(-(-each // count) * count for each in tiles)


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
    """Return every timed case of trained-looking inputs on a chip that the model knows. Other inputs take the same
    work.
    """
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
    """Return the chip by the name of the record's device, or None for any other device."""
    gpu = record["device"].get("gpu", "")
    if any(form in gpu for form in OTHER_FORMS):
        return None
    return next((chip for name, chip in CHIPS.items() if re.search(rf"\b{name}\b", gpu)), None)
