"""`python -m benchmarks.stability`: run what is missing of a grid, then draw the figures and write the page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import cli
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.records import read
from benchmarks.stability.grid import chosen_rates, comparison_jobs, cores, run_missing, sweep_jobs
from benchmarks.stability.settings import CORE_METHODS, CORE_SETTINGS, METHODS, SEEDS, SETTINGS, SMOKE, Size

RESULTS = ROOT / "bench_results" / "stability"


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep learning rates, compare, report. Interrupted, it goes on from the runs that ended."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.smoke and options.out == RESULTS:
        print("error: --smoke needs an --out of its own: its runs are too small to mean anything", file=sys.stderr)
        return 2
    methods = options.methods or (list(METHODS) if options.full else list(CORE_METHODS))
    settings = options.settings or (list(SETTINGS) if options.full else list(CORE_SETTINGS))
    size = SMOKE if options.smoke else Size()
    runs, cache = options.out / "runs.jsonl", options.cache
    command = cli.command(parser, options)
    common = dict(size=size, path=runs, cache=cache, workers=options.workers, command=command)
    try:
        records = run_missing(sweep_jobs(methods), **common)
        rates = chosen_rates(records, methods)
        run_missing(comparison_jobs(methods, settings, SEEDS[: options.seeds], rates), **common)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: {len(read(runs))} runs are in {runs}; the same command goes on from there", file=sys.stderr
        )
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.no_report:
        return 0
    from benchmarks.stability.report import write_report

    return write_report(runs, options.out, options.page)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("benchmarks.stability", __doc__)
    parser.add_argument("--full", action="store_true", help="every method in every setting, not the core grid")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the seeds (default: all)")
    parser.add_argument("--workers", type=int, default=cores(), help="runs at a time (default: one per core)")
    parser.add_argument("--smoke", action="store_true", help="sizes that say nothing, in a minute: a rehearsal")
    parser.add_argument("--no-report", action="store_true", help="run only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of runs.jsonl and the figures")
    parser.add_argument(
        "--page", type=Path, help="the page to write (default: docs/stability.md, or in --out if given)"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "stability", help="warmed-up policies")
    return parser


if __name__ == "__main__":
    sys.exit(main())
