"""Tiny models of many families, and the loss of a model's own logits, with which a fused head must agree.

Budgets. Log-probs and entropy are two float32 computations from the same hidden states with |z| < 32, so an ulp of 2e-6
in each logit and as much again in each log-sum-exp: 1e-5. The gradients of all parameters have the package's 5e-5 of
their norm from float32 inputs, where a parameter whose gradient nearly cancels is given 1e-3 of the largest one's norm.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers

from drpo_kernels import DRPO, linear_policy_loss, linear_token_logprobs

transformers.logging.set_verbosity_error()

LOGPROB_BOUND, GRADIENT_BOUND, CANCELLED = 1e-5, 5e-5, 1e-3
V, DELTA = 97, 0.2
SHAPE = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.2, attention_dropout=0.0,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, output_router_logits=True)
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            initializer_range=0.2, bos_token_id=1, eos_token_id=2)  # fmt: skip
MAMBA = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, initializer_range=0.2)
GRANITE_MOE = {k: v for k, v in SHAPE.items() if k != "head_dim"}
GRANITE_MOE |= dict(logits_scaling=4.0, num_local_experts=4, num_experts_per_tok=2)
FALCON_H1 = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, lm_head_multiplier=0.3)

# Each name stands for (configuration class, its options, what the model does to its logits).
FAMILIES = {
    "Llama": (transformers.LlamaConfig, SHAPE, {}),
    "Qwen3": (transformers.Qwen3Config, SHAPE, {}),
    "Qwen3Moe": (transformers.Qwen3MoeConfig, SHAPE | EXPERTS, {}),
    "Gemma2": (transformers.Gemma2Config, SHAPE | {"final_logit_softcapping": 5.0}, {"softcap": 5.0}),
    "Gemma3": (transformers.Gemma3TextConfig, SHAPE | {"final_logit_softcapping": 7.0}, {"softcap": 7.0}),
    "Cohere": (transformers.CohereConfig, SHAPE | {"logit_scale": 0.25}, {"logit_scale": 0.25}),
    "Granite": (transformers.GraniteConfig, SHAPE | {"logits_scaling": 4.0}, {"logit_scale": 0.25}),
    "GraniteMoe": (transformers.GraniteMoeConfig, GRANITE_MOE, {"logit_scale": 0.25}),  # use_cache is in **kwargs
    "FalconH1": (transformers.FalconH1Config, SHAPE | FALCON_H1, {"logit_scale": 0.3}),
    "GPT2": (transformers.GPT2Config, GPT2, {}),
    "GPTNeoX": (transformers.GPTNeoXConfig, SHAPE, {}),
    "Phi": (transformers.PhiConfig, {k: v for k, v in SHAPE.items() if k != "head_dim"}, {}),  # its head has a bias
    "Mamba": (transformers.MambaConfig, MAMBA, {}),
}


def make(name="Llama", tied=False, attention="eager", seed=0, **changes):
    cls, options, _ = FAMILIES[name]
    torch.manual_seed(seed)
    config = cls(**{**options, "tie_word_embeddings": tied, **changes})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()


def make_batch(rows=3, length=11, seed=1, left_padding=(4, 0, 1)):
    """Return tokens with left padding, of which the first three are the prompt. targets[i] is token i + 1."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (rows, length + 1), generator=generator)
    starts = torch.tensor(left_padding)[:, None]
    attention = (torch.arange(length)[None] >= starts).long()
    mask = torch.arange(length)[None] >= starts + 2
    advantages = torch.randn(rows, generator=generator)
    old = -2 - 3 * torch.rand(rows, length, generator=generator)
    return SimpleNamespace(
        inputs={"input_ids": ids[:, :-1], "attention_mask": attention}, targets=ids[:, 1:], mask=mask,
        advantages=advantages, old=old,
    )  # fmt: skip


def loss_of(batch):
    return partial(
        linear_policy_loss, targets=batch.targets, old_logprobs=batch.old, advantages=batch.advantages,
        mask=batch.mask, objective=DRPO(delta=DELTA),
    )  # fmt: skip


def logprobs_of(batch):
    return partial(linear_token_logprobs, targets=batch.targets, mask=batch.mask)


def eager(logits, batch):
    """Return (loss, log-probs, entropy) of the paper's formula, for autograd. They are 0 where masked."""
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    own = logprobs.gather(-1, batch.targets[..., None])[..., 0]
    ratio, advantages = (own - batch.old).exp(), batch.advantages[:, None]
    loss = -(ratio * advantages - advantages.abs() * batch.old.exp() * (ratio - 1) ** 2 / (2 * DELTA))
    zeroed = (torch.where(batch.mask, x, 0) for x in (loss, own, entropy))
    loss, own, entropy = zeroed
    return loss.sum() / batch.mask.sum().clamp(min=1), own, entropy


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, want, bound=GRADIENT_BOUND):
    assert got.keys() == want.keys() and want
    largest = max(g.norm() for g in want.values())
    assert largest > 0
    for name, exact in want.items():
        error = (got[name].double() - exact.double()).norm() / torch.maximum(exact.norm(), CANCELLED * largest)
        assert error <= bound, f"{name}: {error:.1e}"


def assert_as_its_logits(model, batch):
    """Assert that a fused call has the loss, the log-probs and every gradient of the model's own logits."""
    logits = model(**batch.inputs).logits
    loss, logprobs, entropy = eager(logits, batch)
    want = gradients(model, loss)
    out = model(**batch.inputs, fused_head=loss_of(batch))
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    assert_same_gradients(gradients(model, out.loss), want)
    own = model(**batch.inputs, fused_head=logprobs_of(batch))
    for found, exact in ((own[0], logprobs), (own[1], entropy), (out.logprobs, logprobs)):
        torch.testing.assert_close(found, exact, rtol=0, atol=LOGPROB_BOUND)
    _, *theirs = eager(model(**batch.inputs).logits, batch)
    got, want = (
        gradients(model, (batch.advantages[:, None] * logprobs - 0.1 * entropy).sum())
        for logprobs, entropy in (own, theirs)
    )
    assert_same_gradients(got, want)
