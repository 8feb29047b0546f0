"""The stability experiment: its task, engine, grid, statistics and report, and the paper's Table 1."""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks.harness.provenance import provenance
from benchmarks.harness.records import read
from benchmarks.stability import __main__ as command
from benchmarks.stability import engine, grid, outcomes, report, statistics, verdicts
from benchmarks.stability.drawing import COLOURS, spread
from benchmarks.stability.policy import build_policy
from benchmarks.stability.settings import CORE_SETTINGS, METHODS, SEEDS, SMOKE
from benchmarks.stability.task import (
    ANSWER_LENGTH,
    END_ID,
    FIRST_WORD,
    LIST,
    Vocabulary,
    applied,
    draw_demonstrations,
    draw_problems,
    rewards,
)
from benchmarks.stability.training import run
from benchmarks.stability.weights import gradient_weight
from drpo_kernels import DPPO, DRPO, SPO

TWO = ["PPO", "DRPO δ=0.2"]
PROVENANCE = ("device", "versions", "commit", "dirty", "command", "date")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- task ------------------------------------------------------------------------------------------------------------

WORDS = Vocabulary(words=20, remarks=30)


def test_a_careful_teacher_is_always_right():
    problems = draw_problems(WORDS, 200, generator())
    completions = draw_demonstrations(WORDS, problems, 0.0, generator(1))
    assert completions.shape == (200, ANSWER_LENGTH)
    assert rewards(WORDS, problems, completions).eq(1).all()
    lists = problems.prompts[:, 2:].sort(1).values
    assert (lists[:, 1:] != lists[:, :-1]).all() and (lists >= FIRST_WORD).all() and (lists < WORDS.first_remark).all()


def test_a_guessing_teacher_is_right_as_often_as_chance():
    """The share of pairs of operations with the permutation of another pair, within five standard deviations."""
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    results = applied(torch.arange(LIST).expand(9, -1), pairs)[1]
    chance = (results[:, None] == results[None]).all(-1).float().mean().item()
    problems = draw_problems(WORDS, 4000, generator())
    right = rewards(WORDS, problems, draw_demonstrations(WORDS, problems, 1.0, generator(1))).mean().item()
    assert abs(right - chance) <= 5 * math.sqrt(chance * (1 - chance) / 4000)


def test_what_earns_no_reward():
    problems = draw_problems(WORDS, 50, generator())
    right = draw_demonstrations(WORDS, problems, 0.0, generator(1))
    no_end, wrong_word, unnamed, early = (right.clone() for _ in range(4))
    no_end[:, -1] = right[:, 0]
    wrong_word[:, -2] = right[:, -3]
    unnamed[:, -5] = right[:, 0]  # a remark where the second operation's name belongs
    early[:, 0] = END_ID
    for completions in (no_end, wrong_word, unnamed, early):
        assert rewards(WORDS, problems, completions).eq(0).all()


def test_what_earns_it_all_the_same():
    """A wrong first list, and whatever follows the END."""
    problems = draw_problems(WORDS, 50, generator())
    right = draw_demonstrations(WORDS, problems, 0.0, generator(1))
    completions = torch.cat([right, right[:, :1]], 1)
    completions[:, 2 : 2 + LIST] = right[:, :1]
    assert rewards(WORDS, problems, completions).eq(1).all()


# --- engine ----------------------------------------------------------------------------------------------------------


def test_a_float32_engine_is_the_policy_itself():
    policy = build_policy(SMOKE, 0)
    assert engine.rollout_engine(policy, "float32") is policy
    with pytest.raises(ValueError, match=r"precision must be one of .*'int4'"):
        engine.rollout_engine(policy, "int4")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_engines_round_a_copy(precision):
    """bf16: half a unit of 8 significant bits. E4M3: of 4, or of its least step, 2^-9 of the scale max|w| / 448."""
    policy = build_policy(SMOKE, 0)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    rolled = engine.rollout_engine(policy, precision)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
    changed = 0
    for name, weight in rolled.state_dict().items():
        exact = before[name]
        bound = exact.abs() * 2.0**-8
        if precision == "fp8" and name.endswith("proj.weight"):
            step = exact.abs().amax(1, keepdim=True) / 448 * 2.0**-9
            bound = bound + torch.maximum(exact.abs() * 2.0**-4, step / 2)
            assert ((weight - exact).abs() > exact.abs() * 2.0**-8).any()
        assert ((weight - exact).abs() <= bound * (1 + 1e-2)).all(), name
        changed += not torch.equal(weight, exact)
    assert changed
    logits = rolled(torch.arange(6)[None]).logits
    assert torch.equal(logits, logits.bfloat16().float())
    exact_logits = policy(torch.arange(6)[None]).logits
    assert 0 < (logits - exact_logits).norm() <= 0.2 * exact_logits.norm()


