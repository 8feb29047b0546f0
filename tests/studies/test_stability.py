"""Tests of the stability experiment: the losses' weights, the bandit, its training, and the grid of runs."""

import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks.harness import quantization
from benchmarks.harness.records import read
from benchmarks.stability import __main__ as command
from benchmarks.stability import bandit, grid, training
from benchmarks.stability.settings import (
    AMENDMENT,
    CONTROL,
    HALF,
    METHODS,
    PLAUSIBLE,
    QUICK,
    RARE,
    RATES,
    SEEDS,
    SETTINGS,
    SWEEP_SEEDS,
)
from drpo_kernels import DPPO, DRPO, SPO, linear_policy_loss
from examples import smollm

needs_head = pytest.mark.skipif(not (smollm.CACHE / smollm.HEAD).exists(), reason="the model: `make smollm`")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- Table 1 ---------------------------------------------------------------------------------------------------------


def closed_form(method, mu, pi, advantage):
    """Return each method's weight, written again from the papers."""
    r, sign = pi / mu, np.sign(advantage)
    harmful = sign * (r - 1) > 0
    kl = mu * np.log(mu / pi) + (1 - mu) * np.log((1 - mu + 1e-8) / (1 - pi + 1e-8))
    if method.startswith("DRPO δ="):
        return 1 - sign * (pi - mu) / float(method.removeprefix("DRPO δ="))
    return {
        "PG": lambda: np.ones_like(r),
        "PPO": lambda: np.where(sign > 0, r <= 1.2, r >= 0.8).astype(float),
        "PPO clip-higher": lambda: np.where(sign > 0, r <= 1.28, r >= 0.8).astype(float),
        "SPO": lambda: 1 - sign * (r - 1) / 0.2,
        "CISPO": lambda: np.minimum(r, 5) / r,
        "DPPO-TV": lambda: ~(harmful & (np.abs(pi - mu) > 0.15)) * np.minimum(r, 20) / r,
        "DPPO-KL": lambda: ~(harmful & (kl > 0.15)) * np.minimum(r, 20) / r,
        "DRPO without |A|": lambda: 1 - (pi - mu) / (advantage * 0.2),
        "DRPO without correction": lambda: np.maximum(1 - sign * (pi - mu) / 0.2, 0),
    }[method]()


def table1(objective, mu, pi, advantage):
    tensors = [torch.from_numpy(np.log(values)) for values in (pi, mu)]
    return training.weight(objective, *tensors, torch.full_like(tensors[0], advantage)).numpy()


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.3, -2.5])
@pytest.mark.parametrize("method", METHODS)
def test_table1(method, advantage):
    """The weights are compared in float64, relative to the size of the terms, which r inflates to 1e3 / ε for SPO. No
    point is on a boundary.
    """
    side = np.concatenate([np.geomspace(1.234e-3, 0.1, 40), np.linspace(0.1037, 0.9981, 60)])
    mu, pi = (values.ravel() for values in np.meshgrid(side, side * 0.99931))
    expected = closed_form(method, mu, pi, advantage)
    np.testing.assert_allclose(table1(METHODS[method], mu, pi, advantage), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_drpo_is_zero_where_dppo_s_mask_falls(sign):
    mu = np.array([0.3, 0.5, 0.7])
    at = table1(DRPO(delta=0.2), mu, mu + sign * 0.2, sign)
    assert np.abs(at).max() <= 1e-12
    just = [table1(DPPO(delta_low=0.2, delta_high=0.2), mu, mu + sign * (0.2 + e), sign) for e in (-1e-9, 1e-9)]
    assert (just[0] == 1).all() and (just[1] == 0).all()


def test_spo_is_unbounded():
    assert table1(SPO(), np.array([1e-4]), np.array([0.5]), 1.0)[0] < -1e4


@pytest.mark.parametrize("method", METHODS)
def test_on_policy_all_losses_are_one(method):
    """Where π = μ the slope is -A, also of tokens with A = 0, so the control needs to be run with one method only."""
    logp, advantages = torch.linspace(-9, -1e-3, 50), torch.linspace(-2, 2, 5).repeat(10)
    assert torch.equal(training.slope(METHODS[method], logp, logp, advantages), -advantages)


def test_what_is_counted_of_an_update():
    """Of four tokens with A ≠ 0 two are rare. PPO stops one of each kind, and DRPO reverses a common one."""
    mu = torch.tensor([0.001, 0.001, 0.5, 0.5, 0.3])
    pi = torch.tensor([0.002, 0.001, 0.75, 0.55, 0.9])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0])
    batch = training.Batch(torch.arange(1), torch.arange(5)[None], mu.log()[None], advantages[None])
    tokens = training.pushed(pi.log()[None], batch)
    assert training.by_rarity(torch.ones(4), tokens[1], "tokens") == {"rare_tokens": 2, "common_tokens": 2}
    assert training.distortions(METHODS["PPO"], *tokens) == {"rare_distortion": 1, "common_distortion": 1}
    drpo = training.distortions(METHODS["DRPO δ=0.2"], *tokens)
    assert drpo["rare_distortion"] == pytest.approx(0.005, rel=1e-3)
    assert drpo["common_distortion"] == pytest.approx(1 + 0.25, rel=1e-3)


