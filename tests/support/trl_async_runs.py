"""Asynchronous runs of TRL on a CPU, from recorded samples of stale policies.

TRL's attention over packed rows is a FlashAttention-3 kernel, and a PyTorch function with the same arguments stands in
for it. A worker that hands out recorded samples takes the place of the vLLM server. Its client, the weight transfer and
the GPU's name are left out. Everything else is TRL's.
"""

from __future__ import annotations

import math
import queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16' peft")
from trl.experimental.async_grpo import async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

import tiny_trl
from trl_runs import WEIGHT_BOUND, close

STEPS, SAMPLES = 3, 8  # the samples of a step are two groups of four completions
TIMES = {"epoch", "step_time", "sample/time_in_queue_s"}


def attention(q, k, v, starts_q, starts_k, *_, softmax_scale, causal, window_size):
    """Compute what `flash_attn_varlen_func` does: q [N, heads, D] attends to k and v [K, groups, D] of its segment."""
    assert causal and window_size == (-1, -1)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = []
    for a, b, c, d in zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * softmax_scale
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v[c:d]))
    return torch.cat(out)


def run_on_a_cpu(monkeypatch):
    monkeypatch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=attention))
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)  # it asks CUDA for the name
    monkeypatch.setattr(async_grpo_trainer, "VLLMClient", lambda *_: None)  # it needs `requests`


def samples(steps=STEPS + 1, **changes) -> list[RolloutSample]:
    """Return groups of four completions of one prompt, with the log-probs of an older policy. They are enough for one
    step more than is trained, because the trainer reads ahead.

    Two completions of a group begin alike, so that trained tokens share a position of the packed row. Three have a
    tool's tokens in the middle, which are not trained.
    """
    rng, found = np.random.default_rng(3), []
    for group in range(steps * SAMPLES // 4):
        prompt = rng.integers(4, tiny_trl.VOCAB, 3 + group % 3)
        first = rng.integers(4, tiny_trl.VOCAB, 2)
        for i, length in enumerate((6, 4, 5, 7)):
            completion = rng.integers(4, tiny_trl.VOCAB, length)
            completion[:2] = first if i < 2 else completion[:2]
            mask = np.concatenate([np.zeros(len(prompt)), np.ones(length)]).astype(int)
            mask[len(prompt) + 2 : len(prompt) + 4] = i != 3
            sample = dict(
                prompt=[], completion=[], input_ids=np.concatenate([prompt, completion]), completion_mask=mask,
                old_log_probs=mask * rng.uniform(-6, -2, len(mask)), advantage=float(rng.normal()),
                model_version=max(group // 2 - 1, 0), group_id=group, metrics={"reward": float(i)},
            )  # fmt: skip
            found.append(RolloutSample(**{**sample, **{name: f(sample[name]) for name, f in changes.items()}}))
    return found


class Recorded:
    """This rollout worker hands out recorded samples."""

    def __init__(self, recorded):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        for sample in recorded:
            self.rollout_buffer.put(sample)

    def start(self):
        pass

    stop = start

    def update_model_version(self, model_version):
        pass

    def check_health(self, stale_after_s):
        raise AssertionError("the trainer asked for more samples than were recorded")


class NoTransfer:
    def init_weight_transfer(self):
        pass

    pause = resume = destroy = init_weight_transfer

    def send_weights(self, iterator):
        for _ in iterator:
            pass


def trainer(cls, config, tmp_path, policy=tiny_trl.model, recorded=None, peft_config=None, **options):
    policy().save_pretrained(tmp_path / "policy")
    defaults = dict(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=SAMPLES, max_steps=STEPS, learning_rate=2e-3,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
        token_budget=0,
    )  # fmt: skip
    return cls(
        model=str(tmp_path / "policy"), args=config(**{**defaults, **options}), train_dataset=tiny_trl.dataset(4),
        processing_class=tiny_trl.tokenizer(), rollout_worker=Recorded(recorded or samples()),
        weight_transfer=NoTransfer(), peft_config=peft_config,
    )  # fmt: skip


def assert_same_run(theirs, ours):
    start = tiny_trl.weights(theirs)
    want, got = tiny_trl.run(theirs), tiny_trl.run(ours)
    assert len(want["loss"]) == theirs.args.max_steps
    assert (tiny_trl.weights(theirs) - start).norm() > 0
    assert (tiny_trl.weights(ours) - tiny_trl.weights(theirs)).norm() <= WEIGHT_BOUND * tiny_trl.weights(theirs).norm()
    assert_same_logs(got, want)
    return want, got


def assert_same_logs(got, want):
    for name in want.keys() - TIMES:
        if not name.startswith("perf/"):
            assert close(got[name], want[name]), f"{name}: {got[name]} instead of {want[name]}"
