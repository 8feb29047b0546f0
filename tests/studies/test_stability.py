"""Tests of the stability experiment: its task, engine, statistics and grid, and the paper's Table 1."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks.harness.records import read
from benchmarks.stability import __main__ as command
from benchmarks.stability import engine, grid, report, statistics
from benchmarks.stability.measures import gradient_weight
from benchmarks.stability.policy import build_policy
from benchmarks.stability.settings import METHODS, SMOKE
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
    """Chance is the share of pairs of operations with the permutation of another pair. The bound is five standard
    deviations.
    """
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
    """A wrong first list earns the reward, and so does whatever follows the END."""
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


def test_an_engine_rounds_a_copy():
    """A bf16 engine rounds by half a unit of 8 significant bits. An E4M3 one rounds by half a unit of 4, or by half of
    its least step, 2^-9 of the scale max|w| / 448.
    """
    policy = build_policy(SMOKE, 0)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    rolled = engine.rollout_engine(policy, "fp8")
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
    changed = 0
    for name, weight in rolled.state_dict().items():
        exact = before[name]
        bound = exact.abs() * 2.0**-8
        if name.endswith("proj.weight"):
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
    """Return each method's weight, written again from the papers."""
    r, sign = pi / mu, np.sign(advantage)
    bound = lambda delta: 1 - sign * (pi - mu) / delta  # noqa: E731
    return {
        "PG": lambda: np.ones_like(r),
        "PPO": lambda: np.where(sign > 0, r <= 1.2, r >= 0.8).astype(float),
        "SPO": lambda: 1 - sign * (r - 1) / 0.2,
        "DPPO-TV": lambda: ~((sign * (r - 1) > 0) & (np.abs(pi - mu) > 0.15)) * np.minimum(r, 20) / r,
        "DRPO δ=0.2": lambda: bound(0.2),
        "DRPO δ=12.5": lambda: bound(12.5),
    }[method]()


def table1(objective, mu, pi, advantage):
    tensors = [torch.from_numpy(np.log(values)) for values in (pi, mu)]
    return gradient_weight(objective, *tensors, torch.full_like(tensors[0], advantage)).numpy()


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.3, -2.5])
@pytest.mark.parametrize("method", METHODS)
def test_table1(method, advantage):
    """The weights are compared in float64, relative to the size of the terms, which r inflates to 1e3 / ε for SPO. No
    point is on a boundary.
    """
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


def test_known_means():
    assert statistics.bootstrap([0.25] * 5) == (0.25, 0.25, 0.25)
    assert statistics.bootstrap([-0.2, -0.1, -0.3]).high < 0
    one = statistics.bootstrap([0.4])
    assert one.mean == 0.4 and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(statistics.bootstrap([]).mean)


def test_the_bootstrap_s_ends():
    """All 3,125 resamples of five values are equally likely, which gives the exact 2.5 % point of their mean. The
    bootstrap finds it up to its noise.
    """
    values = np.array([0.0, 1.0, 3.0, 4.0, 9.0])
    means = np.sort(values[np.indices((5,) * 5).reshape(5, -1)].mean(0))
    found = statistics.bootstrap(values)
    # 2.5 % of 10,000 resamples is known to ± 0.5 %
    assert np.quantile(means, 0.02) <= found.low <= np.quantile(means, 0.03)
    assert np.quantile(means, 0.97) <= found.high <= np.quantile(means, 0.98)


def test_coverage():
    """The page says that intervals of five normal seeds hold the true mean about 85 % of the time. The share of 400
    trials is known to ± 5.4 %, three standard deviations.
    """
    estimate = statistics.bootstrap(np.random.default_rng(0).standard_normal((5, 400)))
    assert abs(np.mean((estimate.low <= 0) & (estimate.high >= 0)) - 0.85) <= 0.054
    assert "about 85% of the time" in report.PAGE.read_text(encoding="utf-8")


