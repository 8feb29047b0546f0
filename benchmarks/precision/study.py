"""`python -m benchmarks.precision`: what each precision recipe does to log-probs, ratio, DRPO's weight and gradients.

Every number is an error against float64. `errors` are against the exact result of the operands that a recipe multiplies
(already rounded to fp16 or fp8 where it says so): its arithmetic. `total`, where it differs, is against the exact
result of the bf16 model: the rounding of the operands comes on top. Per quantity [max, p99, norm-wise relative]:

    logprob, prob_shift (π - μ), weight_0.2 and weight_12.5 (DRPO's w at that δ)   |error|
    ratio                                                                         |error| / ratio
    loss                                                                          |error| / Σ |terms of the loss|
    hidden, weight (dX and dW)                                                    |error| / largest entry

One JSON line each: the run, every regime, every recipe in it, every rollout engine against every trainer, the errors
over |logit|, and the bars. The plots are drawn beside them.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import cli
from benchmarks.harness.progress import Progress
from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.records import Record, append, write
from benchmarks.harness.workloads import Shape
from benchmarks.precision import regimes
from benchmarks.precision.mismatch import measure_mismatch, quantile
from benchmarks.precision.recipes import OPERANDS, RECIPES, Recipe
from benchmarks.precision.regimes import REGIMES, Case, Exact, Result, exact_result

FOLDER = ROOT / "bench_results" / "precision"
NAME = "precision.jsonl"
NORMAL, QUICK, FULL = Shape(256, 512, 4096), Shape(16, 64, 256), Shape(1024, 4096, 151_936)
QUICK_REGIMES = ("random", "moderate", "bias+1e4", "softcap")
# errors over |logit|: a random head whose logits an outlier channel moves away from 0
SWEEP = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
SWEEP_SHAPE = Shape(64, 512, 2048)
SWEPT = ("fp32", "bf16", "bf16-logits", "eager-bf16", "trl", "fp8_e4m3-row")
Errors = dict[str, list[float]]


# --- errors -----------------------------------------------------------------------------------------------------------


def token_quantities(logprobs: Tensor, case: Case) -> dict[str, Tensor]:
    """What follows from log-probs [T], in float64: the recipe's error is that of its log-probs."""
    difference = logprobs.double() - case.old_logprobs.double()
    ratio = difference.clamp(-20, 20).exp()
    shift = case.old_logprobs.double().exp() * torch.expm1(difference)
    weights = {f"weight_{delta}": 1 - case.advantages.double().sign() * shift / delta for delta in (0.2, 12.5)}
    return {"logprob": logprobs.double(), "ratio": ratio, "prob_shift": shift, **weights}


def errors_of(found: Result, exact: Exact, case: Case) -> Errors:
    """[max, p99, norm-wise relative] of each quantity; a NaN stays one."""
    want, errors = exact.result, {}
    if found.logprobs is not None:
        wanted = token_quantities(want.logprobs, case)
        for name, value in token_quantities(found.logprobs, case).items():
            errors[name] = _summary(value, wanted[name], wanted[name] if name == "ratio" else None)
    loss = (found.loss.double() - want.loss).abs().item() / exact.loss_scale
    errors["loss"] = [loss, loss, loss]
    for name in ("hidden", "weight"):
        if getattr(found, name) is not None:
            value, wanted = getattr(found, name).double(), getattr(want, name)
            errors[name] = _summary(value, wanted, wanted.abs().max())
    return errors


def _summary(found: Tensor, want: Tensor, scale: Tensor | None = None) -> list[float]:
    difference = found - want
    error = difference.abs() if scale is None else (difference / scale).abs()
    if error.isnan().any():
        return [float("nan")] * 3
    return [_short(x) for x in (error.max().item(), quantile(error), (difference.norm() / want.norm()).item())]


def _short(value: float) -> float:
    return float(f"{value:.3g}")


# --- measuring --------------------------------------------------------------------------------------------------------


class ExactResults:
    """Exact results of a case, one for every set of operands and objective."""

    def __init__(self, case: Case):
        self.case, self._known = case, {}

    def of(self, operands: str, recipe: Recipe) -> Exact:
        key = operands, recipe.objective
        if key not in self._known:
            self._known[key] = exact_result(self.case, OPERANDS[operands](self.case), recipe.objective)
        return self._known[key]


def measure_recipe(recipe: Recipe, case: Case, exact: ExactResults) -> Record:
    """{"status", "errors", "total"}; a peer that is missing or fails is a row that says so."""
    blank = {"errors": None, "total": None}
    if obstacle := recipe.obstacle(case):
        return {"status": obstacle, **blank}
    try:
        found = recipe.run(case)
    except Exception as error:  # a peer's failure is a row, not the end of the run
        if recipe.package is None:
            raise
        traceback.print_exception(error)
        return {"status": f"failed: {type(error).__name__}", **blank}
    errors = errors_of(found, exact.of(recipe.operands, recipe), case)
    total = None if recipe.operands == "bf16" else errors_of(found, exact.of("bf16", recipe), case)
    return {"status": "ok", "errors": errors, "total": total}


