"""Tests of the stability experiment's report: statistics, answers, tables and the page, from made-up runs."""

import math
import re

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.records import read
from benchmarks.stability import answers, figures, grid, runs, settings, statistics, tables
from benchmarks.stability.settings import CONTROL, METHODS, QUICK, RATES, SEEDS, SETTINGS, SWEEP_SEEDS, Size
from pages import unpadded

PAGE = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
BEST = 0.1  # the learning rate that every method likes best


# --- statistics ------------------------------------------------------------------------------------------------------


def test_a_mean_and_its_interval():
    """Student's t of 4 degrees of freedom is 2.776 at 5 %."""
    values = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]) + 7
    half = 2.776445 * np.std(values, ddof=1) / math.sqrt(5)
    assert statistics.mean_of(values) == pytest.approx((7, 7 - half, 7 + half), rel=1e-6)
    assert statistics.mean_of([*values, math.nan]) == statistics.mean_of(values)
    assert statistics.mean_of([0.25] * 5) == (0.25, 0.25, 0.25)
    one = statistics.mean_of([0.4])
    assert one.mean == 0.4 and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(statistics.mean_of([]).mean)


def test_coverage():
    """Intervals of five normal seeds hold the true mean 95 % of the time. The share of 2,000 trials is known to within
    1.5 %, three standard deviations.
    """
    found = [statistics.mean_of(values) for values in np.random.default_rng(0).standard_normal((2000, 5))]
    assert abs(np.mean([e.low <= 0 <= e.high for e in found]) - 0.95) <= 0.015


@pytest.mark.parametrize("side", [1, -1])
def test_p_beyond_a_number(side):
    """Student's t of 4 degrees of freedom is 2.132 at 5 % on one side."""
    shape = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    error = np.std(shape, ddof=1) / math.sqrt(5)
    assert statistics.p_beyond(side * (shape + 3 + 2.131847 * error), 3) == pytest.approx(0.05, rel=1e-5)
    assert statistics.p_beyond(side * (shape + 3), 3) == pytest.approx(0.5)
    assert statistics.p_beyond([side * 0.2] * 5, 0.1) == 0 and statistics.p_beyond([side * 0.05] * 5, 0.1) == 1


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == [pytest.approx(p) for p in (0.03, 0.06, 0.06)]
    assert statistics.holm([0.6, 0.7]) == [1, 1] and statistics.holm([]) == []


NOISE = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]) / 1000


def differing(a, b=0.0, noise=NOISE):
    return {"here": pd.DataFrame({"A": a + noise, "B": b})}


@pytest.mark.parametrize(
    "difference, verdict", [(0.1, "above"), (-0.1, "below"), (0.0, "within"), (0.05, "open"), (-0.0505, "open")]
)
def test_verdicts(difference, verdict):
    found = statistics.decide(statistics.compare(differing(difference), [("A", "B")], 0.05))
    assert found["verdict"].tolist() == [verdict] and found["estimate"][0].mean == pytest.approx(difference)


def test_a_difference_must_survive_the_correction():
    """One comparison at p = 0.03 counts. Beside another at p = 0.03 it has p = 0.06 after Holm's correction."""
    error = np.std(NOISE, ddof=1) / math.sqrt(5)
    alone = statistics.compare(differing(0.05 + 2.6 * error), [("A", "B")], 0.05)
    assert 0.025 < alone["p"][0] < 0.05
    # the interval is two-sided, so that the difference is taken a little larger than the test alone would need
    clear = alone.assign(estimate=[statistics.Estimate(0.06, 0.055, 0.065)])
    assert statistics.decide(clear)["verdict"].tolist() == ["above"]
    assert statistics.decide(clear, clear)["verdict"].tolist() == ["open", "open"]


def test_nothing_is_compared_on_too_few_seeds():
    few = {setting: table[:4] for setting, table in differing(0.9).items()}
    assert statistics.compare(few, [("A", "B")], 0.05).empty
    assert statistics.compare(differing(0.9), [("A", "C")], 0.05).empty


def test_intervals_as_text():
    assert statistics.interval(statistics.Estimate(0.5, 0.25, 0.75), ".2f") == "0.50 [0.25, 0.75]"
    assert statistics.interval(statistics.mean_of([0.5])) == "0.500"
    assert statistics.interval(statistics.mean_of([])) == "–"


# --- answers, from made-up runs --------------------------------------------------------------------------------------


