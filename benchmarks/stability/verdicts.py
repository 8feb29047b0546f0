"""What the runs say, in sentences that only the runs decide.

A difference whose bootstrap interval includes zero is "no difference". Another is a difference where it survives Holm's
correction over the comparisons of the same outcome in the same setting, and is otherwise said not to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.stability.grid import area
from benchmarks.stability.outcomes import Cell, Outcome, Runs, collapsed, collapsed_for_good, final
from benchmarks.stability.settings import CORE_METHODS, METHODS, RATES, SWEEP_SETTING
from benchmarks.stability.statistics import ENOUGH, LEVEL, Estimate, bootstrap, differences, holm, paired_p, wilson
from drpo_kernels import DPPO, DRPO, PPO, SPO

BASELINE = "on-policy"
ALL = "the core methods"
REFERENCES = ("DRPO δ=0.2", "DRPO δ=12.5")
CLIPPED = [name for name, objective in METHODS.items() if isinstance(objective, (PPO, SPO))]
BOUNDED = [name for name, objective in METHODS.items() if isinstance(objective, (DPPO, DRPO))]
DRPOS = [name for name, objective in METHODS.items() if isinstance(objective, DRPO)]
OUTCOMES: dict[str, Outcome] = {"area under the curve": area, "final accuracy": final}


@dataclass(frozen=True)
class Comparison:
    """One cell minus another over the seeds of both; `p` is corrected over the comparisons it was made with."""

    cell: Cell
    other: Cell
    difference: Estimate
    p: float

    @property
    def verdict(self) -> str:
        """Fits between "A is" and "B": "above", "no different from", ..."""
        if self.difference.count < ENOUGH:
            return "not yet comparable with"
        if self.difference.sign == 0:
            return "no different from"
        word = "above" if self.difference.sign > 0 else "below"
        return word if self.p < 1 - LEVEL else f"{word} (not after correction)"


def compared(outcome_of: dict[Cell, dict[int, float]], pairs: Sequence[tuple[Cell, Cell]]) -> list[Comparison]:
    """The pairs that share a seed, corrected for each other, from each cell's outcome by seed."""
    values = {pair: differences(outcome_of[pair[0]], outcome_of[pair[1]]) for pair in pairs}
    values = {pair: found for pair, found in values.items() if found}
    corrected = holm([paired_p(found) if len(found) >= ENOUGH else math.nan for found in values.values()])
    return [Comparison(*pair, bootstrap(found), p) for (pair, found), p in zip(values.items(), corrected, strict=True)]


def _pairs(runs: Runs, outcome: Outcome, pairs: Sequence[tuple[Cell, Cell]]) -> list[Comparison]:
    cells = {cell: runs.values(outcome, *cell) for pair in pairs for cell in pair}
    return compared(cells, pairs)


def of_references(runs: Runs, outcome: Outcome, setting: str) -> list[Comparison]:
    """Each reference minus every other method, once each; core methods are one family, others another."""
    core = [method for method in runs.methods if method in CORE_METHODS]
    others = [method for method in runs.methods if method not in CORE_METHODS]
    families = (reference_pairs(methods, setting) for methods in (core, others))
    return [comparison for pairs in families for comparison in _pairs(runs, outcome, pairs)]


def reference_pairs(methods: Sequence[str], where: object) -> list[tuple[Cell, Cell]]:
    """Each reference with every other of the methods in one setting (or at one rate), a pair of references once."""
    rest = [[method for method in methods if method not in REFERENCES[: i + 1]] for i in range(len(REFERENCES))]
    return [
        ((reference, where), (method, where))
        for reference, others in zip(REFERENCES, rest, strict=True)
        for method in others
    ]


def of_setting(runs: Runs, outcome: Outcome, setting: str) -> list[Comparison]:
    """Each method minus itself on-policy: what the setting costs."""
    return _pairs(runs, outcome, [((method, setting), (method, BASELINE)) for method in runs.methods])


def of_delta(runs: Runs, outcome: Outcome, setting: str) -> list[Comparison]:
    """DRPO at each other δ minus DRPO at 12.5."""
    others = [method for method in DRPOS if method != REFERENCES[1] and method in runs.methods]
    return _pairs(runs, outcome, [((method, setting), (REFERENCES[1], setting)) for method in others])


def moved(runs: Runs, outcome: Outcome) -> list[Comparison]:
    """Each other setting minus on-policy, in an outcome's mean over the core methods, the same ones in both."""
    return [comparison for setting in runs.settings for comparison in _moved(runs, outcome, setting)]


