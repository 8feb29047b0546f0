"""Everything the experiment depends on, in one place: sizes, settings, methods, learning rates, seeds, definitions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from benchmarks.stability.task import Vocabulary
from drpo_kernels import DPPO, DRPO, PPO, SPO, Objective, PolicyGradient

SEEDS = (0, 1, 2, 3, 4)
# A method's learning rate is the one with the largest area under the held-out curve in this setting, in the mean over
# seeds that no other run uses.
SWEEP_SETTING = "stale"
VOCABULARY = Vocabulary(words=256, remarks=1787)

# A run has collapsed if its sampled held-out accuracy falls below this share of the best it had before, which may be
# the accuracy after the warm-up. It has collapsed for good if the mean of its last two evaluations is below it.
COLLAPSE = 0.5


@dataclass(frozen=True)
class Size:
    """One run. Every method gets the same number of rollouts: `minibatches` of `prompts` x `group` completions."""

    vocabulary: Vocabulary = VOCABULARY
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    warmup_steps: int = 450
    warmup_batch: int = 128
    warmup_lr: float = 5e-3
    carelessness: float = 0.6  # how often the teacher guesses an operation
    minibatches: int = 128
    prompts: int = 16  # in a minibatch
    group: int = 8  # completions of a prompt
    grad_clip: float = 1.0
    point: int = 16  # minibatches between two points of a curve, a multiple of every setting's rollout batch
    evaluation: int = 256  # held-out problems
    # The sweep of learning rates. It is not in the definition of a run, whose record has its rate and its seed.
    rates: tuple[float, ...] = field(default=(1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3), repr=False)
    sweep_seeds: tuple[int, ...] = field(default=(100, 101), repr=False)

    @property
    def completions(self) -> int:
        """The completions of a minibatch."""
        return self.prompts * self.group

    @property
    def fingerprint(self) -> str:
        """It changes with every number of the definition, so that policies of another size are not mixed in."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Setting:
    """How rollouts are made and used.

    minibatches  how many a rollout batch has, with an update for each
    epochs       passes over a rollout batch
    precision    what the rollout engine computes in
    rate         the learning rate of every method; None if each has the rate that the sweep chose for it
    """

    minibatches: int = 1
    epochs: int = 1
    precision: str = "float32"
    rate: float | None = field(default=None, repr=False)  # It is not in the definition: a run's record has its rate.


SETTINGS = {
    "on-policy": Setting(),
    "stale": Setting(minibatches=16, epochs=2),
    # The methods differed at this rate in the sweep. The comparison has other seeds than the sweep.
    "stale, rate 1e-3": Setting(minibatches=16, epochs=2, rate=1e-3),
    "mismatch (fp8)": Setting(precision="fp8"),
}

METHODS: dict[str, Objective] = {
    "PG": PolicyGradient(),
    "PPO": PPO(),
    "SPO": SPO(),
    "DPPO-TV": DPPO(),
    "DRPO δ=0.2": DRPO(delta=0.2),
    "DRPO δ=12.5": DRPO(delta=12.5),
}

# A rehearsal runs every line of code and earns some rewards, but learns nothing.
SMOKE = Size(
    vocabulary=Vocabulary(words=4, remarks=4), hidden_size=32, layers=1, heads=2,
    warmup_steps=120, warmup_batch=32, warmup_lr=1e-2,
    minibatches=32, prompts=4, group=4, evaluation=16,
    rates=(5e-4, 1e-3), sweep_seeds=(0,),
)  # fmt: skip
