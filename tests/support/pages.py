"""Markdown as a test compares it."""

import re


def unpadded(text: str) -> str:
    """The text with one space where several pad the cells of a table."""
    return re.sub(" {2,}", " ", text)
