"""Tests of DRPOTrainer with PEFT's adapters around the backbone and the head: step for step the same as GRPOTrainer."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16' peft")
pytest.importorskip("peft", reason="peft is not installed")
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from trl import GRPOConfig, GRPOTrainer

import tiny_trl
from drpo_kernels import PPO
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer
from trl_runs import LOSS_BOUND, LOSS_FLOOR, WEIGHT_BOUND

VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
OLD = {"num_iterations": 2}  # a second iteration needs old log-probs to be scored
REFERENCE = {"num_iterations": 2, "beta": 0.1, "gradient_accumulation_steps": 2}

# Each case is name: (PEFT's configuration, options of both trainers, options of the policy). Gradient checkpointing,
# TRL's default, is on unless an option says otherwise.
CASES = {
    "prompt": (lambda: PromptTuningConfig(**VIRTUAL), OLD, {}),
    "prompt, reference": (lambda: PromptTuningConfig(**VIRTUAL), REFERENCE, {}),
    "p-tuning, reference": (lambda: PromptEncoderConfig(encoder_hidden_size=16, **VIRTUAL), REFERENCE, {}),
    "prefix, reference": (  # its keys and values are lost in checkpointing, in GRPOTrainer too
        lambda: PrefixTuningConfig(**VIRTUAL), {**REFERENCE, "gradient_checkpointing": False}, {},
    ),
    "head, reference": (lambda: LoraConfig(modules_to_save=["lm_head"], **LORA), REFERENCE, {}),
    "head in float32": (
        lambda: LoraConfig(modules_to_save=["lm_head"], **LORA), {**OLD, "cast_lm_head_to_fp32": True}, {},
    ),
    "tied head": (
        lambda: LoraConfig(modules_to_save=["embed_tokens"], ensure_weight_tying=True, **LORA), REFERENCE,
        {"tie_word_embeddings": True},
    ),
    "tokens, untied": (lambda: LoraConfig(trainable_token_indices=[5, 6], **LORA), OLD, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_same_as_trl(name, tmp_path):
    peft_config, options, shape = CASES[name]
    runs = []
    for cls, config, own in ((GRPOTrainer, GRPOConfig, {}), (DRPOTrainer, DRPOConfig, {"objective": PPO()})):
        args = tiny_trl.arguments(config, tmp_path, max_steps=3, **options, **own)
        trainer = tiny_trl.trainer(cls, args, tiny_trl.model(**shape), peft_config=peft_config())
        start, logs, weights = tiny_trl.weights(trainer), tiny_trl.run(trainer), tiny_trl.weights(trainer)
        runs.append((logs, weights, (weights - start).norm(), trainer))
    (want, theirs, moved, _), (got, ours, _, trainer) = runs
    assert moved > 0.01
    for key in {"loss", "grad_norm", "entropy", "kl"} & want.keys():
        assert got[key] == pytest.approx(want[key], rel=LOSS_BOUND, abs=LOSS_BOUND * LOSS_FLOOR)
    assert (ours - theirs).norm() <= WEIGHT_BOUND * theirs.norm()
    if "head" in name:
        wrapper = trainer.model.get_base_model().lm_head
        assert not torch.equal(wrapper.weight, wrapper.original_module.weight)


@pytest.mark.parametrize(
    "options, shape, message",
    [
        ({"target_modules": ["q_proj", "lm_head"]}, {}, "lm_head"),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": [5]}, {"tie_word_embeddings": True},
            r"trainable_token_indices .*modules_to_save=\['embed_tokens'\]",
        ),
    ],
)  # fmt: skip
def test_adapters_on_the_head_are_refused(options, shape, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        tiny_trl.trainer(
            DRPOTrainer, tiny_trl.arguments(DRPOConfig, tmp_path), tiny_trl.model(**shape),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, **options),
        )  # fmt: skip
