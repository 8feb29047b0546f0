"""Tests of what users of DRPOConfig and DRPOTrainer write first, and of what they are told to write instead."""

from __future__ import annotations

import importlib
import sys

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16' peft")
import transformers
from trl.trainer import grpo_trainer

import tiny_trl
from drpo_kernels import CISPO, DPPO, GSPO, PPO, SPO
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer, parse_objective


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epsilon": 0.1}, "epsilon .*got 0.1: write objective=PPO(clip_low=0.1, clip_high=0.1)"),
        ({"epsilon_high": 0.3}, "epsilon_high .*got 0.3: write objective=PPO(clip_low=0.2, clip_high=0.3)"),
        ({"objective": PPO(0.1, 0.4), "epsilon_high": 0.3}, "write objective=PPO(clip_low=0.1, clip_high=0.3)"),
        ({"objective": SPO(), "epsilon": 0.3}, "write objective=SPO(epsilon=0.3)"),
        ({"objective": CISPO(), "epsilon_high": 4.0}, "write objective=CISPO(ratio_cap=4.0)"),
        ({"objective": "GSPO", "epsilon": 2e-4}, "write objective=GSPO(clip_low=0.0002, clip_high=0.0002)"),
        ({"objective": "DRPO", "delta": 0.2}, "delta .*got 0.2: write objective=DRPO(delta=0.2)"),
        ({"delta": 0.2}, "write objective=DRPO(delta=0.2)"),
        ({"objective": "PPO", "delta": 0.2}, "write objective=DRPO(delta=0.2)"),
        ({"objective": DPPO(), "delta": 0.1}, "write objective=DPPO(delta_low=0.1, delta_high=0.1)"),
        ({"delta": 1.5}, "objective=DRPO(delta=1.5), .*objective=PPO(clip_low=0.2, clip_high=0.2, dual_clip=1.5)"),
        ({"objective": PPO(0.1, 0.3), "delta": 1.2}, "write objective=PPO(clip_low=0.1, clip_high=0.2, dual_clip=1.3)"),
        ({"importance_sampling_level": "sequence"}, "write objective=GSPO(clip_low=0.0003, clip_high=0.0004)"),
        ({"importance_sampling_level": "word", "objective": GSPO()}, "importance_sampling_level .*'sequence' .*GSPO("),
        ({"loss_type": "cispo"}, "write objective=CISPO(ratio_cap=5.0)"),
        ({"loss_type": "cispo", "epsilon_high": 4.0}, "write objective=CISPO(ratio_cap=4.0)"),
        ({"loss_type": "sapo"}, "SAPO of docs/integrations/trl.md, with loss_type='grpo'"),
        ({"loss_type": "vespo"}, "VESPO of docs/integrations/trl.md, with loss_type='dapo'"),
        ({"sapo_temperature_pos": 2.0}, "sapo_temperature_pos .*SAPO of docs/integrations/trl.md"),
        ({"objective": GSPO(), "beta": 0.1}, "write use_bias_correction_kl=False"),
        ({"temperature": 0.0}, "temperature must"),
    ],
)
def test_what_to_write_instead(options, message, tmp_path):
    for special in "()":
        message = message.replace(special, rf"\{special}")
    with pytest.raises(ValueError, match=message) as error:
        tiny_trl.arguments(DRPOConfig, tmp_path, **options)
    if "write objective=" in str(error.value):  # the objective that the message suggests is valid
        text = str(error.value).rpartition("objective=")[2].partition(", which")[0]
        tiny_trl.arguments(DRPOConfig, tmp_path, objective=parse_objective(text))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objetive": "PPO"}, r"got objetive='PPO': write objective='PPO'"),
        ({"sparsegrad": 0.01}, r"write sparse_grad=0.01"),
        ({"drpo_delta": 0.2}, r"got drpo_delta=0.2: write objective=DRPO\(delta=0.2\)"),
        ({"clip_high": 0.3}, r"write objective=PPO\(clip_high=0.3\)"),
        ({"objective": "GSPO()", "clip_high": 4e-4}, r"write objective=GSPO\(clip_high=0.0004\)"),
        ({"objective": CISPO(), "ratio_floor": 0.5}, r"write objective=CISPO\(ratio_floor=0.5\)"),
        ({"kl_coef": 0.1}, r"write beta="),
        ({"reduction": "token-mean"}, r"write loss_type="),
        ({"qqq": 1}, "its help"),
    ],
)
def test_keywords_that_do_not_exist(options, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        tiny_trl.arguments(DRPOConfig, tmp_path, **options)


def test_an_objective_beside_the_config(tmp_path):
    args = tiny_trl.arguments(DRPOConfig, tmp_path)
    with pytest.raises(TypeError, match=r"objective must be given in args, .*DRPOConfig\(objective=SPO\("):
        tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model(), objective=SPO())


