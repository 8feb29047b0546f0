"""One run: GRPO-style reinforcement learning of a warmed-up policy with one method in one setting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from transformers import PreTrainedModel

from benchmarks.stability.engine import rollout_engine
from benchmarks.stability.measures import token_measures
from benchmarks.stability.policy import adamw, warmed_policy
from benchmarks.stability.settings import METHODS, SETTINGS, Setting, Size
from benchmarks.stability.task import COMPLETION_LENGTH, END_ID, PROMPT_LENGTH, Problems, draw_problems, rewards
from drpo_kernels import Objective, linear_policy_loss
from drpo_kernels.demo.model import completion_hidden
from drpo_kernels.demo.rollout import Rollout, group_advantages, sample

HELD_OUT_SEED = 1 << 20


def run(method: str, setting: str, seed: int, lr: float, size: Size, cache: Path) -> dict[str, object]:
    """Return the "curve" and the "evaluations" of a run: for each measure, one value per point.
    Evaluations begin at 0.
    """
    policy = warmed_policy(size, seed, cache)
    generator = torch.Generator().manual_seed(seed)
    held_out = draw_problems(size.vocabulary, size.evaluation, torch.Generator().manual_seed(HELD_OUT_SEED + seed))
    optimizer, schedule = adamw(policy, lr)
    trained = _Trained(policy, optimizer, schedule, METHODS[method], SETTINGS[setting], size, generator)
    curve, evaluations = [], [_evaluate(policy, size, held_out, seed)]
    for _ in range(size.minibatches // size.point):
        curve.append(pd.DataFrame(trained.point()).mean())  # the mean leaves out NaN, which is the share of no token
        evaluations.append(_evaluate(policy, size, held_out, seed))
    return {"curve": pd.DataFrame(curve).to_dict("list"), "evaluations": pd.DataFrame(evaluations).to_dict("list")}


class _Trained:
    """A policy under training, with all that its updates need."""

    def __init__(self, policy, optimizer, schedule, objective: Objective, setting: Setting, size: Size, generator):
        self.policy, self.optimizer, self.schedule = policy, optimizer, schedule
        self.objective, self.setting, self.size, self.generator = objective, setting, size, generator

    def point(self) -> Iterator[dict[str, float]]:
        """Sample `size.point` minibatches and train on them. Yield the measures of every update."""
        for _ in range(self.size.point // self.setting.minibatches):
            rollout, reward = self._roll_out()
            for _ in range(self.setting.epochs):
                order = torch.randperm(len(rollout.tokens), generator=self.generator)
                for rows in order.chunk(self.setting.minibatches):
                    yield self._update(rollout.select(rows)) | {"reward": reward}

    def _roll_out(self) -> tuple[Rollout, float]:
        size = self.size
        problems = draw_problems(size.vocabulary, self.setting.minibatches * size.prompts, self.generator)
        problems = problems.repeat(size.group)
        engine = rollout_engine(self.policy, self.setting.precision)
        drawn = sample(engine, problems.prompts, COMPLETION_LENGTH, 1.0, self.generator, END_ID)
        reward = rewards(size.vocabulary, problems, drawn.tokens)
        tokens = torch.cat([problems.prompts, drawn.tokens], 1)
        advantages = group_advantages(reward, size.group)
        return Rollout(tokens, drawn.tokens, drawn.logprobs, drawn.mask, advantages), reward.mean().item()

    def _update(self, batch: Rollout) -> dict[str, float]:
        out = linear_policy_loss(
            completion_hidden(self.policy, batch.tokens, PROMPT_LENGTH),
            self.policy.lm_head.weight,
            batch.targets,
            batch.old_logprobs,
            batch.advantages,
            batch.mask,
            objective=self.objective,
            compact="mask",
        )
        self.optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.size.grad_clip)
        self.optimizer.step()
        self.schedule.step()
        return token_measures(self.objective, out, batch) | {"gradient_norm": norm.item()}


@torch.no_grad()
def _evaluate(policy: PreTrainedModel, size: Size, problems: Problems, seed: int) -> dict[str, float]:
    """Return the held-out accuracy of the policy itself: sampled at temperature 1, and with the
    most probable tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def accuracy(temperature: float) -> float:
        drawn = sample(policy, problems.prompts, COMPLETION_LENGTH, temperature, generator, END_ID)
        return rewards(size.vocabulary, problems, drawn.tokens).mean().item()

    return {"sampled": accuracy(1.0), "greedy": accuracy(0.0)}
