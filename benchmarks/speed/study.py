"""`python -m benchmarks.speed` times forward and backward of the DRPO loss, ours beside floors and peers.

Without --workloads, --tokens, --inputs, --dtypes or --active-shares it runs the standard plan of the device; with any
of them, it runs their product. Results are JSON lines.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

import torch

from benchmarks.harness import cli, plans
from benchmarks.harness.measure import Case, is_broken, measure
from benchmarks.harness.method import DTYPES
from benchmarks.harness.methods import METHODS
from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.records import Record
from benchmarks.harness.workloads import KINDS, MODELS

FOLDER = ROOT / "bench_results"
# A GPU's pages are written from what benchmarks.device measures.
FILES = {"cpu": FOLDER / "cpu.jsonl", "cuda": None}
REAL = FOLDER / "smollm" / "speed.jsonl"  # for --inputs real alone, on a CPU
ROUNDS = {"cpu": 3, "cuda": 20}
# These options choose workloads; `plans.product` calls them by other names.
AXES = {"workloads": "models", "tokens": "tokens", "inputs": "kinds", "dtypes": "dtypes", "active_shares": "shares"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print. Return 1 if one of the repository's own methods failed or was wrong."""
    parser = _parser()
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    records = measure(
        plan(options),
        provenance(cli.command(parser, options), device),
        device=device,
        rounds=2 if options.quick else options.rounds or ROUNDS[device.type],
        budget_seconds=options.time_budget,
        out=cli.results(options, REAL if options.inputs == ["real"] and device.type == "cpu" else FILES[device.type]),
    )
    print("\n".join(summary(records)))
    return int(any(is_broken(record["method"], record["status"]) for record in records))


def plan(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options ask for."""
    standard = plans.STANDARD[options.device]
    axes = {argument: getattr(options, name) for name, argument in AXES.items()}
    cases = plans.product(standard, **axes) if any(axes.values()) else standard.cases()
    cases = [case for case in cases if case.method in options.methods]
    return plans.quick(cases) if options.quick else cases


def summary(records: Sequence[Record]) -> Iterator[str]:
    """Yield a line per record."""
    for record in records:
        median, peak = record["median_s"], record["peak_extra_bytes"]
        where = "{workload} {inputs} {dtype} T={tokens}".format(**record, **record["shape"])
        time = "" if median is None else f"{median * 1e3:.2f} ms"
        memory = "" if peak is None else f"{peak / 2**20:.0f} MiB"
        share = f"{record['active_share']:.0%}"
        yield f"{where:<36}  {record['method']:<34} {share:>4}  {time:>12}  {memory:>10}  {record['status']}"


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("benchmarks.speed", __doc__)
    cli.add_device(parser)
    cli.add_quick(parser, "tiny shapes, two rounds")
    cli.add_out(parser, FILES["cpu"], "JSON lines of a CPU or of a GPU; a GPU has no default")
    parser.add_argument("--rounds", type=int, help="samples of each method; default {cpu} or {cuda}".format(**ROUNDS))
    parser.add_argument("--time-budget", type=float, default=math.inf, help="seconds after which nothing is started")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--workloads", nargs="+", choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--inputs", nargs="+", choices=KINDS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--active-shares", nargs="+", type=float, metavar="SHARE")
    return parser
