"""Fused policy losses for LLM reinforcement learning: DRPO and others in 6·T·V·H FLOP, chunk by chunk."""

from drpo_kernels.integrations import needs

with needs("torch", "torch>=2.8"):  # PyTorch may be missing if a script runs from a clone that is not installed
    import torch as _torch  # noqa: F401

from drpo_kernels.aggregation import TokenCoefficients
from drpo_kernels.diagnosis import diagnose
from drpo_kernels.logprobs import linear_token_logprobs, token_logprobs
from drpo_kernels.objective import Objective, register_objective
from drpo_kernels.objectives import CISPO, DPPO, DRPO, GSPO, PPO, SPO, PolicyGradient
from drpo_kernels.policy_loss import PolicyLossOutput, drpo_loss, linear_drpo_loss, linear_policy_loss, policy_loss
from drpo_kernels.tokens import Tokens
from drpo_kernels.version import __version__

__all__ = [
    "CISPO",
    "DPPO",
    "DRPO",
    "GSPO",
    "PPO",
    "SPO",
    "Objective",
    "PolicyGradient",
    "PolicyLossOutput",
    "TokenCoefficients",
    "Tokens",
    "__version__",
    "diagnose",
    "drpo_loss",
    "linear_drpo_loss",
    "linear_policy_loss",
    "linear_token_logprobs",
    "policy_loss",
    "register_objective",
    "token_logprobs",
]