def measure_regime(name: str, shape: Shape, device: torch.device, advance: Callable[[], object]) -> Iterator[Record]:
    """Records of a regime: itself, every recipe, every engine against every trainer, the bars."""
    regime = REGIMES[name]
    shape = regime.shape or shape
    case = regime.case(shape, device=device)
    exact = ExactResults(case)
    default = exact.of("bf16", RECIPES["bf16"])
    facts = {name: _short(getattr(default, name)) for name in ("largest_logit", "largest_sum")}
    facts["entropy_nats"] = _short(default.entropy)
    yield {"kind": "regime", "regime": name, "label": regime.label, "shape": vars(shape), **facts}
    measured = {}
    for key, recipe in RECIPES.items():
        measured[key] = measure_recipe(recipe, case, exact)
        yield {"kind": "errors", "regime": name, "recipe": key, **measured[key]}
        advance()
    for record in measure_mismatch(case):
        yield {**record, "regime": name, "ratio": {k: [_short(x) for x in v] for k, v in record["ratio"].items()}}
    bound = logprob_bound(shape.hidden, default.largest_sum, case.temperature)
    for bar in bars({key: record["errors"] for key, record in measured.items()}, bound):
        yield {"kind": "bar", "regime": name, **bar}


def logprob_bound(hidden: int, largest_sum: float, temperature: float) -> float:
    """The contract: max(1e-4, 3 (H + 10) 2^-24 S / temperature), S the largest sum of absolute products of a logit."""
    return max(1e-4, 3 * (hidden + 10) * 2**-24 * largest_sum / temperature)


def ratio_bound(logprob: float) -> float:
    """Of the relative error of the ratio where log-probs are within `logprob` <= 1: |exp(ε) - 1| <= 2 |ε|."""
    return max(2e-4, 2 * logprob)


GRADIENT_BOUND = 4e-3


def bars(errors: dict[str, Errors | None], bound: float) -> Iterator[Record]:
    """What bf16 inputs with float32 logits must keep, on a CPU and as a GPU rounds them, and fp16 against bf16."""
    ours, half, device = errors["bf16"], errors["fp16"], errors["bf16-one-read"]
    values = [("logprob", ours["logprob"][0], bound), ("ratio", ours["ratio"][0], ratio_bound(bound))]
    values += [(name, ours[name][2], GRADIENT_BOUND) for name in ("hidden", "weight")]
    values += [(f"GPU {name}", device[name][2], GRADIENT_BOUND) for name in ("hidden", "weight")]
    values += [(f"fp16 {name}", half[name][2], ours[name][2]) for name in ("hidden", "weight")]
    for name, value, limit in values:
        yield {"bar": name, "value": value, "bound": _short(limit), "met": value <= limit}


def measure_sweep(shape: Shape, device: torch.device) -> Iterator[Record]:
    """Errors of log-probs over the largest |logit|."""
    for size in SWEEP:
        regime = regimes.Regime("", lambda s, g, size=size: regimes.offset(s, g, size, regimes.random))
        case = regime.case(shape, device=device)
        exact, found = ExactResults(case), {}
        for key in SWEPT:
            if RECIPES[key].obstacle(case) is None:
                result = RECIPES[key].run(case)
                found[key] = errors_of(result, exact.of("bf16", RECIPES[key]), case)["logprob"]
        default = exact.of("bf16", RECIPES["bf16"])
        bound = logprob_bound(shape.hidden, default.largest_sum, 1.0)
        largest = _short(default.largest_logit)
        yield {"kind": "sweep", "largest_logit": largest, "bound": _short(bound), "logprob": found}


# --- the run ----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, plot, print the bars; a bar that is not met is printed as such and is no failure of the run."""
    parser = _parser()
    options = parser.parse_args(argv)
    source = provenance(cli.command(parser, options), torch.device(options.device))
    shape = QUICK if options.quick else FULL if options.full else NORMAL
    names = options.regimes or (QUICK_REGIMES if options.quick else list(REGIMES))
    folder = cli.results(options, FOLDER)
    records = []
    if folder is not None:
        write(folder / NAME, [])
    for record in _records(options, names, shape, source):
        records.append(record)
        if folder is not None:
            append(folder / NAME, record)
    if folder is not None:
        _plot(records, folder)
    print("\n".join(_lines(records)))
    return 0


def _records(options: argparse.Namespace, names: Sequence[str], shape: Shape, source: Record) -> Iterator[Record]:
    device = torch.device(options.device)
    yield {"kind": "run", "benchmark": "precision", "shape": vars(shape), **source}
    progress = Progress(len(names) * len(RECIPES))
    for name in names:
        progress.say(name)
        yield from measure_regime(name, shape, device, progress.advance)
    progress.say("errors over |logit|")
    yield from measure_sweep(QUICK if options.quick else SWEEP_SHAPE, device)
    progress.close()


def _plot(records: Sequence[Record], folder: Path) -> None:
    try:
        from benchmarks.precision.plots import draw
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is not installed", file=sys.stderr)
    else:
        draw(records, folder)


def _lines(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if record["kind"] == "bar" and (not record["bar"].startswith("fp16") or record["regime"] == "V151936"):
            verdict = "met" if record["met"] else "NOT MET"
            numbers = f"{record['value']:9.2e} <= {record['bound']:.2e}"
            yield f"{record['regime']:<15} {record['bar']:<12} {numbers}  {verdict}"


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("benchmarks.precision", __doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    cli.add_quick(size, "tiny shapes, few regimes")
    size.add_argument("--full", action="store_true", help="T=1024 H=4096 V=151936, for a GPU")
    cli.add_device(parser, "cpu")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES)
    cli.add_out(parser, FOLDER, "a folder")
    return parser
