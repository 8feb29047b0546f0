"""The policy before reinforcement learning is a small Qwen3, trained on demonstrations until it is sometimes right."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.stability import task
from benchmarks.stability.settings import Size
from drpo_kernels import linear_token_logprobs
from drpo_kernels.demo.model import completion_hidden, small_qwen3

# The first updates of Adam have full size whatever the gradient is, so the rate rises over this many of them.
SLOW_START = 20


def build_policy(size: Size, seed: int) -> PreTrainedModel:
    return small_qwen3(
        seed,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        vocab_size=size.vocabulary.size,
        max_position_embeddings=task.PROMPT_LENGTH + task.COMPLETION_LENGTH,
        eos_token_id=task.END_ID,
        pad_token_id=task.PAD_ID,
        tie_word_embeddings=True,  # as in Qwen3's small models
    )


def adamw(policy: PreTrainedModel, lr: float, steps: int | None = None):
    """Return AdamW without weight decay, and its schedule of rates.

    After the slow start the rate is constant. If `steps` is given, it falls linearly to a tenth by then.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def factor(step: int) -> float:
        return min((step + 1) / SLOW_START, 1.0 if steps is None else max(1 - step / steps, 0.1))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def warm_up(policy: PreTrainedModel, size: Size, seed: int) -> None:
    """Train the policy on a careless teacher's demonstrations."""
    generator = torch.Generator().manual_seed(seed)
    optimizer, schedule = adamw(policy, size.warmup_lr, size.warmup_steps)
    for _ in range(size.warmup_steps):
        problems = task.draw_problems(size.vocabulary, size.warmup_batch, generator)
        answers = task.draw_demonstrations(size.vocabulary, problems, size.carelessness, generator)
        hidden = completion_hidden(policy, torch.cat([problems.prompts, answers], 1), task.PROMPT_LENGTH)
        logprobs, _ = linear_token_logprobs(hidden, policy.lm_head.weight, answers)
        optimizer.zero_grad(set_to_none=True)
        (-logprobs.mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), size.grad_clip)
        optimizer.step()
        schedule.step()


def warmed_policy(size: Size, seed: int, cache: Path) -> PreTrainedModel:
    """Return the seed's policy after its warm-up, the same for every method and setting. It is kept in `cache`."""
    policy = build_policy(size, seed)
    path = cache / f"policy-{size.fingerprint}-{seed}.pt"
    if path.exists():
        policy.load_state_dict(torch.load(path))
        return policy
    warm_up(policy, size, seed)
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{seed}.part")
    torch.save(policy.state_dict(), unfinished)
    unfinished.replace(path)
    return policy
