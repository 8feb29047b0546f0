"""Tests of the fused head under the wrappers that shard a model: 2 and 4 CPU processes against one, and ZeRO-3."""

import importlib.util

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from drpo_kernels.integrations.transformers import add_fused_head
from fused_models import assert_same_gradients, eager, gradients, logprobs_of, loss_of, make, make_batch
from launcher import assert_cases_pass, torchrun

# Four processes run one case of each wrapper, and the cases that need four.
OF_FOUR = (
    "gradients-ddp", "gradients-layers-accumulated", "gradients-bare head-own", "tensor_parallel-transformers",
    "sharded_tensor_parallel-root", "sharded_tensor_parallel-head",
)  # fmt: skip


def assert_equal_one(processes, tmp_path, module, names=(), at_least=1, **environment):
    report = tmp_path / "report.json"
    result = torchrun(processes, "wrapper_worker.py", module, str(report), *names, **environment)
    assert_cases_pass(report, *result, at_least=at_least)


def test_two_processes(tmp_path):
    assert_equal_one(2, tmp_path, "wrapper_cases", at_least=29)


def test_four_processes(tmp_path):
    assert_equal_one(4, tmp_path, "wrapper_cases", OF_FOUR, at_least=len(OF_FOUR))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero3(tmp_path):
    """DeepSpeed's own ZeRO-3 engine runs on the CPU."""
    assert_equal_one(2, tmp_path, "zero3_cases", at_least=6, DS_ACCELERATOR="cpu")


# --- a stand-in for ZeRO-3, where deepspeed is not installed ----------------------------------------------------------


class _GatherBeforeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gather, *tensors):
        ctx.gather = gather
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        ctx.gather()
        return None, *gradients


class ReleasedWeight:
    """This stand-in has the life cycle of a ZeRO-3 parameter in DeepSpeed. The module's weight is empty outside its own
    call, gathered by a pre-forward hook, released by a forward hook, gathered again when the gradient of one of the
    call's outputs arrives, and released when its own gradient has been accumulated.
    """

    def __init__(self, module: nn.Linear):
        self.weight, self.whole, self.gathered = module.weight, module.weight.data.clone(), 0
        module.register_forward_pre_hook(lambda *_: self.gather())
        module.register_forward_hook(self.after_forward)
        self.weight.register_post_accumulate_grad_hook(lambda _: self.release())
        self.release()

    def gather(self):
        self.weight.data = self.whole.clone()
        self.gathered += 1

    def release(self):
        self.weight.data.fill_(torch.nan)  # NaN shows if somebody kept the data
        self.weight.data = torch.empty(0)

    def after_forward(self, _, __, output):
        self.release()
        tensors = [output] if isinstance(output, torch.Tensor) else list(output)
        places = [i for i, x in enumerate(tensors) if isinstance(x, torch.Tensor) and x.requires_grad]
        passed = _GatherBeforeBackward.apply(self.gather, *(tensors[i] for i in places))
        for i, x in zip(places, passed, strict=True):
            tensors[i] = x
        if isinstance(output, torch.Tensor):
            return tensors[0]
        return type(output)(*tensors) if hasattr(output, "_fields") else type(output)(tensors)


def test_stand_in_for_zero3():
    model, batch = add_fused_head(make("Qwen3")), make_batch()
    loss, logprobs, _ = eager((whole := make("Qwen3"))(**batch.inputs).logits, batch)
    want = gradients(whole, loss + logprobs.sum())
    zero = ReleasedWeight(model.lm_head)
    assert model.lm_head.weight.numel() == 0
    model(**batch.inputs, fused_head=loss_of(batch)).loss.backward()
    model(**batch.inputs, fused_head=logprobs_of(batch))[0].sum().backward()
    assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, want)
    assert model.lm_head.weight.numel() == 0
    assert zero.gathered == 4  # two calls, each with its backward


def test_the_stand_in_finds_a_head_outside_its_module():
    """This happens if a trainer takes (hidden, weight) out of the model, which our fused head does not do."""
    model, batch = add_fused_head(make("Qwen3")), make_batch()
    ReleasedWeight(model.lm_head)
    hidden, weight = model(**batch.inputs, fused_head=lambda hidden, weight, **_: (hidden, weight))
    with pytest.raises((ValueError, RuntimeError)):
        loss_of(batch)(hidden, weight).loss.backward()