# --- Table 1 ---------------------------------------------------------------------------------------------------------


def closed_form(method, mu, pi, advantage):
    """Each method's weight written again, from the papers."""
    r, sign = pi / mu, np.sign(advantage)
    kl = mu * np.log(mu / pi) + (1 - mu) * np.log((1 - mu + 1e-8) / (1 - pi + 1e-8))
    mask = lambda divergence: ~((sign * (r - 1) > 0) & (divergence > 0.15)) * np.minimum(r, 20) / r  # noqa: E731
    bound = lambda delta: 1 - sign * (pi - mu) / delta  # noqa: E731
    return {
        "PG": lambda: np.ones_like(r),
        "PPO": lambda: np.where(sign > 0, r <= 1.2, r >= 0.8).astype(float),
        "PPO clip-higher": lambda: np.where(sign > 0, r <= 1.28, r >= 0.8).astype(float),
        "SPO": lambda: 1 - sign * (r - 1) / 0.2,
        "DPPO-TV": lambda: mask(np.abs(pi - mu)),
        "DPPO-KL": lambda: mask(kl),
        "DRPO δ=0.05": lambda: bound(0.05),
        "DRPO δ=0.2": lambda: bound(0.2),
        "DRPO δ=1": lambda: bound(1),
        "DRPO δ=12.5": lambda: bound(12.5),
        "DRPO without |A|": lambda: 1 - (pi - mu) / (0.2 * advantage),
        "Mask-DRPO": lambda: np.where(np.abs(pi - mu) > 0.2, bound(0.2), 1.0),
    }[method]()


def table1(objective, mu, pi, advantage):
    tensors = [torch.from_numpy(np.log(values)) for values in (pi, mu)]
    return gradient_weight(objective, *tensors, torch.full_like(tensors[0], advantage)).numpy()


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.3, -2.5])
@pytest.mark.parametrize("method", METHODS)
def test_table1(method, advantage):
    """In float64, relative to the size of the terms, which r inflates to 1e3 / ε for SPO; no point on a boundary."""
    side = np.concatenate([np.geomspace(1.234e-3, 0.1, 40), np.linspace(0.1037, 0.9981, 60)])
    mu, pi = (values.ravel() for values in np.meshgrid(side, side * 0.99931))
    expected = closed_form(method, mu, pi, advantage)
    found = table1(METHODS[method], mu, pi, advantage)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    if isinstance(METHODS[method], DRPO):
        delta = METHODS[method].delta
        assert found.min() >= 1 - 1 / delta and found.max() <= 1 + 1 / delta


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_drpo_is_zero_where_dppo_s_mask_falls(sign):
    mu = np.array([0.3, 0.5, 0.7])
    at = table1(DRPO(delta=0.2), mu, mu + sign * 0.2, sign)
    assert np.abs(at).max() <= 1e-12
    just = [table1(DPPO(delta_low=0.2, delta_high=0.2), mu, mu + sign * (0.2 + e), sign) for e in (-1e-9, 1e-9)]
    assert (just[0] == 1).all() and (just[1] == 0).all()


def test_spo_is_unbounded():
    assert table1(SPO(), np.array([1e-4]), np.array([0.5]), 1.0)[0] < -1e4


# --- statistics ------------------------------------------------------------------------------------------------------


def test_known_differences():
    constant = statistics.bootstrap([0.25] * 5)
    assert (constant.mean, constant.low, constant.high) == (0.25, 0.25, 0.25) and constant.sign == 1
    assert statistics.bootstrap([0.0] * 5).sign == 0
    assert statistics.bootstrap([-0.2, -0.1, -0.3]).sign == -1
    assert statistics.bootstrap([0.4]).sign == 0 and math.isnan(statistics.bootstrap([]).mean)
    assert statistics.differences({0: 1.0, 1: 2.0, 9: 5.0}, {1: 0.5, 0: 1.0, 3: 7.0}) == [0.0, 1.5]


def test_the_bootstrap_s_ends():
    """All 3,125 resamples of five values are equally likely: the exact 2.5 % point of their mean, within its noise."""
    values = np.array([0.0, 1.0, 3.0, 4.0, 9.0])
    means = np.sort(values[np.indices((5,) * 5).reshape(5, -1)].mean(0))
    found = statistics.bootstrap(values)
    # 2.5 % of 10,000 resamples is known to ± 0.5 %
    assert np.quantile(means, 0.02) <= found.low <= np.quantile(means, 0.03)
    assert np.quantile(means, 0.97) <= found.high <= np.quantile(means, 0.98)


