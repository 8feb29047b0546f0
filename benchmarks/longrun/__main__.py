"""`python -m benchmarks.longrun` takes 2,000 optimiser steps on a recorded stream of off-policy batches, beside fp64.

Three copies of the same weights train on the stream (see `stream`). `exact` computes the loss in float64. `ours`
(linear_policy_loss) and `eager` (naive autograd) take hidden states and head rounded to float32, and `eager` measures
how far float32 alone drifts.

The exit status tells whether the bound holds: our loss is within 1e-4 of the mean |loss| of the exact one at every
step, which is the contract on one loss, and ours is within 10 times eager's distance, in the loss and in the weights.

The program writes one JSON line per run to bench_results/longrun.jsonl, with sampled curves.
`python -m benchmarks.longrun.sparse` does the same for `sparse_grad`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch

from benchmarks.harness import cli
from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.records import Record
from benchmarks.longrun.stream import Policy, Run, Size, compare, record_stream, write

RESULTS = ROOT / "bench_results" / "longrun.jsonl"
LOSS_BOUND, EAGER_BOUND = 1e-4, 10.0
RUNS = {
    "exact": Run(torch.float64, {"entropy_coef": 1e-3, "backend": "reference"}),
    "eager": Run(torch.float32, {"entropy_coef": 1e-3, "backend": "reference"}),
    "ours": Run(torch.float32, {"entropy_coef": 1e-3}),
}


def measure(size: Size) -> dict[str, Record]:
    torch.manual_seed(0)
    initial = Policy(size).double()
    return compare(initial, record_stream(initial, size), size, RUNS)


def stays_together(records: Mapping[str, Record]) -> bool:
    ours, eager = records["ours"], records["eager"]
    near = all(ours[gap] <= EAGER_BOUND * eager[gap] + 1e-6 for gap in ("loss_gap_max", "weight_gap"))
    return near and ours["loss_gap_max"] <= LOSS_BOUND * ours["loss_scale"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("benchmarks.longrun", __doc__)
    parser.add_argument("--steps", type=int, default=Size.steps)
    cli.add_out(parser, RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    size, out = Size(steps=options.steps), options.out or RESULTS
    source = provenance(cli.command(parser, options))
    records = measure(size)
    write(records, out, {"size": vars(size), **source})
    return int(not stays_together(records))


if __name__ == "__main__":
    sys.exit(main())