# --- the bandit ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return bandit.bandit(QUICK.width)


@needs_head
def test_the_policy_is_the_model_s_own(world):
    """Without an adapter the policy gives the recorded tokens the log-probs that the model gave them, up to the float16
    of the recorded hidden states.
    """
    recording = bandit.recorded()
    rows = torch.arange(0, 2560, 40)
    found = world.untrained(rows).gather(1, recording.targets[rows, None])[:, 0]
    assert (found - recording.logprobs["fp32"][rows]).abs().max() < 0.02
    assert world.features.square().sum(1).mean() <= 1


@needs_head
def test_engines_round(world):
    rows, adapter = torch.arange(0, 2560, 200), torch.randn(QUICK.width, QUICK.width, generator=generator())
    exact = world.exact.logits(rows, world.features, adapter)
    errors = []
    for engine in ("bf16", "fp8", "int4"):
        logits = world.head(engine).logits(rows, world.features, adapter)
        assert torch.equal(logits, logits.bfloat16().float())
        errors.append((logits - exact).norm() / exact.norm())
    assert 0 < errors[0] < errors[1] < errors[2] < 0.5
    moved = bandit.SCALE * world.scale * (quantization.int4(smollm.load_head()) @ world.directions)
    assert torch.equal(world.head("int4").directions, moved)  # the adapter acts through the engine's weights too


@needs_head
def test_rules_are_half_kept_and_answers_plausible(world):
    """A rule's share is added up again, without the code of the bandit, in the first rule and another that is none."""
    recording, head = bandit.recorded(), smollm.load_head()
    tokenizer = smollm.load_tokenizer()
    names = [tokenizer.decode([token]).lower() for token in range(smollm.VOCAB)]
    p = torch.cat([(rows @ head.T).softmax(1) for rows in recording.hidden.float().split(64)])
    p = torch.where(p >= PLAUSIBLE, p, 0).mean(0)
    for letters, among in ((world.rules[0], True), ("xyz", False)):
        share = p[torch.tensor([any(letter in name for letter in letters) for name in names])].sum()
        assert (HALF[0] <= share <= HALF[1]) == among == (letters in world.rules)


@needs_head
def test_rewards(world):
    """The likeliest token with one of the letters is rewarded. Those without, and the unlikeliest, are not."""
    rule, contexts = world.rule("aeo"), torch.arange(0, 2560, 40)
    both = world.untrained(contexts)
    balanced = torch.minimum(both[:, rule].amax(1), both[:, ~rule].amax(1)).argmax()
    rows, logp = contexts[balanced, None], both[balanced]
    right, wrong = (torch.where(kept, logp, -math.inf).argmax() for kept in (rule, ~rule))
    unlikely = torch.where(rule, logp, math.inf).argmin()
    assert logp[wrong].exp() > PLAUSIBLE > logp[unlikely].exp()
    tokens = torch.stack([right, wrong, unlikely])[None]
    assert world.rewards(rule, rows, tokens).tolist() == [[1.0, 0.0, 0.0]]


