"""The policy: the Qwen3 architecture of `transformers` with a few hundred thousand random weights and no download."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from drpo_kernels.demo.settings import Settings
from drpo_kernels.demo.task import ALPHABET, COMPLETION_LENGTH, END_ID, PAD_ID, PROMPT_LENGTH


def build_model(settings: Settings, device: torch.device) -> PreTrainedModel:
    """A randomly initialised policy. Its weights are drawn on the CPU, so they are the same on every device."""
    return small_qwen3(
        settings.seed,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        vocab_size=len(ALPHABET),
        max_position_embeddings=PROMPT_LENGTH + COMPLETION_LENGTH,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    ).to(device)  # type: ignore[arg-type]  # transformers' wrapper of it hides its own self


def small_qwen3(seed: int, *, hidden_size: int, num_attention_heads: int, **config) -> PreTrainedModel:
    """A Qwen3 with seeded random weights on the CPU and an untied head; `config` overrides fields of Qwen3Config."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads,
        head_dim=hidden_size // num_attention_heads,
        tie_word_embeddings=False,
        bos_token_id=None,
        attn_implementation="eager",  # the fused attentions' backward is not deterministic on every GPU
    )
    return Qwen3ForCausalLM(Qwen3Config(**(sizes | config)))


def completion_hidden(model: PreTrainedModel, tokens: Tensor, prompt_length: int) -> Tensor:
    """The hidden states that predict the completion: tokens [N, P + C] -> [N, C, H].

    Completions are padded on the right and attention is causal, so no real token sees the padding: no mask is needed.
    """
    return model.model(tokens, use_cache=False).last_hidden_state[:, prompt_length - 1 : -1]
