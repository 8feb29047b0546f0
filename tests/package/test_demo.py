"""Tests of the demo's parts, and one quick run from end to end."""
# ruff: noqa: E402 (the packages of the demo extra may be missing, which skips this file)

from dataclasses import replace

import pytest
import torch

for package in ("transformers", "matplotlib", "tqdm", "rich"):
    pytest.importorskip(package)

from drpo_kernels import DRPO, PPO
from drpo_kernels.demo import compare as comparing
from drpo_kernels.demo import main as command
from drpo_kernels.demo import rollout as rolling
from drpo_kernels.demo import run as running
from drpo_kernels.demo.measure import median_times, peak_extra_bytes
from drpo_kernels.demo.model import build_model, completion_hidden
from drpo_kernels.demo.plots import gradient_weight
from drpo_kernels.demo.rollout import group_advantages, roll_out, sample
from drpo_kernels.demo.settings import Settings
from drpo_kernels.demo.task import (
    COMPLETION_LENGTH,
    IDS,
    PROMPT_LENGTH,
    Problem,
    decode,
    encode,
    reward,
    rewards,
    split_problems,
    until_end,
)
from drpo_kernels.demo.train import reinforce

CPU = torch.device("cpu")
TINY = Settings.quick()


@pytest.fixture(scope="module")
def model():
    return build_model(TINY, CPU)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problems(count):
    return split_problems(seed=0, held_out=count)[1]


# --- the task ---------------------------------------------------------------------------------------------------------


def test_problems_are_all_there_once_and_split_by_seed():
    training, held_out = split_problems(seed=3, held_out=1000)
    assert (len(training), len(held_out), len({*training, *held_out})) == (9000, 1000, 10_000)
    assert split_problems(seed=3, held_out=1000) == (training, held_out)
    assert split_problems(seed=4, held_out=1000)[1] != held_out


@pytest.mark.parametrize(
    "left, right, prompt, answer", [(58, 67, "58+67=", "521."), (3, 4, "03+04=", "7."), (99, 99, "99+99=", "891.")]
)
def test_a_problem_is_written_units_first(left, right, prompt, answer):
    assert (Problem(left, right).prompt, Problem(left, right).answer) == (prompt, answer)


def test_every_text_fits_and_survives_the_tokenizer():
    every = [Problem(left, right) for left in range(100) for right in range(100)]
    assert {len(problem.prompt) for problem in every} == {PROMPT_LENGTH}
    answers = [problem.answer for problem in every]
    assert decode(encode(answers, COMPLETION_LENGTH)) == answers


@pytest.mark.parametrize(
    "completion, expected",
    [("521.", 1.0), ("521", 0.0), ("125.", 0.0), ("522.", 0.0), ("5210", 0.0), ("52.", 0.0), ("0521", 0.0), (".", 0.0)],
)
def test_only_the_right_answer_properly_ended_is_rewarded(completion, expected):
    assert reward(Problem(58, 67), completion) == expected


def test_what_follows_the_end_is_ignored():
    completions = torch.tensor([[IDS[c] for c in text] for text in ("7.=9", "7..2", "70.1", "7123")])
    assert decode(completions) == ["7.", "7.", "70.", "7123"]
    assert rewards([Problem(3, 4)] * 4, completions).tolist() == [1, 1, 0, 0]
    assert until_end(completions).tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]


# --- rollouts ---------------------------------------------------------------------------------------------------------


def test_advantages_are_normalised_within_each_group():
    reward = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1])
    advantages = group_advantages(reward, group=4).reshape(4, 4)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(advantages.square().mean(1), torch.tensor([1.0, 1, 0, 0]), atol=1e-4, rtol=0)
    assert (advantages[2:] == 0).all()  # exactly 0, so that the loss drops such rows
    assert ((advantages > 0) == (reward.reshape(4, 4) > reward.reshape(4, 4).mean(1, keepdim=True))).all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_behaviour_logprobs_are_those_of_the_model(model, temperature):
    prompts = encode([problem.prompt for problem in problems(50)], PROMPT_LENGTH)
    drawn = sample(model, prompts, temperature=temperature, generator=generator())
    with torch.no_grad():
        hidden = completion_hidden(model, torch.cat([prompts, drawn.tokens], 1), PROMPT_LENGTH)
        distribution = torch.distributions.Categorical(logits=model.lm_head(hidden) / temperature)
    torch.testing.assert_close(drawn.logprobs, distribution.log_prob(drawn.tokens), atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn.entropy, distribution.entropy(), atol=1e-5, rtol=0)


def test_sampling_follows_the_distribution_and_the_seed(model):
    prompts = encode([Problem(1, 2).prompt] * 10_000, PROMPT_LENGTH)
    first, again, other = (sample(model, prompts, 1, generator=generator(seed)) for seed in (0, 0, 1))
    assert (first.tokens == again.tokens).all()
    assert (first.tokens != other.tokens).any()
    with torch.no_grad():
        expected = model(prompts[:1]).logits[0, -1].softmax(-1)
    shares = torch.bincount(first.tokens[:, 0], minlength=expected.numel()) / len(prompts)
    torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)  # this is at least 4 standard deviations


def test_temperature_zero_takes_the_most_probable_token(model):
    prompts = encode([problem.prompt for problem in problems(20)], PROMPT_LENGTH)
    with torch.no_grad():
        expected = model(prompts).logits[:, -1].argmax(-1)
    assert (sample(model, prompts, temperature=0.0).tokens[:, 0] == expected).all()


