"""One run: GRPO-style reinforcement learning of the adapter with one method in one setting, at one learning rate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.stability.bandit import Bandit, Head, HeldOut, bandit
from benchmarks.stability.settings import METHODS, RARE, SETTINGS, Size
from drpo_kernels import Objective, Tokens
from drpo_kernels.demo.rollout import group_advantages


class Batch(NamedTuple):
    """An update's samples: contexts [C], the tokens after each, log μ as the engine has it, advantages [C, G]."""

    rows: Tensor
    tokens: Tensor
    old_logprobs: Tensor
    advantages: Tensor


def run(method: str, setting: str, seed: int, rate: float, size: Size, compare: Iterable[str] = ()) -> dict:
    """Return the outcome of a run: "reward", "rare" and "implausible" (`HeldOut.evaluate`) from before the first update
    to the last; in the mean over updates, the number of rare and of common tokens with A ≠ 0, and their `distortions`;
    and the same tokens' `distortions` by the methods in `compare`.
    """
    world, objective, conditions = bandit(size.width), METHODS[method], SETTINGS[setting]
    generator = torch.Generator().manual_seed(seed)
    letters = world.rules[int(torch.randint(len(world.rules), (), generator=generator))]
    rule = world.rule(letters)
    order = torch.randperm(len(world.features), generator=generator)
    held_out = HeldOut(world, rule, order[: size.held_out].sort().values)
    adapter = torch.zeros(size.width, size.width)
    adapter.grad = torch.zeros_like(adapter)
    optimizer = torch.optim.Adam([adapter], lr=rate, betas=(0.9, 0.95))
    means: dict[str, dict] = {name: Counter() for name in ("tokens", method, *compare)}
    evaluations = [held_out.evaluate(adapter)]
    sampler = Sampler(world, world.head(conditions.engine), rule, size, generator)
    for update, batch in enumerate(sampler.batches(order[size.held_out :], adapter, conditions.updates), 1):
        logp, adapter.grad[:] = gradient(world, adapter, batch, objective)
        torch.nn.utils.clip_grad_norm_([adapter], size.grad_clip, error_if_nonfinite=True)
        optimizer.step()
        now, old, advantages = pushed(logp, batch)
        means["tokens"].update(by_rarity(torch.ones_like(now), old, "tokens"))
        for name in (method, *compare):
            means[name].update(distortions(METHODS[name], now, old, advantages))
        if update % (size.updates // size.points) == 0:
            evaluations.append(held_out.evaluate(adapter))
    means = {name: {key: total / size.updates for key, total in sums.items()} for name, sums in means.items()}
    curves = {name: [point[name] for point in evaluations] for name in evaluations[0]}
    own = {**means.pop("tokens"), **means.pop(method)}
    return {"letters": letters, **curves, **own, "compared": means}


class Sampler(NamedTuple):
    """What samples the rollouts of a run, with the head of an engine."""

    world: Bandit
    head: Head
    rule: Tensor
    size: Size
    generator: torch.Generator

    def batches(self, contexts: Tensor, adapter: Tensor, updates: int) -> Iterator[Batch]:
        """Yield the batch of each update. The `updates` of a rollout are sampled from the adapter before the first."""
        count, left = updates * self.size.contexts, contexts[:0]
        for _ in range(self.size.updates // updates):
            if len(left) < count:
                left = contexts[torch.randperm(len(contexts), generator=self.generator)]
            rollout, left = left[:count], left[count:]
            yield from [self.sample(rows, adapter) for rows in rollout.split(self.size.contexts)]

    def sample(self, rows: Tensor, adapter: Tensor) -> Batch:
        shifted, likelihood = _softmax(self.head.logits(rows, self.world.features, adapter))
        tokens = torch.multinomial(likelihood, self.size.group, replacement=True, generator=self.generator)
        rewards = self.world.rewards(self.rule, rows, tokens)
        advantages = group_advantages(rewards.flatten(), self.size.group).view_as(rewards)
        return Batch(rows, tokens, shifted.gather(1, tokens) - likelihood.sum(1, keepdim=True).log(), advantages)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits [C, V] minus their maximum, in place, and the exponentials of that. What is below e⁻⁸⁰ is
    computed as e⁻⁸⁰, because subnormal numbers are slow.
    """
    logits -= logits.amax(1, keepdim=True)
    return logits, logits.clamp(min=-80).exp_()


def gradient(world: Bandit, adapter: Tensor, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return the log-probs [C, G] of the batch's tokens, and the gradient of their mean loss in the adapter.

    It is written out, s (onehot - softmax) for each token as in the fused loss, because a context's logits then serve
    all tokens that were sampled after it.
    """
    shifted, likelihood = _softmax(world.exact.logits(batch.rows, world.features, adapter))
    total = likelihood.sum(1, keepdim=True)
    logp = shifted.gather(1, batch.tokens) - total.log()
    slopes = slope(objective, logp, batch.old_logprobs, batch.advantages) / logp.numel()
    dlogits = likelihood.mul_(-slopes.sum(1, keepdim=True) / total).scatter_add_(1, batch.tokens, slopes)
    return logp, world.features[batch.rows].T @ (dlogits @ world.exact.directions)


def slope(objective: Objective, logp: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """Return dℓ/dlogπ of each token, in the shape of the log-probs, by autograd through the objective's formula."""
    leaf = logp.detach().flatten().requires_grad_()
    losses = objective.token_loss(Tokens(leaf, old.flatten(), advantages.flatten()))
    return torch.autograd.grad(losses.sum(), leaf)[0].view_as(logp)


def weight(objective: Objective, logp: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """Return w in dℓ/dlogπ = -A r w of tokens with A ≠ 0: 1 if the loss leaves the policy gradient alone, 0 if it drops
    the token, negative if it pulls the token back.
    """
    return -slope(objective, logp, old, advantages) / (advantages * (logp - old).clamp(-20, 20).exp())


def pushed(logp: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return log π, log μ and A of the update's tokens with A ≠ 0, each [n]."""
    chosen = batch.advantages != 0
    return logp[chosen], batch.old_logprobs[chosen], batch.advantages[chosen]


def by_rarity(values: Tensor, old: Tensor, what: str) -> dict[str, float]:
    """Return the sums of values [n] over the tokens with μ < `RARE` and over the others."""
    rare = old < math.log(RARE)
    return {f"rare_{what}": values[rare].sum().item(), f"common_{what}": values[~rare].sum().item()}


def distortions(objective: Objective, logp: Tensor, old: Tensor, advantages: Tensor) -> dict[str, float]:
    """Return the sums of min(|w - 1|, 1) over the rare tokens and over the others."""
    w = weight(objective, logp, old, advantages)
    return by_rarity((w - 1).abs().clamp(max=1), old, "distortion")
