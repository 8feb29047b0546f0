"""For formulas of TRL that no objective here has by name, the replacements that we tell
users to write train the same.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16' peft")
from trl import GRPOConfig, GRPOTrainer

import tiny_trl
from drpo_kernels import Tokens
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer, parse_objective
from snippets import ROOT, snippet
from trl_runs import LOSS_BOUND, LOSS_FLOOR, WEIGHT_BOUND


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Yield the page's objectives as a module, as a reader would have them."""
    path = tmp_path_factory.mktemp("page") / "objectives_of_the_page.py"
    path.write_text(snippet("class SAPO", ROOT / "docs" / "integrations" / "trl.md"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, path.stem, module)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize(
    "name, loss_type, theirs, ours",
    [
        ("SAPO", "grpo", {"sapo_temperature_neg": 1.5}, {"temperature_neg": 1.5}),
        ("VESPO", "dapo", {"vespo_k_neg": 2.5, "vespo_lambda_pos": 2.0}, {"k_neg": 2.5, "lambda_pos": 2.0}),
    ],
)
def test_objectives_of_the_page(name, loss_type, theirs, ours, page, tmp_path):
    common = {"max_steps": 4, "num_iterations": 2}
    arguments = tiny_trl.arguments(GRPOConfig, tmp_path, loss_type=name.lower(), **common, **theirs)
    trl = tiny_trl.trainer(GRPOTrainer, arguments, tiny_trl.model())
    start = tiny_trl.weights(trl)
    want = tiny_trl.run(trl)
    objective = getattr(page, name)(**ours)
    assert parse_objective(repr(objective)) == objective
    arguments = tiny_trl.arguments(DRPOConfig, tmp_path, loss_type=loss_type, objective=objective, **common)
    trainer = tiny_trl.trainer(DRPOTrainer, arguments, tiny_trl.model())
    got = tiny_trl.run(trainer)
    for key in ("loss", "grad_norm"):
        assert got[key] == pytest.approx(want[key], rel=LOSS_BOUND, abs=LOSS_BOUND * LOSS_FLOOR)
    assert max(map(abs, want["loss"])) > 1e-3 and (tiny_trl.weights(trl) - start).norm() > 1e-3
    assert (tiny_trl.weights(trainer) - tiny_trl.weights(trl)).norm() <= WEIGHT_BOUND * start.norm()


@pytest.mark.parametrize("low, high, delta", [(0.2, 0.2, 1.5), (0.1, 0.3, 1.4), (0.2, 0.3, 1.1), (0.2, 0.2, 1.2)])
def test_what_stands_for_delta(low, high, delta, tmp_path):
    """The suggested objective is TRL's two-sided clip, for ratios on both sides of every bound and both signs of A."""
    with pytest.raises(ValueError, match="must keep its default") as error:
        tiny_trl.arguments(DRPOConfig, tmp_path, objective="PPO", epsilon=low, epsilon_high=high, delta=delta)
    objective = parse_objective(str(error.value).rpartition("objective=")[2])
    ratio = torch.linspace(0.5, 2.0, 301, dtype=torch.float64) + 1e-4
    for advantage in (1.0, -1.0):
        advantages = torch.full_like(ratio, advantage)
        logprobs, old = ratio.log().requires_grad_(), torch.zeros_like(ratio)
        got = objective.token_loss(Tokens(logprobs, old, advantages))
        coefficient = logprobs.exp()
        want = -torch.minimum(
            coefficient.clamp(max=delta) * advantages, coefficient.clamp(1 - low, 1 + high) * advantages
        )
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        slopes = [torch.autograd.grad(loss.sum(), logprobs, retain_graph=True)[0] for loss in (got, want)]
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=0)