def test_what_follows_the_end_changes_no_hidden_state_before_it(model):
    prompt = encode([Problem(3, 4).prompt] * 2, PROMPT_LENGTH)
    completions = torch.tensor([[IDS[c] for c in text] for text in ("7.__", "7.58")])
    with torch.no_grad():
        one, other = completion_hidden(model, torch.cat([prompt, completions], 1), PROMPT_LENGTH)
    torch.testing.assert_close(one[:2], other[:2])
    assert not torch.allclose(one[3], other[3])


def test_a_rollout_repeats_each_prompt_for_its_group(model):
    rollout, statistics = roll_out(model, problems(3), group=4, temperature=1.0, generator=generator())
    expected = encode([problem.prompt for problem in problems(3)], PROMPT_LENGTH)
    assert (rollout.tokens[:, :PROMPT_LENGTH].reshape(3, 4, -1) == expected[:, None]).all()
    assert (rollout.tokens[:, PROMPT_LENGTH:] == rollout.targets).all()
    assert (rollout.old_logprobs <= 0).all()
    assert 0 < statistics["entropy"] <= torch.tensor(len(IDS)).log()


# --- learning ---------------------------------------------------------------------------------------------------------


def test_reinforcement_raises_an_easy_reward_and_is_reproducible(monkeypatch):
    """From random weights, completions that begin with 7 are rewarded. A loss of the wrong sign would end near 0."""
    monkeypatch.setattr(rolling, "rewards", lambda _, completions: (completions[:, 0] == IDS["7"]).float())
    settings = replace(TINY, steps=30, prompts=16, lr=5e-3)
    runs = [reinforce(build_model(settings, CPU), problems(100), settings, generator())[0] for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0][0]["reward"] < 0.3
    assert runs[0][-1]["reward"] > 0.8


def test_sparse_gradients_learn_as_well(monkeypatch):
    """The reward is the same. With 14 tokens every row may be sparse, because the entry limit is 16."""
    monkeypatch.setattr(rolling, "rewards", lambda _, completions: (completions[:, 0] == IDS["7"]).float())
    settings = replace(TINY, steps=30, prompts=16, lr=5e-3, sparse_grad=0.01)
    history, _ = reinforce(build_model(settings, CPU), problems(100), settings, generator())
    assert history[-1]["reward"] > 0.8
    assert history[0]["drpo/sparse_share"] == 1
    assert history[-1]["drpo/sparse_entries"] < len(IDS)
    assert 0 < history[-1]["drpo/left_out_share_max"] <= 0.01 * (1 + 1e-4)


# --- the comparison ---------------------------------------------------------------------------------------------------


def test_fused_and_eager_agree_and_a_wrong_loss_is_noticed(monkeypatch):
    batch = comparing.large_head_batch(4, 16, 32, 300, generator())
    assert comparing.compare(batch, DRPO(delta=0.2), repeats=1).agrees
    fused = comparing.fused_loss
    monkeypatch.setattr(comparing, "fused_loss", lambda *arguments: fused(*arguments) * 1.001)
    assert not comparing.compare(batch, DRPO(delta=0.2), repeats=1).agrees


def test_peak_memory_counts_what_is_held_at_once():
    def two_at_once_of_three():
        first = torch.empty(1 << 20)
        second = torch.empty(2 << 20)
        del first
        return second, torch.empty(1 << 19)

    assert peak_extra_bytes(two_at_once_of_three, CPU) == 4 * (3 << 20)


def test_times_are_of_the_functions_in_order():
    calls = []
    quick, slow = median_times((lambda: calls.append(0), lambda: torch.ones(300, 300, 300).exp()), CPU, repeats=3)
    assert len(calls) == 3
    assert quick < slow


# --- the plots and the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", [0.7, -2.0])
def test_gradient_weight_is_that_of_the_papers(advantage):
    probs, sign = torch.tensor([0.05, 0.29, 0.3, 0.31, 0.9], dtype=torch.float64), 1 if advantage > 0 else -1
    weight = gradient_weight(DRPO(delta=0.2), probs, 0.3, advantage)
    torch.testing.assert_close(weight, 1 - sign * (probs - 0.3) / 0.2)
    kept = sign * (probs / 0.3 - 1) <= 0.2
    assert (gradient_weight(PPO(), probs, 0.3, advantage) == kept).all()


def test_a_reward_that_does_not_rise_fails_the_run(capsys):
    assert running._verdict(0.3, [], Settings()) == 0
    assert running._verdict(0.02, [], Settings()) == 1
    assert "+0.020" in capsys.readouterr().err


def test_missing_extras_are_named(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "rich" else object())
    assert command.main([]) == 2
    error = capsys.readouterr().err
    assert "needs rich:" in error
    assert "pip install 'drpo_kernels[demo]'" in error


def test_a_quick_run_reports_and_plots(tmp_path, capsys):
    assert command.main(["--quick", "--device", "cpu", "--objective", "dppo", "--out", str(tmp_path / "plots")]) == 0
    out = capsys.readouterr().out
    assert "before RL" in out
    assert "peak extra memory: fused" in out
    for name in ("run.png", "gradient_weight.png"):
        content = (tmp_path / "plots" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 20_000


def test_sparse_grad_reaches_the_report_and_is_checked(tmp_path, capsys):
    assert command.main(["--quick", "--device", "cpu", "--sparse-grad", "0.01", "--out", str(tmp_path)]) == 0
    assert "sparse_grad = 0.01: in the last 5 steps" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        command.main(["--sparse-grad", "1"])
    assert "--sparse-grad must be in [0, 1), got 1.0" in capsys.readouterr().err
