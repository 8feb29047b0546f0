"""What the model says of the performance bars, what stands in the way of each, and what a change would buy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.roofline.chips import Chip
from benchmarks.roofline.methods import METHODS
from benchmarks.roofline.ours import Design, linear, sweep_plan
from benchmarks.roofline.predict import TILE, Prediction, occupied, predict
from benchmarks.roofline.work import FLOAT32, Problem

GIB = 1 << 30
LINEAR, FROZEN, RECOMPUTE = "linear_policy_loss", "linear_policy_loss_frozen_head", "linear_token_logprobs"
PEERS = ("trl", "verl", "liger_grpo", "cce_exact", "bound_8f")
BESIDE = ("rows", "scaling", "cast of dW", "small kernels")
SWEEP = tuple(1024 * count for count in (2, 4, 8, 16, 32, 64))


@dataclass(frozen=True)
class Bar:
    """A predicted range against a limit; `at_least`: larger is better. `why` is sentences."""

    what: str
    limit: float
    low: float
    high: float
    why: tuple[str, ...]
    at_least: bool = False

    @property
    def verdict(self) -> str:
        good, bad = (self.low, self.high) if self.at_least else (-self.high, -self.low)
        limit = self.limit if self.at_least else -self.limit
        return "met" if good >= limit else "missed" if bad < limit else "open"

    @property
    def bound(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:.2f}×"


def bars(chip: Chip, problem: Problem) -> list[Bar]:
    """All of them, for a problem with 16-bit inputs, all rows active and a trainable head."""
    return [
        _dense(chip, replace(problem, workspace=GIB), 1.18),
        _roomy(chip, replace(problem, workspace=2 * GIB), 1.10),
        _long(chip, replace(problem, workspace=GIB)),
        _peers(chip, problem),
        _memory(chip, problem),
        _active(chip, problem),
        _ready(chip, problem, 0.80),
        _ready(chip, replace(problem, itemsize=FLOAT32), 0.60),
        _recompute(chip, problem),
        _frozen(chip, problem),
    ]


def span(low: float, high: float, digits: int = 2) -> str:
    """Both ends, or one number where they round to the same."""
    ends = [f"{end:.{digits}f}" for end in sorted((low, high))]
    return ends[0] if ends[0] == ends[1] else "–".join(ends)


def _floors(prediction: Prediction) -> str:
    return f"{span(*prediction.times_floor, 3)}×"


def _shares(prediction: Prediction, names: Sequence[str]) -> str:
    """Milliseconds and share of the floor of stages, those that take any time."""
    stages = [stage for stage in prediction.stages if stage.name in names and stage.most > 0]
    return ", ".join(
        f"{stage.name} {span(stage.least * 1e3, stage.most * 1e3)} ms ({stage.least / prediction.floor.least:.1%})"
        for stage in stages
    )


def _dense(chip: Chip, problem: Problem, limit: float) -> Bar:
    found = predict(chip, LINEAR, problem)
    why = tuple(_dense_reasons(chip, problem, found))
    return Bar(_dense_name(problem), limit, *sorted(found.times_floor), why)


def _dense_name(problem: Problem) -> str:
    return f"dense, T={problem.tokens}, {problem.workspace // GIB} GiB, against the three products"


def _roomy(chip: Chip, problem: Problem, limit: float) -> Bar:
    """The same with more room."""
    found = predict(chip, LINEAR, problem)
    why = (f"The same stages in larger chunks: {_shares(found, ('logits', 'rows', 'dX', 'dW'))}.",)
    return Bar(_dense_name(problem), limit, *sorted(found.times_floor), why)


def _changed(chip: Chip, problem: Problem, design: Design) -> str:
    """`linear_policy_loss` of another design, relative to the floor."""
    return _floors(predict(chip, LINEAR, problem, linear(replace(problem, device=chip.preset), design)))


def _dense_reasons(chip: Chip, problem: Problem, found: Prediction) -> Iterator[str]:
    exposed = chip.seconds_for_bytes(sum(stage.exposed for stage in found.cost.stages)) * 1e3
    yield (
        f"Beyond the products: {_shares(found, BESIDE)}, and {exposed:.2f} ms of epilogue traffic for float32 results, "
        "somewhere between hidden behind the arithmetic and not."
    )
    twice = _changed(chip, problem, Design(one_read=False))
    narrow = _floors(predict(chip, "linear_policy_loss_bf16_logits", problem))
    upstream = _floors(predict(chip, LINEAR, replace(problem, upstream=True)))
    yield (
        f"With two reads of every logit, as with an entropy bonus: {twice}. With bf16 logits, which are read twice: "
        f"{narrow}. With an upstream factor that is not 1: {upstream}."
    )
    yield (
        f"With row kernels behind products on a second stream, at best {_overlapped(chip, found):.3f}×: a bound, for "
        "the two would share the processors."
    )


def _long(chip: Chip, problem: Problem) -> Bar:
    """Of so many rows that dW is a sum over windows."""
    problem = replace(problem, tokens=4 * problem.hidden, device=chip.preset)
    found = predict(chip, LINEAR, problem)
    cut, width = sweep_plan(problem, problem.tokens), problem.hidden
    windows = cut.windows
    share = occupied(chip, [(window.stop - window.start, width) for window in windows])
    fitting = cut.fitting or windows.largest
    roomy = predict(chip, LINEAR, replace(problem, workspace=2 * GIB))
    why = (
        f"{len(windows)} windows of {windows.largest} rows: {_shares(found, ('dW', *BESIDE))}; in 2 GiB "
        f"{_floors(roomy)}.",
        f"Tiles of {TILE[0]}×{TILE[1]} of a window's dX occupy {share:.0%} of the processors, unless the library "
        f"splits its inner dimension; those of windows of {fitting} rows, as many as fit, "
        f"{occupied(chip, [(fitting, width)]):.0%}.",
    )
    return Bar(_dense_name(problem), 1.18, *sorted(found.times_floor), why)


def _overlapped(chip: Chip, found: Prediction) -> float:
    """The roofline of the call as a whole, all of its bytes behind all of its arithmetic."""
    arithmetic = sum(stage.flops / chip.flops_per_second(stage.itemsize) for stage in found.cost.stages if stage.flops)
    return max(arithmetic, chip.seconds_for_bytes(found.cost.moved)) / found.floor.least


def _peers(chip: Chip, problem: Problem) -> Bar:
    ours = predict(chip, LINEAR, problem)
    others = {name: predict(chip, name, problem) for name in PEERS}
    ratios = {name: sorted((p.least / ours.least, p.most / ours.most)) for name, p in others.items()}
    best = min(PEERS, key=lambda name: ratios[name][0])
    compiled = predict(chip, "eager_compiled", problem)
    why = (
        "In times of ours: " + "; ".join(f"{METHODS[n].label} {span(*ratio)}×" for n, ratio in ratios.items()) + ".",
        f"Perfect heads of 8F and 6F are 8/6 = 1.33× apart: 1.2× over a perfect one needs {8 / 6 / 1.2:.2f}× of the "
        "floor or less from us.",
        f"Against eager code that a compiler fuses wholly no recomputation is saved: {_floors(compiled)} of the floor, "
        f"from bf16 logits, in {compiled.cost.extra / GIB:.1f} GiB where we take {ours.cost.extra / GIB:.1f}.",
    )
    what = f"the best other head ({METHODS[best].label}) against ours, T={problem.tokens}"
    return Bar(what, 1.2, *ratios[best], why, at_least=True)


def _memory(chip: Chip, problem: Problem) -> Bar:
    """The share of what is allowed, at worst over T."""
    shares, worst = [], []
    for tokens in SWEEP:
        case = replace(problem, tokens=tokens, workspace=GIB)
        cost = predict(chip, LINEAR, case).cost
        retained = case.itemsize * case.logits if tokens <= 2 * case.hidden else 0
        allowed = GIB + 0.1 * GIB + max(FLOAT32 * case.head, retained)
        shares.append((cost.extra - cost.gradients) / allowed)
        worst.append(f"{(cost.extra - cost.gradients) / GIB:.2f}")
    held = f"Beyond inputs and gradients, at T of {', '.join(f'{t // 1024}k' for t in SWEEP)}: {', '.join(worst)} GiB."
    return Bar("peak memory in 1 GiB, of what is allowed, T up to 65536", 1.0, max(shares), max(shares), (held,))


def _active(chip: Chip, problem: Problem) -> Bar:
    dense, few = predict(chip, LINEAR, problem), predict(chip, LINEAR, replace(problem, active_share=0.25))
    rest = [stage for stage in few.stages if stage.name in ("gather", "scatter", "cast of dW")]
    fixed = sum(stage.least for stage in rest) / dense.least
    why = (
        f"A quarter of the products and of the row kernel, and {fixed:.3f} of the dense time for gathering and "
        "scattering; dW is as large as ever.",
    )
    return Bar("25 % of rows active, of the dense time", 0.29, *_ratio(few, dense), why)


def _ratio(one: Prediction, other: Prediction) -> list[float]:
    return sorted((one.least / other.least, one.most / other.most))


def _ready(chip: Chip, problem: Problem, limit: float) -> Bar:
    found = predict(chip, "policy_loss", problem)
    row = problem.itemsize * problem.vocab
    low, high = sorted((found.floor.least / found.least, found.floor.most / found.most))
    kept = (
        f"keeps a row of {row / 1024:.0f} KiB per processor: the upper end with no more than one row there in flight."
        if chip.keeps(row)
        else f"does not keep a row of {row / 1024:.0f} KiB per processor: each is read twice from memory."
    )
    dtype = {2: "bf16", 4: "float32"}[problem.itemsize]
    why = (f"{_shares(found, ('small kernels', 'rows'))}; the cache {kept}",)
    return Bar(f"`policy_loss` from {dtype} logits, of a copy's speed", limit, low, high, why, at_least=True)


def _recompute(chip: Chip, problem: Problem) -> Bar:
    found = predict(chip, RECOMPUTE, problem)
    why = (f"{_shares(found, ('rows', 'rows again', 'cast of dW'))}.",)
    return Bar("`linear_token_logprobs` against four products", 1.12, *sorted(found.times_floor), why)


def _frozen(chip: Chip, problem: Problem) -> Bar:
    dense, found = predict(chip, LINEAR, problem), predict(chip, FROZEN, problem)
    why = (f"4/6 of the products and all of the row kernel, {_shares(found, ('rows',))} of the two products.",)
    return Bar("frozen head, of the dense time", 0.72, *_ratio(found, dense), why)
