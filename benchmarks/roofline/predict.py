"""Seconds for a method on a chip, as a range.

Least: every stage takes the longest of its arithmetic, its bytes and its instructions; second reads of a row hit where
the cache keeps one row per processor. Most: nothing hits; what epilogues move beyond one write of a result is not
hidden; instructions are issued at the share of the peak that was measured; and a product's tiles occupy whole waves of
processors, without splitting its inner dimension. Launches and waits for the host are added to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.roofline.charges import ISSUE, ISSUED, LAUNCH, READ_BACK
from benchmarks.roofline.chips import Chip
from benchmarks.roofline.methods import METHODS
from benchmarks.roofline.work import Cost, Problem, Stage

# rows and columns that one processor computes at a time: cuBLAS's usual tile for large 16-bit products
TILE = (128, 256)


@dataclass(frozen=True)
class StageTime:
    """Seconds; `bound` is "arithmetic", "memory" or "instructions", whichever takes longest, or "launches"."""

    name: str
    least: float
    most: float
    bound: str


@dataclass(frozen=True)
class Prediction:
    """Of a method, or a variant of one, on a chip; `floor` of the method it is held to, or None of a floor."""

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
        """The range relative to the floor's: least to least, most to most."""
        return None if self.floor is None else (self.least / self.floor.least, self.most / self.floor.most)

    @property
    def fits(self) -> bool:
        """Beside hidden and weight (or the logits) in the chip's memory."""
        floor = self.method if self.floor is None else self.floor.method
        inputs = self.problem.logits if floor == "copy" else self.problem.states + self.problem.head
        capacity = self.chip.capacity
        return capacity is None or self.cost.extra + self.problem.itemsize * inputs <= capacity.value


def predict(chip: Chip, method: str, problem: Problem, cost: Cost | None = None) -> Prediction:
    """`cost` replaces the method's own, for a variant of it."""
    problem = replace(problem, device=chip.preset)
    cost = METHODS[method].cost(problem) if cost is None else cost
    held_to = METHODS[method].held_to
    # a floor has no rows to skip and no workspace
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
    # a CPU's calls are not launches
    launches = 0.0 if chip.processors is None else LAUNCH * stage.kernels + READ_BACK * stage.waits
    bounds = {"arithmetic": arithmetic, "memory": memory, "instructions": instructions}
    longest = max(bounds, key=bounds.get)
    return StageTime(
        stage.name,
        least=bounds[longest] + launches,
        most=max(arithmetic / occupied(chip, stage.results), hidden, instructions / ISSUE.share) + exposed + launches,
        bound=longest if bounds[longest] >= launches else "launches",
    )


def occupied(chip: Chip, results: Sequence[tuple[int, int]]) -> float:
    """The share of the processors' time that products with these results use, in whole waves of tiles."""
    if chip.processors is None or not results:
        return 1.0
    count = int(chip.processors.value)
    tiles = [-(-rows // TILE[0]) * -(-columns // TILE[1]) for rows, columns in results]
    return sum(tiles) / sum(-(-each // count) * count for each in tiles)
