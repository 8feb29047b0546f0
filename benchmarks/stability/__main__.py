"""`python -m benchmarks.stability` runs what is missing of the experiment, then draws the pictures and writes the page.

It needs the model's head, which `make smollm` downloads.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import cli
from benchmarks.stability.grid import comparison_jobs, run_missing, sweep_jobs
from benchmarks.stability.report import RESULTS, write_report
from benchmarks.stability.runs import chosen_rates, load
from benchmarks.stability.settings import METHODS, SEEDS, SETTINGS, SMOKE, Size
from examples.smollm import prepare


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep learning rates, compare methods and report. After an interruption this goes on from the runs that ended."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.smoke and options.out == RESULTS:
        parser.error("--smoke needs an --out of its own: its runs are too small to mean anything")
    methods, settings = options.methods or list(METHODS), options.settings or list(SETTINGS)
    size = SMOKE if options.smoke else Size()
    path = options.out / "runs.jsonl"
    shared = {"size": size, "path": path, "workers": options.workers, "command": cli.command(parser, options)}
    try:
        prepare()
        run_missing(sweep_jobs(methods, settings), title="learning rates", **shared)
        rates = chosen_rates(load(path), methods, settings)
        run_missing(comparison_jobs(rates, SEEDS[: options.seeds]), title="comparison", **shared)
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command goes on from the runs that are in {path}", file=sys.stderr)
        return 130
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if options.no_report else write_report(options.out)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("benchmarks.stability", __doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the seeds (default: all)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, help="runs at a time (default: one per core)")
    parser.add_argument("--smoke", action="store_true", help="sizes that say nothing, in minutes: a rehearsal")
    parser.add_argument("--no-report", action="store_true", help="run only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of runs.jsonl, pictures, page")
    return parser


if __name__ == "__main__":
    sys.exit(main())
