"""The parts of docs/stability.md that runs decide, in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from benchmarks.harness.tables import NOTHING, table
from benchmarks.stability import verdicts
from benchmarks.stability.grid import area, chosen_rates
from benchmarks.stability.measures import RARE, RATIO_BOUNDARY, SHIFT_BOUNDARY
from benchmarks.stability.outcomes import (
    REACHED,
    Outcome,
    Runs,
    best,
    collapsed,
    collapsed_for_good,
    final,
    final_entropy,
    final_greedy,
    largest_gradient,
    lowest_greedy,
    mean_of,
    rollouts_to,
    warmed_up,
    weight_beyond,
)
from benchmarks.stability.policy import build_policy
from benchmarks.stability.settings import COLLAPSE, METHODS, RATES, SETTINGS, SMOKE, SWEEP_SEEDS, SWEEP_SETTING
from benchmarks.stability.statistics import ENOUGH, LEVEL, RESAMPLES, Estimate, coverage
from benchmarks.stability.task import COMPLETION_LENGTH


def bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"* {sentence}" for sentence in sentences)


def interval(estimate: Estimate, digits: int = 3) -> str:
    """As in "0.912 [0.901, 0.920]", with that many digits after the point; "0.912" of one seed."""
    if math.isnan(estimate.mean):
        return NOTHING
    numbers = [estimate.mean] if estimate.count < 2 else [estimate.mean, estimate.low, estimate.high]
    mean, *ends = (f"{number:.{digits}f}" for number in numbers)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def significant(estimate: Estimate) -> str:
    """The same with two significant digits."""
    if math.isnan(estimate.mean):
        return NOTHING
    if estimate.count < 2:
        return f"{estimate.mean:.2g}"
    return f"{estimate.mean:.2g} [{estimate.low:.2g}, {estimate.high:.2g}]"


def render_status(runs: Runs) -> str:
    """Which cells have how many seeds."""
    counts = {len(found) for found in runs.comparison.values()}
    lines = []
    if runs.size == SMOKE:
        lines.append("**A rehearsal (`--smoke`): these numbers mean nothing.**")
    missing = sum(not runs.of(method, setting) for method in runs.methods for setting in runs.settings)
    if not runs.comparison:
        return "\n\n".join([*lines, f"**No comparison yet**: {len(runs.records)} runs of the sweep of learning rates."])
    if len(counts) == 1 and not missing and counts >= {ENOUGH}:
        whole = f"{len(runs.methods)} methods × {len(runs.settings)} settings × {seeds(*counts)}"
        return "\n\n".join(
            [*lines, f"{whole}, and {sum(map(len, runs.sweep.values()))} runs to choose learning rates."]
        )
    lines.append(f"**The grid is not complete.** Seeds so far; a verdict needs {ENOUGH}:")
    rows = [[m, *(str(len(runs.of(m, s))) if runs.of(m, s) else NOTHING for s in runs.settings)] for m in runs.methods]
    return "\n\n".join([*lines, table(["method", *runs.settings], rows)])


def seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def render_setup(runs: Runs) -> str:
    """Sizes, and what follows from them."""
    size, vocabulary = runs.size, runs.size.vocabulary
    start = {run["seed"]: run for run in runs.records}.values()
    accuracies = [(warmed_up(run), run["evaluations"]["greedy"][0]) for run in start]
    sampled, greedy = ([each[i] for each in accuracies] for i in (0, 1))
    rows = [
        ("model", f"Qwen3, {size.layers} layers, width {size.hidden_size}, {size.heads} heads, tied, float32; "
                  f"{build_policy(size, 0).num_parameters():,} parameters"),
        ("vocabulary", f"{vocabulary.size}: {vocabulary.words} words, {vocabulary.remarks} remarks, operations, END"),
        ("warm-up", f"{size.warmup_steps} steps of {size.warmup_batch} demonstrations; an operation is a guess with "
                    f"probability {size.carelessness}"),
        ("held-out accuracy after it", f"sampled {min(sampled):.2f} to {max(sampled):.2f}, "
                                       f"greedy {min(greedy):.2f} to {max(greedy):.2f} over {seeds(len(accuracies))}"),
        ("a minibatch", f"{size.prompts} problems × {size.group} completions of at most {COMPLETION_LENGTH} tokens"),
        ("rollouts of a run", f"{size.minibatches} minibatches, {size.minibatches * size.completions:,} completions"),
        ("optimiser", f"AdamW without weight decay, gradient norm clipped at {size.grad_clip:g}, constant rate"),
        ("evaluation", f"{size.evaluation} held-out problems every {size.point} minibatches, sampled and greedy"),
    ]  # fmt: skip
    return table(("", ""), rows)


def render_settings(runs: Runs) -> str:
    """What each setting is, and what it was measured to do."""
    names = [*runs.settings] or [*SETTINGS]
    header = ("setting", "minibatches per rollout batch", "epochs", "rollout engine", "updates of a run", "rate")
    rows = []
    for name in names:
        setting = SETTINGS[name]
        updates = runs.size.minibatches * setting.epochs
        rate = "each method's own" if setting.rate is None else f"{setting.rate:g}"
        rows.append((name, str(setting.minibatches), str(setting.epochs), setting.precision, str(updates), rate))
    return table(header, rows)


def render_methods(runs: Runs) -> str:
    """Every method of settings.py, and what has been run of it."""
    rows = []
    for method, objective in METHODS.items():
        rate = runs.chosen_rate(method)
        shown = NOTHING if rate is None else f"{rate:g}"
        rows.append((method, f"`{objective!r}`", shown, str(sum(len(runs.of(method, s)) for s in runs.settings))))
    return table(("method", "objective", "learning rate", "runs compared"), rows)


MOVED: dict[str, Outcome] = {
    "mean |π - μ|": mean_of("prob_shift"),
    "mean |log r|": mean_of("log_ratio"),
    "mean |log r| of rare tokens": mean_of("log_ratio_rare"),
    "std of log r": mean_of("log_ratio_std"),
}


def render_moved(runs: Runs) -> str:
    """The settings do what they say, or not."""
    rows = []
    for name, outcome in MOVED.items():
        for c in verdicts.moved(runs, outcome):
            verdict = {1: "more", 0: "no difference", -1: "less"}[c.difference.sign]
            verdict = verdict if c.difference.count >= ENOUGH else f"no verdict on {seeds(c.difference.count)}"
            levels = (verdicts.level(runs, outcome, setting) for setting in (c.cell[1], c.other[1]))
            rows.append((c.cell[1], name, *map(significant, levels), significant(c.difference), verdict))
    if not rows:
        return "No setting beside on-policy has a seed in common with it yet."
    rows.sort(key=lambda row: [*SETTINGS].index(row[0]))
    rare = "; ".join(f"{s} {percent(verdicts.level(runs, mean_of('rare'), s))}" for s in runs.settings)
    return "\n\n".join((
        "Means over a run's updates and over the core methods, intervals over seeds:",
        table(("setting", "quantity", "there", "on-policy", "difference", "verdict"), rows),
        f"Share of rare tokens (μ < {RARE}) among those sampled: {rare}.",
    ))  # fmt: skip


def render_rates(runs: Runs) -> str:
    """Area under the curve of each method at each rate, and which was chosen."""
    rows, edges = [], []
    for method in [m for m in METHODS if any(m == found for found, _ in runs.sweep)]:
        swept = {lr: [*runs.sweep.get((method, lr), {}).values()] for lr in RATES}
        done = all(len(found) == len(SWEEP_SEEDS) for found in swept.values())
        chosen = chosen_rates(runs.records, [method])[method] if done else None
        cells = [_rate_cell(found, lr == chosen) for lr, found in swept.items()]
        learnt = [lr for lr in RATES if learns(runs, method, lr)]
        reach = f"{len(learnt)} of {len(RATES)}" + (f", up to {max(learnt):g}" if learnt else "")
        rows.append([method, *cells, reach if done else NOTHING])
        if chosen in (RATES[0], RATES[-1]):
            edges.append(f"{method} ({'lowest' if chosen == RATES[0] else 'highest'})")
    if not rows:
        return "No sweep yet."
    header = ["method", *(f"{lr:g}" for lr in RATES), "learns at"]
    text = (
        f"Area under the held-out curve in the {SWEEP_SETTING} setting, mean (least to most) of "
        f"{seeds(len(SWEEP_SEEDS))} that no other run uses; the chosen rate in bold. A method *learns* at a rate where "
        f"every seed's area is above its accuracy before the first update."
    )
    where = (
        f"Chosen at an edge of the sweep, so that a better rate may lie beyond it: {verdicts.listed(edges)}."
        if edges
        else ""
    )
    parts = (text, table(header, rows), where, bullets(verdicts.on_sweep(runs)))
    return "\n\n".join(part for part in parts if part)


def _rate_cell(found: Sequence[dict], chosen: bool) -> str:
    if not found:
        return NOTHING
    areas = [area(run) for run in found]
    text = f"{statistics.fmean(areas):.3f} ({min(areas):.3f} to {max(areas):.3f})"
    text = f"**{text}**" if chosen else text
    fallen = sum(map(collapsed, found))
    return f"{text}, {fallen} collapsed" if fallen else text


def learns(runs: Runs, method: str, lr: float) -> bool:
    """Every sweep run at this rate has a larger area than its policy's accuracy before the first update."""
    found = runs.sweep.get((method, lr), {}).values()
    return bool(found) and all(area(run) > warmed_up(run) for run in found)


