"""Tests of what editors and type checkers see of the public functions."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from typing import get_type_hints

import pytest

from drpo_kernels import options
from snippets import ROOT

CALLS = ROOT / "tests" / "support" / "typed_calls.py"
WRONG = {i for i, line in enumerate(CALLS.read_text(encoding="utf-8").splitlines(), 1) if "# WRONG: " in line}


def test_the_keywords_are_the_fields_of_the_options():
    for keywords, fields, beside in (
        (options.LinearLogprobKeywords, options.LogprobOptions, set()),
        (options.LinearLossKeywords, options.PolicyOptions, {"objective"}),
    ):
        typed = {field.name: field.type for field in dataclasses.fields(fields) if field.name not in beside}
        assert get_type_hints(keywords) == typed


def checker(name: str, *arguments: str) -> str:
    """Return what a type checker prints about the calls in typed_calls.py."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    command = [sys.executable, "-m", name, *arguments, str(CALLS)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600).stdout


def test_mypy_flags_the_wrong_calls_alone():
    cache = ROOT / ".mypy_cache" / "typed_calls"  # with these options the cache of `make lint` would become useless
    options = "--strict", "--allow-untyped-calls", "--follow-imports=silent", f"--cache-dir={cache}"
    printed = checker("mypy", *options)
    assert {int(line) for line in re.findall(r"typed_calls\.py:(\d+): error", printed)} == WRONG, printed


def test_pyright_flags_the_wrong_calls_alone():
    found = json.loads(checker("basedpyright", "--outputjson"))["generalDiagnostics"]
    errors = {one["range"]["start"]["line"] + 1 for one in found if one["severity"] == "error"}
    assert errors == WRONG, found
