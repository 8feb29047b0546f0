"""`python -m benchmarks.sparsity` measures what `sparse_grad` saves and costs, into bench_results/sparsity.jsonl.

    real      time, memory and gradient error on a real model's tokens, all of them and each topic
    tails     how many entries these rows need, by their entropy
    speed     the same over the entropy of made-up rows, beside the floor and the dense path
    regimes   the error over τ in every regime of the precision study, beside that of dlogits rounded to bf16
    learning  rewards of the demo trained with exact and with sparse gradients, over seeds

The parts are measured alone or together, and the lines of other parts stay as they are. By default these are the last
three; the first two have results of their own, in bench_results/smollm/.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

import torch
from torch import Tensor

from benchmarks.harness import cli, plans
from benchmarks.harness import regimes as cases
from benchmarks.harness.measure import Case, measure
from benchmarks.harness.methods import SPARSE_GRAD, TIGHT_SPARSE_GRAD
from benchmarks.harness.progress import Progress
from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.records import Record, replace_part
from benchmarks.harness.workloads import MODELS, Inputs, Shape, Workload, logit_blocks, make_inputs
from benchmarks.sparsity.tables import MADE_UP_KINDS, METHODS, REAL_KINDS
from drpo_kernels.demo.model import build_model
from drpo_kernels.demo.settings import Settings
from drpo_kernels.demo.task import split_problems
from drpo_kernels.demo.train import train

RESULTS = ROOT / "bench_results" / "sparsity.jsonl"
RECORDED, REAL_RESULTS = ("real", "tails"), ROOT / "bench_results" / "smollm" / "sparsity.jsonl"
NATS = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 11.0)  # ranges of entropies; none is over ln(V) = 10.8
ROUNDS = {"cpu": 5, "cuda": 20}
SEEDS = 8
TOLERANCES = (0.001, 0.003, 0.01, 0.03, 0.1)
REGIME_SHAPE, QUICK_REGIME_SHAPE, QUICK_REGIMES = Shape(256, 512, 4096), Shape(16, 64, 256), ("random", "trained")


def real(options: argparse.Namespace) -> Iterator[Record]:
    dtype = plans.STANDARD[options.device].main.dtype
    tokens = dict.fromkeys(REAL_KINDS, 512) | {"real": 2048}
    yield from _timed([Workload("SmolLM2-135M", tokens[kind], kind, dtype) for kind in REAL_KINDS], options)


def tails(options: argparse.Namespace) -> Iterator[Record]:
    """Yield, for each range of entropies and τ, how many rows there are and the quantiles of the entries they need."""
    model = MODELS["SmolLM2-135M"]
    inputs = make_inputs("real", Shape(64 if options.quick else 2048, model.hidden, model.vocab))
    for tolerance in (TIGHT_SPARSE_GRAD, SPARSE_GRAD):
        needed = entries_needed(inputs, tolerance)
        for low, high in itertools.pairwise(NATS):
            counts = needed[(low <= inputs.entropies) & (inputs.entropies < high)].double()
            if counts.numel():
                quantiles = [round(counts.quantile(q).item()) for q in (0.5, 0.9)]
                entries = {"rows": counts.numel(), "of": needed.numel(), "needed": quantiles}
                yield {"tolerance": tolerance, "from": low, "to": high, **entries}


def entries_needed(inputs: Inputs, tolerance: float) -> Tensor:
    """Return the fewest entries [T] beside the target that leave out at most tolerance · (1 - p_y) of each row."""
    parts = []
    for rows, logits in logit_blocks(inputs.hidden, inputs.weight, inputs.softcap):
        probs = logits.double().softmax(-1).scatter_(1, inputs.targets[rows, None], 0)
        left_out = probs.sort(-1).values.cumsum(-1)
        spared = (left_out <= tolerance * left_out[:, -1:]).sum(-1)
        parts.append(probs.shape[1] - spared)
    return torch.cat(parts)


def speed(options: argparse.Namespace) -> Iterator[Record]:
    main = plans.STANDARD[options.device].main
    kinds = ("mixed", "random") if options.quick else MADE_UP_KINDS
    yield from _timed([Workload(main.model, main.tokens, kind, main.dtype) for kind in kinds], options)


def _timed(workloads: Sequence[Workload], options: argparse.Namespace) -> Iterator[Record]:
    plan = [Case(name, workload) for workload in workloads for name in METHODS]
    rounds = 2 if options.quick else options.rounds or ROUNDS[options.device]
    plan = plans.quick(plan) if options.quick else plan
    yield from measure(plan, {}, device=torch.device(options.device), rounds=rounds)


def regimes(options: argparse.Namespace) -> Iterator[Record]:
    """Measure every regime but that of the soft-cap, which sparse gradients do not allow."""
    names = QUICK_REGIMES if options.quick else [name for name in cases.SYNTHETIC if name != "softcap"]
    progress = Progress(2 * len(names))
    for name in names:
        regime = cases.REGIMES[name]
        shape = QUICK_REGIME_SHAPE if options.quick else regime.shape or REGIME_SHAPE
        common = {"regime": name, "label": regime.label, "shape": asdict(shape), "objective": str(cases.OBJECTIVE)}
        case = regime.case(shape)
        for dtype in (torch.float32, torch.bfloat16):
            progress.say(f"{name} {dtype}")
            yield {**common, **errors_over_tolerance(case, dtype)}
            progress.advance()
    progress.close()


def errors_over_tolerance(case: Inputs, dtype: torch.dtype) -> Record:
    """Return the norm-wise errors against float64 of dlogits rounded to bf16, of the dense path, and over τ."""
    exact = cases.exact_result(case).result

    def errors(hidden: Tensor, weight: Tensor) -> dict[str, float]:
        pairs = {"hidden": (hidden, exact.hidden), "weight": (weight, exact.weight)}
        return {name: ((found.double() - want).norm() / want.norm()).item() for name, (found, want) in pairs.items()}

    over: dict[str, Record] = {}
    for tolerance in TOLERANCES:
        found = cases.ours(case, dtype, sparse_grad=tolerance)
        over[str(tolerance)] = {"errors": errors(found.hidden, found.weight), **found.sparsity}
    dlogits = cases.bf16_dlogits(case)[1].double()
    rounded = dlogits @ case.weight.double(), dlogits.T @ case.hidden.double()
    dense = cases.ours(case, dtype)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "rounded": errors(*(x.to(dtype) for x in rounded)),
        "dense": errors(dense.hidden, dense.weight),
        "over_tolerance": over,
    }


def learning(options: argparse.Namespace) -> Iterator[Record]:
    """Train pairs of whole runs that differ in nothing but `sparse_grad`, one on each core."""
    make = Settings.quick if options.quick else Settings
    seeds = range(2 if options.quick else SEEDS)
    runs = [make(seed=seed, sparse_grad=tolerance) for seed in seeds for tolerance in (0.0, SPARSE_GRAD)]
    progress = Progress(len(runs))
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for settings, rewards in zip(runs, pool.map(trained_rewards, runs), strict=True):
            yield {"seed": settings.seed, "sparse_grad": settings.sparse_grad, "settings": str(settings), **rewards}
            progress.advance()
    progress.close()


def trained_rewards(settings: Settings) -> dict[str, float]:
    """Return the rewards on held-out problems after the training: "sampled" and "greedy"."""
    device = torch.device("cpu")
    model, generator = build_model(settings, device), torch.Generator(device).manual_seed(settings.seed)
    return train(model, *split_problems(settings.seed, settings.held_out), settings, generator).after


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Record]]] = {
    function.__name__: function for function in (real, tails, speed, regimes, learning)
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("benchmarks.sparsity", __doc__)
    cli.add_device(parser)
    cli.add_quick(parser, "tiny shapes")
    cli.add_out(parser, RESULTS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[name for name in PARTS if name not in RECORDED])
    parser.add_argument("--rounds", type=int, help="samples of each method; default {cpu} or {cuda}".format(**ROUNDS))
    options = parser.parse_args(argv)
    out = cli.results(options, REAL_RESULTS if set(options.parts) <= set(RECORDED) else RESULTS)
    source = provenance(cli.command(parser, options), torch.device(options.device))
    for part in options.parts:
        records = []
        for record in PARTS[part](options):
            records.append(record | {"benchmark": "sparsity", "part": part} | source)
            if out is not None:
                replace_part(out, part, records, list(PARTS))
        print(f"{part}: {len(records)} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
