"""A Hugging Face model whose forward returns the policy loss: `add_fused_head` in place of logits and `log_softmax`."""

from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drpo_kernels import PPO, linear_policy_loss
from drpo_kernels.integrations.transformers import add_fused_head


def main() -> float:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    ids, advantages = torch.randint(2000, (4, 33)), torch.randn(4)
    old_logprobs = torch.full((4, 32), -7.6)  # log μ of ids[:, 1:], from the rollout engine

    # As a trainer usually writes it: logits of the whole vocabulary, then the token's log-prob, then PPO.
    logits = model(ids[:, :-1]).logits.float()
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(0.8, 1.2)
    plain = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None]).mean()
    plain.backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad()

    # The same from inside the model's forward, and there are no logits. DDP, FSDP and ZeRO-3 may wrap the model now.
    add_fused_head(model)
    loss = partial(
        linear_policy_loss, targets=ids[:, 1:], old_logprobs=old_logprobs, advantages=advantages, objective=PPO()
    )
    out = model(ids[:, :-1], fused_head=loss)
    out.loss.backward()

    difference = ((model.lm_head.weight.grad - expected).norm() / expected.norm()).item()
    print(f"loss: fused {out.loss:.6f}, plain {plain:.6f}")
    print(f"relative difference of the head's gradients: {difference:.1e}")
    print(f"logits that the fused call never held: {logits.numel() * 4 / 2**20:.1f} MiB, and their gradient")
    return difference


if __name__ == "__main__":
    main()
