"""TRL always asks a `rollout_func` for "logprobs", and it may return log-probs or placeholders for them."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16' peft")
from trl import GRPOConfig, GRPOTrainer

import tiny_trl
from drpo_kernels import PPO
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer

NONE_GIVEN = "rollout_func returns no log-probs"
LENGTHS = (5, 3, 6, 4)


def train(tmp_path, logprobs_of, cls=DRPOTrainer, config=DRPOConfig, greedy=False, **options):
    """Train two steps on random completions, and return (weights, log μ of each batch). `logprobs_of` maps a row's
    tokens to its log-probs.
    """
    generator = torch.Generator().manual_seed(0)
    seen = []

    def rollout(prompts, trainer):
        found = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        lengths = [LENGTHS[i % len(LENGTHS)] for i in range(len(prompts))]
        if greedy:
            ids = [trainer.model.generate(torch.tensor([x]), do_sample=False, max_new_tokens=5)[0] for x in found]
            tokens = [row[len(x) :].tolist() for row, x in zip(ids, found, strict=True)]
        else:
            tokens = [torch.randint(4, tiny_trl.VOCAB, (n,), generator=generator).tolist() for n in lengths]
        rows = None if logprobs_of is None else [logprobs_of(row) for row in tokens]
        return {"prompt_ids": found, "completion_ids": tokens, "logprobs": rows}

    if cls is DRPOTrainer:
        options = {"objective": PPO(), **options}

        class Recording(DRPOTrainer):
            def _behaviour_logprobs(self, *args):
                seen.append(super()._behaviour_logprobs(*args))
                return seen[-1]

        cls = Recording
    args = tiny_trl.arguments(config, tmp_path, max_steps=2, **options)
    trainer = tiny_trl.trainer(cls, args, tiny_trl.model(), rollout_func=rollout)
    tiny_trl.run(trainer)
    return tiny_trl.weights(trainer), seen


PLACEHOLDERS = {
    "zeros": lambda row: [0.0] * len(row),
    "sentinels": lambda row: [-9999.0] * len(row),
    "no numbers": lambda row: [math.nan] * len(row),
    "None": lambda row: [None] * len(row),
    "no rows": lambda row: None,
    "a mixture": lambda row: [(0.0, None, -9999.0, math.nan)[i % 4] for i in range(len(row))],
    "most": lambda row: [0.0] * (len(row) - 1) + [-3.0],
}


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Return the weights after a run whose rollouts have no log-probs, by the number of passes over a batch."""
    return {n: train(tmp_path_factory.mktemp("without"), None, num_iterations=n)[0] for n in (1, 2)}


@pytest.mark.parametrize("name, iterations", [*((name, 1) for name in PLACEHOLDERS), ("zeros", 2)])
def test_placeholders(name, iterations, without, tmp_path, caplog):
    """Placeholders are not taken for log μ, at any batch size."""
    got, _ = train(tmp_path, PLACEHOLDERS[name], num_iterations=iterations)
    assert torch.equal(got, without[iterations])
    assert caplog.text.count(NONE_GIVEN) == 1


def test_placeholders_as_in_trl(tmp_path):
    got, _ = train(tmp_path, PLACEHOLDERS["zeros"])
    theirs, _ = train(tmp_path, PLACEHOLDERS["zeros"], GRPOTrainer, GRPOConfig)
    start = torch.cat([p.detach().reshape(-1) for p in tiny_trl.model().parameters()])
    # Adam's first steps follow only the signs of gradients
    assert (got - theirs).norm() <= 1e-4 * (theirs - start).norm()


def test_some_zeros_among_log_probs(tmp_path, caplog):
    """A few tokens of which the engine was sure, and one that it could not score, do not spoil
    the others' log-probs.
    """
    _, seen = train(tmp_path, lambda row: [0.0, -3.0, None, *[-2.0] * (len(row) - 3)])
    assert NONE_GIVEN not in caplog.text
    for old in seen:
        assert (old[:, 0] == 0).all() and (old[:, 1] == -3).all() and old[:, 2].isnan().all()


def test_a_policy_that_is_sure(tmp_path, caplog):
    """At a tiny temperature every sampled token has probability 1, so that its log-prob of 0 is no placeholder."""

    _, seen = train(tmp_path, PLACEHOLDERS["zeros"], greedy=True, temperature=1e-3)
    assert NONE_GIVEN not in caplog.text
    assert all(old.eq(0).all() for old in seen) and len(seen) == 2


@pytest.mark.parametrize("more", [-1, 1, -5])
def test_rows_of_another_length(more, tmp_path):
    with pytest.raises(ValueError, match=r"one log-prob per completion token, got \d for the 5 tokens of completion 0"):
        train(tmp_path, lambda row: [-1.0] * (len(row) + more))
