"""The settings of the demo."""

from dataclasses import dataclass
from typing import Any

from drpo_kernels import DPPO, DRPO, PPO, SPO

# With its default δ of 12.5, the paper's, DRPO never reaches its boundary. With 0.2 it does, as DPPO with 0.15.
OBJECTIVES = {"drpo": DRPO(delta=0.2), "ppo": PPO(), "spo": SPO(), "dppo": DPPO()}


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on besides the device. Equal settings on one machine give equal runs."""

    seed: int = 0
    objective: str = "drpo"

    hidden_size: int = 64
    layers: int = 2
    heads: int = 4

    held_out: int = 1000  # problems kept from training, of 10,000
    eval_samples: int = 4  # completions per held-out problem in a sampled evaluation

    warmup_steps: int = 500  # at most
    warmup_batch: int = 256
    warmup_lr: float = 1e-3
    warmup_target: float = 0.25  # the warm-up ends once a sampled answer is right with this probability

    steps: int = 150
    prompts: int = 64  # per RL step
    group: int = 8  # completions per prompt
    epochs: int = 1  # passes over each rollout
    minibatches: int = 4  # updates per pass
    lr: float = 8e-4
    grad_clip: float = 1.0
    temperature: float = 1.0
    sparse_grad: float = 0.0  # the option of `linear_policy_loss`; 0 gives exact gradients
    min_gain: float = 0.1  # the run fails unless the sampled reward on held-out problems rises by this

    large_head: tuple[int, int, int, int] = (16, 128, 256, 32768)  # sequences, length, width, vocabulary compared
    repeats: int = 3  # timed calls of each loss in the comparison

    @classmethod
    def quick(cls, **changes) -> "Settings":
        """A run of seconds, for tests: too short to learn anything, so no gain is asked for."""
        size: dict[str, Any] = dict(
            hidden_size=32, layers=1, held_out=100, warmup_steps=30, warmup_batch=64, steps=5, prompts=8, min_gain=-1.0,
            large_head=(4, 32, 64, 2048),
        )  # fmt: skip
        return cls(**{**size, **changes})
