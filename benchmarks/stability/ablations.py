"""The paper's ablations as a user writes an objective: a formula in PyTorch, and it runs on every backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from drpo_kernels import Objective, Tokens


@dataclass(frozen=True)
class DRPOWithoutAbsA(Objective):
    """ℓ = -(r A - μ (r - 1)² / (2δ)) regularises every advantage alike: dℓ/dlogπ = -r (A - (π - μ)/δ)."""

    delta: float = 0.2

    def token_loss(self, tokens: Tokens) -> Tensor:
        penalty = tokens.old_probs * tokens.ratio_minus_one.square() / (2 * self.delta)
        return penalty - tokens.advantages * tokens.ratio


@dataclass(frozen=True)
class MaskDRPO(Objective):
    """The regulariser of DRPO acts beyond |π - μ| = δ only: w = 1 within, 1 - sign(A)(π - μ)/δ beyond."""

    delta: float = 0.2

    def token_loss(self, tokens: Tokens) -> Tensor:
        beyond = (tokens.prob_shift.abs() > self.delta).to(tokens.logprobs.dtype)
        penalty = tokens.advantages.abs() * tokens.old_probs * tokens.ratio_minus_one.square() / (2 * self.delta)
        return beyond * penalty - tokens.advantages * tokens.ratio
