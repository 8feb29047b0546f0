"""Two processes of a TRL run (torchrun, gloo): DRPOTrainer and GRPOTrainer side by side. Prints one JSON line."""

from __future__ import annotations

import json
import sys

import torch
import transformers
from trl import GRPOConfig, GRPOTrainer

import tiny_trl
from distributed_harness import leave
from drpo_kernels import PPO
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)


def count_tokens(trainer) -> list[int]:
    """A list that fills with the completion tokens of each of this rank's micro-batches."""
    counts, compute_loss = [], trainer._compute_loss

    def counting(model, inputs):
        counts.append(inputs["completion_mask"].sum().item())
        return compute_loss(model, inputs)

    trainer._compute_loss = counting
    return counts


def main(output_dir: str) -> None:
    options = {"max_steps": 4, "num_iterations": 2, "entropy_coef": 0.01, "ddp_backend": "gloo"}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "loss_type": "dapo"}
    runs = []
    for cls, config, objective in ((GRPOTrainer, GRPOConfig, {}), (DRPOTrainer, DRPOConfig, {"objective": PPO()})):
        trainer = tiny_trl.trainer(
            cls, tiny_trl.arguments(config, output_dir, **options, **objective), tiny_trl.model()
        )
        counts = count_tokens(trainer)
        runs.append((tiny_trl.run(trainer), tiny_trl.weights(trainer)))
    (theirs, their_weights), (ours, our_weights) = runs
    tokens = [None, None]
    torch.distributed.all_gather_object(tokens, counts)
    group = [torch.zeros_like(our_weights) for _ in range(2)]
    torch.distributed.all_gather(group, our_weights)
    if torch.distributed.get_rank() == 0:
        record = {
            "theirs": theirs, "ours": ours, "tokens": tokens,
            "moved": (their_weights - torch.cat([p.reshape(-1) for p in tiny_trl.model().parameters()])).norm().item(),
            "weights": ((our_weights - their_weights).norm() / their_weights.norm()).item(),
            "ranks": (group[0] - group[1]).abs().max().item(),
        }  # fmt: skip
        print("RECORD " + json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