def _by_setting(runs: Runs, header: Sequence[str], row: Callable[[str, str], list[str]]) -> str:
    """A table per setting, a row per method."""
    parts = []
    for setting in runs.settings:
        rows = [[method, *row(method, setting)] for method in runs.methods if runs.of(method, setting)]
        parts += [f"**{setting}**", table(["method", *header], rows)]
    return "\n\n".join(parts) or "No run yet."


def render_results(runs: Runs) -> str:
    """Accuracy, price and collapses."""

    def row(method: str, setting: str) -> list[str]:
        found = [*runs.of(method, setting).values()]
        prices = [rollouts_to(run, runs.size) for run in found]
        price = statistics.median(prices)
        reached = sum(map(math.isfinite, prices))
        return [
            str(len(found)),
            *(interval(runs.estimate(outcome, method, setting)) for outcome in (area, final, best)),
            f"{price:,.0f} ({reached} of {len(found)})"
            if math.isfinite(price)
            else f"not reached ({reached} of {len(found)})",
            verdicts.counted(sum(map(collapsed, found)), len(found)),
            str(sum(map(collapsed_for_good, found))),
        ]

    header = (
        "seeds", "area under the curve", "final accuracy", "best accuracy", f"rollouts to {REACHED:g} (runs that did)",
        "collapsed", "for good",
    )  # fmt: skip
    return _by_setting(runs, header, row)