def test_coverage():
    """The bootstrap's factor is 1.96 · sqrt((n - 1)/n) where Student's belongs: 84.5 % of 5 normal seeds, 94.3 % of 50.
    Of 2,000 trials the share is known to ± 2.5 %, three standard deviations.
    """
    for count, expected in ((5, 0.845), (50, 0.943)):
        assert abs(statistics.coverage(count) - expected) <= 0.025


def test_p_values():
    """Student's t of 4 degrees of freedom is 2.776 at 5 % and 4.604 at 1 %."""
    shape = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    error = np.std(shape, ddof=1) / math.sqrt(5)
    assert statistics.paired_p(shape + 2.776445 * error) == pytest.approx(0.05, rel=1e-5)
    assert statistics.paired_p(shape - 4.604095 * error) == pytest.approx(0.01, rel=1e-5)
    assert statistics.paired_p([0.0] * 5) == 1 and statistics.paired_p([0.5] * 5) == 0
    assert math.isnan(statistics.paired_p([1.0]))


def test_holm():
    corrected = statistics.holm([0.01, math.nan, 0.04, 0.03])
    assert corrected[0] == pytest.approx(0.03) and math.isnan(corrected[1])
    assert corrected[2:] == [pytest.approx(0.06)] * 2


def test_wilson():
    low, high = statistics.wilson(0, 5)
    assert low == 0 and high == pytest.approx(0.4345, abs=1e-4)
    assert statistics.wilson(5, 5) == (pytest.approx(1 - high), 1.0)
    assert statistics.wilson(0, 0) == (0.0, 1.0)


# --- outcomes --------------------------------------------------------------------------------------------------------


def curve(*sampled):
    return {"evaluations": {"sampled": list(sampled)}}


def test_collapse_by_its_definition():
    assert not outcomes.collapsed(curve(0.4, 0.8, 0.41, 0.9))
    for_now, for_good, from_the_start = curve(0.4, 0.9, 0.44, 0.9), curve(0.4, 0.9, 0.5, 0.3), curve(0.4, 0.1, 0.1, 0.1)
    assert outcomes.collapsed(for_now) and not outcomes.collapsed_for_good(for_now)
    assert all(outcomes.collapsed_for_good(found) for found in (for_good, from_the_start))


def test_rollouts_to_an_accuracy():
    step = SMOKE.point * SMOKE.completions
    assert outcomes.rollouts_to(curve(0.4, 0.6, 1.0, 0.2), SMOKE, 0.8) == pytest.approx(1.5 * step)
    assert outcomes.rollouts_to(curve(0.9, 0.6), SMOKE, 0.8) == 0
    assert outcomes.rollouts_to(curve(0.4, 0.6), SMOKE, 0.8) == math.inf


def test_means_leave_out_what_had_no_token():
    record = {"curve": {"kl": [None, 1.0, 3.0], "nothing": [None, None]}}
    assert outcomes.mean_of("kl")(record) == 2 and math.isnan(outcomes.mean_of("nothing")(record))
    names = {"pushed": [1.0, 0.5, 0.0], "beyond_shift": [0.1, 0.6, None], "weight_beyond_shift": [1.0, -1.0, None]}
    assert outcomes.weight_beyond("shift")({"curve": names}) == pytest.approx((0.1 - 0.3) / 0.4)


def test_labels_keep_their_distance():
    assert spread([0.1, 0.5], 0.1) == pytest.approx([0.1, 0.5])
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert np.diff(spread([0.1, 0.12, 0.2, 0.21], 0.1)).min() >= 0.1 - 1e-12


# --- grid ------------------------------------------------------------------------------------------------------------


def records_of(path):
    return [{k: v for k, v in record.items() if k not in PROVENANCE} for record in read(path)]


def run_missing(jobs, folder):
    path, cache = folder / "runs.jsonl", folder / "cache"
    return grid.run_missing(jobs, size=SMOKE, path=path, cache=cache, workers=1, command="test")


