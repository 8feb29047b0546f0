"""Tests of the report of the stability experiment: verdicts, claims, tables and the page, from made-up runs."""

import math
import random

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks.harness.blocks import markers
from benchmarks.harness.provenance import provenance
from benchmarks.harness.records import read, write
from benchmarks.stability import comparisons, grid, report, runs, statistics, tables
from benchmarks.stability.figures import COLOURS
from benchmarks.stability.measures import RARE, RATIO_BOUNDARY, SHIFT_BOUNDARY
from benchmarks.stability.settings import COLLAPSE, METHODS, SEEDS, SETTINGS, SMOKE, SWEEP_SETTING
from pages import unpadded

TWO = ["PPO", "DRPO δ=0.2"]
CURVES = ("entropy", "prob_shift", "log_ratio", "log_ratio_std", "log_ratio_rare", "kl", "rare", "pushed",
          "beyond_shift", "beyond_ratio", "beyond_ratio_rare", "weight_beyond_shift", "weight_beyond_ratio",
          "weight_within", "gradient_norm", "reward")  # fmt: skip


def fabricated(method, setting, seed, level, purpose="comparison", lr=1e-3):
    """Return a run whose held-out curve rises to `level`. Its seed's offset cancels in a paired difference. Its noise
    takes the same five values in every cell, in another order, so that cells of one level have a mean difference of
    zero.
    """
    job = grid.Job(purpose, method, setting, seed, lr)
    offset = 0.05 * random.Random(seed).random()
    order = 1 + (list(METHODS).index(method) + list(SETTINGS).index(setting)) % 4
    noise = 0.001 * (order * seed % 5)
    sampled = [0.3 + offset, (0.3 + level) / 2 + offset, level + offset + noise]
    evaluations = {"sampled": sampled, "greedy": [1.0] * 3}
    curves = {name: [0.1 + offset, None if "beyond" in name else 0.2] for name in CURVES}
    return {**vars(job), "curve": curves, "evaluations": evaluations, "definition": job.definition(SMOKE)}


@pytest.fixture
def written(tmp_path):
    """Return a function that writes the runs of {(method, setting, seeds): level} and their sweep, and returns the
    path.
    """

    def write_runs(levels):
        found = [fabricated(m, s, seed, level) for (m, s, seeds), level in levels.items() for seed in seeds]
        swept = {m: level for (m, _, _), level in levels.items()}
        found += [
            fabricated(m, SWEEP_SETTING, seed, level, "sweep", lr)
            for m, level in swept.items() for seed in SMOKE.sweep_seeds for lr in SMOKE.rates
        ]  # fmt: skip
        source = provenance("test")
        write(tmp_path / "runs.jsonl", [record | source for record in found])
        return tmp_path / "runs.jsonl"

    return write_runs


def test_another_definition_is_an_error_and_loses_nothing(written, tmp_path):
    path = written({("PPO", "stale", (0,)): 0.8, ("DRPO δ=0.2", "stale", (0,)): 0.8})
    text = path.read_text(encoding="utf-8").replace("PPO(clip_low=0.2", "PPO(clip_low=0.3")
    path.write_text(text, encoding="utf-8")
    jobs = grid.comparison_jobs(TWO, ["stale"], [0, 1], dict.fromkeys(TWO, 1e-3))
    with pytest.raises(ValueError, match="another definition"):
        grid.run_missing(jobs, size=SMOKE, path=path, cache=tmp_path / "cache", workers=1, command="test")
    with pytest.raises(ValueError, match="another definition"):
        runs.load(path)
    assert path.read_text(encoding="utf-8") == text


def test_which_differences_count(written):
    levels = {"DRPO δ=0.2": 0.9, "PPO": 0.9, "SPO": 0.5, "DPPO-TV": 0.95}
    found = runs.load(written({(method, "stale", SEEDS): level for method, level in levels.items()}))
    differences = comparisons.differences(found).set_index("other")
    assert dict(differences["counts"]) == {"PPO": False, "SPO": True, "DPPO-TV": True}
    signs = {"PPO": 0, "SPO": 1, "DPPO-TV": -1}
    for other, sign in signs.items():
        estimate = differences.loc[other, "estimate"]
        assert int(estimate.low > 0) - int(estimate.high < 0) == sign
    assert tables.faster(found).count("**") == 2 * 2


def test_a_difference_must_survive_the_correction(written, monkeypatch):
    """Two comparisons at p = 0.03 have p = 0.06 each after Holm's correction."""
    monkeypatch.setattr(comparisons, "paired_p", lambda values: 0.03)
    levels = {("DRPO δ=0.2", "stale", SEEDS): 0.9, ("SPO", "stale", SEEDS): 0.5}
    found = comparisons.differences(runs.load(written(levels)))
    assert list(found["p"]) == [0.03] and list(found["counts"]) == [True]
    found = comparisons.differences(runs.load(written(levels | {("PG", "stale", SEEDS): 0.5})))
    assert list(found["p"]) == [0.06, 0.06] and not any(found["counts"])


def test_nothing_is_compared_on_too_few_seeds(written):
    levels = {("DRPO δ=0.2", "stale", SEEDS[:4]): 0.9, ("SPO", "stale", SEEDS): 0.3}
    found = runs.load(written(levels))
    assert comparisons.differences(found).empty and "No two methods share 5 seeds" in tables.faster(found)


