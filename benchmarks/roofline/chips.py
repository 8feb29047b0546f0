"""Published figures of the chips that the model knows, and the shares of them that are assumed to be reached.

chips.csv has a row for each figure with its source. Some are not published: the cache of an H200 is as its driver
reports it, the number of SMs of a B200 is that of a device query, lanes follow from the compute capability, and the
share of the bandwidth is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd


@dataclass(frozen=True)
class Figure:
    """A number, and where it is published or why it is assumed."""

    value: float
    source: str


@dataclass(frozen=True)
class Chip:
    """Published dense rates, never those "with sparsity", which are twice as large.

    matrix      FLOP/s of 16-bit operands with float32 accumulation
    vector      FLOP/s of float32 operands, without TF32
    bandwidth   bytes/s of the memory
    capacity    bytes of memory
    cache       bytes of the last cache that all processors share
    processors  SMs or compute units; each works on one tile of a product, or one row, at a time
    product     FLOP/s of the fastest bf16 product that a search over shapes found; products are assumed to reach it
    memory_efficiency  share of the bandwidth that is assumed to be reached
    lanes       float32 results of a processor in a clock, which give the clock; None if instructions are not charged
    """

    name: str
    matrix: Figure
    vector: Figure
    bandwidth: Figure
    capacity: Figure
    cache: Figure
    processors: Figure
    product: Figure
    memory_efficiency: Figure
    lanes: Figure | None = None

    @property
    def preset(self) -> str:
        """The chip's name among the devices that the planning knows."""
        return self.name.lower()

    @property
    def matmul_efficiency(self) -> Figure:
        """The share of `matrix` that products are assumed to reach."""
        return Figure(self.product.value / self.matrix.value, self.product.source)

    @property
    def clock(self) -> float | None:
        """The clock in Hz, from a multiplication and an addition in every lane."""
        return None if self.lanes is None else self.vector.value / (2 * self.lanes.value * self.processors.value)

    def flops_per_second(self, itemsize: int) -> float:
        """Return the rate that products of operands of this size are assumed to reach."""
        return (self.matrix if itemsize < 4 else self.vector).value * self.matmul_efficiency.value

    def seconds_for_bytes(self, count: float) -> float:
        return count / (self.bandwidth.value * self.memory_efficiency.value)

    def keeps(self, row_bytes: float) -> bool:
        """Return whether the cache holds one row per processor, so that a row's second read need not go to memory."""
        return self.processors.value * row_bytes <= self.cache.value

    def with_efficiency(self, matmul: float | None, memory: float | None) -> Chip:
        """Return the chip with these shares of the published rates in place of the assumed ones. None leaves a share as
        it is.
        """
        for share in (matmul, memory):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"an efficiency must be in (0, 1], got share={share}")
        product = self.product if matmul is None else Figure(matmul * self.matrix.value, "as asked for")
        return replace(
            self,
            product=product,
            memory_efficiency=self.memory_efficiency if memory is None else Figure(memory, "as asked for"),
        )


def _read(path: Path) -> dict[str, Chip]:
    rows = pd.read_csv(path).groupby("chip", sort=False)
    return {
        str(name): Chip(str(name), **{row.figure: Figure(row.value, row.source) for row in figures.itertuples()})
        for name, figures in rows
    }


CHIPS = _read(Path(__file__).with_name("chips.csv"))