def _moved(runs: Runs, outcome: Outcome, setting: str) -> list[Comparison]:
    shared = [m for m in CORE_METHODS if runs.values(outcome, m, setting) and runs.values(outcome, m, BASELINE)]
    if setting == BASELINE or not shared:
        return []
    cells = {(ALL, name): _mean_over(runs, outcome, shared, name) for name in (setting, BASELINE)}
    return compared(cells, [((ALL, setting), (ALL, BASELINE))])


def level(runs: Runs, outcome: Outcome, setting: str) -> Estimate:
    """The outcome's mean over the core methods that were run in the setting."""
    present = [method for method in CORE_METHODS if runs.values(outcome, method, setting)]
    return bootstrap(list(_mean_over(runs, outcome, present, setting).values()) if present else [])


def _mean_over(runs: Runs, outcome: Outcome, methods: Sequence[str], setting: str) -> dict[int, float]:
    """By seed, of the seeds that every one of the methods has."""
    values = [runs.values(outcome, method, setting) for method in methods]
    seeds = set.intersection(*(set(found) for found in values))
    return {seed: sum(found[seed] for found in values) / len(values) for seed in sorted(seeds)}


def grouped(comparisons: Sequence[Comparison]) -> str:
    """As in "above A and B; no different from C": the other cells' methods under each verdict."""
    groups: dict[str, list[str]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.verdict, []).append(comparison.other[0])
    return "; ".join(f"{verdict} {listed(names)}" for verdict, names in sorted(groups.items()))


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def counted(hits: int, trials: int) -> str:
    """As in "3 of 5 [23%, 88%]"."""
    low, high = wilson(hits, trials)
    return f"{hits} of {trials} [{low:.0%}, {high:.0%}]"


def on_references(runs: Runs) -> list[str]:
    """A sentence per setting, outcome and reference."""
    sentences = []
    for setting in runs.settings:
        for label, outcome in OUTCOMES.items():
            comparisons = of_references(runs, outcome, setting)
            for reference in REFERENCES:
                chosen = [c for c in comparisons if c.cell[0] == reference]
                if chosen:
                    sentences.append(f"**{setting}**, {label}: {reference} is {grouped(chosen)}.")
    return sentences


def on_claims(runs: Runs) -> str:
    """The paper's claims, each with what was found, in Markdown."""
    if not runs.comparison:
        return ""
    ratio = [method for method in CLIPPED if method in CORE_METHODS]
    claims = {
        f"*Losses clipped by the ratio become unstable off-policy.* {on_stability(runs)} {on_rates(runs)}": [],
        "*DPPO's hard mask is stable but slow.* Area under the curve:": ["DPPO-TV"],
        "*DRPO is more efficient than losses clipped by the ratio.* Area under the curve:": ratio,
        "*The regulariser makes a difference to the plain policy gradient.* Area under the curve:": ["PG"],
    }
    lines = []
    for claim, others in claims.items():
        lines += [f"* {claim}", *(f"  * {said}" for said in _by_setting(runs, others))]
    return "\n".join(lines)


def _by_setting(runs: Runs, others: Sequence[str]) -> list[str]:
    """Both references against the others, a sentence per setting."""
    said = []
    for setting in runs.settings if others else []:
        chosen = [c for c in of_references(runs, area, setting) if c.other[0] in others]
        each = [f"{c.cell[0]} is {c.verdict} {c.other[0]} ({signed(c.difference)})" for c in chosen]
        if each:
            said.append(f"**{setting}**: {'; '.join(each)}.")
    return said


def on_rates(runs: Runs) -> str:
    """Which runs of the sweep collapsed: instability that the choice of a rate avoids."""
    swept = [method for method in METHODS if any(method == found for found, _ in runs.sweep)]
    hits = {cell: sum(map(collapsed, found.values())) for cell, found in runs.sweep.items()}
    each = [
        f"{m} at {lr:g} ({hits[m, lr]} of {len(runs.sweep[m, lr])})" for m in swept for lr in RATES if hits.get((m, lr))
    ]
    held = [method for method in swept if not any(hits.get((method, lr)) for lr in RATES)]
    if not each:
        return "No run of the sweep of learning rates collapsed either." if swept else ""
    never = f"; at no rate: {listed(held)}" if held else ""
    return f"In the sweep of learning rates ({SWEEP_SETTING}) runs collapsed of {', '.join(each)}{never}."


