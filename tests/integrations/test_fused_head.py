"""Tests of a model with a fused head against the same model's own logits, family by family, and of what the head leaves
alone.

The bounds are those of fused_models.py. For bf16 inputs they are the package's 1e-4 and 0.4 %, against float64 on the
same hidden states.
"""

import copy
import inspect
import types
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers

from drpo_kernels.integrations.transformers import WithAuxiliaryLoss, add_fused_head, remove_fused_head
from fused_models import (
    FAMILIES,
    LOGPROB_BOUND,
    SHAPE,
    V,
    assert_as_its_logits,
    assert_same_gradients,
    eager,
    gradients,
    logprobs_of,
    loss_of,
    make,
    make_batch,
)

BF16_LOGPROB_BOUND, BF16_GRADIENT_BOUND = 1e-4, 4e-3
EAGER_ONLY = ("Mamba", "FalconH1", "Gemma2")
CASES = [
    (name, tied, attention)
    for name in FAMILIES
    for tied in (False, True)
    for attention in (("eager",) if name in EAGER_ONLY else ("eager", "sdpa"))
    if not (name in ("Phi", "GPTNeoX", "FalconH1") and tied)
]


# --- every family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, tied, attention", CASES)
def test_families(name, tied, attention):
    model = add_fused_head(make(name, tied, attention))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    seen = {}

    def look(hidden, weight, bias, **transform):
        seen.update(transform, bias=bias, rows=weight.shape[0])
        return hidden.sum()

    batch = make_batch()
    model(**batch.inputs, fused_head=look)
    assert seen.pop("rows") == V and (seen.pop("bias") is None) == (name != "Phi")
    assert seen == {"logit_scale": 1.0, "softcap": None, **{k: pytest.approx(v) for k, v in FAMILIES[name][2].items()}}
    (assert_as_its_router if name == "Qwen3Moe" else assert_as_its_logits)(model, batch)


def assert_as_its_router(model, batch):
    """Assert that the load-balancing loss is the model's own, and that its gradient reaches the routers."""
    outputs = model(**batch.inputs)
    loss, logprobs, _ = eager(outputs.logits, batch)
    want = gradients(model, loss + 0.1 * outputs.aux_loss)
    result = model(**batch.inputs, fused_head=loss_of(batch))
    assert isinstance(result, WithAuxiliaryLoss) and result.aux_loss.item() == outputs.aux_loss.item()
    assert_same_gradients(gradients(model, result.result.loss + 0.1 * result.aux_loss), want)
    torch.testing.assert_close(result.result.logprobs[batch.mask], logprobs[batch.mask], rtol=0, atol=LOGPROB_BOUND)


def test_vision_language_model_on_text():
    text = transformers.Gemma3TextConfig(**SHAPE, final_logit_softcapping=6.0)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                  patch_size=8)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_index=V - 1,
            boi_token_index=V - 2, eoi_token_index=V - 3,
        )
    ).float()  # fmt: skip
    batch = make_batch()
    batch.inputs["input_ids"] = batch.inputs["input_ids"].clamp(max=V - 4)
    batch.inputs["token_type_ids"] = torch.zeros_like(batch.inputs["input_ids"])
    assert_as_its_logits(add_fused_head(model), batch)


# --- inputs, dtypes and modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, attention", [("Qwen3", "eager"), ("Qwen3", "sdpa"), ("GraniteMoe", "eager")])
def test_packed_sequences(name, attention):
    batch = make_batch(rows=1, length=12, left_padding=(0,))
    batch.inputs = {
        "input_ids": batch.inputs["input_ids"],
        "position_ids": torch.cat([torch.arange(n) for n in (5, 4, 3)])[None],
    }
    batch.inputs["use_cache"] = False  # as in a fused call; with a cache, transformers does not look for packing
    batch.mask[0, [4, 8]] = False
    model = add_fused_head(make(name, attention=attention))
    assert_as_its_logits(model, batch)
    alone = model(input_ids=batch.inputs["input_ids"][:, 5:9]).logits
    del batch.inputs["use_cache"]
    got = model(**batch.inputs, fused_head=logprobs_of(batch))[0][0, 5:8]
    want = alone.log_softmax(-1)[0, :3].gather(-1, batch.targets[0, 5:8, None])[:, 0]
    torch.testing.assert_close(got, want, rtol=0, atol=LOGPROB_BOUND)  # the sequence does not see its neighbours


