"""`python -m benchmarks.stability.report`: the figures, and every number and verdict of the page, from the runs alone.

The page's prose is written by hand; what runs decide stands between markers `<!-- stability:NAME -->` and is rewritten.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import cli
from benchmarks.harness.blocks import markers, rewrite
from benchmarks.harness.provenance import ROOT
from benchmarks.stability import tables
from benchmarks.stability.outcomes import Runs, load

RESULTS = ROOT / "bench_results" / "stability"
PAGE = ROOT / "docs" / "stability.md"


@dataclass(frozen=True)
class Part:
    """A part of the page: text from the runs, then those of its figures that the runs suffice for."""

    name: str
    render: Callable[[Runs], str] | None = None
    figures: tuple[tuple[str, str], ...] = ()  # (name, what it shows)

    @property
    def markers(self) -> tuple[str, str]:
        return markers("stability", self.name)


PARTS = (
    Part("status", tables.render_status),
    Part("claims", tables.render_claims),
    Part("setup", tables.render_setup),
    Part("settings", tables.render_settings),
    Part("methods", tables.render_methods),
    Part("rates", tables.render_rates, (("learning_rates", "Area under the curve against the learning rate"),)),
    Part("definitions", tables.render_definitions),
    Part("intervals", tables.render_intervals),
    Part("moved", tables.render_moved, (("settings", "Divergence and spread of the log-ratio by setting and method"),)),
    Part("curves", None, (("curves_rollouts", "Held-out accuracy against rollouts"),
                          ("curves_others", "Held-out accuracy against rollouts, the other methods"))),
    Part("results", tables.render_results),
    Part("verdicts", tables.render_verdicts),
    Part("differences", tables.render_differences),
    Part("updates", None, (("curves_updates", "Held-out accuracy against updates"),)),
    Part("health", tables.render_health),
    Part("boundaries", tables.render_boundaries,
         (("boundaries", "Tokens beyond the boundaries and the weight they get"),)),
    Part("table1", None, (("table1", "Gradient weight over μ and π"), ("table1_slices", "Gradient weight along π"))),
    Part("delta", tables.render_delta, (("delta", "Accuracy, divergence and weight against δ"),)),
    Part("origin", tables.render_origin),
)  # fmt: skip


def write_report(runs: Path, out: Path, page: Path | None = None) -> int:
    """Figures into `out`, and the page: docs/stability.md for the committed results, else a copy of it in `out`.

    -> an exit status: 2 where there is nothing to report, or the page lacks a part.
    """
    try:
        found = load(runs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page = page or (PAGE if out.resolve() == RESULTS else out / PAGE.name)
    if not page.exists():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    drawn = draw(found, out)
    complaints = 0
    for part in PARTS:
        if not rewrite(page, part.markers, _text(part, found, drawn, page.parent)):
            complaints += 1
            print(f"error: {page} has no part {part.markers[0]}", file=sys.stderr)
    print(f"{page} and {len(drawn)} figures in {out}, from {len(found.records)} runs")
    return 2 if complaints else 0


def draw(runs: Runs, folder: Path) -> dict[str, Path]:
    """The figures that the runs suffice for, by name; one of an earlier report that no longer is, goes."""
    try:
        from benchmarks.stability.figures import FIGURES
    except ModuleNotFoundError as error:  # the tables are written all the same
        print(f"no figures: {error.name} is not installed", file=sys.stderr)
        return {}
    paths = {name: folder / f"{name}.png" for name in FIGURES}
    for name, path in paths.items():
        if not FIGURES[name](runs, path):
            path.unlink(missing_ok=True)
    return {name: path for name, path in paths.items() if path.exists()}


def _text(part: Part, runs: Runs, drawn: dict[str, Path], folder: Path) -> str:
    pictures = [
        f"![{shown}]({Path(os.path.relpath(drawn[name], folder)).as_posix()})"
        for name, shown in part.figures
        if name in drawn
    ]
    return "\n\n".join(([part.render(runs)] if part.render else []) + pictures)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("benchmarks.stability.report", __doc__)
    parser.add_argument(
        "--runs", type=Path, default=RESULTS / "runs.jsonl", help="raw runs (default: the committed ones)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures")
    parser.add_argument("--page", type=Path, help="default: docs/stability.md, or a copy of it in --out if given")
    options = parser.parse_args(argv)
    return write_report(options.runs, options.out, options.page)


if __name__ == "__main__":
    sys.exit(main())
