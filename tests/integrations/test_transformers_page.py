"""The snippets of docs/integrations/transformers.md run as they stand, in a process group of one where needed."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="transformers is not installed")

import drpo_kernels as dk
from distributed_harness import leave
from fused_models import V, eager, make, make_batch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations" / "transformers.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def snippets(title):
    (section,) = (text for text in SECTIONS if text.lstrip("# ").startswith(title))
    return re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def run(title, namespace):
    for code in snippets(title):
        exec(compile(code, f"transformers.md, {title}", "exec"), namespace)
    return namespace


@pytest.fixture
def names():
    """Return the variables that the page's reader has: a model, a padded batch, and the same batch in two
    micro-batches.
    """
    batch = make_batch()
    ids = torch.cat([batch.inputs["input_ids"], batch.targets[:, -1:]], 1)
    columns = {"targets": batch.targets, "old_logprobs": batch.old, "advantages": batch.advantages, "mask": batch.mask}
    micro_batches = [
        {"inputs": {k: v[rows] for k, v in batch.inputs.items()}, **{k: v[rows] for k, v in columns.items()}}
        for rows in (slice(0, 2), slice(2, 3))
    ]
    model = make("Qwen3")
    return {
        "batch": batch, "model": model, "ids": ids, "old_logprobs": batch.old, "advantages": batch.advantages,
        "attention_mask": torch.cat([batch.inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1),
        "completion_mask": torch.cat([torch.zeros(3, 1, dtype=torch.bool), batch.mask], 1),
        "micro_batches": micro_batches, "optimizer": torch.optim.SGD(model.parameters(), lr=0.0),
    }  # fmt: skip


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    leave()


def expected(delta, names):
    """Return the gradient of the head, computed from the logits of an untouched model."""
    model, batch = make("Qwen3"), names["batch"]
    logits = model(**batch.inputs).logits
    out = dk.policy_loss(
        logits, batch.targets, batch.old, batch.advantages, batch.mask, objective=dk.DRPO(delta), backend="reference"
    )
    out.loss.backward()
    return out.loss.item(), {name: p.grad for name, p in model.named_parameters()}


def assert_gradient(model, want, bound=5e-5):
    for name, exact in want.items():
        got = model.get_parameter(name).grad
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        assert (got - exact).norm() <= bound * exact.norm(), name


def test_first_snippets(names):
    loss, want = expected(0.2, names)
    first, second = snippets("transformers and plain PyTorch")
    exec(compile(first, "first", "exec"), names)
    assert names["out"].loss.item() == pytest.approx(loss, rel=1e-4)
    assert_gradient(names["model"], want)
    names["model"].zero_grad()
    exec(compile(second, "second", "exec"), names)
    batch = names["batch"]
    _, logprobs, entropy = eager(names["model"](**batch.inputs).logits, batch)
    torch.testing.assert_close(names["logprobs"], logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(names["ref_logprobs"], logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(names["entropy"], entropy, rtol=0, atol=1e-5)
    assert names["model"].lm_head.weight.grad.norm() > 0


def test_accumulation(names):
    _, want = expected(12.5, names)
    run("transformers and plain PyTorch", names)
    names["model"].zero_grad()
    run("Gradient accumulation", names)
    assert_gradient(names["model"], want)


def test_ddp(names, group_of_one):
    _, want = expected(12.5, names)
    run("transformers and plain PyTorch", names)
    run("Gradient accumulation", names)
    names["model"].zero_grad()
    run("DDP", names)
    assert_gradient(names["model"], want)


@pytest.mark.interpreted  # FSDP2 would move the model to the GPU, and its inputs are on the CPU
def test_fsdp2(names, group_of_one):
    loss, want = expected(0.2, names)
    run("transformers and plain PyTorch", names)
    names["model"].zero_grad()
    run("FSDP2", names)
    assert names["out"].loss.item() == pytest.approx(loss, rel=0.1)  # the backbone is bf16
    assert_gradient(names["model"], {"lm_head.weight": want["lm_head.weight"]}, bound=0.1)


def test_zero3(names, group_of_one, monkeypatch):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    before = names["model"].lm_head.weight.detach().clone()
    _, want = expected(12.5, names)
    run("transformers and plain PyTorch", names)
    run("Gradient accumulation", names)
    names["config"] = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    names["model"].zero_grad()
    run("ZeRO-3", names)
    import deepspeed

    with deepspeed.zero.GatheredParameters([names["model"].lm_head.weight]):
        moved = before - names["model"].lm_head.weight.detach()
    assert (moved - want["lm_head.weight"]).norm() <= 1e-4 * want["lm_head.weight"].norm()
    names["engine"].destroy()


def test_peft(names):
    pytest.importorskip("peft", reason="peft is not installed")
    run("transformers and plain PyTorch", names)
    plain = names["ref_logprobs"]
    run("PEFT", names)
    trained = [name for name, p in names["model"].named_parameters() if p.grad is not None and "lora" in name]
    assert len(trained) == 8  # these are A and B of two projections in two layers
    torch.testing.assert_close(names["ref_logprobs"], plain, rtol=0, atol=1e-5)


def test_without_transformers(names):
    run("transformers and plain PyTorch", names)
    run("Without transformers", names)
    batch = names["batch"]
    backbone = torch.nn.Embedding(V, 16)
    policy = names["Policy"](backbone, V, 16)
    arguments = dict(targets=batch.targets, old_logprobs=batch.old, advantages=batch.advantages, mask=batch.mask)
    out = policy(batch.inputs["input_ids"], **arguments)
    want = dk.policy_loss(policy(batch.inputs["input_ids"]), **arguments)
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-4)
    out.loss.backward()
    assert backbone.weight.grad.norm() > 0 and policy.lm_head.weight.grad.norm() > 0
