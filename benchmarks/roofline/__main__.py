"""`python -m benchmarks.roofline` predicts time and memory per method, from FLOPs, bytes and published rates."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.harness import cli
from benchmarks.harness.workloads import MODELS
from benchmarks.roofline import tables
from benchmarks.roofline.chips import CHIPS
from benchmarks.roofline.ours import METHODS
from benchmarks.roofline.predict import predict


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of methods for every chip, or with --stages a table of stages for every chip and method."""
    parser = cli.parser("benchmarks.roofline", __doc__)
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--model", choices=MODELS, default=tables.MODEL, help="whose head's H and V are taken")
    parser.add_argument("--tokens", type=int, default=tables.TOKENS, help=f"T, by default {tables.TOKENS}")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--matmul-efficiency", type=float, help="share of the published FLOP/s, for every chip")
    parser.add_argument("--memory-efficiency", type=float, help="share of the published bandwidth, for every chip")
    parser.add_argument("--stages", action="store_true", help="each method's stages: FLOPs, bytes, time, live memory")
    options = parser.parse_args(argv)
    problem = tables.problem_of(options.model, options.tokens)
    shape = f"T={problem.tokens} H={problem.hidden} V={problem.vocab}"
    print(f"PREDICTED, not measured: {options.model}, {shape}, bf16")
    for name in options.chip:
        chip = CHIPS[name].with_efficiency(options.matmul_efficiency, options.memory_efficiency)
        products, memory = chip.matmul_efficiency.value, chip.memory_efficiency.value
        print(f"\n{name}, assuming {products:.0%} of the published FLOP/s and {memory:.0%} of the bandwidth\n")
        if not options.stages:
            print(tables.method_table(chip, options.method, problem))
            continue
        for method in options.method:
            print(f"{METHODS[method].label}:\n{tables.stage_table(predict(chip, method, problem))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
