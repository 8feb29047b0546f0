"""Helpers for tests that compare Markdown."""

import re


def unpadded(text: str) -> str:
    """Return the text with one space where several pad the cells of a table."""
    return re.sub(" {2,}", " ", text)
