"""What the experiment is: methods, settings, sizes, learning rates, seeds, and the definitions of words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from drpo_kernels import CISPO, DPPO, DRPO, PPO, SPO, Objective, PolicyGradient, Tokens
from drpo_kernels.objectives import score

# A token is rare if the policy that sampled it gave it less than this probability.
RARE = 0.01
# A token is plausible in a context if the model before training gives it at least this probability.
PLAUSIBLE = 1e-4
# A seed draws its rule among those with which the untrained policy expects a reward in this range.
HALF = (0.45, 0.55)


@dataclass(frozen=True)
class DRPOWithoutMagnitude(Objective):
    """DRPO with a penalty that is not multiplied by |A|: w = 1 - (π - μ) / (δ A). It also acts on tokens of A = 0."""

    delta: float = 0.2

    def token_loss(self, tokens: Tokens) -> Tensor:
        penalty = tokens.old_probs * tokens.ratio_minus_one.square() / (2 * self.delta)
        return penalty - tokens.advantages * tokens.ratio


@dataclass(frozen=True)
class DRPOWithoutCorrection(Objective):
    """DRPO whose weight stops at 0: w = max(0, 1 - sign(A)(π - μ) / δ), so that no token is pulled back."""

    delta: float = 0.2

    def token_loss(self, tokens: Tokens) -> Tensor:
        weight = (1 - tokens.advantages.sign() * tokens.prob_shift / self.delta).clamp(min=0)
        return score(-tokens.advantages * tokens.ratio * weight, tokens.logprobs)


METHODS: dict[str, Objective] = {
    "PG": PolicyGradient(),
    "PPO": PPO(),
    "PPO clip-higher": PPO(clip_high=0.28),
    "SPO": SPO(),
    "CISPO": CISPO(),
    "DPPO-TV": DPPO(),
    "DPPO-KL": DPPO(divergence="kl"),
    **{f"DRPO δ={delta:g}": DRPO(delta=delta) for delta in (0.05, 0.1, 0.2, 0.5, 1.0, 12.5)},
    "DRPO without |A|": DRPOWithoutMagnitude(),
    "DRPO without correction": DRPOWithoutCorrection(),
}


@dataclass(frozen=True)
class Setting:
    """How rollouts are made: `updates` for each rollout batch, sampled with the head of an `engine`."""

    updates: int = 1
    engine: str = "float32"


CONTROL = "on-policy"  # Here π = μ at every update, so all methods are one algorithm, and only PG is run.
SETTINGS = {
    CONTROL: Setting(),
    "4 updates": Setting(updates=4),
    "16 updates": Setting(updates=16),
    "64 updates": Setting(updates=64),
    "bf16 head": Setting(engine="bf16"),
    "8-bit head": Setting(engine="fp8"),
    "4-bit head": Setting(engine="int4"),
}


@dataclass(frozen=True)
class Size:
    """One run. Every method gets the same number of updates and of samples."""

    width: int = 32  # the adapter is a matrix of this size, squared
    held_out: int = 256  # contexts that are never trained on
    updates: int = 256
    contexts: int = 16  # of an update
    group: int = 8  # tokens sampled after each context
    points: int = 4  # evaluations after the first
    grad_clip: float = 1.0


RATES = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)
SWEEP_SEEDS = (100, 101)  # they choose the learning rate of each method in each setting, and decide nothing else
SEEDS = tuple(range(20))
# A rehearsal runs every line of code, and learns too little to mean anything.
QUICK = Size(width=4, held_out=16, updates=128, contexts=8, group=4, points=2)


class Amendment(NamedTuple):
    """The amendment of docs/stability.md: its methods run in its settings at both rates, on seeds of their own."""

    seeds: tuple[int, ...] = tuple(range(20, 40))
    rates: tuple[float, ...] = (0.05, 0.1)
    methods: tuple[str, ...] = (
        "PG", "DPPO-TV", "DRPO δ=0.2", "DRPO δ=0.5", "DRPO δ=1", "DRPO δ=12.5", "DRPO without correction",
    )  # fmt: skip
    settings: tuple[str, ...] = ("16 updates", "64 updates", "8-bit head", "4-bit head")


AMENDMENT = Amendment()
