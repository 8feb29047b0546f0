"""The parts of a tiny TRL run: tokenizer, model, data, rewards and a recorder. Nothing is downloaded."""

from __future__ import annotations

import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789+-*/=(). "
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCAB = len(SPECIALS) + len(LETTERS)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *LETTERS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def config(cls=Qwen3Config, **changes):
    shape = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    return cls(**{**shape, **changes})


def model(cls=Qwen3ForCausalLM, seed=0, **changes):
    torch.manual_seed(seed)
    return cls(config(cls.config_class, **changes)).float()


def dataset(size: int = 64) -> Dataset:
    prompts = [f"{a}+{a * 7 % 13}=" if a % 3 else f"({a})" for a in range(size)]  # their lengths differ
    return Dataset.from_dict({"prompt": prompts})


def letter_share(completions, **_):
    """Reward the share of vowels, which differs within a group and can be learnt."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


def arguments(cls, output_dir, **changes):
    defaults = dict(
        output_dir=str(output_dir), per_device_train_batch_size=8, num_generations=4, max_completion_length=7,
        max_steps=4, learning_rate=2e-3, logging_steps=1, report_to="none", save_strategy="no", seed=3, use_cpu=True,
        bf16=False, disable_tqdm=True,
    )  # fmt: skip
    return cls(**{**defaults, **changes})


def trainer(cls, args, policy, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(
            model=policy, reward_funcs=keywords.pop("reward_funcs", letter_share), args=args,
            train_dataset=keywords.pop("train_dataset", None) or dataset(), processing_class=tokenizer(), **keywords,
        )  # fmt: skip


def run(trainer) -> dict[str, list[float]]:
    """Train, and return the logged series by name."""
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in steps if name in entry] for name in steps[0]}


def weights(trainer) -> torch.Tensor:
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return torch.cat([p.detach().reshape(-1) for p in policy.parameters()])