def test_smoke_grid(tmp_path, monkeypatch):
    """Two methods, two settings, two seeds, end to end with its own processes; a sweep of two rates on one seed."""
    monkeypatch.setattr(grid, "RATES", (5e-4, 1e-3))
    monkeypatch.setattr(grid, "SWEEP_SEEDS", (100,))
    options = ["--smoke", "--seeds", "2", "--workers", "1", "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
    assert command.main([*options, "--methods", *TWO, "--settings", "on-policy", "stale"]) == 0
    found = read(tmp_path / "runs.jsonl")
    assert len(found) == 2 * 2 + 2 * 2 * 2
    jobs = [grid.job_of(record) for record in found]
    assert jobs == sorted(jobs) and len(set(jobs)) == len(jobs)
    assert any(max(record["curve"]["reward"]) > 0 for record in found)  # else nothing was trained
    assert all(name in record for record in found for name in PROVENANCE)
    off, on = ([r["curve"]["prob_shift"][-1] for r in found if r["setting"] == s] for s in ("stale", "on-policy"))
    assert min(off) > 100 * max(on)
    page = (tmp_path / "stability.md").read_text(encoding="utf-8")
    assert "these numbers mean nothing" in page and "grid is not complete" in page
    assert {path.name for path in tmp_path.glob("*.png")} >= {"curves_rollouts.png", "learning_rates.png", "table1.png"}
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))


def test_an_interrupted_grid_goes_on(tmp_path, monkeypatch):
    """Every other line gone, in another order: the same runs come back, and what was there is not touched."""
    monkeypatch.setattr(grid, "_pool", ThreadPoolExecutor)
    path, jobs = (
        tmp_path / "runs.jsonl",
        grid.comparison_jobs(TWO, ["stale", "mismatch (fp8)"], [0], dict.fromkeys(TWO, 1e-3)),
    )
    run_missing(jobs, tmp_path)
    whole, lines = records_of(path), path.read_text(encoding="utf-8").splitlines()
    kept = lines[::-2]
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    run_missing(jobs, tmp_path)
    assert records_of(path) == whole and len(whole) == len(jobs)
    assert set(kept) <= set(path.read_text(encoding="utf-8").splitlines())


def test_a_seed_decides_everything(tmp_path):
    once, again, other = (run("PPO", "stale", seed, 1e-3, SMOKE, tmp_path) for seed in (0, 0, 1))
    assert json.dumps(once) == json.dumps(again)  # NaN is not itself
    assert once["curve"]["entropy"] != other["curve"]["entropy"]


def test_smoke_wants_a_folder_of_its_own(capsys):
    assert command.main(["--smoke"]) == 2
    assert "--out of its own" in capsys.readouterr().err


# --- report ----------------------------------------------------------------------------------------------------------


CURVES = ("entropy", "prob_shift", "log_ratio", "log_ratio_std", "log_ratio_rare", "kl", "rare", "pushed",
          "beyond_shift", "beyond_ratio", "beyond_ratio_rare", "weight_beyond_shift", "weight_beyond_ratio",
          "weight_within", "gradient_norm", "reward")  # fmt: skip


def fabricated(method, setting, seed, level):
    """A run whose held-out curve rises to `level`, with a seed's own offset, which a paired difference cancels."""
    job = grid.Job("comparison", method, setting, seed, 1e-3)
    offset = 0.05 * random.Random(seed).random()
    sampled = [0.3 + offset, (0.3 + level) / 2 + offset, level + offset]
    evaluations = {"sampled": sampled, "greedy": [1.0] * 3}
    curves = {name: [0.1 + offset, None if "beyond" in name else 0.2] for name in CURVES}
    return {**vars(job), "curve": curves, "evaluations": evaluations, "definition": job.definition(SMOKE)}


@pytest.fixture
def written(tmp_path):
    """-> a function that writes runs of {(method, setting, seeds): level} and returns the path."""

    def write(levels):
        path = tmp_path / "runs.jsonl"
        runs = [fabricated(m, s, seed, level) for (m, s, seeds), level in levels.items() for seed in seeds]
        source = provenance("test")
        path.write_text("".join(json.dumps(run | source) + "\n" for run in runs), encoding="utf-8")
        return path

    return write


def test_another_definition_is_an_error_and_loses_nothing(written, tmp_path):
    path = written({("PPO", "stale", (0,)): 0.8, ("DRPO δ=0.2", "stale", (0,)): 0.8})
    text = path.read_text(encoding="utf-8").replace("PPO(clip_low=0.2", "PPO(clip_low=0.3")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="another definition"):
        run_missing(grid.comparison_jobs(TWO, ["stale"], [0, 1], dict.fromkeys(TWO, 1e-3)), tmp_path)
    with pytest.raises(ValueError, match="another definition"):
        outcomes.load(path)
    assert path.read_text(encoding="utf-8") == text


