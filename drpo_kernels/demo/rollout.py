"""Rollouts: sampled completions, the log-probs that they were sampled with, rewards and group advantages."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drpo_kernels.demo.task import COMPLETION_LENGTH, END_ID, PROMPT_LENGTH, Problem, encode, rewards, until_end


@dataclass(frozen=True)
class Completions:
    """N sampled completions of up to C tokens.

    tokens    [N, C] the sampled ids; ids after the end of a completion mean nothing
    logprobs  [N, C] log μ, recorded while sampling; the loss takes them as old_logprobs
    entropy   [N, C] the entropy of the distribution that each token was drawn from
    mask      [N, C] bool, True up to and including the end
    """

    tokens: Tensor
    logprobs: Tensor
    entropy: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Rollout:
    """N = prompts x group completions with what the updates need; the first axis of every field is N.

    tokens [N, P + C], targets [N, C], old_logprobs [N, C], mask [N, C], advantages [N]
    """

    tokens: Tensor
    targets: Tensor
    old_logprobs: Tensor
    mask: Tensor
    advantages: Tensor

    def select(self, rows: Tensor) -> "Rollout":
        return Rollout(*(getattr(self, field.name)[rows] for field in fields(self)))


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Tensor,
    length: int = COMPLETION_LENGTH,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    end_id: int = END_ID,
) -> Completions:
    """Draw one completion per prompt [N, P] with a key-value cache. Temperature 0 takes the most probable token."""
    tokens, logprobs, entropies = [], [], []
    inputs, cache = prompts, None
    for _ in range(length):
        output = model.model(inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = model.lm_head(output.last_hidden_state[:, -1]).float()
        distribution = torch.log_softmax(logits / (temperature or 1.0), -1)
        probabilities = distribution.exp()
        if temperature:
            inputs = draw(probabilities, generator)
        else:
            inputs = distribution.argmax(-1, keepdim=True)
        tokens.append(inputs)
        logprobs.append(distribution.gather(-1, inputs))
        entropies.append(-(probabilities * distribution).sum(-1, keepdim=True))
    completion = torch.cat(tokens, -1)
    return Completions(completion, torch.cat(logprobs, -1), torch.cat(entropies, -1), until_end(completion, end_id))


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One index for each row of probabilities [N, V] -> [N, 1], by inverting the cumulative distribution.

    That takes one random number per row, where `torch.multinomial` draws V.
    """
    cumulative = probabilities.double().cumsum(-1)
    point = cumulative[:, -1:] * torch.rand(
        len(probabilities), 1, dtype=torch.float64, generator=generator, device=probabilities.device
    )
    return torch.searchsorted(cumulative, point, right=True)  # never an index with p = 0


def group_advantages(reward: Tensor, group: int) -> Tensor:
    """GRPO: (reward - mean) / standard deviation within each group of completions of one prompt, [N] -> [N].

    If all rewards of a group are equal, its advantages are exactly 0 and the loss drops its rows.
    """
    grouped = reward.reshape(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-6)).reshape(-1)


def roll_out(
    model: PreTrainedModel, problems: Sequence[Problem], group: int, temperature: float, generator: torch.Generator
) -> tuple[Rollout, dict[str, float]]:
    """Sample `group` completions per problem and grade them -> (rollout, its mean {"reward", "entropy"})."""
    repeated = [problem for problem in problems for _ in range(group)]
    prompts = encode([problem.prompt for problem in repeated], PROMPT_LENGTH).to(generator.device)
    drawn = sample(model, prompts, temperature=temperature, generator=generator)
    reward = rewards(repeated, drawn.tokens).to(prompts.device)
    rollout = Rollout(
        tokens=torch.cat([prompts, drawn.tokens], 1),
        targets=drawn.tokens,
        old_logprobs=drawn.logprobs,
        mask=drawn.mask,
        advantages=group_advantages(reward, group),
    )
    return rollout, {"reward": reward.mean().item(), "entropy": drawn.entropy[drawn.mask].mean().item()}
