"""Tests of DRPOTrainer against the real TRL: step for step the same numbers as GRPOTrainer wherever TRL has the
formula.
"""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16' peft")
pytest.importorskip("peft", reason="peft is not installed")
from transformers import (
    AutoModelForCausalLM,
    CohereForCausalLM,
    Gemma2ForCausalLM,
    GraniteForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

import tiny_trl
from drpo_kernels import CISPO, DRPO, GSPO, PPO
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer
from trl_runs import LORA, WEIGHT_BOUND, assert_same_run, close, moe

# Each case is name: (TRL's options, the objective of the same formula, keywords of both trainers, the policy).
CASES = {
    "defaults": ({}, PPO(), {}, tiny_trl.model),
    "grpo accumulated": ({"loss_type": "grpo", "gradient_accumulation_steps": 2}, PPO(), {}, tiny_trl.model),
    "bnpo reused": ({"loss_type": "bnpo", "num_iterations": 2}, PPO(), {}, tiny_trl.model),
    "dr_grpo": ({"loss_type": "dr_grpo", "steps_per_generation": 2}, PPO(), {}, tiny_trl.model),
    "luspo truncated": ({"loss_type": "luspo", "mask_truncated_completions": True}, PPO(), {}, tiny_trl.model),
    "two-sided clip": (
        {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.4, "num_iterations": 2}, PPO(0.1, 0.3, 1.4), {},
        tiny_trl.model,
    ),
    "gspo": (
        {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "num_iterations": 2}, GSPO(),
        {}, tiny_trl.model,
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2}, CISPO(), {}, tiny_trl.model),
    "off-policy mask": ({"off_policy_mask_threshold": 1e-4, "num_iterations": 2}, PPO(), {}, tiny_trl.model),
    "entropy quantile": (
        # At the third step, tokens of equal entropy lie at other quantiles, and the last bit chooses among them.
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.01, "num_iterations": 2}, PPO(), {}, tiny_trl.model
    ),
    "entropy bonus": ({"entropy_coef": 0.02, "loss_type": "grpo"}, PPO(), {}, tiny_trl.model),
    "adaptive entropy": (
        {"use_adaptive_entropy": True, "entropy_target": 3.7, "gradient_accumulation_steps": 2}, PPO(), {},
        tiny_trl.model,
    ),
    "fp32 head, temperature": ({"cast_lm_head_to_fp32": True, "temperature": 0.7}, PPO(), {}, tiny_trl.model),
    "adapters": ({}, PPO(), LORA, tiny_trl.model),
    "adapters, kl": ({"beta": 0.05}, PPO(), LORA, tiny_trl.model),
    "router": ({"gradient_accumulation_steps": 2}, PPO(), {}, moe),
    "soft-cap": (
        {"temperature": 1.3}, PPO(), {}, lambda: tiny_trl.model(Gemma2ForCausalLM, final_logit_softcapping=3.0)
    ),
    "scale, tied": (
        {}, PPO(), {}, lambda: tiny_trl.model(CohereForCausalLM, logit_scale=0.25, tie_word_embeddings=True)
    ),
    "divided logits": ({}, PPO(), {}, lambda: tiny_trl.model(GraniteForCausalLM, logits_scaling=2.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_same_as_trl(name, tmp_path):
    assert_same_run(*CASES[name], tmp_path, steps=10 if name == "defaults" else 3)


def test_same_as_trl_with_a_reference(tmp_path):
    """TRL reloads the reference from the model's path, and its KL carries the ratio by default."""
    tiny_trl.model().save_pretrained(tmp_path / "policy")
    options = {"beta": 0.1, "num_iterations": 2}
    assert_same_run(
        options, PPO(), {}, lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "policy"), tmp_path, steps=6
    )


def test_same_evaluation(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8, "max_steps": 2}
    losses = []
    for cls, args in ((GRPOTrainer, GRPOConfig), (DRPOTrainer, DRPOConfig)):
        keywords = {} if args is GRPOConfig else {"objective": PPO()}
        trainer = tiny_trl.trainer(
            cls, tiny_trl.arguments(args, tmp_path, **options, **keywords), tiny_trl.model(),
            eval_dataset=tiny_trl.dataset(8),
        )  # fmt: skip
        trainer.train()
        losses.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    assert len(losses[0]) == 1 and abs(losses[0][0]) > 1e-3
    assert close(*losses)


class EagerDRPO(GRPOTrainer):
    """This is TRL with the paper's DRPO formula as its loss, on TRL's own log-probs, in the default aggregation."""

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logps, _, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, inputs["completion_ids"].shape[1], compute_entropy=True
        )
        old, adv = inputs.get("old_per_token_logps", logps.detach()), inputs["advantages"][:, None]
        ratio = (logps - old).exp()
        loss = -(ratio * adv - adv.abs() * old.exp() * (ratio - 1) ** 2 / (2 * 0.2)) * inputs["completion_mask"]
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return loss.sum() / (inputs["num_items_in_batch"] * share)


def test_drpo_is_the_paper_s_loss_in_trl(tmp_path):
    common = {"max_steps": 6, "num_iterations": 2, "gradient_accumulation_steps": 2}
    theirs = tiny_trl.trainer(EagerDRPO, tiny_trl.arguments(GRPOConfig, tmp_path, **common), tiny_trl.model())
    want = tiny_trl.run(theirs)
    args = tiny_trl.arguments(DRPOConfig, tmp_path, objective=DRPO(delta=0.2), **common)
    # this seeds the process, so it comes after the other run
    ours = tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model())
    got = tiny_trl.run(ours)
    assert close(got["loss"], want["loss"]) and close(got["grad_norm"], want["grad_norm"])
    assert (tiny_trl.weights(ours) - tiny_trl.weights(theirs)).norm() <= WEIGHT_BOUND * tiny_trl.weights(theirs).norm()


def test_trl_s_head_is_never_called(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("TRL's head was called")

    tiny_trl.model().save_pretrained(tmp_path / "policy")
    monkeypatch.setattr(chunked_logprob.ChunkedLogProbFunction, "apply", refuse)
    options = {"num_iterations": 2, "beta": 0.1, "max_steps": 2, "off_policy_mask_threshold": 0.5}
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with pytest.raises(AssertionError, match="TRL's head"):  # the trap works, for GRPOTrainer calls the head
        tiny_trl.run(tiny_trl.trainer(GRPOTrainer, tiny_trl.arguments(GRPOConfig, tmp_path, **options), policy))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    args = tiny_trl.arguments(DRPOConfig, tmp_path, objective=DRPO(delta=0.2), **options)
    assert len(tiny_trl.run(tiny_trl.trainer(DRPOTrainer, args, policy))["loss"]) == 2
    assert trl_utils._ChunkedLogProbFunction is chunked_logprob.ChunkedLogProbFunction


def test_the_run_learns(tmp_path):
    args = tiny_trl.arguments(
        DRPOConfig, tmp_path, objective=DRPO(delta=0.2), max_steps=40, num_iterations=2, learning_rate=1e-2,
        per_device_train_batch_size=16, num_generations=8,
    )  # fmt: skip
    rewards = tiny_trl.run(tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model()))["reward"]
    # At first 5 of 49 tokens are vowels.
    assert sum(rewards[:5]) / 5 < 0.2
    assert sum(rewards[-5:]) / 5 > 0.3


def test_signature_is_trl_s():
    assert inspect.signature(DRPOTrainer.__init__) == inspect.signature(GRPOTrainer.__init__)


def test_compiled_model(tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    assert_same_run(options, PPO(), {}, tiny_trl.model, tmp_path, steps=2)