def fabricated(method, setting, seed, rate, level, distortion):
    """A run that rises to `level` at the best rate, and to less at others. Its seed's part cancels in a difference."""
    noise = 0.001 * ((list(METHODS).index(method) + 3) * seed % 5) + 0.01 * (seed % 7)
    final = level + noise - 0.03 * abs(math.log2(rate / BEST))
    return {
        "method": method, "setting": setting, "seed": seed, "rate": rate, "letters": "aeo",
        "reward": [0.5, 0.55, final, final], "rare": [0.07, 0.1, final / 3, final / 3],
        "implausible": [0.02, 0.1, 0.1, 0.1], "rare_tokens": 20.0, "common_tokens": 10.0,
        "rare_distortion": 20.0 * distortion, "common_distortion": 10.0,
    }  # fmt: skip


@pytest.fixture
def written(records):
    """Return a function that makes and loads `records`."""
    return lambda *args, **options: runs.load(records(*args, **options))


@pytest.fixture
def records():
    """Return a function that makes the records of all methods. `levels` has final rewards other than 0.65, by method or
    by method and setting, and `distortions` what the methods do with PG's tokens.
    """

    def make(levels=(), distortions=(), seeds=SEEDS, methods=tuple(METHODS)):
        levels, distortions = dict(levels), dict(distortions)
        found = [{"definitions": grid.definitions(QUICK), **provenance("test")}]
        for method, setting in grid.cells(methods, SETTINGS):
            level = levels.get((method, setting), levels.get(method, 0.65))
            jobs = [(seed, rate) for seed in SWEEP_SEEDS for rate in RATES] + [(seed, BEST) for seed in seeds]
            for seed, rate in jobs:
                record = fabricated(method, setting, seed, rate, level, distortions.get(method, 0.0))
                if method == "PG" and seed not in SWEEP_SEEDS:
                    record["compared"] = {
                        name: {"rare_distortion": 20.0 * (distortions.get(name, 0.0) + 0.001 * (seed % 3)),
                               "common_distortion": 10.0 * 0.4}
                        for name in METHODS if name != "PG"
                    }  # fmt: skip
                found.append(record)
        return found

    return make


def verdicts(found):
    return {(row.setting, row.a, row.b): row.verdict for row in found.itertuples()}


def test_outcomes():
    record = fabricated("PPO", "4 updates", 0, BEST, 0.7, 0.25)
    record |= {"reward": [0.5, 0.4, 0.8, 0.45], "rare": [0, 0, 0.2, 0.1]}
    found = runs.outcomes(record)
    assert found["final"] == pytest.approx(0.625) and found["final_rare"] == pytest.approx(0.15)
    assert found["collapsed"] and not runs.outcomes(record | {"reward": [0.5, 0.4, 0.8, 0.5]})["collapsed"]
    assert runs.distortions(record, record) == {"rare": 0.25, "common": 1.0}
    assert math.isnan(runs.distortions(record | {"common_tokens": 0.0}, record)["common"])


def test_question_a(written):
    """PPO distorts, DRPO and SPO do not, and DPPO-TV earns 0.03 / 3 more by rare tokens in one setting."""
    levels = {("DPPO-TV", "64 updates"): 0.72}
    loaded = written(levels, {"PPO": 0.2, "SPO": 0.03})
    assert "| PPO | 0.20 and 0.40 | 0.20 and 0.40 |" in unpadded(tables.distortion(loaded))
    found = verdicts(answers.rare_tokens(loaded))
    assert len(found) == 4 * 6
    assert all(found[setting, "PPO", "DPPO-TV"] == "above" for setting in SETTINGS if setting != CONTROL)
    assert all(found[setting, "SPO", "DRPO δ=0.2"] == "within" for setting in SETTINGS if setting != CONTROL)
    earned = {key: verdict for key, verdict in found.items() if key[1:] == ("DPPO-TV", "PPO")}
    assert [setting for (setting, _, _), verdict in earned.items() if verdict == "above"] == ["64 updates"]


def test_question_b(written):
    loaded = written({("SPO", "4-bit head"): 0.4, ("CISPO", "16 updates"): 0.7})
    found = verdicts(answers.gains(loaded))
    assert len(found) == (len(METHODS) - 1) * (len(SETTINGS) - 1)
    assert found.pop(("4-bit head", "SPO", "PG")) == "below" and found.pop(("16 updates", "CISPO", "PG")) == "above"
    assert set(found.values()) == {"within"}
    working = answers.working_rates(loaded)
    assert working.loc["SPO", "4-bit head"] == 0 and working.loc["CISPO", "16 updates"] == 6
    assert working.loc["PG", "16 updates"] == 3  # half and twice the best rate lose 0.03 of the 0.05
    said = unpadded(tables.ranges(loaded))
    assert f"0 of 6 ({BEST}), **20 of 20 collapsed** |" in said and f"| 3 of 6 ({BEST}) |" in said