def test_collapses_follow_the_runs(written):
    levels = {("SPO", "stale", SEEDS): 0.05, ("DRPO δ=0.2", "stale", SEEDS): 0.9}
    said = unpadded(tables.collapses(runs.load(written(levels))))
    assert "| SPO | 5 of 5 | 0.0005 |" in said and "| DRPO δ=0.2 | 0 of 5 | none |" in said


@pytest.mark.parametrize(
    "levels",
    [
        {("PPO", "stale", (3,)): 0.8},
        {("PPO", "stale", SEEDS): 0.8, ("PG", "on-policy", (0, 1)): 0.7, ("SPO", "mismatch (fp8)", (2,)): 0.9},
    ],
    ids=["one run", "holes"],
)
def test_report_on_a_partial_grid(written, tmp_path, levels, monkeypatch):
    monkeypatch.setitem(report.PICTURES, "table1_slices", ("", lambda runs, path: None))
    written(levels)
    assert report.write_report(tmp_path) == 0
    page = (tmp_path / "stability.md").read_text(encoding="utf-8")
    assert "grid is not complete" in page and "nan" not in page.lower()
    assert (tmp_path / "curves_rollouts.png").exists()


def test_report_of_nothing(tmp_path, capsys, written):
    assert report.write_report(tmp_path) == 2
    assert "holds no run" in capsys.readouterr().err
    path = written({("PPO", "stale", (0,)): 0.8})
    write(path, read(path)[:1])
    assert report.write_report(tmp_path) == 2
    assert "holds no sweep" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [("stale", "stale"), ("stale", "on-policy")])
def test_two_rates_of_a_method_are_an_error(written, settings):
    path = written({("PPO", "stale", (0,)): 0.8})
    source = provenance("test")
    found = [fabricated("PPO", setting, 0, 0.8, lr=lr) for setting, lr in zip(settings, (1e-3, 2e-3), strict=True)]
    write(path, [record | source for record in found])
    with pytest.raises(ValueError, match=r"PPO.* at the learning rates \[0.001, 0.002\], not at one"):
        runs.load(path)


def test_an_incomplete_sweep_chooses_no_rate(written):
    found = runs.load(written({("PPO", "stale", (0,)): 0.8}))
    assert runs.chosen_rates(found, ["PPO"])["PPO"] in SMOKE.rates
    with pytest.raises(ValueError, match="the sweep of SPO has no run"):
        runs.chosen_rates(found, ["PPO", "SPO"])


def test_the_page_has_every_part():
    page = report.PAGE.read_text(encoding="utf-8")
    names = [*report.TEXTS, *(f"picture {name}" for name in report.PICTURES)]
    for name in names:
        assert [page.count(marker) for marker in markers("stability", name)] == [1, 1], name
    assert page.count("<!-- stability:") == len(names)
    assert COLOURS.keys() == METHODS.keys()


def test_the_page_defines_what_the_code_does():
    page = " ".join(report.PAGE.read_text(encoding="utf-8").split())
    for text in (
        f"fell below {COLLAPSE:.0%} of the best", f"|π - μ| = {SHIFT_BOUNDARY} ",
        f"|r - 1| = {RATIO_BOUNDARY} ", f"if μ < {RARE}.", f"{statistics.LEVEL:.0%} percentile bootstrap",
        f"({statistics.RESAMPLES:,} resamples)", f"p < {1 - statistics.LEVEL:.2f} ",
    ):  # fmt: skip
        assert text in page, text


def test_the_page_says_what_the_runs_say():
    found, page = runs.load(report.RESULTS / "runs.jsonl"), report.PAGE.read_text(encoding="utf-8")
    for name, render in report.TEXTS.items():
        assert render(found) in page, name


# --- outcomes --------------------------------------------------------------------------------------------------------


def test_collapse_by_its_definition():
    assert not runs.collapsed([0.4, 0.8, 0.41, 0.9])
    for_now, for_good, from_the_start = [0.4, 0.9, 0.44, 0.9], [0.4, 0.9, 0.5, 0.3], [0.4, 0.1, 0.1, 0.1]
    assert runs.collapsed(for_now) and not runs.collapsed_for_good(for_now)
    assert all(runs.collapsed_for_good(found) for found in (for_good, from_the_start))


def test_means_leave_out_what_had_no_token():
    record = fabricated("PPO", "stale", 0, 0.9)
    record["curve"] |= {"kl": [None, 1.0, 3.0], "log_ratio": [None] * 3, "gradient_norm": [1.0, None, 2.0],
                        "pushed": [1.0, 0.5, 0.0], "beyond_shift": [0.1, 0.6, None],
                        "weight_beyond_shift": [1.0, -1.0, None], "weight_beyond_ratio": [None] * 3}  # fmt: skip
    record["curve"] = {name: (values + [0.0] * 3)[:3] for name, values in record["curve"].items()}
    found = runs.outcomes(record)
    assert found["kl"] == 2 and math.isnan(found["log_ratio"]) and found["largest_gradient"] == math.inf
    assert found["weight_beyond_shift"] == pytest.approx((0.1 - 0.3) / 0.4)
    assert math.isnan(found["weight_beyond_ratio"])


def test_the_area_is_by_trapezoids():
    record = fabricated("PPO", "stale", 0, 0.9)
    record["evaluations"]["sampled"] = [0.0, 0.4, 1.0]
    assert runs.outcomes(record)["area"] == pytest.approx(0.45)
