"""Tests of AsyncDRPOTrainer against TRL's AsyncGRPOTrainer on recorded, stale samples: the
same numbers in each step.
"""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16' peft")
from transformers import HfArgumentParser
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker

import oracle
import tiny_trl
from drpo_kernels import CISPO, DPPO, DRPO, GSPO, PPO
from drpo_kernels.integrations.trl_async import AsyncDRPOConfig, AsyncDRPOTrainer
from trl_async_runs import SAMPLES, assert_same_run, run_on_a_cpu, samples, trainer
from trl_runs import LORA, WEIGHT_BOUND, close, moe


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    run_on_a_cpu(monkeypatch)


# Each case is name: (TRL's options of the formula, the objective of the same formula, options of both, the policy).
CASES = {
    "defaults": ({}, PPO(), {}, tiny_trl.model),
    "two clips, accumulated": (
        {"epsilon": 0.1, "epsilon_high": 0.3}, PPO(0.1, 0.3),
        {"per_device_train_batch_size": SAMPLES // 2, "gradient_accumulation_steps": 2}, tiny_trl.model,
    ),
    "temperature, token budget": ({}, PPO(), {"temperature": 0.7, "token_budget": 48, "max_steps": 2}, tiny_trl.model),
    "adapters": ({}, PPO(), LORA, tiny_trl.model),
    "router": ({}, PPO(), {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, moe),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_same_as_trl(name, tmp_path):
    formula, objective, options, policy = CASES[name]
    theirs = trainer(AsyncGRPOTrainer, AsyncGRPOConfig, tmp_path, policy, **formula, **options)
    ours = trainer(AsyncDRPOTrainer, AsyncDRPOConfig, tmp_path, policy, objective=objective, **options)
    want, got = assert_same_run(theirs, ours)
    assert max(want["clip_ratio/region_mean"]) > 0 and max(want["sample/staleness_max"]) > 0
    assert "drpo/ratio_mean" in got and not any(key.startswith("drpo/evidence/") for key in got)


class Naive(AsyncGRPOTrainer):
    """This is TRL's trainer with a formula of the oracle, on the model's own logits in float64."""

    spec: tuple = ()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        tree = {name: inputs[name][0] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
        tree["tree_max_seqlen_q"], tree["tree_max_seqlen_k"] = inputs["tree_max_seqlens"][0].tolist()
        logits = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], **tree).logits[0].double()
        position, sequence = inputs["token_index"][0], inputs["segment_id"][0]
        assert len(position.unique()) < len(position)  # tokens of two samples share a position
        targets = inputs["shift_labels"][0][position]
        logp = (logits[position] / self.temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        old, advantages = inputs["old_log_probs"][0].double(), inputs["advantages"][0].double()
        known = ~old.isnan()
        rows = oracle.Rows(logp[known], old[known], advantages[known], sequence[known], int(sequence.max()) + 1)
        scale = inputs["global_n_tokens"][0] * self.current_gradient_accumulation_steps
        return oracle.token_loss(self.spec, rows).sum() / scale


NO_LOGPROB = {"old_log_probs": lambda old: np.where((old < 0) & (old > -2.5), math.nan, old)}
# Each case is name: (formula, objective, changes to the samples).
FORMULAS = {
    "drpo": (("DRPO", {"delta": 0.2}), DRPO(delta=0.2), {}),
    "drpo, tokens without log-prob": (("DRPO", {"delta": 0.2}), DRPO(delta=0.2), NO_LOGPROB),
    "gspo": (("GSPO", {"clip_low": 0.3, "clip_high": 0.5}), GSPO(0.3, 0.5), {}),
    "dppo, kl": (("DPPO", {"divergence": "kl", "ratio_cap": 3.0}), DPPO(divergence="kl", ratio_cap=3.0), {}),
    "cispo": (("CISPO", {"ratio_cap": 2.0}), CISPO(ratio_cap=2.0), {}),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_same_as_the_formula(name, tmp_path):
    spec, objective, changes = FORMULAS[name]
    options = {"per_device_train_batch_size": SAMPLES // 2, "gradient_accumulation_steps": 2, "temperature": 1.3}
    theirs = trainer(Naive, AsyncGRPOConfig, tmp_path, recorded=samples(**changes), **options)
    theirs.spec = spec
    want = tiny_trl.run(theirs)
    ours = trainer(
        AsyncDRPOTrainer, AsyncDRPOConfig, tmp_path, recorded=samples(**changes), objective=objective, **options
    )
    start = tiny_trl.weights(ours)
    got = tiny_trl.run(ours)
    assert close(got["loss"], want["loss"]) and close(got["grad_norm"], want["grad_norm"])
    assert (tiny_trl.weights(theirs) - start).norm() > 0
    assert (tiny_trl.weights(ours) - tiny_trl.weights(theirs)).norm() <= WEIGHT_BOUND * tiny_trl.weights(theirs).norm()
    assert all(value is not None and math.isfinite(value) for series in got.values() for value in series)
    assert (max(got["drpo/unscorable"]) > 0) == bool(changes)


def test_tokens_without_an_advantage_cost_nothing(tmp_path):
    """compact="active" gives the same run, also where no token of a row has an advantage."""
    half = {"advantage": lambda a: a if a > 0.5 else 0.0}
    recorded = samples(**half)
    for sample in recorded[:4]:
        sample.advantage = 0.0
    runs = {}
    for compact in ("mask", "active"):
        ours = trainer(
            AsyncDRPOTrainer, AsyncDRPOConfig, tmp_path, recorded=recorded, compact=compact,
            per_device_train_batch_size=4, max_steps=3,
        )  # fmt: skip
        runs[compact] = tiny_trl.run(ours), tiny_trl.weights(ours)
    (mask, want), (active, got) = runs["mask"], runs["active"]
    assert torch.equal(got, want) and active["loss"] == mask["loss"]
    assert active["drpo/computed"][0] == 0 < active["drpo/computed"][1] < mask["drpo/computed"][1]
    assert active["entropy"] == active["drpo/entropy_mean"]
    assert active["ratio"][0] == 1  # nothing was computed in this step
    assert all(math.isfinite(value) for value in active["kl"])


def test_options_of_the_head_reach_the_loss(tmp_path):
    exact, rounded = (
        tiny_trl.run(trainer(AsyncDRPOTrainer, AsyncDRPOConfig, tmp_path, max_steps=1, logits_dtype=dtype))["loss"]
        for dtype in ("float32", "bfloat16")
    )
    assert exact != rounded


def test_a_router_without_its_loss(tmp_path):
    ours = trainer(AsyncDRPOTrainer, AsyncDRPOConfig, tmp_path)
    ours.aux_loss_enabled, ours.router_aux_loss_coef = True, 0.1  # as for a model that only declares a router
    with pytest.raises(ValueError, match=r"router_aux_loss_coef must .* 0.1: write AsyncDRPOConfig\(router_aux"):
        ours.train()


def test_what_is_wrong_is_said_once(tmp_path, caplog):
    recorded = samples(old_log_probs=np.zeros_like)
    tiny_trl.run(trainer(AsyncDRPOTrainer, AsyncDRPOConfig, tmp_path, recorded=recorded))
    assert caplog.text.count("these are placeholders, not log-probs") == 1


# --- configuration ----------------------------------------------------------------------------------------------------


def config(tmp_path, **options):
    return AsyncDRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"epsilon": 0.1}, ValueError, r"epsilon must .*got 0.1: write objective=PPO\(clip_low=0.1, clip_high=0.1\)"),
        ({"epsilon_high": 0.3}, ValueError, r"epsilon_high must .*got 0.3: write objective=PPO\(.*clip_high=0.3\)"),
        ({"objective": 0.2}, TypeError, "objective must"),
        ({"objective": "DRPO(epsilon=1)"}, ValueError, "objective"),
        ({"compact": "none"}, ValueError, "compact must"),
        ({"sparse_grad": 1.0}, ValueError, "sparse_grad must"),
        ({"sparse_grad": 0.01, "objective": "GSPO"}, ValueError, "sparse_grad must"),
        ({"logits_dtype": "float16"}, ValueError, "logits_dtype must"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        config(tmp_path, **options)


def test_objective_as_text(tmp_path):
    assert config(tmp_path).objective == DRPO()
    (parsed,) = HfArgumentParser(AsyncDRPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--objective", "PPO(clip_high=0.28)", "--use_cpu", "--bf16", "False"]
    )
    assert parsed.objective == PPO(clip_high=0.28)
    assert parsed.to_dict()["objective"] == repr(parsed.objective)


def test_arguments_are_trl_s_with_another_config(tmp_path):
    assert inspect.signature(AsyncDRPOTrainer.__init__) == inspect.signature(AsyncGRPOTrainer.__init__)
    with pytest.raises(TypeError, match="args must be of AsyncDRPOConfig, got AsyncGRPOConfig"):
        trainer(AsyncDRPOTrainer, AsyncGRPOConfig, tmp_path)
    with pytest.raises(TypeError, match="objective must be given in args, got 'DRPO'"):
        AsyncDRPOTrainer("policy", args=config(tmp_path), objective="DRPO")


class Server:
    def __init__(self, mode):
        self.mode = mode

    def wait_for_server_ready(self):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": self.mode}}


@pytest.mark.parametrize(
    "options, mode, warning",
    [
        ({"temperature": 0.7}, "raw_logprobs", "processed_logprobs"),
        ({"temperature": 0.7}, "processed_logprobs", None),
        ({"top_p": 0.9, "min_p": 0.1}, "processed_logprobs", "after top_p, min_p, which"),
        ({"top_p": 0.9}, "raw_logprobs", None),
        ({}, None, None),  # a server is asked only where its answer matters
    ],
)
def test_logprobs_of_another_distribution(options, mode, warning, tmp_path, caplog):
    ours = SimpleNamespace(args=config(tmp_path, **options), vllm_client=Server(mode) if mode else None)
    ours.temperature = ours.args.temperature
    AsyncDRPOTrainer._check_engine(ours)
    assert len(caplog.records) == (warning is not None) and (warning or "") in caplog.text


def test_the_server_is_asked_before_training(tmp_path, monkeypatch):
    """The check runs where TRL's own worker asks a vLLM server for its log-probs."""
    asked = []
    monkeypatch.setattr(AsyncDRPOTrainer, "_check_engine", lambda self: asked.append(self))
    ours = trainer(AsyncDRPOTrainer, AsyncDRPOConfig, tmp_path)
    ours.get_train_dataloader()
    assert not asked
    ours.rollout_worker = object.__new__(AsyncRolloutWorker)
    ours.get_train_dataloader()
    assert asked == [ours]
