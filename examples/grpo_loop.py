"""A whole GRPO loop: a tiny random model learns to write even tokens. Its loss comes from the hidden states alone."""

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from drpo_kernels import DRPO, linear_policy_loss, linear_token_logprobs

VOCAB, PROMPTS, GROUP, PROMPT_LENGTH, LENGTH, STEPS = 32, 8, 8, 4, 8, 16


def tiny_model() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
            pad_token_id=0,
        )
    )  # fmt: skip


def completion_hidden(model: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    """The hidden states [N, LENGTH, H] that predict the completions."""
    return model.model(ids, use_cache=False).last_hidden_state[:, PROMPT_LENGTH - 1 : -1]


def main() -> list[float]:
    torch.manual_seed(0)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rewards = []
    for step in range(STEPS):
        prompts = torch.randint(VOCAB, (PROMPTS, PROMPT_LENGTH)).repeat_interleave(GROUP, 0)
        ids = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=LENGTH
        )
        completions = ids[:, PROMPT_LENGTH:]
        reward = (completions % 2 == 0).float().mean(1).view(PROMPTS, GROUP)
        advantages = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        with torch.no_grad():  # a rollout engine reports these with the tokens that it sampled
            old_logprobs, _ = linear_token_logprobs(completion_hidden(model, ids), model.lm_head.weight, completions)
        for _ in range(2):
            out = linear_policy_loss(
                completion_hidden(model, ids), model.lm_head.weight, completions, old_logprobs, advantages.flatten(),
                objective=DRPO(delta=0.2),
            )  # fmt: skip
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        rewards.append(reward.mean().item())
        if step % 5 == 0:
            entropy = out.metrics["drpo/entropy_mean"]
            print(f"step {step:2d}  reward {rewards[-1]:.2f}  loss {out.loss:+.4f}  entropy {entropy:.2f} nat")
    return rewards


if __name__ == "__main__":
    main()