def test_logits_to_keep():
    batch = make_batch()
    model = add_fused_head(make("Gemma3"))
    want = model(**batch.inputs, fused_head=logprobs_of(batch))[0][:, -4:]
    batch.targets, batch.mask = batch.targets[:, -4:], batch.mask[:, -4:]
    got = model(**batch.inputs, logits_to_keep=4, fused_head=logprobs_of(batch))[0]
    torch.testing.assert_close(got, want, rtol=0, atol=LOGPROB_BOUND)


def hidden_of(model, inputs):
    """Return the hidden states that the model gives to its own head."""
    hidden = []
    with model.get_output_embeddings().register_forward_pre_hook(lambda _, args: hidden.append(args[0])):
        model(**inputs)
    return hidden[0]


@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_low_precision(mode):
    """Logits are fp32 from bf16 products, while the model itself rounds them. They are compared with float64 on the
    model's hidden states.
    """
    model, batch = add_fused_head(make("Granite")), make_batch()
    model = model.to(torch.bfloat16) if mode == "bf16" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        hidden = hidden_of(model, batch.inputs).detach()
        rounded = model(**batch.inputs).logits
        out = model(**batch.inputs, fused_head=loss_of(batch))
    head = model.get_output_embeddings()
    weight = head.weight.detach().to(torch.bfloat16).double().requires_grad_()
    loss, logprobs, _ = eager(hidden.to(torch.bfloat16).double() @ weight.T / 4.0, batch)
    torch.testing.assert_close(out.logprobs[batch.mask].double(), logprobs[batch.mask], rtol=0, atol=BF16_LOGPROB_BOUND)
    # the model's own rounding is avoided
    assert (eager(rounded.float(), batch)[1] - logprobs).abs().max() > 4 * BF16_LOGPROB_BOUND
    (want,) = torch.autograd.grad(loss, weight)
    got = gradients(model, out.loss)
    assert all(gradient.dtype == p.dtype for gradient, p in zip(got.values(), model.parameters(), strict=True))
    assert (got["lm_head.weight"].double() - want).norm() <= BF16_GRADIENT_BOUND * want.norm()