class Engine:
    """This stands in for vLLM, which is not asked for anything here."""

    def __init__(self, **_):
        pass


@pytest.mark.parametrize(
    "options, filters",
    [
        ({"top_p": 0.9}, "top_p"),
        ({"generation_kwargs": {"top_p": 0.9, "repetition_penalty": 1.2}}, "top_p, repetition_penalty"),
        ({"top_k": 5, "generation_kwargs": {"top_k": -1, "seed": 3}}, None),
        ({"min_p": 0.1}, "min_p"),
        ({"generation_kwargs": {"presence_penalty": 0.5, "frequency_penalty": 0.5}}, "presence_penalty, freq"),
        ({"generation_kwargs": {"logit_bias": {5: 2.0}}}, "logit_bias"),
        ({"generation_kwargs": {"guided_decoding": {"regex": "a*"}}}, "guided_decoding"),
        ({"vllm_structured_outputs_regex": "a*"}, "vllm_structured_outputs_regex"),
        ({"generation_kwargs": {"temperature": 0.5}}, "temperature"),
        ({"temperature": 0.5, "generation_kwargs": {"temperature": 0.5, "logit_bias": {}, "min_p": 0.0}}, None),
    ],
)
def test_sampling_that_the_policy_does_not_apply(options, filters, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Engine)
    args = tiny_trl.arguments(DRPOConfig, tmp_path, use_vllm=True, vllm_mode="colocate", **options)
    tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model())
    found = [record.getMessage() for record in caplog.records if "engine's log-prob" in record.getMessage()]
    assert len(found) == (filters is not None)
    assert filters is None or f"after {filters}" in found[0]


def llama4():
    shape = {"intermediate_size_mlp": 48, "num_local_experts": 4}
    return tiny_trl.model(transformers.Llama4ForCausalLM, **shape)


def test_a_router_without_its_loss(tmp_path):
    options = {"max_steps": 1, "gradient_checkpointing": False}
    with pytest.raises(ValueError, match=r"router_aux_loss_coef must be 0 .*write DRPOConfig\(router_aux_loss_coef=0"):
        tiny_trl.run(tiny_trl.trainer(DRPOTrainer, tiny_trl.arguments(DRPOConfig, tmp_path, **options), llama4()))
    args = tiny_trl.arguments(DRPOConfig, tmp_path, router_aux_loss_coef=0.0, **options)
    assert len(tiny_trl.run(tiny_trl.trainer(DRPOTrainer, args, llama4()))["loss"]) == 1


@pytest.mark.parametrize("says_so", [True, False])
def test_a_forward_that_was_replaced(says_so, tmp_path):
    """No other output is taken for a loss or for log-probs, even if a forward claims to wrap the fused one."""
    trainer = tiny_trl.trainer(DRPOTrainer, tiny_trl.arguments(DRPOConfig, tmp_path), tiny_trl.model())
    own, fused = type(trainer.model).forward, trainer.model.forward
    trainer.model.forward = lambda fused_head=None, **inputs: own(trainer.model, **inputs)
    message = r"fused_head must reach .*call add_fused_head\(model\) again"
    if not says_so:
        trainer.model.forward.__wrapped__ = fused
        message = "must be that of its fused head, got a CausalLMOutput.*patch the model"
    with pytest.raises(RuntimeError, match=message):
        trainer.train()


def test_advice_on_sequences(tmp_path, caplog):
    """TRL's advice follows the objective, and the options that it names are valid."""

    def warned(**options):
        caplog.clear()
        args = tiny_trl.arguments(DRPOConfig, tmp_path, **options)
        trainer = tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model())
        assert trainer.importance_sampling_level == args.importance_sampling_level
        saved = args.to_dict()
        del saved["steps_per_generation"]  # TRL takes this or generation_batch_size
        assert DRPOConfig(**saved).importance_sampling_level == args.importance_sampling_level
        return caplog.text

    assert "weights each sequence by its completion length" in warned(objective=GSPO())
    assert "importance_sampling_level" not in warned(objective=GSPO(), loss_type="grpo")
    assert "importance_sampling_level" not in warned(objective=GSPO(), loss_type="luspo")
    assert "is objective=GSPO(...) here" in warned(objective=PPO(), loss_type="luspo")


@pytest.mark.parametrize("package, name", [("trl", "trl"), ("verl", "verl"), ("verl", "verl_fused_head")])
def test_without_the_package(package, name, monkeypatch):
    for module in list(sys.modules):
        if module.startswith(f"drpo_kernels.integrations.{package}"):
            monkeypatch.delitem(sys.modules, module)
        if module.startswith(f"{package}."):  # another test has loaded it
            monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}>=.* must be installed, got .*pip install '{package}>="):
        importlib.import_module(f"drpo_kernels.integrations.{name}")
