"""`python -m benchmarks.stability` runs what is missing of the experiment. `python -m benchmarks.report` reports it.

It needs the model's head, which `make smollm` downloads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial

from benchmarks.harness import cli
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.records import read
from benchmarks.stability.grid import amendment_jobs, comparison_jobs, run_missing, sweep_jobs
from benchmarks.stability.runs import chosen_rates, load
from benchmarks.stability.settings import METHODS, QUICK, SEEDS, SETTINGS, Size
from examples.smollm import prepare

RESULTS = ROOT / "bench_results" / "stability" / "runs.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep learning rates, then compare methods. After an interruption this goes on from the runs that ended."""
    parser = cli.parser("benchmarks.stability", __doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the seeds (default: all)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, help="runs at a time, 3 GB each (default: one per core)")
    cli.add_quick(parser, "sizes that say nothing, minutes")
    cli.add_out(parser, RESULTS)
    options = parser.parse_args(argv)
    path = cli.results(options, RESULTS)
    if path is None:
        parser.error("--quick needs an --out: its runs are too small to mean anything")
    methods, settings = options.methods or list(METHODS), options.settings or list(SETTINGS)
    size = QUICK if options.quick else Size()
    run = partial(run_missing, size=size, path=path, workers=options.workers, command=cli.command(parser, options))
    try:
        prepare()
        run(sweep_jobs(methods, settings), title="learning rates")
        rates = chosen_rates(load(read(path)), methods, settings)
        run(comparison_jobs(rates, SEEDS[: options.seeds]), title="comparison")
        if not (options.methods or options.settings or options.quick):
            run(amendment_jobs(), title="amendment")
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command goes on from the runs that are in {path}", file=sys.stderr)
        return 130
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path} is complete", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
