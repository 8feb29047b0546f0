"""Everything the experiment depends on, in one place: sizes, settings, methods, learning rates, seeds, definitions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from benchmarks.stability.ablations import DRPOWithoutAbsA, MaskDRPO
from benchmarks.stability.task import Vocabulary
from drpo_kernels import DPPO, DRPO, PPO, SPO, Objective, PolicyGradient

VOCABULARY = Vocabulary(words=256, remarks=1787)


@dataclass(frozen=True)
class Size:
    """One run: every method gets the same rollouts budget, `minibatches` of `prompts` x `group` completions."""

    vocabulary: Vocabulary = VOCABULARY
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4

    warmup_steps: int = 450
    warmup_batch: int = 128
    warmup_lr: float = 5e-3
    carelessness: float = 0.6  # of the teacher: how often an operation is a guess

    minibatches: int = 128  # sampled in all
    prompts: int = 16  # per minibatch
    group: int = 8
    grad_clip: float = 1.0
    point: int = 16  # minibatches between two points of a curve; a multiple of every setting's rollout
    evaluation: int = 256  # held-out problems

    @property
    def completions(self) -> int:
        """Of a minibatch."""
        return self.prompts * self.group

    @property
    def fingerprint(self) -> str:
        """Changes with any number above: what was run with others is not mixed in."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Setting:
    """How rollouts are made and used.

    minibatches  of a rollout batch, an update each: by the last the policy is that many updates from what sampled it
    epochs       passes over a rollout batch
    precision    of the rollout engine
    rate         every method's learning rate, or None: each has its own, chosen in the sweep
    """

    minibatches: int = 1
    epochs: int = 1
    precision: str = "float32"
    rate: float | None = field(default=None, repr=False)  # not in the definition: a run's record has its rate


SETTINGS = {
    "on-policy": Setting(),
    "stale": Setting(minibatches=16, epochs=2),
    # a rate at which the sweep's two seeds showed the methods apart, on seeds of which the sweep knows nothing
    "stale, rate 1e-3": Setting(minibatches=16, epochs=2, rate=1e-3),
    "mismatch (bf16)": Setting(precision="bf16"),
    "mismatch (fp8)": Setting(precision="fp8"),
    "stale + mismatch (fp8)": Setting(minibatches=16, epochs=2, precision="fp8"),
}

# what `make stability` runs, and what is compared with what on the page
CORE_SETTINGS = ("on-policy", "stale", "stale, rate 1e-3", "mismatch (fp8)")
CORE_METHODS = ("PG", "PPO", "SPO", "DPPO-TV", "DRPO δ=0.2", "DRPO δ=12.5")
SEEDS = (0, 1, 2, 3, 4)

# the learning rate of a method is the one of these with the largest area under the held-out curve in this setting,
# mean over these seeds, which no other run uses
RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)
SWEEP_SETTING, SWEEP_SEEDS = "stale", (100, 101)

# A run has collapsed where its sampled held-out accuracy falls below this share of the best it had before, the
# warm-up's included; it has collapsed for good where the mean of its last two evaluations is below it.
COLLAPSE = 0.5

METHODS: dict[str, Objective] = {
    "PG": PolicyGradient(),
    "PPO": PPO(),
    "PPO clip-higher": PPO(clip_high=0.28),
    "SPO": SPO(),
    "DPPO-TV": DPPO(),
    "DPPO-KL": DPPO(divergence="kl"),
    "DRPO δ=0.05": DRPO(delta=0.05),
    "DRPO δ=0.2": DRPO(delta=0.2),
    "DRPO δ=1": DRPO(delta=1.0),
    "DRPO δ=12.5": DRPO(delta=12.5),
    "DRPO without |A|": DRPOWithoutAbsA(delta=0.2),
    "Mask-DRPO": MaskDRPO(delta=0.2),
}

# a rehearsal: every line of code, some rewards, nothing learnt
SMOKE = Size(
    vocabulary=Vocabulary(words=4, remarks=4),
    hidden_size=32,
    layers=1,
    heads=2,
    warmup_steps=120,
    warmup_batch=32,
    warmup_lr=1e-2,
    minibatches=32,
    prompts=4,
    group=4,
    evaluation=16,
)
