"""`python -m benchmarks.precision` measures what each recipe does to log-probs, ratio, DRPO's weight and gradients.

Every number is an error against float64. `errors` are those of a recipe's arithmetic, against the exact result of the
operands that it multiplies (already rounded to fp16 or fp8 where it says so). `total`, where it differs, includes the
rounding of the operands, against the exact result of the bf16 model. Each quantity has [max, p99, norm-wise relative]:

    logprob, prob_shift (π - μ), weight_0.2 and weight_12.5 (DRPO's w at that δ)   |error|
    ratio                                                                         |error| / ratio
    loss                                                                          |error| / Σ |terms of the loss|
    hidden, weight (dX and dW)                                                    |error| / largest entry

There is one JSON line for the run, each regime, each recipe in it, each rollout engine against every trainer and each
bar. `--regimes real` also has the engines of the recording, and results of its own in bench_results/smollm/.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.harness import cli, regimes
from benchmarks.harness.progress import Progress
from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.recording import recorded
from benchmarks.harness.records import Record, append, write
from benchmarks.harness.regimes import REGIMES, SYNTHETIC, Exact, Result, exact_result
from benchmarks.harness.workloads import Inputs, Shape
from benchmarks.precision.mismatch import measure_engines, measure_mismatch, percentile_99, three_digits
from benchmarks.precision.recipes import OPERANDS, RECIPES, Recipe

RESULTS = ROOT / "bench_results" / "precision" / "precision.jsonl"
REAL_RESULTS = ROOT / "bench_results" / "smollm" / "precision.jsonl"
NORMAL, QUICK, FULL = Shape(256, 512, 4096), Shape(16, 64, 256), Shape(1024, 4096, 151_936)
QUICK_REGIMES = ("random", "moderate", "bias+1e4", "softcap")
GRADIENT_BOUND = 4e-3
Errors = dict[str, list[float]]
ExactOf = Callable[[str, object], Exact]  # (a key of OPERANDS, an objective) -> exact result


# --- errors -----------------------------------------------------------------------------------------------------------


def token_quantities(logprobs: Tensor, case: Inputs) -> dict[str, Tensor]:
    """Return what follows from log-probs [T], in float64, so that a recipe's error is that of its log-probs."""
    difference = logprobs.double() - case.old_logprobs.double()
    ratio = difference.clamp(-20, 20).exp()
    shift = case.old_logprobs.double().exp() * torch.expm1(difference)
    weights = {f"weight_{delta}": 1 - case.advantages.double().sign() * shift / delta for delta in (0.2, 12.5)}
    return {"logprob": logprobs.double(), "ratio": ratio, "prob_shift": shift, **weights}


def errors_of(found: Result, exact: Exact, case: Inputs) -> Errors:
    """Return [max, p99, norm-wise relative] of each quantity. A NaN stays a NaN."""
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
    relative = (difference.norm() / want.norm()).item()
    return [three_digits(x) for x in (error.max().item(), percentile_99(error), relative)]


# --- measuring --------------------------------------------------------------------------------------------------------


def exact_of(case: Inputs) -> ExactOf:
    """Return a function that gives the exact results of a case, each computed once."""
    return functools.cache(lambda operands, objective: exact_result(case, OPERANDS[operands](case), objective))


def obstacle(recipe: Recipe, case: Inputs) -> str | None:
    """Return why the recipe does not run here, or None."""
    if recipe.package is not None and importlib.util.find_spec(recipe.package) is None:
        return f"{recipe.package} not installed"
    return "no soft-cap" if case.softcap is not None and not recipe.softcap else None


def measure_recipe(recipe: Recipe, case: Inputs, exact: ExactOf) -> Record:
    """Measure a recipe, and return {"status", "errors", "total"}. The record of a peer that is missing or fails says
    so.
    """
    status, errors, total = obstacle(recipe, case) or "ok", None, None
    if status == "ok":
        try:
            found = recipe.run(case)
        except Exception as error:  # A peer's failure is not the end of the run.
            if recipe.package is None:
                raise
            traceback.print_exception(error)
            status = f"failed: {type(error).__name__}"
        else:
            errors = errors_of(found, exact(recipe.operands, recipe.objective), case)
            if recipe.operands != "bf16":
                total = errors_of(found, exact("bf16", recipe.objective), case)
    return {"status": status, "errors": errors, "total": total}


