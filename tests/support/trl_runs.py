"""Runs of DRPOTrainer beside those of GRPOTrainer, and single steps of both on batches made by hand."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16' peft")
pytest.importorskip("peft", reason="peft is not installed")
import transformers
from peft import LoraConfig
from transformers import (
    Qwen3MoeForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

import tiny_trl
from drpo_kernels import PPO
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer

transformers.logging.set_verbosity_error()

# Float32 log-probs of two correct heads differ by about 1e-6. The terms of a loss cancel to 1e-2 and below, hence the
# floor.
LOSS_BOUND, LOSS_FLOOR = 2e-5, 1e-2
WEIGHT_BOUND = 2e-5
LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
TRL_FORMULA = ("epsilon", "epsilon_high", "delta", "importance_sampling_level")


def moe():
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return tiny_trl.model(Qwen3MoeForCausalLM, router_aux_loss_coef=0.05, **shape)


def close(ours: list, theirs: list) -> bool:
    """Return whether all numbers are within the bound. TRL logs None for a NaN, and then ours must be None too."""
    return len(ours) == len(theirs) and all(
        a is b if a is None or b is None else abs(a - b) <= LOSS_BOUND * max(abs(b), LOSS_FLOOR)
        for a, b in zip(ours, theirs, strict=True)
    )


def assert_same_run(options, objective, keywords, policy, tmp_path, steps):
    theirs = tiny_trl.trainer(
        GRPOTrainer, tiny_trl.arguments(GRPOConfig, tmp_path, max_steps=steps, **options), policy(), **keywords
    )
    start = tiny_trl.weights(theirs)
    want = tiny_trl.run(theirs)
    kept = {name: value for name, value in options.items() if name not in TRL_FORMULA}
    args = tiny_trl.arguments(DRPOConfig, tmp_path, max_steps=steps, objective=objective, **kept)
    ours = tiny_trl.trainer(DRPOTrainer, args, policy(), **keywords)
    got = tiny_trl.run(ours)
    assert len(want["loss"]) == steps
    moved = (tiny_trl.weights(theirs) - start).norm()
    assert moved > 0
    assert (tiny_trl.weights(ours) - tiny_trl.weights(theirs)).norm() <= WEIGHT_BOUND * tiny_trl.weights(theirs).norm()
    for name in set(want) - {"step_time", "epoch"}:
        assert close(got[name], want[name]), f"{name}: {got[name]} instead of {want[name]}"


def batch(trainer, **changes):
    """Return a batch of two left-padded prompts whose completions have 2 to 6 tokens."""
    g = torch.Generator().manual_seed(5)
    lengths = torch.tensor([6, 4, 2, 5])
    steps = torch.arange(6)
    inputs = {
        "prompt_ids": torch.randint(4, tiny_trl.VOCAB, (4, 5), generator=g),
        "prompt_mask": torch.tensor([[0, 0, 1, 1, 1]] * 2 + [[1] * 5] * 2),
        "completion_ids": torch.randint(4, tiny_trl.VOCAB, (4, 6), generator=g),
        "completion_mask": (steps < lengths[:, None]).long(),
        "advantages": torch.tensor([1.0, -0.7, 0.0, 0.4]),
        "num_items_in_batch": lengths.sum(),
    }
    inputs = {**inputs, **changes}
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return inputs


def loss_and_gradient(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters() if p.grad is not None])


def pair(tmp_path, objective=None, **options):
    """Return a GRPOTrainer and a DRPOTrainer with the same weights."""
    theirs = tiny_trl.trainer(GRPOTrainer, tiny_trl.arguments(GRPOConfig, tmp_path, **options), tiny_trl.model())
    args = tiny_trl.arguments(DRPOConfig, tmp_path, objective=objective or PPO(), **options)
    return theirs, tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model())


def assert_same_step(theirs, ours, **changes):
    want_loss, want = loss_and_gradient(theirs, batch(theirs, **changes))
    got_loss, got = loss_and_gradient(ours, batch(ours, **changes))
    assert got_loss == pytest.approx(want_loss, rel=LOSS_BOUND, abs=LOSS_BOUND * LOSS_FLOOR)
    assert (got - want).norm() <= LOSS_BOUND * want.norm()
    assert want.norm() > 0


def old_logprobs(seed=7):
    return -3 - torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)) * 2