@pytest.mark.parametrize(
    "pairs, a, b",
    [(answers.CORRECTION_PAIRS, "DRPO δ=0.2", "DPPO-TV"), (answers.PAPER_PAIRS, "DRPO δ=12.5", "PG")],
    ids=["correction", "paper"],
)
def test_questions_c_and_d(written, pairs, a, b):
    found = verdicts(answers.best_rates(written({(a, "bf16 head"): 0.68, (b, "8-bit head"): 0.68}), pairs))
    chosen = {setting: found[setting, a, b] for setting in SETTINGS if setting != CONTROL}
    assert chosen.pop("bf16 head") == "above" and chosen.pop("8-bit head") == "below"
    assert set(chosen.values()) == {"within"}


def test_question_e(written):
    """δ = 0.5 is nowhere the best, and has the least worst regret."""
    levels = dict.fromkeys(answers.DELTAS, 0.5) | {"DRPO δ=1": 0.65, "DRPO δ=0.5": 0.63, "DRPO δ=0.2": 0.65}
    levels |= {("DRPO δ=1", "64 updates"): 0.55, ("DRPO δ=0.2", "4 updates"): 0.55}
    choice = answers.choose(written(levels))
    assert choice.named == ["DRPO δ=0.5"] and choice.summary["working"]["DRPO δ=0.5"] == 3 * 6
    assert choice.means.loc["DRPO δ=1", "64 updates"] == pytest.approx(0.58, abs=0.01)  # 0.55 and the seeds' mean
    assert choice.summary.loc["DRPO δ=0.5", "worst"] == pytest.approx(0.02, abs=0.003)
    assert choice.summary.loc["DRPO δ=1", "worst"] == pytest.approx(0.1, abs=0.003)
    assert choice.summary["wins"]["DRPO δ=0.5"] == 1 and choice.worse == 1


def test_ties_between_deltas():
    """Within 0.005 of the least regret, more working rates win, and then the larger δ."""
    worst, working = np.array([0.02, 0.01, 0.012, 0.014, 0.2, 0.3]), np.array([36, 10, 20, 20, 30, 30])
    assert answers.DELTAS[answers.winner(worst, working)] == "DRPO δ=0.5"
    assert answers.winner(worst, np.array([36, 21, 20, 20, 30, 30])) == 1


def test_an_unsure_choice_names_all_that_may_win(written):
    choice = answers.choose(written(dict.fromkeys(answers.DELTAS, 0.65)))
    wins = pd.Series([0.5, 0.3, 0.16, 0.04, 0.0, 0.0], index=answers.DELTAS)
    unsure = choice._replace(summary=choice.summary.assign(wins=wins))
    assert unsure.named == answers.DELTAS[:3]


def amended(records, levels):
    """Runs of all methods, and the amendment's at both rates, with final rewards `levels` by method and rate."""
    found = records()
    for job in grid.amendment_jobs():
        level = levels.get((job.method, job.rate), 0.6) + 0.03 * abs(math.log2(job.rate / BEST))
        found.append(fabricated(job.method, job.setting, job.seed, job.rate, level, 0.0))
    return runs.load(found)


def test_the_amendment_compares_at_the_same_rate(records):
    loaded = amended(records, {("DRPO δ=12.5", 0.05): 0.64, ("PG", 0.1): 0.55})
    found = verdicts(answers.same_rate(loaded, answers.PAPER_PAIRS))
    assert len(found) == 4 * 2 and set(found.values()) == {"above"}
    found = verdicts(answers.same_rate(loaded, answers.CORRECTION_PAIRS))
    assert len(found) == 4 * 2 * 2 and set(found.values()) == {"within"}
    assert len(loaded.comparison) == len(runs.load(records()).comparison)  # the registered runs are as they were


