"""Two processes of an asynchronous TRL run (torchrun, gloo): AsyncGRPOTrainer, then AsyncDRPOTrainer. Prints one JSON
line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from test_trl_async import SAMPLES, run_on_a_cpu, trainer
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

import tiny_trl
from distributed_harness import leave
from drpo_kernels import PPO
from drpo_kernels.integrations.trl_async import AsyncDRPOConfig, AsyncDRPOTrainer

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)


def main(output_dir: str) -> None:
    run_on_a_cpu(pytest.MonkeyPatch())
    options = {"per_device_train_batch_size": SAMPLES // 4, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    runs = []
    for cls, config, objective in (
        (AsyncGRPOTrainer, AsyncGRPOConfig, {}),
        (AsyncDRPOTrainer, AsyncDRPOConfig, {"objective": PPO()}),
    ):
        # a folder for each rank, so that none reads the model that another is writing
        run = trainer(cls, config, Path(output_dir) / os.environ["RANK"], **options, **objective)
        runs.append((tiny_trl.run(run), tiny_trl.weights(run)))
    (theirs, their_weights), (ours, our_weights) = runs
    if os.environ["RANK"] == "0":
        distance = ((our_weights - their_weights).norm() / their_weights.norm()).item()
        print("RECORD " + json.dumps({"theirs": theirs, "ours": ours, "weights": distance}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
