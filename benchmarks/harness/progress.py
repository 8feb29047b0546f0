"""What a long run says while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Progress:
    """A tqdm bar where there is one, lines on stderr where not."""

    def __init__(self, total: int):
        self._bar = tqdm(total=total, leave=False) if tqdm else None
        self.advance: Callable[..., object] = self._bar.update if self._bar else lambda count=1: None
        self.close: Callable[[], None] = self._bar.close if self._bar else lambda: None

    def say(self, what: str) -> None:
        if self._bar:
            self._bar.set_description(what)
        else:
            print(what, file=sys.stderr)
