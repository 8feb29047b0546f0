"""A `fused_head=` that does not reach the fused forward is an error, and never gives the model's own output in place of
the loss.
"""

import io
import pickle
import types

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers.modeling_outputs import CausalLMOutput

from drpo_kernels.integrations.transformers import add_fused_head, remove_fused_head
from fused_models import assert_as_its_logits, loss_of, make, make_batch


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def patched(model):
    """Give the model a forward of its own, which hands unknown keywords to the backbone, as Liger's does."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]
        return CausalLMOutput(logits=self.lm_head(hidden))

    model.forward = types.MethodType(forward, model)
    return model


def swallowed(model):
    """Give the model a forward of its own that drops unknown keywords."""
    own = type(model).forward
    model.forward = lambda input_ids=None, attention_mask=None, **_: own(model, input_ids, attention_mask)
    return model


def adapted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))


# Mamba's forward swallows unknown keywords, and PEFT calls it without running the model's hooks.
LOST = {
    "pickled": lambda: pickled(add_fused_head(make("Qwen3"))),
    "saved": lambda: saved(add_fused_head(make("Mamba"))),
    "patched": lambda: patched(add_fused_head(make("Qwen3"))),
    "swallowed": lambda: swallowed(add_fused_head(make("Mamba"))),
    "adapted, then patched": lambda: (wrapped := adapted(add_fused_head(make())), patched(wrapped.get_base_model()))[0],
    "adapted, then pickled": lambda: pickled(adapted(add_fused_head(make()))),
    "compiled": lambda: (model := patched(add_fused_head(make())), model.model.compile(backend="eager"))[0],
}


@pytest.mark.parametrize("name", LOST)
def test_a_lost_head(name):
    model, batch = LOST[name](), make_batch()
    logits = model(**batch.inputs).logits
    with pytest.raises(RuntimeError, match=r"fused_head must reach .*call add_fused_head\(model\) again"):
        model(**batch.inputs, fused_head=loss_of(batch))
    assert_as_its_logits(add_fused_head(model), batch)
    assert torch.equal(model(**batch.inputs).logits, logits)


def test_liger_after():
    liger = pytest.importorskip("liger_kernel.transformers", reason="liger_kernel is not installed")
    model, batch = add_fused_head(make("Qwen3")), make_batch()
    liger.apply_liger_kernel_to_qwen3(
        model=model, rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=True
    )
    with pytest.raises(RuntimeError, match="fused_head must reach"):
        model.train()(**batch.inputs, fused_head=loss_of(batch))
    assert_as_its_logits(add_fused_head(model), batch)


@pytest.mark.parametrize("family", ["Qwen3", "Mamba"])
@pytest.mark.parametrize("name", ["fused_haed", "fusedhead", "head", "fused_lm_head"])
def test_a_misspelt_argument(family, name):
    model, batch = add_fused_head(make(family)), make_batch()
    for called in [model] if family == "Mamba" else [model, adapted(model)]:
        with pytest.raises(TypeError, match=rf"given as fused_head=, got {name}="):
            called(**batch.inputs, **{name: loss_of(batch)})


def test_trl_s_argument():
    model, batch = add_fused_head(make()), make_batch()
    with pytest.raises(TypeError, match=r"given as fused_head=, got fused_lm_head="):
        model(**batch.inputs, labels=batch.targets, fused_lm_head=True)


def test_trl_s_head_on_a_loaded_model():
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    model, batch = pickled(add_fused_head(make())), make_batch()
    utils.add_fused_lm_head(model)
    found = model(**batch.inputs, labels=batch.inputs["input_ids"], fused_lm_head=True).log_probs
    assert found.isfinite().all() and found.min() < 0


@pytest.mark.parametrize("value", ["loss", torch.ones(3), True])
def test_no_function(value):
    with pytest.raises(TypeError, match=r"fused_head must be a function .*linear_policy_loss"):
        add_fused_head(make())(**make_batch().inputs, fused_head=value)


def test_adding_again_and_removing():
    """A forward that says what it wraps still has the fused head. One that hides it gets another around it."""
    operations = pytest.importorskip("accelerate.utils.operations")
    model, batch = add_fused_head(make()), make_batch()
    own = model.forward
    model.forward = types.MethodType(operations.convert_outputs_to_fp32(own.__func__), model)
    outer = model.forward
    assert add_fused_head(model).forward is outer
    assert_as_its_logits(model, batch)
    calls = []

    def hiding(*args, **kwargs):
        calls.append(args)
        return own(*args, **kwargs)

    model.forward = hiding
    assert_as_its_logits(add_fused_head(model), batch)
    assert calls
    assert remove_fused_head(model).forward is hiding
    model.forward = own
    hooks = [m for m in model.modules() if m._forward_pre_hooks]
    assert hooks == [model, model.model]
    remove_fused_head(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_hook_of_a_loaded_model_is_not_overwritten(monkeypatch):
    """PyTorch numbers hooks by process. A loaded model's handles keep their numbers from being given again."""
    data = pickle.dumps(add_fused_head(make()))
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)
    model, batch = pickle.loads(data), make_batch()
    for _ in range(8):
        model.model.register_forward_pre_hook(nn.Module.eval)
        model.register_forward_pre_hook(nn.Module.eval)
    with pytest.raises(RuntimeError, match="fused_head must reach"):
        model(**batch.inputs, fused_head=loss_of(batch))
