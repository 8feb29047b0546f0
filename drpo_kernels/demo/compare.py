"""The fused and the eager loss on the same batch: whether they agree, and their time and memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from drpo_kernels import Objective, Tokens, linear_policy_loss, linear_token_logprobs
from drpo_kernels.demo.measure import median_times, peak_extra_bytes
from drpo_kernels.demo.model import completion_hidden
from drpo_kernels.demo.rollout import Rollout
from drpo_kernels.demo.task import ALPHABET, PROMPT_LENGTH

# Both losses are the same function; float32 rounding over a few thousand additions stays below this.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Batch:
    """Inputs of a policy loss: hidden [B, L, H] and weight [V, H]; all others are [B, L]. Floats are float32."""

    title: str
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(tokens, width, vocabulary)"""
        vocabulary, width = self.weight.shape
        return self.targets.numel(), width, vocabulary


@dataclass(frozen=True)
class Comparison:
    """How the eager and the fused loss differ on one batch.

    loss                              |fused - eager|, absolute: a loss of centred advantages may be close to 0
    hidden_gradient, weight_gradient  |fused - eager| / |eager|, in norm
    seconds, peak_bytes               (eager, fused), for forward and backward
    """

    batch: Batch
    loss: float
    hidden_gradient: float
    weight_gradient: float
    seconds: tuple[float, float]
    peak_bytes: tuple[int, int]

    @property
    def agrees(self) -> bool:
        return max(self.loss, self.hidden_gradient, self.weight_gradient) < TOLERANCE


@torch.no_grad()
def run_batch(model: PreTrainedModel, rollout: Rollout) -> Batch:
    """The run's last rollout under the final weights, so that π differs from μ as it does in training."""
    return Batch(
        title="this run's last batch",
        hidden=completion_hidden(model, rollout.tokens, PROMPT_LENGTH),
        weight=model.lm_head.weight.detach(),
        targets=rollout.targets,
        old_logprobs=rollout.old_logprobs,
        advantages=rollout.advantages[:, None].expand_as(rollout.targets),
        mask=rollout.mask,
    )


@torch.no_grad()
def large_head_batch(sequences: int, length: int, width: int, vocabulary: int, generator: torch.Generator) -> Batch:
    """A random batch with the head of a language model: peaked distributions, targets drawn from them, π near μ."""
    device = generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden = normal(sequences, length, width)
    weight = normal(vocabulary, width) * (4 / width**0.5)  # logits of standard deviation 4
    targets = torch.stack(
        [torch.multinomial(torch.softmax(rows @ weight.T, -1), 1, generator=generator)[:, 0] for rows in hidden]
    )
    logprobs, _ = linear_token_logprobs(hidden, weight, targets)
    return Batch(
        title="a large head",
        hidden=hidden,
        weight=weight,
        targets=targets,
        old_logprobs=(logprobs + 0.2 * normal(sequences, length)).clamp(max=0),
        advantages=normal(sequences, 1).expand(sequences, length),
        mask=torch.ones_like(targets, dtype=torch.bool),
    )


def eager_loss(batch: Batch, hidden: Tensor, weight: Tensor, objective: Objective) -> Tensor:
    """The same loss in plain PyTorch: all the logits, `log_softmax`, `gather`, the objective's formula, autograd."""
    logprobs = torch.log_softmax(hidden @ weight.T, -1).gather(-1, batch.targets[..., None])[..., 0]
    tokens = Tokens(logprobs.flatten(), batch.old_logprobs.flatten(), batch.advantages.flatten())
    return objective.token_loss(tokens)[batch.mask.flatten()].mean()


def fused_loss(batch: Batch, hidden: Tensor, weight: Tensor, objective: Objective) -> Tensor:
    out = linear_policy_loss(
        hidden, weight, batch.targets, batch.old_logprobs, batch.advantages, batch.mask, objective=objective
    )
    return out.loss


def compare(batch: Batch, objective: Objective, repeats: int) -> Comparison:
    """Compare loss and gradients, then peak extra memory, then the time of forward and backward once all is warm."""
    eager, fused = (_forward_backward(batch, loss, objective) for loss in (eager_loss, fused_loss))
    (loss, *gradients), (expected, *expected_gradients) = fused(), eager()
    hidden, weight = (_relative(*pair) for pair in zip(gradients, expected_gradients, strict=True))
    device = batch.hidden.device
    peaks = (peak_extra_bytes(eager, device), peak_extra_bytes(fused, device))
    eager_seconds, fused_seconds = median_times((eager, fused), device, repeats)
    return Comparison(batch, (loss - expected).abs().item(), hidden, weight, (eager_seconds, fused_seconds), peaks)


def _forward_backward(batch: Batch, loss: Callable, objective: Objective) -> Callable[[], tuple[Tensor, ...]]:
    """A function of no arguments that returns (loss, gradient of hidden, gradient of weight)."""

    def run() -> tuple[Tensor, ...]:
        inputs = [leaf.detach().requires_grad_() for leaf in (batch.hidden, batch.weight)]
        value = loss(batch, *inputs, objective)
        return value.detach(), *torch.autograd.grad(value, inputs)

    return run


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def comparison_table(comparisons: list[Comparison], objective: Objective) -> Table:
    """One column per batch."""
    table = Table(
        title=f"{objective}: fused against eager, forward and backward",
        caption="Differences are |fused - eager|, for gradients relative and in norm.\n"
        "Peak extra memory includes the gradients.\n"
        f"A vocabulary of {len(ALPHABET)} leaves nothing to save: the first column shows fixed costs.",
        caption_justify="left",
    )
    table.add_column("")
    for comparison in comparisons:
        table.add_column(comparison.batch.title, justify="right")

    def row(title: str, value: Callable[[Comparison], str]) -> None:
        table.add_row(title, *(value(comparison) for comparison in comparisons))

    row("tokens x width x vocabulary", lambda c: " x ".join(str(size) for size in c.batch.shape))
    row("tokens with a gradient", lambda c: str(((c.batch.advantages != 0) & c.batch.mask).sum().item()))
    table.add_section()
    row("loss: difference", lambda c: f"{c.loss:.1e}")
    row("hidden gradient: difference", lambda c: f"{c.hidden_gradient:.1e}")
    row("head gradient: difference", lambda c: f"{c.weight_gradient:.1e}")
    table.add_section()
    row("time: eager", lambda c: f"{c.seconds[0] * 1e3:.1f} ms")
    row("time: fused", lambda c: f"{c.seconds[1] * 1e3:.1f} ms")
    row("time: fused / eager", lambda c: f"{c.seconds[1] / c.seconds[0]:.2f}")
    table.add_section()
    row("peak extra memory: eager", lambda c: f"{c.peak_bytes[0] / 2**20:.1f} MiB")
    row("peak extra memory: fused", lambda c: f"{c.peak_bytes[1] / 2**20:.1f} MiB")
    row("memory: fused / eager", lambda c: f"{c.peak_bytes[1] / c.peak_bytes[0]:.2f}")
    return table
