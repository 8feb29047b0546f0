"""Plain-text tables that can be pasted into a bug report, without a dependency."""

from __future__ import annotations

from collections.abc import Sequence


class TextTable:
    """Columns of fixed width, so that a row can be printed as soon as it is known."""

    def __init__(self, headers: Sequence[str], widths: Sequence[int] | None = None, left: int = 1) -> None:
        """`left`: how many leading columns are text, set flush left; the others are numbers, set flush right."""
        widths = widths or [0] * len(headers)
        self._widths = [max(width, len(header)) for width, header in zip(widths, headers, strict=True)]
        self._headers = headers
        self._left = left

    def header(self) -> str:
        return self.row(self._headers) + "\n" + "  ".join("-" * width for width in self._widths)

    def row(self, cells: Sequence[object]) -> str:
        pairs = enumerate(zip(map(str, cells), self._widths, strict=True))
        return "  ".join(c.ljust(w) if i < self._left else c.rjust(w) for i, (c, w) in pairs).rstrip()