def test_float32_head_of_a_bf16_model():
    model, batch = add_fused_head(make().to(torch.bfloat16), float32=True), make_batch()
    model.lm_head.float()
    out = model(**batch.inputs, fused_head=loss_of(batch))
    with model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].float(),)):
        _, logprobs, _ = eager(model(**batch.inputs).logits, batch)
    torch.testing.assert_close(out.logprobs[batch.mask], logprobs[batch.mask], rtol=0, atol=LOGPROB_BOUND)
    with pytest.raises(ValueError, match="float32=True"):
        add_fused_head(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, batch = add_fused_head(make("Qwen3")).train(), make_batch()
    want = gradients(model, model(**batch.inputs, fused_head=loss_of(batch)).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: runs.append(1))
    got = gradients(model, model(**batch.inputs, fused_head=loss_of(batch)).loss)
    assert len(runs) == 2  # the second run is the recomputation
    assert_same_gradients(got, want)


def test_compiled_layers():
    model, batch = add_fused_head(make("Qwen3")), make_batch()
    want = gradients(model, model(**batch.inputs, fused_head=loss_of(batch)).loss)
    model.model.compile(backend="eager")
    assert_same_gradients(gradients(model, model(**batch.inputs, fused_head=loss_of(batch)).loss), want)


def test_generate():
    model = make("Qwen3").eval()
    prompt = make_batch().inputs
    want = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    add_fused_head(model)
    assert torch.equal(model.generate(**prompt, max_new_tokens=5, do_sample=False), want)
    model(**prompt, fused_head=lambda hidden, weight, **_: hidden.sum())
    assert torch.equal(model.generate(**prompt, max_new_tokens=5, do_sample=False), want)


# --- never the logits -------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Find the most elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in found)])
        return out


def test_never_the_logits(monkeypatch):
    vocab, tokens = 20_000, 256
    model = add_fused_head(make(vocab_size=vocab, hidden_size=16, num_hidden_layers=1))
    products = []
    linear = nn.functional.linear

    def spy(x, weight, *args):
        products.append(weight.shape[0])
        return linear(x, weight, *args)

    monkeypatch.setattr(nn.functional, "linear", spy)
    batch = make_batch(rows=4, length=tokens // 4, left_padding=(0, 0, 0, 0))
    head = partial(loss_of(batch), workspace_bytes=1 << 20)
    with Largest() as fused:
        model(**batch.inputs, fused_head=head).loss.backward()
        log_probs, _ = model(**batch.inputs, fused_head=partial(logprobs_of(batch), workspace_bytes=1 << 20))
        log_probs.sum().backward()
    assert products and vocab not in products
    assert fused.elements < tokens * vocab / 8  # the weight's own size is that of 16 rows of logits, half of this
    with Largest() as plain:
        model(**batch.inputs)
    assert vocab in products and plain.elements == tokens * vocab  # on a plain call both checks find the logits


# --- the model stays itself -------------------------------------------------------------------------------------------


def test_adding_twice_and_removing():
    model, batch = make(), make_batch()
    before, signature = dict(model.__dict__), inspect.signature(model.forward)
    want = model(**batch.inputs).logits
    assert add_fused_head(add_fused_head(model)) is model
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model(**batch.inputs).logits, want)
    model(**batch.inputs, fused_head=loss_of(batch))
    assert remove_fused_head(model) is model
    assert model.__dict__.keys() == before.keys() and "forward" not in model.lm_head.__dict__
    assert torch.equal(model(**batch.inputs).logits, want)
    with pytest.raises(ValueError, match="no fused head"):
        remove_fused_head(model)


def test_a_forward_set_before_and_after():
    model, batch = make(), make_batch()
    calls, forward = [], model.forward

    def wrapped(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    model.forward = wrapped
    assert_as_its_logits(add_fused_head(model), batch)
    assert calls
    mine = model.forward
    model.forward = wrapped
    with pytest.raises(ValueError, match="replaced after"):
        remove_fused_head(model)
    model.forward = mine
    assert remove_fused_head(model).forward is wrapped


def test_a_copy_has_its_own_weights():
    model, batch = add_fused_head(make("Qwen3")), make_batch()
    model(**batch.inputs, fused_head=loss_of(batch))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(1.1)
    assert not torch.allclose(copied(**batch.inputs).logits, model(**batch.inputs).logits)
    assert_as_its_logits(copied, batch)
    assert all(p.grad is None for p in model.parameters())


def test_a_copy_keeps_a_forward_set_before():
    model, batch = make(), make_batch()
    calls = []

    def wrapped(self, *args, **kwargs):
        calls.append(self)
        return type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(wrapped, model)
    copied = copy.deepcopy(add_fused_head(model))
    assert_as_its_logits(copied, batch)
    assert {id(m) for m in calls} == {id(copied)}
    assert remove_fused_head(copied).forward.__self__ is copied


def test_beside_trl_s_fused_head():
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    model, batch = make("Gemma3"), make_batch()
    utils.add_fused_lm_head(model)
    trl_forward, labels = model.forward, batch.inputs["input_ids"]
    want = model(**batch.inputs, labels=labels, fused_lm_head=True).log_probs
    assert_as_its_logits(add_fused_head(model), batch)
    assert torch.equal(model(**batch.inputs, labels=labels, fused_lm_head=True).log_probs, want)
    assert remove_fused_head(model).forward is trl_forward
    assert torch.equal(model(**batch.inputs, labels=labels, fused_lm_head=True).log_probs, want)


def test_saving(tmp_path):
    plain, batch = make(tied=True), make_batch()
    model = add_fused_head(copy.deepcopy(plain))
    model(**batch.inputs, fused_head=loss_of(batch))
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "fused" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused", attn_implementation="eager")
    assert torch.equal(loaded(**batch.inputs).logits, plain(**batch.inputs).logits)
    assert_as_its_logits(add_fused_head(loaded), batch)


def test_changes_after_adding():
    """A call uses the head and the configuration that the model has at that time."""
    model, batch = add_fused_head(make("Gemma3")), make_batch()
    assert_as_its_logits(model, batch)
    model.config.final_logit_softcapping = None
    model.resize_token_embeddings(V + 3)
    assert_as_its_logits(model, batch)


@pytest.mark.parametrize("where", ["backbone", "function"])
def test_an_exception_leaves_the_head_in_place(where):
    model, batch = add_fused_head(make()), make_batch()
    want = model(**batch.inputs).logits

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    head = model.lm_head
    function = fail if where == "function" else loss_of(batch)
    handles = []
    if where == "backbone":
        handles.append(model.model.layers[1].register_forward_hook(fail))
    with pytest.raises(RuntimeError, match=r"^out of memory"):
        model(**batch.inputs, fused_head=function)
    for handle in handles:
        handle.remove()
    assert model.lm_head is head and "forward" not in head.__dict__
    assert torch.equal(model(**batch.inputs).logits, want)
    assert_as_its_logits(model, batch)
