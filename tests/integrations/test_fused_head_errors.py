"""A model that cannot have a fused head is refused with a message that says what to do, and never silently left without
one.
"""

from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
import transformers
from transformers.modeling_outputs import CausalLMOutput

from drpo_kernels.integrations.transformers import add_fused_head
from fused_models import SHAPE, V, assert_as_its_logits, gradients, loss_of, make, make_batch


class QuantisedLinear(nn.Linear):
    """Like bitsandbytes' Linear4bit, this is a Linear by name with a product of its own."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round())


class ShiftedWeight(torch.Tensor):
    """Like torchao's, this is a tensor whose products are its own."""


def test_heads_that_are_not_plain():
    batch = make_batch()
    model = make()
    model.lm_head = QuantisedLinear(32, V, bias=False)
    with pytest.raises(TypeError, match=r"plain nn\.Linear, got .*QuantisedLinear: .*do not quantise"):
        add_fused_head(model)
    model = make()
    model.lm_head.forward = lambda x: 2 * nn.functional.linear(x, model.lm_head.weight)
    with pytest.raises(TypeError, match="whose forward was replaced"):
        add_fused_head(model)
    del model.lm_head.forward
    add_fused_head(model)
    model.lm_head.forward = lambda x: 2 * nn.functional.linear(x, model.lm_head.weight)
    with pytest.raises(TypeError, match="whose forward was replaced"):
        model(**batch.inputs, fused_head=loss_of(batch))
    model = add_fused_head(make())
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.as_subclass(ShiftedWeight))
    with pytest.raises(TypeError, match=r"whole, plain tensor .*got ShiftedWeight"):
        model(**batch.inputs, fused_head=loss_of(batch))


@pytest.mark.parametrize("wrap", [nn.DataParallel, partial(torch.compile, backend="eager"), lambda m: m.model, id])
def test_not_the_model_itself(wrap):
    model = make()
    with pytest.raises(TypeError, match=r"before wrapping, or to its|takes a causal language model"):
        add_fused_head(wrap(model))


class WithTail(transformers.LlamaForCausalLM):
    """This is Llama with something after the head."""

    def __init__(self, config):
        super().__init__(config)
        self.tail = lambda logits, hidden: logits
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, input_ids=None, attention_mask=None, return_dict=True, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        logits = self.tail(self.lm_head(hidden), hidden)
        return CausalLMOutput(logits=logits) if return_dict else (logits,)


def with_tail(tail):
    torch.manual_seed(0)
    model = WithTail(transformers.LlamaConfig(**SHAPE, attn_implementation="eager"))
    model.tail = tail
    return add_fused_head(model)


def banned(logits, _):
    logits = logits.clone()
    logits[..., 40] = -torch.inf
    return logits


TAILS = {
    "a bias per entry": lambda logits, _: logits + torch.linspace(0, 1, V),
    "a bias per entry that is zero elsewhere": lambda logits, _: logits + (torch.arange(V) == 60),
    "a bias": lambda logits, _: logits + 1.0,
    "a bias per token": lambda logits, hidden: logits + hidden[..., :1],
    "a scale per token": lambda logits, hidden: logits * hidden[..., :1].detach(),
    "clipped": lambda logits, _: logits.clamp(-15, 15),
    "softmax": lambda logits, _: logits.softmax(-1),
    "negative": lambda logits, _: -logits,
    "zero": lambda logits, _: 0 * logits,
    "cap above another": lambda logits, _: 5 * torch.tanh(10 * torch.tanh(logits / 10) / 5),
    "a banned entry": banned,
    "rounded": lambda logits, _: logits.bfloat16(),
}


@pytest.mark.parametrize("name", TAILS)
def test_tails_that_are_refused(name):
    model, batch = with_tail(TAILS[name]), make_batch()
    with pytest.raises(ValueError, match=r"WithTail cannot have a fused head: what its forward does .*the"):
        model(**batch.inputs, fused_head=loss_of(batch))
    with torch.no_grad():
        model(**batch.inputs)  # the model's own logits work as before


def test_a_trainable_scale_is_refused():
    model, batch = with_tail(None), make_batch()
    model.tail = lambda logits, _: logits * model.factor
    with pytest.raises(ValueError, match="require a gradient"):
        model(**batch.inputs, fused_head=loss_of(batch))
    model.factor.requires_grad_(False)
    assert_as_its_logits(model, batch)


def test_cut_logits():
    """The model returns the real entries of a padded vocabulary, and the function gets vocab_size."""
    model, batch = with_tail(lambda logits, _: 0.5 * logits[..., :90]), make_batch()
    batch.targets = batch.targets.clamp(max=89)
    assert_as_its_logits(model, batch)
    gradient = gradients(model, model(**batch.inputs, fused_head=loss_of(batch)).loss)["lm_head.weight"]
    assert gradient[90:].eq(0).all() and gradient[:90].ne(0).any(1).all()


@pytest.mark.parametrize("tail", [lambda _, hidden: hidden[..., :5], lambda *_: None], ids=["hidden", "none"])
def test_logits_from_elsewhere(tail):
    model, batch = with_tail(tail), make_batch()
    with pytest.raises(ValueError, match="cannot have a fused head"):
        model(**batch.inputs, fused_head=loss_of(batch))


def test_head_called_twice_or_never():
    model, batch = with_tail(None), make_batch()
    model.tail = lambda logits, hidden: logits + 0 * model.lm_head(hidden)
    with pytest.raises(ValueError, match="called its output embeddings 2 times"):
        model(**batch.inputs, fused_head=loss_of(batch))
    never = with_tail(None)
    never.get_output_embeddings = lambda: never.another
    never.another, never.tail = nn.Linear(32, V, bias=False), lambda logits, _: logits
    with pytest.raises(ValueError, match="called its output embeddings 0 times"):
        never(**batch.inputs, fused_head=loss_of(batch))


def test_arguments_that_are_refused():
    model, batch = add_fused_head(make()), make_batch()
    with pytest.raises(ValueError, match=r"labels must be None .*targets"):
        model(**batch.inputs, labels=batch.targets, fused_head=loss_of(batch))
    with pytest.raises(ValueError, match="return_dict must not be False"):
        model(**batch.inputs, return_dict=False, fused_head=loss_of(batch))
    with pytest.raises(ValueError, match="targets"):  # an error that the function itself raises is not rewritten
        model(**batch.inputs, logits_to_keep=3, fused_head=loss_of(batch))
