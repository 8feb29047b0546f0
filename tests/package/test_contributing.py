"""Tests that the files, functions and folders named in CONTRIBUTING.md exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TABLE = TEXT.partition("## Where is what")[2].partition("## ")[0]
FOLDERS = ("drpo_kernels", "tests", "benchmarks")
FILES = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]


def files(name):
    """Return the repository's files with this name, or whose path ends so."""
    return [file for file in FILES if f"/{file}".endswith(f"/{name}")]


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


def rows():
    cells = [line.strip("|").split("|") for line in TABLE.splitlines() if line.startswith("|")]
    return [(quoted(paths), quoted(names)) for _, paths, names in cells[2:]]


def defines(text, name):
    return re.search(rf"^\s*(def|class) {name}\b|^{name}\b.*=", text, re.MULTILINE)


@pytest.mark.parametrize("paths, names", rows(), ids=lambda value: value[0])
def test_the_table_finds_every_name(paths, names):
    folder = (ROOT / paths[0]).parent
    text = "\n".join((folder / Path(path).name).read_text(encoding="utf-8") for path in paths)
    assert names
    for name in names:
        assert all(defines(text, part) for part in name.split(".")), name


def test_every_file_that_is_named_exists():
    named = {name for name in quoted(TEXT) if re.fullmatch(r"[\w/]+\.(py|c)", name)}
    assert len(named) > 20
    assert not [name for name in named if not files(name)]


def test_every_folder_that_is_named_exists():
    named = {name for name in quoted(TEXT) if re.fullmatch(r"[\w/]+/", name)}
    assert named
    assert not [name for name in named if not any(f"/{name}" in f"/{file}" for file in FILES)]
