"""Runs of our trainers beside TRL's on two processes (torchrun, gloo): `trl_worker.py synchronous|asynchronous FOLDER`.

The first process prints a JSON line with what was logged, and how far the weights are from each other.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

import tiny_trl
import trl_async_runs
from distributed_harness import leave
from drpo_kernels import PPO
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer
from drpo_kernels.integrations.trl_async import AsyncDRPOConfig, AsyncDRPOTrainer

torch.set_num_threads(1)


def count_tokens(trainer) -> list[int]:
    """Return a list that fills with the completion tokens of each of this rank's micro-batches."""
    counts, compute_loss = [], trainer._compute_loss

    def counting(model, inputs):
        counts.append(inputs["completion_mask"].sum().item())
        return compute_loss(model, inputs)

    trainer._compute_loss = counting
    return counts


def report(**record) -> None:
    if torch.distributed.get_rank() == 0:
        print("RECORD " + json.dumps(record), flush=True)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def synchronous(folder: Path) -> None:
    options = {"max_steps": 4, "num_iterations": 2, "entropy_coef": 0.01, "ddp_backend": "gloo"}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "loss_type": "dapo"}
    runs = []
    for cls, config, objective in ((GRPOTrainer, GRPOConfig, {}), (DRPOTrainer, DRPOConfig, {"objective": PPO()})):
        trainer = tiny_trl.trainer(cls, tiny_trl.arguments(config, folder, **options, **objective), tiny_trl.model())
        counts = count_tokens(trainer)
        runs.append((tiny_trl.run(trainer), tiny_trl.weights(trainer)))
    (theirs, their_weights), (ours, our_weights) = runs
    tokens = [None, None]
    torch.distributed.all_gather_object(tokens, counts)
    group = [torch.zeros_like(our_weights) for _ in range(2)]
    torch.distributed.all_gather(group, our_weights)
    start = torch.cat([p.reshape(-1) for p in tiny_trl.model().parameters()])
    report(
        theirs=theirs, ours=ours, tokens=tokens, moved=(their_weights - start).norm().item(),
        weights=distance(our_weights, their_weights), ranks=(group[0] - group[1]).abs().max().item(),
    )  # fmt: skip


def asynchronous(folder: Path) -> None:
    trl_async_runs.run_on_a_cpu(pytest.MonkeyPatch())
    options = {"per_device_train_batch_size": trl_async_runs.SAMPLES // 4, "gradient_accumulation_steps": 2}
    runs = []
    for cls, config, objective in (
        (AsyncGRPOTrainer, AsyncGRPOConfig, {}),
        (AsyncDRPOTrainer, AsyncDRPOConfig, {"objective": PPO()}),
    ):
        # Each rank has a folder of its own, so that none reads the model that another is writing.
        own = folder / os.environ["RANK"]
        run = trl_async_runs.trainer(cls, config, own, ddp_backend="gloo", **options, **objective)
        runs.append((tiny_trl.run(run), tiny_trl.weights(run)))
    (theirs, their_weights), (ours, our_weights) = runs
    report(theirs=theirs, ours=ours, weights=distance(our_weights, their_weights))


if __name__ == "__main__":
    {"synchronous": synchronous, "asynchronous": asynchronous}[sys.argv[1]](Path(sys.argv[2]))
    leave()