def render_health(runs: Runs) -> str:
    """Greedy accuracy, entropy, divergence, gradient norm."""

    def row(method: str, setting: str) -> list[str]:
        largest = max(largest_gradient(run) for run in runs.of(method, setting).values())
        return [
            *(
                interval(runs.estimate(outcome, method, setting))
                for outcome in (final_greedy, lowest_greedy, final_entropy)
            ),
            *(
                significant(runs.estimate(mean_of(name), method, setting))
                for name in ("prob_shift", "log_ratio_std", "kl")
            ),
            f"{largest:.2g}",
        ]

    header = (
        "final greedy accuracy", "lowest greedy accuracy", "final entropy (nat)", "mean |π - μ|", "std of log r",
        "mean KL estimate k3", "largest gradient norm",
    )  # fmt: skip
    return _by_setting(runs, header, row)


def render_boundaries(runs: Runs) -> str:
    """Tokens beyond the boundaries, and what each loss does to their gradient."""

    def row(method: str, setting: str) -> list[str]:
        shares = (mean_of("beyond_shift"), mean_of("beyond_ratio"), mean_of("beyond_ratio_rare"))
        weights = (mean_of("weight_within"), weight_beyond("ratio"), weight_beyond("shift"))
        return [
            *(percent(runs.estimate(outcome, method, setting)) for outcome in shares),
            *(interval(runs.estimate(outcome, method, setting), 2) for outcome in weights),
        ]

    header = (
        f"beyond |π - μ| = {SHIFT_BOUNDARY}", f"beyond |r - 1| = {RATIO_BOUNDARY}", f"of these rare (μ < {RARE})",
        "weight within", "weight beyond the ratio's", "weight beyond the shift's",
    )  # fmt: skip
    return _by_setting(runs, header, row)


def percent(estimate: Estimate) -> str:
    if math.isnan(estimate.mean):
        return NOTHING
    numbers = [estimate.mean] if estimate.count < 2 else [estimate.mean, estimate.low, estimate.high]
    mean, *ends = (f"{100 * number:.2g}" for number in numbers)
    return f"{mean}% [{', '.join(ends)}]" if ends else f"{mean}%"


def render_differences(runs: Runs) -> str:
    """Every comparison of the references, with its interval."""
    parts = []
    for setting in runs.settings:
        columns = {
            label: verdicts.of_references(runs, outcome, setting) for label, outcome in verdicts.OUTCOMES.items()
        }
        rows = []
        for together in zip(*columns.values(), strict=True):
            cells = [text for c in together for text in (verdicts.signed(c.difference), p_value(c.p))]
            rows.append([f"{together[0].cell[0]} minus {together[0].other[0]}", *cells])
        if rows:
            header = ["difference", *(text for label in columns for text in (label, "p, corrected"))]
            parts += [f"**{setting}**", table(header, rows)]
    return "\n\n".join(parts) or "No two methods share a seed yet."


def p_value(p: float) -> str:
    return NOTHING if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def render_claims(runs: Runs) -> str:
    """The paper's claims, one by one."""
    return verdicts.on_claims(runs) or "No run yet."


def render_verdicts(runs: Runs) -> str:
    return bullets([*verdicts.on_references(runs), *verdicts.on_costs(runs)]) or "No two methods share a seed yet."


