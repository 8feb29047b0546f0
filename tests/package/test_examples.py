"""The scripts of examples/ run as they are and show what they promise."""

import runpy

import pytest

from snippets import ROOT

EXAMPLES = ROOT / "examples"


def shown(name: str, capsys: pytest.CaptureFixture) -> object:
    """Return what a script's main() returns, after checking that its output fits on a screen."""
    result = runpy.run_path(str(EXAMPLES / name))["main"]()
    assert 0 < len(capsys.readouterr().out.splitlines()) <= 24
    return result


def test_every_example_is_run_here_or_in_test_smollm():
    here, there = ("grpo_loop", "own_objective", "fused_head"), ("smollm", "smollm_arithmetic", "smollm_report")
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*here, *there, "__init__"}


def test_the_loop_learns(capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    rewards = shown("grpo_loop.py", capsys)
    assert rewards[0] < 0.6
    assert rewards[-1] > 0.8


@pytest.mark.parametrize("name", ["own_objective.py", "fused_head.py"])
def test_the_fused_loss_is_the_plain_one(name, capsys):
    if name == "fused_head.py":
        pytest.importorskip("transformers", reason="transformers is not installed")
    assert shown(name, capsys) < 5e-5  # the README's promise on float32 gradients
