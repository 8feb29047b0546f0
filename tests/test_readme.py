"""The README's Python runs, in order, as a reader would paste it."""

import re
from pathlib import Path

import torch

import drpo_kernels as dk

README = Path(__file__).resolve().parent.parent / "README.md"


def test_snippets_run(capsys):
    snippets = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 2
    torch.manual_seed(0)
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), namespace)
    assert "torch.Size([4, 32])" in capsys.readouterr().out
    assert namespace["backbone_output"].grad.isfinite().all()
    assert namespace["lm_head"].weight.grad.norm() > 0
    tokens = dk.Tokens(torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([2.0]))
    assert namespace["DRPOWithoutAbsA"]().token_loss(tokens).item() == -2.0


def test_table_names_every_objective():
    text = README.read_text(encoding="utf-8")
    for objective in (dk.DRPO, dk.DPPO, dk.SPO, dk.PPO, dk.CISPO, dk.PolicyGradient, dk.GSPO):
        assert f"`{objective.__name__}(" in text