def render_delta(runs: Runs) -> str:
    """DRPO at every δ that was run, and the verdicts on them."""
    present = [method for method in verdicts.DRPOS if method in runs.methods]
    if not present:
        return "No DRPO run yet."
    rows = []
    for setting in runs.settings:
        for method in [m for m in present if runs.of(m, setting)]:
            estimates = [runs.estimate(outcome, method, setting) for outcome in (area, final)]
            rows.append([
                setting, f"{METHODS[method].delta:g}", f"{runs.rate(method, setting):g}", *map(interval, estimates),
                significant(runs.estimate(mean_of("prob_shift"), method, setting)),
                percent(runs.estimate(mean_of("beyond_shift"), method, setting)),
                interval(runs.estimate(mean_of("weight_within"), method, setting), 2),
                interval(runs.estimate(weight_beyond("shift"), method, setting), 2),
            ])  # fmt: skip
    header = (
        "setting", "δ", "rate", "area under the curve", "final accuracy", "mean |π - μ|",
        f"beyond |π - μ| = {SHIFT_BOUNDARY}", "weight within", "weight beyond",
    )  # fmt: skip
    absent = [method for method in verdicts.DRPOS if method not in runs.methods]
    note = f"Not run: {verdicts.listed(absent)} (`--full` runs every method)." if absent else ""
    return "\n\n".join(part for part in (table(header, rows), bullets(verdicts.on_delta(runs)), note) if part)


def render_intervals(runs: Runs) -> str:
    """What an interval of so few seeds is worth."""
    counts = sorted({len(found) for found in runs.comparison.values() if len(found) >= ENOUGH}) or [ENOUGH]
    worth = "; ".join(f"{coverage(count):.0%} of the time on {count} seeds" for count in counts)
    return (
        f"Intervals are {LEVEL:.0%} percentile bootstrap intervals of the mean over seeds ({RESAMPLES:,} resamples); "
        f"those of shares of runs are Wilson's. With so few seeds the bootstrap is too narrow: of normally distributed "
        f"seeds it holds the true mean {worth}, not {LEVEL:.0%}. So a verdict asks for more than the interval:\n\n"
        f'* "no different": the interval of the paired difference (same seeds, which share warm-up and held-out '
        f"problems) includes zero;\n"
        f'* "above" or "below": it does not, and a paired t test agrees (p < {1 - LEVEL:.2f}) after Holm\'s correction '
        f"over the comparisons of that outcome in that setting, of the core methods and of the others apart;\n"
        f'* "(not after correction)": the first without the second;\n'
        f"* on fewer than {ENOUGH} seeds there is no verdict.\n\n"
        f'"No different" means that these seeds do not show a difference, not that there is none.'
    )


def render_definitions(runs: Runs) -> str:
    return bullets([
        f"*Collapsed*: the sampled held-out accuracy fell below {COLLAPSE:.0%} of the best it had before, the "
        f"warm-up's included; *for good*: the mean of the last two evaluations is below it. Written before any run.",
        "*Area under the curve*: mean held-out accuracy over the run, sampled, by trapezoids.",
        f"*Rollouts to {REACHED:g}*: completions sampled until that accuracy is first crossed, linear between "
        f"evaluations; median over seeds. The {REACHED:g} was chosen with the first runs of the sweep in view, before "
        f"any comparison.",
        f"*Beyond a boundary*: moved past |π - μ| = {SHIFT_BOUNDARY} (DPPO's default) or |r - 1| = {RATIO_BOUNDARY} "
        f"(PPO's) in the direction in which the advantage pushes, among tokens with an advantage. *Rare*: μ < {RARE}.",
        "*Weight*: w in dℓ/dlogπ = -A r w, by autograd through the objective that trained: 1 leaves the policy "
        "gradient alone, 0 drops the token, below 0 pushes it back.",
    ])  # fmt: skip


def render_origin(runs: Runs) -> str:
    """Where the numbers come from."""

    def distinct(of: Callable[[dict], str]) -> str:
        return ", ".join(sorted({of(record) for record in runs.records}))

    machine = distinct(lambda r: f"{r['device']['cpu']}, {r['device']['cores']} cores, one thread a run")
    versions = distinct(lambda r: ", ".join(f"{n} {v}" for n, v in r["versions"].items() if n in VERSIONS))
    commits = distinct(
        lambda r: f"{(r['commit'] or 'unknown')[:12]}{' with uncommitted changes' if r['dirty'] else ''}"
    )
    commands = distinct(lambda r: f"`{r['command']}`")
    dates = distinct(lambda r: r["date"][:10])
    return f"{len(runs.records)} runs on {machine}; {versions}; commit {commits}; {commands}; {dates}."


VERSIONS = ("python", "torch", "drpo_kernels")
