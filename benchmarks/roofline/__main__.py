"""`python -m benchmarks.roofline`: predicted time and memory per method and workload, from FLOPs, bytes and published
rates; and, where bench_results/ has the device, prediction beside measurement."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness import cli
from benchmarks.harness.records import Record, line
from benchmarks.harness.workloads import MODELS
from benchmarks.roofline import measured, tables
from benchmarks.roofline.chips import CHIPS, Chip
from benchmarks.roofline.methods import METHODS
from benchmarks.roofline.predict import Prediction, predict
from benchmarks.roofline.work import Problem


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    chips = [CHIPS[name].with_efficiency(options.matmul_efficiency, options.memory_efficiency) for name in options.chip]
    problem = Problem(
        options.tokens,
        MODELS[options.model].hidden,
        MODELS[options.model].vocab,
        workspace=None if options.workspace_gib is None else round(options.workspace_gib * 2**30),
        active_share=options.active_share,
        upstream=options.upstream_factor,
    )
    if options.plot is not None:
        from benchmarks.roofline.plots import draw

        draw(options.plot)
        return 0
    if options.json:
        for chip in chips:
            for method in options.method:
                print(line(as_record(predict(chip, method, problem))))
        return 0
    print("\n".join(_text(options, chips, problem)))
    return 0


def _text(options: argparse.Namespace, chips: Sequence[Chip], problem: Problem) -> Iterator[str]:
    if options.bars:
        for chip in chips:
            yield tables.verdicts(chip) + "\n"
        return
    yield f"PREDICTED, not measured: {options.model}, T={problem.tokens} H={problem.hidden} V={problem.vocab}, bf16"
    for chip in chips:
        efficiencies = (f"{a.share:.0%}" for a in (chip.matmul_efficiency, chip.memory_efficiency))
        yield "\n{}, assuming {} of the published FLOP/s and {} of the bandwidth\n".format(chip.name, *efficiencies)
        if options.stages:
            for method in options.method:
                yield "\n".join([f"{METHODS[method].label}:", tables.stage_table(predict(chip, method, problem)), ""])
        else:
            yield tables.chip_table(chip, options.method, problem)
    yield "\nPrediction beside measurement, of bench_results/:\n"
    yield tables.comparison(measured.records_of())


def as_record(found: Prediction) -> Record:
    """One line of JSON; seconds and bytes."""
    problem = found.problem
    return {
        "kind": "predicted",
        "chip": found.chip.name,
        "method": found.method,
        "shape": {"tokens": problem.tokens, "hidden": problem.hidden, "vocab": problem.vocab},
        "active_share": problem.active_share,
        "workspace_bytes": problem.workspace,
        "least_s": found.least,
        "most_s": found.most,
        "times_floor": found.times_floor,
        "flops": found.cost.flops,
        "moved_bytes": found.cost.moved,
        "kernels": found.cost.kernels,
        "upstream_factor": problem.upstream,
        "peak_extra_bytes": found.cost.extra,
        "peak_beyond_gradients_bytes": found.cost.extra - found.cost.gradients,
        "fits": found.fits,
        "stages": [vars(stage) for stage in found.stages],
    }


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("benchmarks.roofline", __doc__)
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--model", choices=MODELS, default=tables.MODEL, help="its head's H and V")
    parser.add_argument("--tokens", type=int, default=tables.TOKENS, help=f"T (default {tables.TOKENS})")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--workspace-gib", type=float, help="of our linear paths; default: the package's own")
    parser.add_argument("--active-share", type=float, default=1.0, help="of the rows, those with an advantage")
    parser.add_argument("--upstream-factor", action="store_true", help="the loss's factor in the backward is not 1")
    parser.add_argument("--matmul-efficiency", type=float, help="share of the published FLOP/s, for every chip")
    parser.add_argument("--memory-efficiency", type=float, help="share of the published bandwidth, for every chip")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--stages", action="store_true", help="each method's stages: FLOPs, bytes, time, live memory")
    output.add_argument("--bars", action="store_true", help="the performance bars: predictions, limits, remedies")
    output.add_argument("--json", action="store_true", help="a line per chip and method")
    output.add_argument("--plot", type=Path, metavar="FOLDER", help="draw roofline.png there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
