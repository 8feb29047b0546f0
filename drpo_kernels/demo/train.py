"""The two phases of training, supervised warm-up and reinforcement learning, and the evaluations around them."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from drpo_kernels import PolicyLossOutput, linear_policy_loss, linear_token_logprobs
from drpo_kernels.demo.model import completion_hidden
from drpo_kernels.demo.rollout import Rollout, roll_out, sample
from drpo_kernels.demo.settings import OBJECTIVES, Settings
from drpo_kernels.demo.task import COMPLETION_LENGTH, PROMPT_LENGTH, Problem, encode, rewards, until_end

History = list[dict[str, float]]


class Training(NamedTuple):
    """The results of training besides the model; `before` and `after` are evaluations around reinforcement learning."""

    history: History
    rollout: Rollout
    before: dict[str, float]
    after: dict[str, float]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: so small a model gains nothing from a second one, and on a busy machine would wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(
    model: PreTrainedModel,
    training: list[Problem],
    held_out: list[Problem],
    settings: Settings,
    generator: torch.Generator,
) -> Training:
    with one_thread():
        warm_up(model, training, settings)
        before = evaluate(model, held_out, settings, generator)
        history, rollout = reinforce(model, training, settings, generator)
        return Training(history, rollout, before, evaluate(model, held_out, settings, generator))


def warm_up(model: PreTrainedModel, problems: Sequence[Problem], settings: Settings) -> None:
    """Supervised training until the model is sometimes right, so that groups hold both successes and failures."""
    rng = random.Random(settings.seed)
    optimizer, schedule = _optimizer(model, settings.warmup_lr)
    recent: list[float] = []
    progress = tqdm(range(settings.warmup_steps), desc="warm-up")
    for _ in progress:
        batch = rng.choices(problems, k=settings.warmup_batch)
        prompts = encode([problem.prompt for problem in batch], PROMPT_LENGTH)
        answers = encode([problem.answer for problem in batch], COMPLETION_LENGTH).to(model.device)
        tokens = torch.cat([prompts.to(model.device), answers], 1)
        mask = until_end(answers)
        hidden = completion_hidden(model, tokens, PROMPT_LENGTH)
        logprobs, _ = linear_token_logprobs(hidden, model.lm_head.weight, answers)
        loss = -logprobs[mask].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        schedule.step()

        # The probability of the whole right answer is the mean reward that sampling would get.
        recent = [*recent[-4:], (logprobs.detach() * mask).sum(1).exp().mean().item()]
        progress.set_postfix_str(f"loss {loss.item():.3f}, p(right answer) {recent[-1]:.2f}")
        if sum(recent) / 5 >= settings.warmup_target:
            progress.close()
            break


def _optimizer(model: PreTrainedModel, lr: float, steps: int | None = None):
    """AdamW with a learning rate that rises linearly, then stays constant, or falls linearly to 0 at `steps`.

    Adam's first steps have full size whatever the gradient is. Without the slow start they would undo what the model
    knows.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)

    def factor(step: int) -> float:
        return min((step + 1) / 20, 1.0 if steps is None else 1 - step / steps)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def update(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: Rollout, settings: Settings
) -> PolicyLossOutput:
    """One step of the optimizer on a minibatch. These are the lines that a trainer needs for the fused loss."""
    out = linear_policy_loss(
        completion_hidden(model, batch.tokens, PROMPT_LENGTH),
        model.lm_head.weight,
        batch.targets,
        batch.old_logprobs,
        batch.advantages,
        batch.mask,
        objective=OBJECTIVES[settings.objective],
        temperature=settings.temperature,
        sparse_grad=settings.sparse_grad,
    )
    optimizer.zero_grad(set_to_none=True)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
    optimizer.step()
    return out


def reinforce(
    model: PreTrainedModel, problems: Sequence[Problem], settings: Settings, generator: torch.Generator
) -> tuple[History, Rollout]:
    """GRPO-style training -> (statistics of every step, the last rollout).

    Each rollout serves several updates, so the policy π moves away from the behaviour policy μ that sampled it.
    """
    rng = random.Random(settings.seed + 1)
    optimizer, schedule = _optimizer(model, settings.lr, settings.steps)
    history: History = []
    progress = tqdm(range(settings.steps), desc=settings.objective.upper())
    for _ in progress:
        batch, statistics = roll_out(
            model, rng.sample(problems, settings.prompts), settings.group, settings.temperature, generator
        )
        metrics = []
        for _ in range(settings.epochs):
            order = torch.randperm(len(batch.tokens), generator=generator, device=generator.device)
            for rows in order.chunk(settings.minibatches):
                out = update(model, optimizer, batch.select(rows), settings)
                metrics.append(out.metrics)
        schedule.step()
        history.append(statistics | _summarise(metrics))
        progress.set_postfix_str(_describe(history[-1]))
    return history, batch


def _summarise(metrics: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The metrics of the updates on one rollout as numbers: extremes of extremes, and means of all other metrics."""
    summary = {}
    for name in metrics[0]:
        values = torch.stack([metric[name].float() for metric in metrics])
        reduce = values.max if name.endswith("_max") else values.min if name.endswith("_min") else values.mean
        summary[name] = reduce().item()
    return summary


def _describe(statistics: dict[str, float]) -> str:
    return (
        "reward {reward:.2f}, weight {drpo/weight_mean:.2f} [{drpo/weight_min:.2f}, {drpo/weight_max:.2f}], "
        "|π-μ| {drpo/prob_shift_mean:.3f}, active {drpo/active_share:.0%}"
    ).format_map(statistics)


def evaluate(
    model: PreTrainedModel, problems: Sequence[Problem], settings: Settings, generator: torch.Generator
) -> dict[str, float]:
    """The mean reward, "sampled" at the training temperature and "greedy" with the most probable tokens."""
    prompts = encode([problem.prompt for problem in problems], PROMPT_LENGTH).to(generator.device)
    repeated = prompts.repeat(settings.eval_samples, 1)
    drawn = sample(model, repeated, temperature=settings.temperature, generator=generator)
    best = sample(model, prompts, temperature=0.0)
    return {
        "sampled": rewards(list(problems) * settings.eval_samples, drawn.tokens).mean().item(),
        "greedy": rewards(problems, best.tokens).mean().item(),
    }
