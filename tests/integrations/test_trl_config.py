"""Tests of DRPOConfig: objectives as text, options that are refused, and the pages' snippets."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16' peft")
pytest.importorskip("peft", reason="peft is not installed")
from transformers import (
    HfArgumentParser,
)
from trl import GRPOConfig

import tiny_trl
from drpo_kernels import DRPO, GSPO, PPO, SPO
from drpo_kernels.integrations import trl as integration
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer, parse_objective
from drpo_kernels.integrations.trl_config import HEAD_OPTIONS
from snippets import README, ROOT, run, snippet


@pytest.mark.parametrize(
    "text, objective",
    [("DRPO", DRPO()), ("DRPO(delta=0.2)", DRPO(0.2)), (" SPO( 0.3 )", SPO(0.3)), ("PPO(dual_clip=None)", PPO())],
)
def test_objective_as_text(text, objective):
    assert parse_objective(text) == objective
    assert parse_objective(repr(objective)) == objective


BAD_TEXTS = ("", "DRPO(", "DRPO(delta=x)", "__import__('os')", "DRPO(delta=-1)", "NOPE()", "3", "DRPO(epsilon=1)")


@pytest.mark.parametrize("text", [*BAD_TEXTS, "DRPO(**{})", "DRPO(**{'delta': 1})"])
def test_bad_text(text):
    with pytest.raises(ValueError, match=r"objective|delta"):
        parse_objective(text)


def test_config_survives_the_command_line_and_json(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--objective", "PPO(clip_high=0.28)", "--use_cpu", "--bf16", "False"]
    (config,) = HfArgumentParser(DRPOConfig).parse_args_into_dataclasses([*arguments, "--report_to", "none"])
    assert config.objective == PPO(clip_high=0.28)
    saved = json.loads(config.to_json_string())
    assert parse_objective(saved["objective"]) == config.objective
    added = {"objective", "compact", "sparse_grad", *HEAD_OPTIONS}
    assert set(saved) == {*GRPOConfig(str(tmp_path), bf16=False, use_cpu=True).to_dict(), *added}
    torch.save(config, tmp_path / "args.bin")
    assert torch.load(tmp_path / "args.bin", weights_only=False).objective == config.objective
    assert DRPOConfig(str(tmp_path), bf16=False, use_cpu=True).objective == DRPO()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": GSPO(), "beta": 0.1}, "use_bias_correction_kl"),
        ({"compact": "none"}, "compact"),
        ({"vllm_importance_sampling_mode": "token_truncate"}, "vllm_importance_sampling_correction=True"),
        ({"vllm_importance_sampling_clip_max": 2.0}, "vllm_importance_sampling_correction=True"),
        ({"compact": "active", "use_adaptive_entropy": True}, "compact"),
        ({"sparse_grad": 1.0}, "sparse_grad"),
        ({"sparse_grad": 0.01, "entropy_coef": 0.1}, "sparse_grad"),
        ({"sparse_grad": 0.01, "objective": GSPO()}, "sparse_grad"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_trl.arguments(DRPOConfig, tmp_path, **options)


@dataclass
class OnTheCPU(DRPOConfig):
    """The snippets are for a GPU, and these defaults make them run on a CPU."""

    use_cpu: bool = True
    max_completion_length: int = 6
    report_to: str = "none"


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "integrations" / "trl.md"], ids=["readme", "page"])
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(integration, "DRPOConfig", OnTheCPU)
    tiny_trl.model().save_pretrained("policy")
    tiny_trl.tokenizer().save_pretrained("policy")
    names = {"model": "policy", "reward": tiny_trl.letter_share, "dataset": tiny_trl.dataset(2)}
    trainer = run(snippet("integrations.trl import", page), **names)["trainer"]
    assert trainer.state.global_step > 0
    assert trainer.args.objective == DRPO(delta=0.2)


def test_fields_set_after_construction_are_checked(tmp_path):
    args = tiny_trl.arguments(DRPOConfig, tmp_path)
    args.objective = "DRPO(0.1)"
    assert tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model()).objective == DRPO(0.1)
    args.loss_type = "sapo"
    with pytest.raises(ValueError, match="loss_type"):
        tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model())


def test_an_objective_that_no_checkpoint_could_hold(tmp_path):
    @dataclass(frozen=True)
    class Local(DRPO):
        pass

    with pytest.raises(ValueError, match="top of a module"):
        tiny_trl.arguments(DRPOConfig, tmp_path, objective=Local())


def test_wrong_types(tmp_path):
    with pytest.raises(TypeError, match="objective"):
        tiny_trl.arguments(DRPOConfig, tmp_path, objective=0.2)
    with pytest.raises(TypeError, match="DRPOConfig"):
        tiny_trl.trainer(DRPOTrainer, tiny_trl.arguments(GRPOConfig, tmp_path), tiny_trl.model())