def measure_regime(name: str, shape: Shape, device: torch.device, advance: Callable[[], object]) -> Iterator[Record]:
    """Yield the records of a regime: its own, every recipe's, every engine's against every trainer, and the bars'."""
    regime = REGIMES[name]
    shape = regime.shape or shape
    case = regime.case(shape, device=device)
    exact = exact_of(case)
    default = exact("bf16", regimes.OBJECTIVE)
    facts = {
        "largest_logit": three_digits(default.largest_logit), "largest_sum": three_digits(default.largest_sum),
        "entropy_nats": three_digits(default.entropy),
    }  # fmt: skip
    yield {"kind": "regime", "regime": name, "label": regime.label, "shape": vars(shape), **facts}
    measured = {}
    for key, recipe in RECIPES.items():
        measured[key] = measure_recipe(recipe, case, exact)
        yield {"kind": "errors", "regime": name, "recipe": key, **measured[key]}
        advance()
    for record in measure_mismatch(case):
        yield {**record, "regime": name}
    if name == "real":
        for record in measure_engines(recorded()):
            yield {**record, "regime": name}
    bound = logprob_bound(shape.hidden, default.largest_sum, case.temperature)
    for bar in bars({key: record["errors"] for key, record in measured.items()}, bound):
        yield {"kind": "bar", "regime": name, **bar}


def logprob_bound(hidden: int, largest_sum: float, temperature: float) -> float:
    """Return the contract's bound, max(1e-4, 3 (H + 10) 2^-24 S / temperature), where S is the largest sum of absolute
    products of a logit.
    """
    return max(1e-4, 3 * (hidden + 10) * 2**-24 * largest_sum / temperature)


def ratio_bound(logprob: float) -> float:
    """Return the relative error of the ratio where log-probs are within `logprob` <= 1: |exp(ε) - 1| <= 2 |ε|."""
    return max(2e-4, 2 * logprob)


def bars(errors: dict[str, Errors | None], bound: float) -> Iterator[Record]:
    """Yield the bars that bf16 inputs with float32 logits must keep, on a CPU and as a GPU rounds them, and that fp16
    must keep against bf16.
    """
    default, half, device = errors["bf16"], errors["fp16"], errors["bf16-one-read"]
    values = [("logprob", default["logprob"][0], bound), ("ratio", default["ratio"][0], ratio_bound(bound))]
    values += [(name, default[name][2], GRADIENT_BOUND) for name in ("hidden", "weight")]
    values += [(f"GPU {name}", device[name][2], GRADIENT_BOUND) for name in ("hidden", "weight")]
    values += [(f"fp16 {name}", half[name][2], default[name][2]) for name in ("hidden", "weight")]
    for name, value, limit in values:
        yield {"bar": name, "value": value, "bound": three_digits(limit), "met": value <= limit}


# --- the run ----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print the bars. A bar that is not met is printed as such, and is no failure of the run."""
    parser = _parser()
    options = parser.parse_args(argv)
    source = provenance(cli.command(parser, options), torch.device(options.device))
    out = cli.results(options, REAL_RESULTS if options.regimes == ["real"] else RESULTS)
    if out is not None:
        write(out, [])
    for record in _records(options, source):
        if out is not None:
            append(out, record)
        if record["kind"] == "bar":
            verdict = "met" if record["met"] else "NOT MET"
            numbers = f"{record['value']:9.2e} <= {record['bound']:.2e}"
            print(f"{record['regime']:<15} {record['bar']:<12} {numbers}  {verdict}")
    return 0


def _records(options: argparse.Namespace, source: Record) -> Iterator[Record]:
    device, shape = torch.device(options.device), QUICK if options.quick else FULL if options.full else NORMAL
    names = options.regimes or (QUICK_REGIMES if options.quick else SYNTHETIC)
    yield {"kind": "run", "benchmark": "precision", "shape": vars(REGIMES[names[0]].shape or shape), **source}
    progress = Progress(len(names) * len(RECIPES))
    for name in names:
        progress.say(name)
        yield from measure_regime(name, shape, device, progress.advance)
    progress.close()


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("benchmarks.precision", __doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    cli.add_quick(size, "tiny shapes, few regimes")
    size.add_argument("--full", action="store_true", help="T=1024 H=4096 V=151936, for a GPU")
    cli.add_device(parser, "cpu")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES)
    cli.add_out(parser, RESULTS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
