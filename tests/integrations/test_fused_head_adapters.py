"""Tests of a fused head together with the adapters of PEFT, on the backbone and on the head."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from drpo_kernels.integrations.transformers import add_fused_head, remove_fused_head
from fused_models import (
    LOGPROB_BOUND,
    assert_as_its_logits,
    eager,
    logprobs_of,
    loss_of,
    make,
    make_batch,
)


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_on_the_backbone(order):
    peft = pytest.importorskip("peft")
    model = make("Qwen3")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    if order == "before":
        add_fused_head(model)
    wrapped = peft.get_peft_model(model, lora)
    assert add_fused_head(wrapped) is wrapped
    caches = []
    model.model.register_forward_pre_hook(lambda _, __, kwargs: caches.append(kwargs["use_cache"]), with_kwargs=True)
    wrapped(**make_batch().inputs, fused_head=loss_of(make_batch()))
    assert caches == [False]
    assert_as_its_logits(wrapped, make_batch())
    assert not wrapped(**make_batch().inputs, fused_head=lambda hidden, weight, **_: weight).requires_grad
    assert remove_fused_head(wrapped) is wrapped


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_an_adapter_saves(order, tied):
    """The active adapter's copy of the head computes and is trained. Where adapters are disabled, the original
    computes.
    """
    peft = pytest.importorskip("peft")
    model, batch = make("Qwen3", tied=tied), make_batch()
    original = model.lm_head.weight.detach().clone()
    if order == "before":
        add_fused_head(model)
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False, ensure_weight_tying=tied,
        modules_to_save=["embed_tokens" if tied else "lm_head"],
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, lora)
    if not tied:  # PEFT ties the head of the first adapter only
        wrapped.add_adapter("other", lora)
    add_fused_head(wrapped)
    for name in list(wrapped.peft_config):
        wrapped.set_adapter(name)
        with torch.no_grad():
            wrapped.get_output_embeddings().weight.mul_(1.5 if name == "other" else 0.7)
        assert_as_its_logits(wrapped, batch)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(**batch.inputs, fused_head=lambda hidden, weight, **_: weight), original)
        want = eager(wrapped(**batch.inputs).logits, batch)[1]
        got = wrapped(**batch.inputs, fused_head=logprobs_of(batch))[0]
    torch.testing.assert_close(got, want, rtol=0, atol=LOGPROB_BOUND)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}, "trainable_token_indices .*'embed_tokens'"),
    ],
    ids=["lora", "tokens"],
)
def test_adapters_on_the_head(order, options, message):
    peft = pytest.importorskip("peft")
    model, batch = make("Qwen3", tied="trainable_token_indices" in options), make_batch()
    if order == "before":
        add_fused_head(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    with pytest.raises(TypeError, match=rf"plain nn\.Linear, got peft.*{message}"):
        add_fused_head(wrapped)(**batch.inputs, fused_head=loss_of(batch))