def test_p_values():
    """Student's t of 4 degrees of freedom is 2.776 at 5 % and 4.604 at 1 %."""
    shape = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    error = np.std(shape, ddof=1) / math.sqrt(5)
    assert statistics.paired_p(shape + 2.776445 * error) == pytest.approx(0.05, rel=1e-5)
    assert statistics.paired_p(shape - 4.604095 * error) == pytest.approx(0.01, rel=1e-5)
    assert statistics.paired_p([0.0] * 5) == 1


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == [pytest.approx(p) for p in (0.03, 0.06, 0.06)]
    assert statistics.holm([0.6, 0.7]) == [1, 1] and statistics.holm([]) == []


def test_shares_and_intervals_as_text():
    """Wilson's interval of 0 of 5 ends at z² / (5 + z²) = 43.4 %."""
    assert statistics.counted(0, 5) == "0 of 5 [0%, 43%]" and statistics.counted(5, 5) == "5 of 5 [57%, 100%]"
    assert statistics.interval(statistics.Estimate(0.5, 0.25, 0.75), ".2f") == "0.50 [0.25, 0.75]"
    assert statistics.interval(statistics.Estimate(0.5, 0.25, 0.75), ".2g", percent=True) == "50% [25, 75]"
    assert statistics.interval(statistics.bootstrap([0.5])) == "0.500"
    assert statistics.interval(statistics.bootstrap([])) == "–"


# --- grid ------------------------------------------------------------------------------------------------------------


def records_of(path):
    return [{k: v for k, v in record.items() if k not in PROVENANCE} for record in read(path)]


UNTRAINED = replace(SMOKE, warmup_steps=1, minibatches=16)  # one point of a curve, from an untrained policy


def run_missing(jobs, folder, size=UNTRAINED):
    path, cache = folder / "runs.jsonl", folder / "cache"
    grid.run_missing(jobs, size=size, path=path, cache=cache, workers=1, command="test")


def test_smoke_grid(tmp_path):
    """One method runs in two settings, end to end with processes of its own, after a sweep of two rates on one seed."""
    options = ["--smoke", "--seeds", "1", "--workers", "1", "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
    assert command.main([*options, "--methods", "DRPO δ=0.2", "--settings", "on-policy", "stale"]) == 0
    found = read(tmp_path / "runs.jsonl")
    jobs = list(grid.recorded(tmp_path / "runs.jsonl", SMOKE))
    assert len(found) == len(jobs) == 2 + 2 and jobs == sorted(jobs)
    assert any(max(record["curve"]["reward"]) > 0 for record in found)  # otherwise nothing was trained
    assert all(name in record for record in found for name in PROVENANCE)
    off, on = ([r["curve"]["prob_shift"][-1] for r in found if r["setting"] == s] for s in ("stale", "on-policy"))
    assert min(off) > 100 * max(on)
    page = (tmp_path / "stability.md").read_text(encoding="utf-8")
    assert "these numbers mean nothing" in page and "grid is not complete" in page
    assert {path.stem for path in tmp_path.glob("*.png")} == report.PICTURES.keys()
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))


def test_an_interrupted_grid_goes_on(tmp_path, monkeypatch):
    """Every other line is lost and the rest are in another order. The same runs come back, and the lines that were
    there stay.
    """
    monkeypatch.setattr(grid, "_pool", ThreadPoolExecutor)
    path, rates = tmp_path / "runs.jsonl", dict.fromkeys(TWO, 1e-3)
    jobs = grid.comparison_jobs(TWO, ["stale", "mismatch (fp8)"], [0], rates)
    run_missing(jobs, tmp_path)
    whole, lines = records_of(path), path.read_text(encoding="utf-8").splitlines()
    kept = lines[::-2]
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    run_missing(jobs, tmp_path)
    assert records_of(path) == whole and len(whole) == len(jobs)
    assert set(kept) <= set(path.read_text(encoding="utf-8").splitlines())


def test_a_seed_decides_everything(tmp_path):
    once, again, other = (run("PPO", "stale", seed, 1e-3, UNTRAINED, tmp_path) for seed in (0, 0, 1))
    assert json.dumps(once) == json.dumps(again)  # as text, because NaN does not equal itself
    assert once["curve"]["entropy"] != other["curve"]["entropy"]


def test_smoke_wants_a_folder_of_its_own(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--smoke"])
    assert "--out of its own" in capsys.readouterr().err
