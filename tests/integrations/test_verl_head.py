"""Tests of the fused head in verl: it has the numbers of verl's own head, and it can take its place."""

import importlib.util
import sys
import types

import pytest
import torch

from drpo_kernels.distributed import VocabShard
from verl_calls import relative

HIDDEN, VOCAB, TEMPERATURE = 24, 151, 0.7
# The package's contract from float32 inputs is 1e-4 on a log-prob and 5e-5 of a gradient's norm (README). Entropy sums
# p log p with the same errors and weights of at most 1.
LOGPROB_BOUND, GRADIENT_BOUND = 1e-4, 5e-5


def head_inputs(*lead, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(*lead, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).mul(0.7).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, lead, generator=generator)


def head_reference(hidden, weight, labels):
    """Return (logprobs [N], entropy [N]) in float64."""
    logp = (hidden.double().reshape(-1, HIDDEN) @ weight.double().T / TEMPERATURE).log_softmax(-1)
    return logp.gather(-1, labels.reshape(-1, 1))[:, 0], -(logp.exp() * logp).sum(-1)


def gradients(outputs, slopes, leaves):
    used = [(out, slope.to(out.dtype)) for out, slope in zip(outputs, slopes, strict=True) if slope is not None]
    return torch.autograd.grad([out for out, _ in used], leaves, [slope for _, slope in used])


def slopes_for(outputs, what):
    generator = torch.Generator().manual_seed(4)
    slopes = [torch.randn(out.shape, generator=generator) for out in outputs]
    return [slope if name in what else None for name, slope in zip(("logprobs", "entropy"), slopes, strict=True)]


@pytest.mark.parametrize("what", [("logprobs",), ("entropy",), ("logprobs", "entropy")], ids="+".join)
@pytest.mark.parametrize("lead", [(13,), (1, 13), (3, 7)], ids=str)
def test_head_is_the_formula(verl, lead, what):
    hidden, weight, labels = head_inputs(*lead)
    outputs = verl.ours.linear_cross_entropy(hidden, weight, labels, TEMPERATURE, "none")
    reference = head_reference(hidden, weight, labels)
    for out, exact in zip(outputs, reference, strict=True):
        assert out.shape == (labels.numel(),) and out.dtype == torch.float32  # verl flattens these
        assert (out - exact).abs().max() <= LOGPROB_BOUND
    assert (outputs[0] < 0).all()
    slopes = slopes_for(outputs, what)
    for grad, exact in zip(*(gradients(x, slopes, (hidden, weight)) for x in (outputs, reference)), strict=True):
        assert relative(grad, exact) <= GRADIENT_BOUND


@pytest.mark.parametrize("reduction", ["none", "sum", "Mean"])
def test_head_reduces_log_probs_alone(verl, reduction):
    hidden, weight, labels = head_inputs(3, 7)
    logprobs, entropy = verl.ours.linear_cross_entropy(hidden, weight, labels, TEMPERATURE, reduction)
    exact = head_reference(hidden, weight, labels)[0]
    exact = {"none": exact, "sum": exact.sum(), "Mean": exact.mean()}[reduction]
    assert logprobs.shape == exact.shape and entropy.shape == (21,)
    assert (logprobs - exact).abs().max() <= LOGPROB_BOUND * (21 if reduction == "sum" else 1)
    with pytest.raises(ValueError, match="reduction must be one of 'none', 'sum', 'mean', got 'max'"):
        verl.ours.linear_cross_entropy(hidden, weight, labels, TEMPERATURE, "max")


