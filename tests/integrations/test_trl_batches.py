"""Tests of DRPOTrainer beside GRPOTrainer on batches made by hand, which hold what a tiny run cannot produce."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16' peft")
pytest.importorskip("peft", reason="peft is not installed")

import tiny_trl
from drpo_kernels import DRPO, PPO, Tokens
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer
from trl_runs import LOSS_BOUND, LOSS_FLOOR, assert_same_step, batch, close, loss_and_gradient, old_logprobs, pair


def test_tool_masks(tmp_path):
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 1:3] = mask[3, 0] = 0
    assert_same_step(*pair(tmp_path), tool_mask=mask, num_items_in_batch=torch.tensor(14))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_advantages_per_token(loss_type, tmp_path):
    advantages = torch.randn(4, 6, generator=torch.Generator().manual_seed(8))
    assert_same_step(*pair(tmp_path, loss_type=loss_type), advantages=advantages, old_per_token_logps=old_logprobs())


@pytest.mark.parametrize("shape", [(4, 6), (4, 1)], ids=["token", "sequence"])
def test_vllm_correction_as_in_trl(shape, tmp_path):
    """vllm_importance_sampling_correction=True recomputes old log-probs, and puts TRL's ratio
    on the policy term alone.
    """
    theirs, ours = pair(tmp_path, vllm_importance_sampling_correction=True)
    theirs.use_vllm = ours.use_vllm = True
    ratio = 0.5 + torch.rand(*shape, generator=torch.Generator().manual_seed(9))
    sampling = old_logprobs(10)
    sampling[0, 2] = math.nan
    assert_same_step(
        theirs, ours, old_per_token_logps=old_logprobs(), importance_sampling_ratio=ratio,
        sampling_per_token_logps=sampling,
    )  # fmt: skip


def test_the_engine_s_logprobs_are_the_behaviour_policy(tmp_path):
    """By default μ is what the sampling engine reported, counted once; a token it could not score does not count."""
    theirs, ours = pair(tmp_path, vllm_importance_sampling_correction=False)
    ours.use_vllm, ours.beta, theirs.beta = True, 0.1, 0.1
    ours.args.compact, reference = "mask", {"ref_per_token_logps": old_logprobs(11)}
    sampling = old_logprobs(10)
    # TRL is told that the old log-probs are the engine's. The unscorable token is out of its mask but in its counts.
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 2] = 0
    want_loss, want = loss_and_gradient(
        theirs, batch(theirs, old_per_token_logps=sampling, tool_mask=mask, **reference)
    )
    unscorable = sampling.clone()
    unscorable[0, 2] = math.nan
    changes = {"old_per_token_logps": old_logprobs(), "sampling_per_token_logps": unscorable, **reference}
    got_loss, got = loss_and_gradient(ours, batch(ours, **changes))
    assert got_loss == pytest.approx(want_loss, rel=LOSS_BOUND, abs=LOSS_BOUND * LOSS_FLOOR)
    assert (got - want).norm() <= LOSS_BOUND * want.norm()
    assert ours._metrics["train"]["drpo/unscorable"] == [1]
    assert all(math.isfinite(value) for series in ours._metrics["train"].values() for value in series)
    for name, series in theirs._metrics["train"].items():
        assert close(ours._metrics["train"][name], series), name


def test_sparse_gradients(tmp_path):
    _, exact = pair(tmp_path)
    want_loss, want = loss_and_gradient(exact, batch(exact))
    errors = []
    for tolerance in (0.5, 1e-3):
        args = tiny_trl.arguments(DRPOConfig, tmp_path, objective=PPO(), sparse_grad=tolerance)
        sparse = tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model())
        loss, found = loss_and_gradient(sparse, batch(sparse))
        assert loss == pytest.approx(want_loss, rel=1e-6)
        assert sparse._metrics["train"]["drpo/left_out_share_max"][0] <= tolerance
        errors.append((found - want).norm() / want.norm())
    # Every token's dlogits are off by at most τ of their norm. Their sum may cancel, but not to a twentieth.
    assert errors[0] > 1e-3 and errors[1] < 20 * 1e-3


def test_skipping_tokens_without_advantage(tmp_path):
    theirs, ours = pair(tmp_path)
    args = tiny_trl.arguments(DRPOConfig, tmp_path, objective=PPO(), compact="active")
    lean = tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model())
    assert_same_step(theirs, lean)
    loss_and_gradient(ours, batch(ours))
    assert ours._metrics["train"]["drpo/active_share"] == [1.0]
    assert lean._metrics["train"]["drpo/active_share"] == [pytest.approx(15 / 17)]
    # This is a mean over the computed tokens, not one in which the skipped ones count as 0.
    assert lean._metrics["train"]["entropy"] == lean._metrics["train"]["drpo/entropy_mean"]
    assert lean._metrics["train"]["entropy"][0] == pytest.approx(ours._metrics["train"]["entropy"][0], rel=0.1)


def test_all_masked(tmp_path):
    _, ours = pair(tmp_path)
    nothing = torch.zeros(4, 6, dtype=torch.long)
    loss, gradient = loss_and_gradient(ours, batch(ours, tool_mask=nothing, num_items_in_batch=torch.tensor(0)))
    assert loss == 0 and gradient.eq(0).all()


def test_a_user_s_objective(tmp_path):
    """The loss of an objective is its own, whatever TRL's formula would have said."""
    _, ours = pair(tmp_path, objective=DRPO(delta=0.1))
    old = old_logprobs()
    got, _ = loss_and_gradient(ours, batch(ours, old_per_token_logps=old))
    inputs = batch(ours)
    logits = ours.model(
        input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
    ).logits[:, -7:-1]
    logp = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    tokens = Tokens(logp.double(), old.double(), inputs["advantages"][:, None].double())
    want = (DRPO(delta=0.1).token_loss(tokens) * inputs["completion_mask"]).sum() / 17
    assert got == pytest.approx(want.item(), rel=LOSS_BOUND)


def test_accumulated_metrics_are_one_step_s(tmp_path, caplog):
    """A micro-batch without an advantage causes no warning, and counts add up."""
    _, ours = pair(tmp_path)
    nothing = batch(ours, advantages=torch.zeros(4))
    ours.accelerator.gradient_state._set_sync_gradients(False)
    loss_and_gradient(ours, nothing)
    assert "drpo/tokens" not in ours._metrics["train"]
    ours.accelerator.gradient_state._set_sync_gradients(True)
    loss_and_gradient(ours, batch(ours))
    assert ours._metrics["train"]["drpo/tokens"] == [34]
    assert not any("evidence" in name for name in ours._metrics["train"])
    assert "advantages" not in caplog.text


def test_fsdp_does_not_round_what_the_loss_is_made_of(tmp_path):
    """FSDP1 casts every tensor that it finds in a forward's arguments, including those in dataclasses."""
    from torch.distributed.utils import _apply_to_tensors

    _, ours = pair(tmp_path)
    seen = []

    class Wrapped(torch.nn.Module):
        def forward(self, fused_head, **inputs):
            fused_head = _apply_to_tensors(torch.Tensor.bfloat16, {"fused_head": fused_head})["fused_head"]
            seen.append(fused_head.old_logprobs)
            return ours.model(**inputs, fused_head=fused_head)

    old = old_logprobs()
    ours._compute_loss(Wrapped(), batch(ours, old_per_token_logps=old))
    assert torch.equal(seen[0], old)
