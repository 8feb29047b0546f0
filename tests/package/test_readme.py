"""The README's Python runs as a reader would paste it; other tests run TRL's and verl's snippets."""

import pytest
import torch

import drpo_kernels as dk
from snippets import README, run, snippet, snippets


def test_every_snippet_is_run_somewhere():
    assert len(snippets()) == 5
    for text in ("torch.nn.Linear", "integrations.trl", "integrations.verl", "add_fused_head", "@register_objective"):
        assert snippet(text)


def test_the_snippet(capsys):
    torch.manual_seed(0)
    names = run(snippet("torch.nn.Linear"))
    assert "torch.Size([4, 32])" in capsys.readouterr().out
    assert names["backbone_output"].grad.isfinite().all()
    assert names["lm_head"].weight.grad.norm() > 0


def test_objective_of_one_s_own():
    names = run(snippet("@register_objective"))
    tokens = dk.Tokens(torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([2.0]))
    assert names["DRPOWithoutAbsA"]().token_loss(tokens).item() == -2.0


def test_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("datasets", reason="datasets is not installed")
    import tiny_trl

    model = tiny_trl.model(transformers.Qwen3ForCausalLM)
    ids = torch.randint(4, tiny_trl.VOCAB, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, :3] = False
    names = dict(ids=ids, mask=mask, attention_mask=torch.ones_like(ids), old_logprobs=torch.full((2, 8), -4.0))
    out = run(snippet("add_fused_head"), model=model, advantages=torch.tensor([1.0, -0.5]), **names)["out"]
    logits = model(input_ids=ids[:, :-1]).logits.double()
    logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    # Fp32 logits of magnitude 10 have an ulp of 1e-6.
    assert (out.logprobs - logp)[mask[:, 1:]].abs().max() <= 1e-5
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_table_names_every_objective():
    text = README.read_text(encoding="utf-8")
    for objective in (dk.DRPO, dk.DPPO, dk.SPO, dk.PPO, dk.CISPO, dk.PolicyGradient, dk.GSPO):
        assert f"`{objective.__name__}(" in text
