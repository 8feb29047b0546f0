"""An objective of one's own, in PyTorch: the fused loss takes it as it is, and agrees with plain autograd."""

from dataclasses import dataclass

import torch
from torch import Tensor

from drpo_kernels import Objective, Tokens, linear_policy_loss, register_objective


@register_objective  # only needed inside torch.compile(fullgraph=True)
@dataclass(frozen=True)
class SoftPenalty(Objective):
    """-A r + scale · |A| · Δ², with the ratio r = π / μ and the log-ratio Δ."""

    scale: float = 0.5

    def token_loss(self, tokens: Tokens) -> Tensor:
        penalty = self.scale * tokens.advantages.abs() * tokens.log_ratio.square()
        return penalty - tokens.advantages * tokens.ratio


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The same from all the logits."""
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    log_ratio = logprobs - old_logprobs
    return (0.5 * advantages.abs() * log_ratio.square() - advantages * log_ratio.exp()).mean()


def main() -> float:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 16, 32, requires_grad=True), torch.randn(500, 32, requires_grad=True)
    targets, advantages = torch.randint(500, (4, 16)), torch.randn(4, 16)
    with torch.no_grad():
        logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        old_logprobs = (logprobs + 0.2 * torch.randn(4, 16)).clamp(max=0)

    fused = linear_policy_loss(hidden, weight, targets, old_logprobs, advantages, objective=SoftPenalty(scale=0.5)).loss
    plain = plain_loss(hidden, weight, targets, old_logprobs, advantages)
    (of_fused,) = torch.autograd.grad(fused, weight)
    (of_plain,) = torch.autograd.grad(plain, weight)
    difference = ((of_fused - of_plain).norm() / of_plain.norm()).item()
    print(f"loss: fused {fused:.6f}, plain {plain:.6f}")
    print(f"relative difference of the weight's gradients: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