def test_head_agrees_with_verls_torch_path(verl):
    """Both heads round, hence twice the bounds."""
    hidden, weight, labels = head_inputs(3, 7)
    outputs = verl.ours.linear_cross_entropy(hidden, weight, labels, TEMPERATURE)
    theirs = verl.torch_head.FusedLinearForPPO()(hidden, weight, labels, TEMPERATURE)
    for out, other in zip(outputs, theirs, strict=True):
        torch.testing.assert_close(out, other.flatten(), rtol=0, atol=2 * LOGPROB_BOUND)
    slopes = slopes_for(outputs, ("logprobs", "entropy"))
    mine = gradients(outputs, slopes, (hidden, weight))
    for grad, other in zip(mine, gradients(theirs, [s.view(3, 7) for s in slopes], (hidden, weight)), strict=True):
        assert relative(grad, other) <= 2 * GRADIENT_BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_head_agrees_with_verls_kernel(verl, device, reduction):
    """verl's kernel runs on a GPU alone, with hidden sizes that are multiples of 128; it multiplies fp32 as TF32."""
    hidden, weight, labels = (torch.randn(1, 40, 256), torch.randn(1000, 256) / 16, torch.randint(1000, (1, 40)))
    leaves = [x.to(device, torch.bfloat16).requires_grad_() for x in (hidden, weight)]
    mine, theirs = (
        head(*leaves, labels.to(device), TEMPERATURE, reduction)
        for head in (verl.ours.linear_cross_entropy, verl.ours.VERL_HEAD)
    )
    for out, other in zip(mine, theirs, strict=True):
        assert out.shape == other.shape and out.dtype == other.dtype
        # These are two fp32 accumulations of the same bf16 products.
        torch.testing.assert_close(out, other, rtol=1e-5, atol=2 * LOGPROB_BOUND)
    slopes = [torch.randn_like(out) for out in mine]
    for grad, other in zip(*(gradients(out, slopes, leaves) for out in (mine, theirs)), strict=True):
        assert relative(grad, other) <= 2 * 0.004  # twice the contract from bf16 inputs, because both sides round


def test_head_in_a_process_group(verl, monkeypatch):
    hidden, weight, labels = head_inputs(5)
    plain = verl.ours.linear_cross_entropy(hidden, weight, labels, 1.0, "none", None)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    world = torch.distributed.group.WORLD
    try:
        alone = verl.ours.linear_cross_entropy(hidden, weight, labels, 1.0, "none", world)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
        received = {}
        monkeypatch.setattr(verl.ours, "linear_token_logprobs", lambda *_, **keywords: (received.update(keywords), 0))
        verl.ours.linear_cross_entropy(hidden, weight, labels, 1.0, "none", world)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(plain, alone, strict=True))
    # tests/distributed/test_distributed.py compares such a shard with the numbers of one process.
    rows = weight.shape[0]
    assert received["vocab_shard"] == VocabShard(world, (rows, rows), partial_hidden_gradient=True)


def test_head_is_replaced_and_put_back(verl, monkeypatch, restored_head):
    """Megatron's modules bind the name when they are loaded. They need megatron-core, so that a stand-in takes their
    place.
    """
    loaded = types.ModuleType("verl.models.mcore.loaded_before")
    loaded.linear_cross_entropy = verl.ours.VERL_HEAD
    monkeypatch.setitem(sys.modules, loaded.__name__, loaded)
    for _ in range(2):
        verl.ours.use_fused_head()
        assert verl.kernel.linear_cross_entropy is loaded.linear_cross_entropy is verl.ours.linear_cross_entropy
    for _ in range(2):
        verl.ours.use_verl_head()
        assert verl.kernel.linear_cross_entropy is loaded.linear_cross_entropy is verl.ours.VERL_HEAD
    monkeypatch.delitem(sys.modules, "drpo_kernels.integrations.verl_fused_head", raising=False)
    importlib.import_module("drpo_kernels.integrations.verl_fused_head")
    assert verl.kernel.linear_cross_entropy is verl.ours.linear_cross_entropy


def test_head_in_a_model_that_verl_patched(verl, monkeypatch, restored_head):
    """verl's own forward for `impl_backend: triton` agrees, on a CPU, with its forward for `impl_backend: torch`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", Qwen2ForCausalLM.forward)  # verl patches the class
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=97)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, tie_word_embeddings=True))
    tokens = torch.randint(97, (1, 11))
    verl.ours.use_fused_head()
    results = {}
    for backend in ("torch", "triton"):
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
        out = model(input_ids=tokens, temperature=TEMPERATURE, return_dict=True)
        logprobs, entropy = out.log_probs.squeeze(0), out.entropy.squeeze(0)  # as verl's FSDP engine does
        model.zero_grad()
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
        results[backend] = (logprobs, entropy, model.lm_head.weight.grad.clone())
    theirs, mine = results["torch"], results["triton"]
    for a, b in zip(mine[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2 * LOGPROB_BOUND)
    assert relative(mine[2], theirs[2]) <= 2 * GRADIENT_BOUND