@needs_head
def test_what_a_policy_earns(world):
    """The sums are taken again over the whole vocabulary. More rows than are computed at a time."""
    rule, rows = world.rule("aeo"), torch.arange(0, 2560, 60)
    adapter = torch.randn(QUICK.width, QUICK.width, generator=generator())
    before = world.untrained(rows).exp()
    hidden = world.hidden[rows] + bandit.SCALE * world.scale * world.features[rows] @ adapter @ world.directions.T
    now = (hidden @ smollm.load_head().T).softmax(1)
    good = (before >= PLAUSIBLE) & rule
    found = bandit.HeldOut(world, rule, rows).evaluate(adapter)
    assert found["reward"] == pytest.approx((now * good).sum(1).mean().item(), rel=1e-3)
    assert found["rare"] == pytest.approx((now * (good & (before < RARE))).sum(1).mean().item(), rel=1e-3)
    assert found["implausible"] == pytest.approx((now * (before < PLAUSIBLE)).sum(1).mean().item(), rel=1e-2)


# --- training --------------------------------------------------------------------------------------------------------


def sampler(world, **changes):
    return training.Sampler(world, world.exact, world.rule("aeo"), replace(QUICK, **changes), generator())


@needs_head
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_that_of_the_package(world, method):
    """The hand-written gradient of the adapter beside autograd through `linear_policy_loss`, off-policy. The gradient
    is a sum that cancels by a factor of a hundred, which leaves 1e-3 of float32's 1e-7 times √V terms.
    """
    first, now = (0.4 * torch.randn(QUICK.width, QUICK.width, generator=generator(seed)) for seed in (0, 1))
    rows = torch.arange(0, 2560, 300)
    batch = sampler(world).sample(rows, first)
    logp, found = training.gradient(world, now, batch, METHODS[method])
    adapter = now.clone().requires_grad_()
    moved = bandit.SCALE * world.scale * world.features[rows] @ adapter @ world.directions.T
    out = linear_policy_loss(
        (world.hidden[rows] + moved).repeat_interleave(QUICK.group, 0), smollm.load_head(), batch.tokens.flatten(),
        batch.old_logprobs.flatten(), batch.advantages.flatten(), objective=METHODS[method], compact="none",
    )  # fmt: skip
    (want,) = torch.autograd.grad(out.loss, adapter)
    assert (found - want).norm() <= 1e-3 * want.norm() and want.norm() > 0
    assert (logp.flatten() - out.logprobs).abs().max() <= 1e-4


@needs_head
def test_a_rollout_is_sampled_before_its_first_update(world):
    """The adapter changes after every update. The tokens of a rollout do not depend on that, those of the next do."""

    def tokens(change):
        adapter, found = torch.zeros(QUICK.width, QUICK.width), []
        for batch in sampler(world, updates=8).batches(torch.arange(40), adapter, 4):
            found.append((batch.rows, batch.tokens))
            adapter += change
        return found

    still, moving = tokens(0.0), tokens(5.0)
    same = [torch.equal(a[1], b[1]) for a, b in zip(still, moving, strict=True)]
    assert all(same[:4]) and not any(same[4:])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(still, moving, strict=True))
    # The second rollout finds 8 of 40 contexts left and draws a new order: all 32 of a rollout differ.
    rollouts = torch.stack([rows for rows, _ in still]).view(2, -1)
    assert all(len(rollout.unique()) == 4 * QUICK.contexts for rollout in rollouts)


@needs_head
def test_tokens_are_drawn_as_often_as_they_are_likely(world):
    """The log-probs of drawn tokens are on average minus the entropy, within five standard errors."""
    rows = torch.arange(0, 2560, 80)
    batch = sampler(world, group=64).sample(rows, torch.zeros(4, 4))
    logp = world.untrained(rows)
    surplus = batch.old_logprobs + -(logp.exp() * logp).sum(1, keepdim=True)
    assert surplus.mean().abs() <= 5 * surplus.std() / surplus.numel() ** 0.5
    assert (batch.old_logprobs - logp.gather(1, batch.tokens)).abs().max() <= 1e-4


@needs_head
def test_samples_are_of_the_engine_and_advantages_of_a_group(world):
    """The recorded log-probs are those of the head that samples, and a context's advantages have mean 0."""
    rows, adapter = torch.arange(0, 2560, 100), torch.randn(QUICK.width, QUICK.width, generator=generator())
    rule, head = world.rule("aeo"), world.head("int4")
    batch = training.Sampler(world, head, rule, QUICK, generator()).sample(rows, adapter)
    logp = head.logits(rows, world.features, adapter).log_softmax(1).gather(1, batch.tokens)
    assert (batch.old_logprobs - logp).abs().max() <= 1e-4
    assert batch.advantages.mean(1).abs().max() <= 1e-5 and batch.advantages.abs().max() > 1
    rewards = world.rewards(rule, rows, batch.tokens)
    assert ((batch.advantages > 0) == (rewards > rewards.mean(1, keepdim=True))).all()