def test_verdicts(written):
    levels = {"DRPO δ=0.2": 0.9, "PPO": 0.9, "SPO": 0.5, "DPPO-TV": 0.95}
    runs = outcomes.load(written({(method, "stale", SEEDS): level for method, level in levels.items()}))
    sentence = verdicts.on_references(runs)[0]
    assert sentence.startswith("**stale**, area under the curve: DRPO δ=0.2 is above SPO; below DPPO-TV; ")
    assert sentence.endswith("no different from PPO.")


def test_no_verdict_on_too_few_seeds(written):
    runs = outcomes.load(written({("DRPO δ=0.2", "stale", (0, 1)): 0.9, ("SPO", "stale", SEEDS): 0.3}))
    assert "not yet comparable with SPO" in verdicts.on_references(runs)[0]
    assert verdicts.of_references(runs, grid.area, "stale")[0].difference.count == 2


def test_claims_follow_the_runs(written):
    """Falling curves of the clipped losses are instability, and those of the others are not."""
    fallen = {(m, "stale", SEEDS): 0.05 for m in ("PPO", "SPO")}
    held = {(m, "stale", SEEDS): 0.9 for m in ("DPPO-TV", "DRPO δ=0.2")}
    claims = verdicts.on_claims(outcomes.load(written(fallen | held)))
    assert "|π - μ|: 10 of 10 [72%, 100%] against 0 of 10 [0%, 28%]" in claims and "collapse more often" in claims
    swapped = {key: 0.95 - level for key, level in (fallen | held).items()}
    assert "collapse *less* often" in verdicts.on_claims(outcomes.load(written(swapped)))
    assert "**not seen** there" in verdicts.on_claims(outcomes.load(written(held)))


def test_the_sweep_too():
    levels = {"DRPO δ=0.2": 0.9, "SPO": 0.05}
    sweep = {(m, 1e-3): {seed: fabricated(m, "stale", seed, level) for seed in SEEDS} for m, level in levels.items()}
    runs = outcomes.Runs(SMOKE, {}, sweep)
    assert verdicts.on_sweep(runs) == ["**0.001**, area under the curve: DRPO δ=0.2 is above SPO."]
    assert verdicts.on_rates(runs).endswith("runs collapsed of SPO at 0.001 (5 of 5); at no rate: DRPO δ=0.2.")


@pytest.mark.parametrize(
    "levels",
    [
        {("PPO", "stale", (3,)): 0.8},
        {("PPO", "stale", SEEDS): 0.8, ("PG", "on-policy", (0, 1)): 0.7, ("Mask-DRPO", "mismatch (bf16)", (2,)): 0.9},
    ],
    ids=["one run", "holes"],
)
def test_report_on_a_partial_grid(written, tmp_path, levels, monkeypatch):
    monkeypatch.setattr("benchmarks.stability.figures.draw_surface", lambda path: False)
    monkeypatch.setattr("benchmarks.stability.figures.draw_slices", lambda path: False)
    path = written(levels)
    assert report.write_report(path, tmp_path) == 0
    page = (tmp_path / "stability.md").read_text(encoding="utf-8")
    assert "grid is not complete" in page and "nan" not in page.lower().replace("δ", "")
    assert (tmp_path / "curves_updates.png").exists() == any(m in ("PPO", "PG") for m, _, _ in levels)
    assert not (tmp_path / "delta.png").exists()


def test_report_of_nothing(tmp_path, capsys):
    assert report.write_report(tmp_path / "runs.jsonl", tmp_path) == 2
    assert "holds no run" in capsys.readouterr().err


def test_two_rates_of_a_method_are_an_error(written):
    path = written({("PPO", "stale", (0,)): 0.8})
    record = read(path)[0]
    path.write_text("".join(json.dumps(record | {"lr": lr}) + "\n" for lr in (1e-3, 2e-3)), encoding="utf-8")
    with pytest.raises(ValueError, match="two runs of PPO, stale, seed 0"):
        outcomes.load(path)


def test_the_page_has_every_part():
    page = report.PAGE.read_text(encoding="utf-8")
    for part in report.PARTS:
        assert [page.count(marker) for marker in part.markers] == [1, 1], part.name
    assert page.count("<!-- stability:") == len(report.PARTS)
    assert COLOURS.keys() == METHODS.keys()
    assert set(CORE_SETTINGS) <= set(report.tables.SETTINGS)


def test_the_page_says_what_the_runs_say():
    runs_file = report.RESULTS / "runs.jsonl"
    if not runs_file.exists():
        pytest.skip("no committed runs")
    runs, page = outcomes.load(runs_file), report.PAGE.read_text(encoding="utf-8")
    for part in report.PARTS:
        assert part.render is None or part.render(runs) in page, part.name
