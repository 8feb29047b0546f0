"""Functions that run the Python code of a page as if a reader had pasted it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def snippets(page: Path = README) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def snippet(containing: str, page: Path = README) -> str:
    """Return the only snippet of the page that contains this text."""
    (found,) = [text for text in snippets(page) if containing in text]
    return found


def run(text: str, **names) -> dict:
    """Execute a snippet with these names, and return all names that exist afterwards."""
    exec(compile(text, "<snippet>", "exec"), names)
    return names