def on_sweep(runs: Runs) -> list[str]:
    """Each reference against the core methods at every rate of the sweep, where seeds are enough for a verdict."""
    sentences = []
    for lr in RATES:
        areas = {(m, lr): {seed: area(run) for seed, run in runs.sweep.get((m, lr), {}).items()} for m in CORE_METHODS}
        pairs = reference_pairs(CORE_METHODS, lr)
        comparisons = [c for c in compared(areas, pairs) if c.difference.count >= ENOUGH]
        for reference in REFERENCES:
            chosen = [c for c in comparisons if c.cell[0] == reference]
            if chosen:
                sentences.append(f"**{lr:g}**, area under the curve: {reference} is {grouped(chosen)}.")
    return sentences


def on_stability(runs: Runs) -> str:
    """Do ratio-clipped losses collapse, and the others not? At the rate of each, and at one rate for all."""
    chosen = [setting for setting in runs.free_settings if setting != BASELINE]
    given = [setting for setting in runs.settings if setting not in runs.free_settings]
    if not chosen + given:
        return "No run off-policy yet."
    openings = [("At the chosen rates, off-policy", chosen)] + [("At a rate that is given", [one]) for one in given]
    return " ".join(_on_collapses(runs, opening, settings) for opening, settings in openings if settings)


def _on_collapses(runs: Runs, opening: str, settings: Sequence[str]) -> str:
    tried = {m: [run for s in settings for run in runs.of(m, s).values()] for m in runs.methods}
    tried = {method: found for method, found in tried.items() if found}
    everything = [run for found in tried.values() for run in found]
    hits = {method: sum(map(collapsed, found)) for method, found in tried.items()}
    for_good = sum(map(collapsed_for_good, everything))
    fallen = counted(sum(hits.values()), len(everything))
    said = f"{opening} ({listed(settings)}), {fallen} runs collapsed at some point"
    if not sum(hits.values()):
        unseen = "the paper's instability is **not seen** there"
        return f"{said}. No loss is unstable in the sense fixed beforehand: {unseen}."
    each = ", ".join(f"{method} {counted(hits[method], len(found))}" for method, found in tried.items() if hits[method])
    rest = "; none under any other" if not all(hits.values()) else ""
    return f"{said}, {for_good} of them for good. By method: {each}{rest}. {_families(tried, hits)}".rstrip()


def _families(tried: dict[str, list], hits: dict[str, int]) -> str:
    """Ratio-clipped losses against those bounded by |π - μ|: a difference is two intervals that do not overlap."""
    shares = []
    for family in (CLIPPED, BOUNDED):
        present = [method for method in family if method in tried]
        shares.append((sum(hits[m] for m in present), sum(len(tried[m]) for m in present)))
    if not all(trials for _, trials in shares):
        return ""
    (clipped, bounded), (low, high) = shares, [wilson(*share) for share in shares]
    counts = f"{counted(*clipped)} against {counted(*bounded)}"
    if low[0] > high[1]:
        return f"Losses clipped by the ratio collapse more often than those bounded by |π - μ|: {counts}."
    if high[0] > low[1]:
        return f"Losses clipped by the ratio collapse *less* often than those bounded by |π - μ|: {counts}."
    return f"Between losses clipped by the ratio and those bounded by |π - μ| there is no difference: {counts}."


def on_costs(runs: Runs) -> list[str]:
    """What each setting costs each method, against itself on-policy."""
    sentences = []
    for setting in runs.free_settings:  # at another rate it is not the setting alone that costs
        for label, outcome in OUTCOMES.items():
            groups: dict[str, list[str]] = {}
            for comparison in of_setting(runs, outcome, setting) if setting != BASELINE else []:
                groups.setdefault(comparison.verdict, []).append(comparison.cell[0])
            said = "; ".join(f"{verdict} itself: {listed(names)}" for verdict, names in sorted(groups.items()))
            if said:
                sentences.append(f"**{setting}** against on-policy, {label}: {said}.")
    return sentences


def on_delta(runs: Runs) -> list[str]:
    """When does δ < 1 pay, and is 12.5 anything but the policy gradient?"""
    sentences = []
    for setting in runs.settings:
        for label, outcome in OUTCOMES.items():
            smaller = of_delta(runs, outcome, setting)
            plain = [
                c for c in of_references(runs, outcome, setting) if (c.cell[0], c.other[0]) == (REFERENCES[1], "PG")
            ]
            said = [f"{c.cell[0]} is {c.verdict} {c.other[0]} ({signed(c.difference)})" for c in [*smaller, *plain]]
            if said:
                sentences.append(f"**{setting}**, {label}: {'; '.join(said)}.")
    return sentences


def signed(difference: Estimate) -> str:
    """As in "+0.012 [-0.003, +0.027]"."""
    if difference.count < 2:
        return f"{difference.mean:+.3f}, one seed"
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
