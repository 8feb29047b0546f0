"""Tests of `kept_ids` from a `rollout_func`: with top-k sampling through DRPOTrainer, the ratio is of what was sampled
from.
"""

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from transformers import Qwen3ForCausalLM

import tiny_trl
from drpo_kernels import PPO
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer
from drpo_kernels.integrations.trl_sampling import padded_ids

TOP = 6


def sampler(kept=True, logprobs=True, top=TOP, tool=False):
    """Return a rollout function that samples up to five tokens of the policy's `top` likeliest. With `tool`, the second
    token is a tool's, whose ids mean nothing.
    """
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def rollout(prompts, trainer):
        trainer.model.eval()
        found = {"prompt_ids": [trainer.processing_class(p)["input_ids"] for p in prompts]}
        found |= {"completion_ids": [], "logprobs": [], "kept_ids": []}
        for i, prompt in enumerate(found["prompt_ids"]):
            ids, sampled, sets = list(prompt), [], []
            for _ in range(3 + i % 3):
                logits = trainer.model(torch.tensor([ids])).logits[0, -1].float()
                values, candidates = logits.topk(top)
                at = torch.multinomial(values.softmax(0), 1, generator=generator).item()
                ids.append(candidates[at].item())
                sampled.append(values.log_softmax(0)[at].item())
                sets.append(candidates[torch.randperm(top, generator=generator)].tolist())
            found["completion_ids"].append(ids[len(prompt) :])
            found["logprobs"].append(sampled)
            found["kept_ids"].append(sets)
        trainer.model.train()
        if tool:
            found["env_mask"] = [[1, 0, *[1] * (len(ids) - 2)] for ids in found["completion_ids"]]
            for ids, sets in zip(found["completion_ids"], found["kept_ids"], strict=True):
                sets[1] = [(ids[1] + 1) % tiny_trl.VOCAB]
        return {k: v for k, v in found.items() if kept or k != "kept_ids"} | ({} if logprobs else {"logprobs": None})

    return rollout


def run(tmp_path, **options):
    chosen = {name: options.pop(name) for name in ("kept", "logprobs", "top", "tool") if name in options}
    tiny_trl.model().save_pretrained(tmp_path / "policy")  # TRL loads the reference from there
    policy = Qwen3ForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    arguments = tiny_trl.arguments(DRPOConfig, tmp_path, objective=PPO(), **({"max_steps": 2} | options))
    trainer = tiny_trl.trainer(DRPOTrainer, arguments, policy, rollout_func=sampler(**chosen))
    return tiny_trl.run(trainer), tiny_trl.weights(trainer)


def test_a_fresh_batch_has_a_ratio_of_one(tmp_path):
    """Each step has a new batch, which the trained policy sampled after top-k."""
    series, _ = run(tmp_path)
    assert series["drpo/ratio_max"] == pytest.approx([1, 1], abs=1e-4)
    assert series["drpo/entropy_mean"][0] < torch.tensor(TOP).log()
    assert series["entropy"] == pytest.approx(series["drpo/entropy_mean"], rel=1e-4)
    without, _ = run(tmp_path, kept=False)
    assert without["drpo/ratio_mean"][0] < 0.9


OPTIONS = [
    {"tool": True},
    {"tool": True, "beta": 0.1},
    {"top_entropy_quantile": 0.5, "steps_per_generation": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_scored_by_the_trainer(options, tmp_path):
    """Without log-probs from the rollout, those of the policy at generation and of the
    reference are over the same ids.
    """
    series, _ = run(tmp_path, logprobs=False, num_iterations=2, pad_to_multiple_of=4, **options)
    assert series["drpo/ratio_max"][0] == pytest.approx(1, abs=1e-5)
    assert series["drpo/ratio_max"][1] != pytest.approx(1, abs=1e-5)  # this is the second pass over the batch
    if "beta" in options:
        assert series["kl"][0] == pytest.approx(0, abs=1e-6) == series["drpo/ref_kl"][0]


def test_sets_of_all_ids_change_nothing(tmp_path):
    every, weights = run(tmp_path, top=tiny_trl.VOCAB, num_iterations=2)
    without, others = run(tmp_path, top=tiny_trl.VOCAB, num_iterations=2, kept=False)
    assert every["loss"] == pytest.approx(without["loss"], abs=1e-6)
    start = torch.cat([p.detach().reshape(-1) for p in tiny_trl.model().parameters()])
    # Adam's first steps follow only the signs of gradients
    assert (weights - others).norm() <= 1e-4 * (others - start).norm()


def test_padding():
    ids = padded_ids([[[3, 4], None], [{5}, [6]]], [[3, 9], [5, 6]], [[1, 1], [1, 0]], multiple=4)
    assert ids.tolist() == [[[3, 4], *[[-1, -1]] * 3], [[5, -1], *[[-1, -1]] * 3]]
    assert padded_ids([[]], [[]], None, 1).tolist() == [[[-1]]]
    for wrong, message in (
        ([[[3]]], "got 1 for the 2 tokens of completion 0"),
        ([None], "got None for the 2 tokens of completion 0"),
        ([[[3], [4]], []], "got lists for 2 of 1 completions"),
        ([[[3.5], [4]]], "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            padded_ids(wrong, [[3, 4]], None, 1)
