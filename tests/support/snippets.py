"""The Python of a page, as a reader would paste it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def snippets(page: Path = README) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def snippet(containing: str, page: Path = README) -> str:
    """The one snippet of the page with this text."""
    (found,) = [text for text in snippets(page) if containing in text]
    return found


def run(text: str, **names) -> dict:
    """Execute a snippet where these names exist -> all names afterwards."""
    exec(compile(text, "<snippet>", "exec"), names)
    return names
