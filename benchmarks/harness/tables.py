"""Markdown tables, and the formats of numbers that the pages of several studies share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from benchmarks.harness.records import Record

NOTHING = "–"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """Return a GitHub Markdown table: the first `left` columns are aligned left, the others right."""
    cells = [[str(cell).replace("|", "&#124;") for cell in row] for row in (header, *rows)]
    align = ["left"] * left + ["right"] * (len(header) - left)
    return tabulate(cells[1:], cells[0], tablefmt="pipe", colalign=align, disable_numparse=True)


def milliseconds(record: Record) -> str:
    """Return the record's median with its least and its largest sample, as in "1.25 (1.20 to 1.31)"."""
    median, least, most = (three_figures(1e3 * record[key]) for key in ("median_s", "min_s", "max_s"))
    return f"{median} ({least} to {most})"


def three_figures(value: float) -> str:
    """Format with three significant figures, and with every figure before the decimal point."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def two_figures(value: float) -> str:
    """Format with two significant figures, and with a power of ten where that is shorter: 0.13, 2e-5, 93."""
    if value != value:
        return "NaN"
    if 0 < value < 1e-2 or value >= 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def times(ratio: float | None) -> str:
    """Format a ratio as in "1.25×"."""
    return NOTHING if ratio is None else f"{ratio:.2f}×"


def size(count: int | None) -> str:
    """Format a number of bytes in MiB, from 10 GiB on in GiB."""
    if count is None:
        return NOTHING
    return f"{count / 2**20:.0f} MiB" if count < 10 << 30 else f"{count / 2**30:.1f} GiB"


def gibibytes(count: int | None) -> str:
    return NOTHING if count is None else f"{count / 2**30:.2f} GiB"
