"""The command lines of the studies: the options that they share, and the command as the records name it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.harness.provenance import ROOT

DEVICES = ("cpu", "cuda")
PLACES = ("out", "cache")  # options that do not change what is measured


def parser(module: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m {module}", description=description)


def add_out(parser: argparse.ArgumentParser, default: Path | None, what: str = "JSON lines") -> None:
    """Add --out. Without it `results` writes to the default, or nowhere if the default is None."""
    place = "none" if default is None else default.relative_to(ROOT)
    parser.add_argument("--out", type=Path, help=f"{what}; default {place}")


def add_quick(parser: argparse._ActionsContainer, what: str) -> None:
    parser.add_argument("--quick", action="store_true", help=f"{what}; written only where --out says")


def add_device(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    default = default or ("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", choices=DEVICES, default=default, help=f"default here: {default}")


def results(options: argparse.Namespace, default: Path | None) -> Path | None:
    """Return where results go: to --out, without it to the default, and nowhere after --quick alone."""
    return options.out or (None if options.quick else default)


def command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """Return the command that repeats a run: the options that are not at their defaults, but for the output's place."""
    words, flags = [parser.prog], []
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        if name in PLACES or value == parser.get_default(name):
            continue
        if value is True:
            flags.append(flag)
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words + flags)