@needs_head
def test_a_run_learns_and_a_seed_decides_everything():
    once, again = (training.run("DRPO δ=0.2", "16 updates", 3, 0.2, QUICK, ["PPO"]) for _ in range(2))
    other, another = (training.run("PG", "16 updates", seed, 0.2, QUICK) for seed in (4, 3))
    assert json.dumps(once) == json.dumps(again)
    assert (once["letters"], once["reward"][0]) != (other["letters"], other["reward"][0])
    assert (once["letters"], once["reward"][0]) == (another["letters"], another["reward"][0])  # pairs of a seed
    assert once["reward"] != another["reward"] and len(once["reward"]) == QUICK.points + 1
    assert once["reward"][-1] > once["reward"][0] + 0.03
    assert once["compared"].keys() == {"PPO"} and once["compared"]["PPO"]["rare_distortion"] > 0


@needs_head
def test_a_run_trains_on_no_held_out_context(monkeypatch):
    """Every batch is looked at, and so are the rows that are held out; most of the others are used."""
    used, held_out = [], []
    gradient, made = training.gradient, bandit.HeldOut.__init__
    monkeypatch.setattr(training, "gradient", lambda *args: used.append(args[2].rows) or gradient(*args))
    monkeypatch.setattr(bandit.HeldOut, "__init__", lambda self, *args: held_out.append(args[2]) or made(self, *args))
    training.run("PG", "4 updates", 0, 0.1, QUICK)
    used, held_out = torch.cat(used), held_out[0]
    assert len(held_out) == QUICK.held_out and not set(used.tolist()) & set(held_out.tolist())
    assert len(used) == len(used.unique()) == QUICK.updates * QUICK.contexts


@needs_head
def test_a_mismatch_is_one_and_the_control_is_none():
    """PPO distorts nothing where the policy itself samples for each update, and something where a 4-bit head does."""
    found = [training.run("PPO", setting, 0, 0.1, QUICK) for setting in (CONTROL, "4-bit head")]
    assert found[0]["rare_distortion"] == found[0]["common_distortion"] == 0
    assert found[1]["rare_distortion"] > 0.1 * found[1]["rare_tokens"]


@needs_head
def test_gradients_are_clipped():
    """Adam divides by the gradient's size, except where that is near its ε of 1e-8: so small a clip stops it."""
    free, clipped = (training.run("PG", CONTROL, 0, 0.1, replace(QUICK, grad_clip=clip)) for clip in (1.0, 1e-12))
    assert abs(clipped["reward"][-1] - clipped["reward"][0]) < 0.01 < abs(free["reward"][-1] - free["reward"][0])


# --- grid ------------------------------------------------------------------------------------------------------------


def made_up(method, setting, seed, rate, size, compare):
    """What a run would return, if it took no time."""
    sums = {"rare_distortion": 1.0, "common_distortion": 3.0}
    return {
        "letters": "aeo", "reward": [0.5, 0.6 + seed / 1000 + rate, 1 / 3], "rare": [0.1, 0.1, 0.1],
        "rare_tokens": 5.0, "common_tokens": 9.0, **sums, "compared": dict.fromkeys(compare, sums),
    }  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(grid, "_pool", ThreadPoolExecutor)
    monkeypatch.setattr(grid, "run", made_up)


def run_missing(jobs, path):
    grid.run_missing(jobs, size=QUICK, path=path, workers=1, command="test", title="test")


def test_the_jobs_are_all_cells_and_the_control_is_run_once():
    sweep = grid.sweep_jobs(list(METHODS), list(SETTINGS))
    off_policy = len(METHODS) * (len(SETTINGS) - 1)
    assert len(set(sweep)) == len(sweep) == (off_policy + 1) * len(RATES) * len(SWEEP_SEEDS)
    assert {job.method for job in sweep if job.setting == CONTROL} == {"PG"}
    rates = dict.fromkeys(grid.cells(["PG", "PPO"], ["4 updates"]), 0.1)
    assert not set(SEEDS) & set(SWEEP_SEEDS) and not set(AMENDMENT.seeds) & {*SEEDS, *SWEEP_SEEDS}
    amended = grid.amendment_jobs()
    assert len(set(amended)) == len(amended) == 20 * 2 * 7 * 4
    jobs = grid.comparison_jobs(rates, (0, 1))
    assert [(job.method, job.seed) for job in jobs] == [("PG", 0), ("PPO", 0), ("PG", 1), ("PPO", 1)]


