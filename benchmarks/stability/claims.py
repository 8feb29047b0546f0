"""The comparisons between methods, and the paper's claims with what the runs say to each, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import pandas as pd
from scipy.stats import fisher_exact

from benchmarks.stability.runs import Runs
from benchmarks.stability.settings import CORE_METHODS, METHODS, SETTINGS
from benchmarks.stability.statistics import ENOUGH, LEVEL, Estimate, bootstrap, counted, holm, paired_p
from drpo_kernels import DPPO, DRPO, PPO, SPO

BASELINE = "on-policy"
REFERENCES = ("DRPO δ=0.2", "DRPO δ=12.5")
CLIPPED = [name for name, objective in METHODS.items() if isinstance(objective, (PPO, SPO))]
BOUNDED = [name for name, objective in METHODS.items() if isinstance(objective, (DPPO, DRPO))]
Cell = tuple[str, str]  # method, setting


@dataclass(frozen=True)
class Comparison:
    """One cell minus another over the seeds of both; `p` is corrected for the other comparisons of its family."""

    cell: Cell
    other: Cell
    difference: Estimate
    p: float

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes zero and the corrected test agrees, else 0."""
        return (int(self.difference.low > 0) - int(self.difference.high < 0)) * (self.p < 1 - LEVEL)


def compared(runs: Runs, outcome: str, pairs: Iterable[tuple[Cell, Cell]]) -> list[Comparison]:
    """One family of comparisons: those of the pairs that share enough seeds."""
    values = runs.comparison.pivot(index="seed", columns=["method", "setting"], values=outcome)
    present = [(cell, other) for cell, other in pairs if cell in values.columns and other in values.columns]
    differences = {(cell, other): (values[cell] - values[other]).dropna() for cell, other in present}
    differences = {pair: found for pair, found in differences.items() if len(found) >= ENOUGH}
    corrected = holm([paired_p(found) for found in differences.values()])
    return [Comparison(*pair, bootstrap(differences[pair]), p) for pair, p in zip(differences, corrected, strict=True)]


def with_references(runs: Runs, outcome: str, setting: str) -> list[Comparison]:
    """Each reference minus every other method. The core methods are one family, and all others are another."""
    names = [(a, b) for a, b in product(REFERENCES, METHODS) if a != b and (a, b) != REFERENCES[::-1]]
    pairs = [((a, setting), (b, setting)) for a, b in names]
    core = [(cell, other) for cell, other in pairs if other[0] in CORE_METHODS]
    return compared(runs, outcome, core) + compared(runs, outcome, [pair for pair in pairs if pair not in core])


def claims(runs: Runs) -> str:
    """Each claim of the paper with what the runs say to it."""
    found = [comparison for setting in runs.settings for comparison in with_references(runs, "area", setting)]
    clipped = [method for method in CLIPPED if method in CORE_METHODS]
    said = {
        "Losses clipped by the ratio become unstable off-policy.": [*on_collapses(runs), on_sweep(runs)],
        "DPPO's hard mask is stable but slow.": [_against(found, "DPPO-TV")],
        "DRPO is more efficient than losses clipped by the ratio.": [_against(found, other) for other in clipped],
        "The regulariser makes a difference to the plain policy gradient.": [_against(found, "PG")],
    }
    return "\n".join("\n  * ".join([f"* *{claim}*", *sentences]) for claim, sentences in said.items())


def on_delta(runs: Runs) -> str:
    """Whether δ = 0.2 paid, and whether δ = 12.5 was anything but the policy gradient."""
    found = [comparison for setting in runs.settings for comparison in with_references(runs, "area", setting)]
    small, large = ([c for c in found if c.cell[0] == reference] for reference in REFERENCES)
    return f"{_against(small, REFERENCES[1], REFERENCES[0])} {_against(large, 'PG', REFERENCES[1])}"


def _against(comparisons: Sequence[Comparison], other: str, subject: str = "DRPO") -> str:
    return f"Against {other}, {subject} was {_tally([c for c in comparisons if c.other[0] == other])}"