def test_the_amendment_takes_the_better_rate(records):
    """δ = 0.2 has the best reward at 0.05, and δ = 1 a good one at 0.1."""
    choice = answers.choose_amended(amended(records, {("DRPO δ=0.2", 0.05): 0.7, ("DRPO δ=1", 0.1): 0.66}))
    assert choice.named == ["DRPO δ=0.2"] and choice.means.index[0] == "DRPO δ=0.2" and choice.worse == 1
    regrets = choice.summary["worst"]
    assert regrets["DRPO δ=1"] == pytest.approx(0.04, abs=0.003)
    assert regrets["DRPO δ=12.5"] == pytest.approx(0.1, abs=0.003)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_two_rates_of_a_method_are_an_error(records):
    found = records(methods=("PG",))
    with pytest.raises(ValueError, match=r"PG in 4 updates is compared at the rates \[0.1, 0.2\], not at one"):
        runs.load([*found, fabricated("PG", "4 updates", 5, 0.2, 0.6, 0.0)])


def test_an_incomplete_sweep_chooses_no_rate(written):
    found = written(methods=("PG", "PPO"))
    assert runs.chosen_rates(found, ["PG", "PPO"], ["4 updates"]) == {(m, "4 updates"): BEST for m in ("PG", "PPO")}
    with pytest.raises(ValueError, match=r"the sweep of .*SPO.* has no run"):
        runs.chosen_rates(found, ["PG", "SPO"], ["4 updates"])


def test_a_page_needs_every_method(records):
    with pytest.raises(ValueError, match=r"of one size that settings.py has, got no run"):
        runs.load([])
    found = records(methods=[method for method in METHODS if method != "CISPO"])
    with pytest.raises(ValueError, match="CISPO in 4 updates has 0 seeds, the page needs 5"):
        tables.BLOCKS[0].render(found)


def test_a_partial_grid(records, tmp_path):
    found = records(seeds=SEEDS[:5])
    said = [block.render(found) for block in tables.BLOCKS if block.name != "stability-toy"]
    assert "The grid is not complete" in said[0] and not any("nan" in text for text in said)
    figures.draw(found, tmp_path, "runs")
    assert {path.stem for path in tmp_path.glob("*.png")} == figures.PICTURES.keys()
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_registers_what_the_code_decides_by():
    page = " ".join(PAGE.split())
    for text in (
        f"minus that by DRPO δ=0.2, is over {answers.RARE_NUMBER}.",
        f"DRPO δ=0.2 minus SPO, is over {answers.EARNED_NUMBER}.",
        f"is over {answers.GAIN_NUMBER} above that of the policy gradient",
        f"at most {answers.WORKS_WITHIN} below that of PG",
        f"is over {answers.SAME_NUMBER} in some setting and nowhere below -{answers.SAME_NUMBER}",
        f"lies within ±{answers.SAME_NUMBER} in every setting",
        f"Within {answers.TIE} of the least",
        f"resampled {answers.RESAMPLES:,} times",
        f"A token is rare if μ < {settings.RARE}.",
        f"over {answers.COLLAPSES:.0%} of its runs".replace("%", " %"),
        f"in {answers.LEAVES:.0%} of the resamples".replace("%", " %"),
        "The rates are " + ", ".join(f"{rate:g}" for rate in RATES[:-1]) + f" and {RATES[-1]:g}.",
        f"at least 10⁻{-math.log10(settings.PLAUSIBLE):.0f} in this context".replace("4", "⁴"),
        f"earns {settings.HALF[0]} to {settings.HALF[1]}",
        f"{Size().width} × {Size().width} matrix",
        f"{Size().updates} updates of Adam, each with {Size().contexts} contexts × {Size().group} tokens",
        f"none wins {answers.SURE:.0%} of the time, all that win at least {answers.LIKELY:.0%}".replace("%", " %"),
        f"paired differences over {len(SEEDS)} seeds",
    ):
        assert text in page, text


def test_the_page_says_what_the_runs_say():
    for block in tables.BLOCKS:
        start, end = block.markers
        text = block.render(read(ROOT / "bench_results" / block.results))
        assert f"{start}\n{text}\n{end}" in PAGE, block.name
    assert PAGE.count("<!-- benchmarks:") == len(tables.BLOCKS)
    assert all(f"bench_results/stability/{name}.png" in PAGE for name in figures.PICTURES)


def test_the_toy_s_collapses():
    """A run collapses if it falls below half of its best so far."""
    curves = {"A": [0.4, 0.8, 0.41, 0.9], "B": [0.4, 0.8, 0.39, 0.9]}
    records = [
        {"method": method, "setting": "stale", "evaluations": {"sampled": curve}, **provenance("test")}
        for method, curve in curves.items()
    ]
    said = unpadded(tables.toy(records))
    assert re.search(r"\| A +\| 0.620 \|", said) and re.search(r"\| B +\| 0.613, 1 of 1 collapsed \|", said)