def test_an_interrupted_grid_goes_on(tmp_path, quick):
    """Every other run is lost. The same runs come back, and the lines that were there stay."""
    path = tmp_path / "runs.jsonl"
    jobs = [grid.Job(*job) for job in itertools.product(("PG", "SPO"), ("4 updates",), (0, 100), (0.1, 0.2))]
    run_missing(jobs, path)
    whole, lines = grid.runs_by_job(read(path), QUICK)[0], path.read_text(encoding="utf-8").splitlines()
    kept = lines[:1] + lines[2::2]
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    run_missing(jobs, path)
    assert grid.runs_by_job(read(path), QUICK)[0] == whole and set(whole) == set(jobs)
    assert set(kept) <= set(path.read_text(encoding="utf-8").splitlines())
    size = path.stat().st_size
    run_missing(jobs, path)
    assert path.stat().st_size == size  # nothing is left to do


def test_what_a_line_holds(tmp_path, quick):
    """Numbers have four digits, and runs of PG that choose no rate compare all other methods."""
    path = tmp_path / "runs.jsonl"
    run_missing([grid.Job(m, "4 updates", seed, 0.1) for m in ("PG", "PPO") for seed in (0, 100)], path)
    runs, (source,) = grid.runs_by_job(read(path), QUICK)
    assert {"benchmark", "definitions", "device", "versions", "commit", "dirty", "command", "date"} == source.keys()
    compared = {(job.method, job.seed): len(run.get("compared", ())) for job, run in runs.items()}
    assert compared == {("PG", 0): len(METHODS) - 1, ("PG", 100): 0, ("PPO", 0): 0, ("PPO", 100): 0}
    assert runs[grid.Job("PG", "4 updates", 0, 0.1)]["reward"] == [0.5, 0.7, 0.3333]


@pytest.mark.parametrize(
    "old, new", [("PPO(clip_low=0.2", "PPO(clip_low=0.3"), ("updates=4,", "updates=5,"), ("width=4", "width=5")]
)
def test_another_definition_is_an_error_and_loses_nothing(tmp_path, quick, old, new):
    path = tmp_path / "runs.jsonl"
    run_missing([grid.Job("PPO", "4 updates", 0, 0.1)], path)
    text = path.read_text(encoding="utf-8").replace(old, new)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="another definition"):
        run_missing([grid.Job("PPO", "4 updates", 1, 0.1)], path)
    assert path.read_text(encoding="utf-8") == text


def test_a_definition_that_no_run_has_may_change(tmp_path, quick):
    path = tmp_path / "runs.jsonl"
    run_missing([grid.Job("PPO", "4 updates", 0, 0.1)], path)
    path.write_text(path.read_text(encoding="utf-8").replace("SPO(epsilon=0.2", "SPO(epsilon=0.3"), encoding="utf-8")
    run_missing([grid.Job("PPO", "4 updates", 1, 0.1)], path)
    assert len(grid.runs_by_job(read(path), QUICK)[0]) == 2


@needs_head
def test_the_command(tmp_path, monkeypatch, capsys):
    """One method runs in one setting, a sweep and a seed. Runs of another definition are an error."""
    monkeypatch.setattr(grid, "_pool", ThreadPoolExecutor)
    path = tmp_path / "runs.jsonl"
    options = ["--quick", "--seeds", "1", "--workers", "1", "--methods", "SPO", "--settings", "4-bit head"]
    assert command.main([*options, "--out", str(path)]) == 0
    found = [record for record in read(path) if "definitions" not in record]
    assert len(found) == len(RATES) * len(SWEEP_SEEDS) + 1
    best = max(RATES, key=lambda rate: sum(sum(r["reward"][-2:]) for r in found[:-1] if r["rate"] == rate))
    assert found[-1]["rate"] == best and found[-1]["seed"] == 0
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("SPO(epsilon=0.2", "SPO(epsilon=0.3"), encoding="utf-8")
    assert command.main([*options, "--out", str(path)]) == 2
    assert "another definition" in capsys.readouterr().err


def test_a_rehearsal_wants_a_file_of_its_own(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--quick"])
    assert "--quick needs an --out" in capsys.readouterr().err
