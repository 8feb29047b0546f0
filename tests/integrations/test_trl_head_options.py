"""The head's options of `linear_policy_loss` in DRPOConfig get from the command line to every call of the head."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16' peft")
from transformers import HfArgumentParser

import tiny_trl
from drpo_kernels import GSPO
from drpo_kernels.integrations import trl as integration
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer

WORDS = {
    "workspace_bytes": ("1000000", 1000000),
    "logits_dtype": ("bfloat16", "bfloat16"),
    "head_dtype": ("fp8_e4m3", "fp8_e4m3"),
    "batch_invariant": ("True", True),
    "validate": ("False", False),
}


@pytest.mark.parametrize("name", WORDS)
def test_command_line_and_saved_config(name, tmp_path):
    word, value = WORDS[name]
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", f"--{name}", word]
    (config,) = HfArgumentParser(DRPOConfig).parse_args_into_dataclasses(words)
    assert getattr(config, name) == value
    saved = json.loads(config.to_json_string())
    del saved["steps_per_generation"]  # TRL takes this or generation_batch_size
    assert getattr(DRPOConfig(**saved), name) == value
    (default,) = HfArgumentParser(DRPOConfig).parse_args_into_dataclasses(words[:-2])
    assert getattr(default, name) == DRPOConfig.__dataclass_fields__[name].default != value


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_logits_dtype_is_text(dtype, tmp_path):
    args = tiny_trl.arguments(DRPOConfig, tmp_path, logits_dtype=dtype)
    assert args.logits_dtype == json.loads(args.to_json_string())["logits_dtype"] == "bfloat16"
    assert args.head_options()["logits_dtype"] == torch.bfloat16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"logits_dtype": "float16"}, "logits_dtype must be None, torch.float32 or torch.bfloat16, got"),
        ({"logits_dtype": "half a byte"}, "logits_dtype must be .*got half a byte"),
        ({"head_dtype": "fp4"}, "head_dtype must be one of .*got 'fp4'"),
        ({"workspace_bytes": 0}, "workspace_bytes must be"),
        ({"workspace_bytes": 1.5}, "workspace_bytes must be"),
        ({"batch_invariant": 1}, "batch_invariant must be True or False, got 1"),
        ({"validate": "yes"}, "validate must be None, True or False, got 'yes'"),
        ({"batch_invariant": True, "head_dtype": "fp8_e4m3"}, "head_dtype must be None with batch_invariant"),
        ({"batch_invariant": True, "sparse_grad": 0.01}, "sparse_grad must be 0 with batch_invariant"),
        ({"objective": GSPO(), "sparse_grad": 0.01}, "sparse_grad must be 0 with objective"),
        ({"sparse_grad": 0.01, "use_adaptive_entropy": True}, "sparse_grad must be 0 with use_adaptive_entropy"),
    ],
)
def test_refused_at_construction(options, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        tiny_trl.arguments(DRPOConfig, tmp_path, **options)


def test_every_call_of_the_head_has_them(tmp_path, monkeypatch):
    """The calls are the loss, the scoring of old and reference log-probs, and the scoring that selects tokens."""
    want = {"workspace_bytes": 100_000, "logits_dtype": torch.bfloat16, "head_dtype": "fp8_e4m3", "validate": True}
    calls = {"linear_policy_loss": [], "linear_token_logprobs": []}

    def recorded(name):
        function = getattr(integration, name)

        def call(*args, **keywords):
            calls[name].append({option: keywords.get(option) for option in [*want, "temperature"]})
            return function(*args, **keywords)

        return call

    for name in calls:
        monkeypatch.setattr(integration, name, recorded(name))
    options = {"num_iterations": 2, "top_entropy_quantile": 0.5, "max_steps": 2, "temperature": 0.8, "beta": 0.1}
    tiny_trl.model().save_pretrained(tmp_path / "policy")
    args = tiny_trl.arguments(DRPOConfig, tmp_path, **want, **options)
    logs = tiny_trl.run(tiny_trl.trainer(DRPOTrainer, args, str(tmp_path / "policy")))
    assert len(calls["linear_policy_loss"]) == 2
    # one generation scores old and reference; two steps score their selection
    assert len(calls["linear_token_logprobs"]) == 4
    assert all(call == {**want, "temperature": 0.8} for found in calls.values() for call in found)
    # log μ was scored by the same head; otherwise an fp8 head would be 6 % off.
    assert logs["drpo/ratio_max"][0] == pytest.approx(1, abs=1e-5)
