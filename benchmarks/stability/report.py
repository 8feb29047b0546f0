"""`python -m benchmarks.stability.report`: the pictures, and every number and verdict of the page, from the runs alone.

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
from benchmarks.stability import claims, figures, surface, tables
from benchmarks.stability.runs import Runs, load

RESULTS = ROOT / "bench_results" / "stability"
PAGE = ROOT / "docs" / "stability.md"

TEXTS: dict[str, Callable[[Runs], str]] = {
    "status": tables.status,
    "claims": claims.claims,
    "setup": tables.setup,
    "settings": tables.settings,
    "methods": tables.methods,
    "rates": tables.rates,
    "results": partial(tables.cells, columns=tables.RESULTS),
    "costs": claims.on_costs,
    "differences": tables.differences,
    "health": partial(tables.cells, columns=tables.HEALTH),
    "boundaries": partial(tables.cells, columns=tables.BOUNDARIES),
    "delta": claims.on_delta,
    "source": tables.source,
}
# The file name of each picture without its ending, what it shows, and what draws it.
PICTURES: dict[str, tuple[str, Callable[[Runs, Path], None]]] = {
    "curves_rollouts": ("Held-out accuracy against rollouts", figures.draw_curves),
    "learning_rates": ("Area under the curve against the learning rate", figures.draw_rates),
    "boundaries": ("Tokens beyond the boundaries and the weight they get", figures.draw_boundaries),
    "table1": ("Gradient weight over μ and π", surface.draw_surface),
    "table1_slices": ("Gradient weight along π", surface.draw_slices),
}


def write_report(path: Path, out: Path, page: Path | None = None) -> int:
    """Pictures into `out`, and the page: docs/stability.md for the committed results, else a copy of it in `out`.

    Returns an exit status: 2 if there is nothing to report, or the page lacks a part.
    """
    try:
        runs = load(path)
        if runs.comparison.empty or runs.sweep.empty:
            raise ValueError(f"{path} holds no {'sweep' if runs.sweep.empty else 'comparison'} yet")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page = page or (PAGE if out.resolve() == RESULTS else out / PAGE.name)
    if not page.exists():
        page.parent.mkdir(parents=True, exist_ok=True)
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
    parser.add_argument("--runs", type=Path, default=RESULTS / "runs.jsonl", help="default: the committed runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the pictures")
    parser.add_argument("--page", type=Path, help="default: docs/stability.md, or a copy of it in --out if given")
    options = parser.parse_args(argv)
    return write_report(options.runs, options.out, options.page)


if __name__ == "__main__":
    sys.exit(main())
