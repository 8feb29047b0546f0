"""`python -m benchmarks.stability.report` makes the pictures and tables of docs/stability.md from the runs alone.

The page's prose is written by hand. What the runs decide stands between markers `<!-- stability:NAME -->`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness import cli
from benchmarks.harness.blocks import markers, rewrite
from benchmarks.harness.provenance import ROOT
from benchmarks.stability import figures, tables
from benchmarks.stability.runs import Runs, load

RESULTS = ROOT / "bench_results" / "stability"
PAGE = ROOT / "docs" / "stability.md"

TEXTS: dict[str, Callable[[Runs], str]] = {
    "status": tables.status,
    "collapses": tables.collapses,
    "faster": tables.faster,
    "setup": tables.setup,
    "settings": tables.settings,
    "methods": tables.methods,
    "rates": tables.rates,
    "results": partial(tables.cells, columns=tables.RESULTS),
    "health": partial(tables.cells, columns=tables.HEALTH),
    "boundaries": partial(tables.cells, columns=tables.BOUNDARIES),
    "source": tables.source,
}
# The file name of each picture without its ending, what it shows, and what draws it.
PICTURES: dict[str, tuple[str, Callable[[Runs, Path], None]]] = {
    "curves_rollouts": ("Held-out accuracy against rollouts", figures.draw_curves),
    "table1_slices": ("Gradient weight along π", figures.draw_slices),
}


def write_report(out: Path = RESULTS) -> int:
    """Draw the pictures beside the runs in `out`, and write the page: docs/stability.md, or a copy of it in another
    `out`.

    Return an exit status, which is 2 if there is nothing to report or the page lacks a part.
    """
    try:
        runs = load(out / "runs.jsonl")
        if runs.comparison.empty or runs.sweep.empty:
            raise ValueError(f"{out} holds no {'sweep' if runs.sweep.empty else 'comparison'} yet")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page = PAGE if out.resolve() == RESULTS else out / PAGE.name
    if page != PAGE:
        shutil.copyfile(PAGE, page)
    parts = {name: render(runs) for name, render in TEXTS.items()}
    for name, (shown, draw) in PICTURES.items():
        picture = out / f"{name}.png"
        draw(runs, picture)
        parts[f"picture {name}"] = f"![{shown}]({Path(os.path.relpath(picture, page.parent)).as_posix()})"
    missing = [name for name, text in parts.items() if not rewrite(page, markers("stability", name), text)]
    if missing:
        print(f"error: {page} has no part for {', '.join(missing)}", file=sys.stderr)
    print(f"{page} and {len(PICTURES)} pictures in {out}, from {len(runs.records)} runs")
    return 2 if missing else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("benchmarks.stability.report", __doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of runs.jsonl, pictures, page")
    return write_report(parser.parse_args(argv).out)


if __name__ == "__main__":
    sys.exit(main())