def _tally(comparisons: Sequence[Comparison]) -> str:
    """How many comparisons show a larger area, and how many a smaller one."""
    if not comparisons:
        return f"not compared on {ENOUGH} seeds yet."
    faster, slower = (_listing([c for c in comparisons if c.sign == sign]) for sign in (1, -1))
    even = sum(c.sign == 0 for c in comparisons)
    return f"faster in {faster}, slower in {slower} and no different in {even} of {len(comparisons)} comparisons."


def _listing(comparisons: Sequence[Comparison]) -> str:
    """Their number, and each with its difference, as in "1 (PPO, stale: +0.012)"."""
    each = "; ".join(f"{c.cell[0]}, {c.cell[1]}: {c.difference.mean:+.3f}" for c in comparisons)
    return f"{len(comparisons)} ({each})" if each else "0"


def on_costs(runs: Runs) -> str:
    """What each setting costs a method. At a rate that is given it is not the setting alone that costs."""
    lines = []
    for setting in _chosen_rate(runs):
        found = compared(runs, "area", [((method, setting), (method, BASELINE)) for method in runs.methods])
        lines.append(f"* Against itself on-policy, a method in **{setting}** was {_tally(found)}")
    return "\n".join(lines)


def _chosen_rate(runs: Runs) -> list[str]:
    """The settings off-policy in which each method has the rate that the sweep chose for it."""
    return [setting for setting in runs.settings if setting != BASELINE and SETTINGS[setting].rate is None]


def on_collapses(runs: Runs) -> list[str]:
    """How many runs collapsed off-policy: at the rates chosen for each method, and at each rate given to all."""
    chosen = _chosen_rate(runs)
    given = [setting for setting in runs.settings if setting not in {*chosen, BASELINE}]
    groups = [("At the learning rate chosen for each method", chosen)]
    groups += [("At one rate for all methods", [setting]) for setting in given]
    return [_collapses(runs, opening, settings) for opening, settings in groups if settings]


def _collapses(runs: Runs, opening: str, settings: Sequence[str]) -> str:
    found = runs.comparison[runs.comparison["setting"].isin(settings)]
    said = f"{opening} ({', '.join(settings)}), {_share(found)} runs collapsed"
    if not found["collapsed"].any():
        return f"{said}: the paper's instability is **not seen** there."
    each = {method: found[found["method"] == method] for method in runs.methods}
    fallen = ", ".join(f"{method} {_share(of)}" for method, of in each.items() if of["collapsed"].any())
    for_good = found["collapsed_for_good"].sum()
    return f"{said}, {for_good} of them for good: {fallen}, and none of any other method. {_families(found)}".rstrip()


def _share(runs: pd.DataFrame) -> str:
    return counted(int(runs["collapsed"].sum()), len(runs))


def _families(runs: pd.DataFrame) -> str:
    """Losses clipped by the ratio against those bounded by |π - μ|."""
    clipped, bounded = (runs[runs["method"].isin(family)] for family in (CLIPPED, BOUNDED))
    if clipped.empty or bounded.empty:
        return ""
    counts = [[family["collapsed"].sum(), (~family["collapsed"]).sum()] for family in (clipped, bounded)]
    p = fisher_exact(counts).pvalue
    more = clipped["collapsed"].mean() > bounded["collapsed"].mean()
    verdict = "no difference" if p >= 1 - LEVEL else "more often" if more else "*less* often"
    return (
        f"Losses clipped by the ratio collapsed in {_share(clipped)} runs and those bounded by |π - μ| in "
        f"{_share(bounded)}: {verdict} (p = {p:.2g})."
    )


def on_sweep(runs: Runs) -> str:
    """The lowest rate of the sweep at which a run of each method collapsed."""
    lowest = runs.sweep[runs.sweep["collapsed"]].groupby("method")["lr"].min()
    never = [method for method in METHODS if method in set(runs.sweep["method"]) - set(lowest.index)]
    fallen = [f"{method} from {lowest[method]:g}" for method in METHODS if method in lowest.index]
    never = f"no run of {' and '.join(never)} did up to {max(runs.size.rates):g}" if never else ""
    fallen = f"runs collapsed of {', '.join(fallen)}" if fallen else ""
    return f"In the sweep of learning rates {'; '.join(filter(None, (fallen, never)))}."
