"""A recorded stream of off-policy batches, and copies of one policy that are trained on it in different ways.

A stream is recorded once, by sampling from a fixed behaviour policy: the initial one, mixed with the right answers. If
every run sampled afresh, runs would diverge chaotically after the first token that differs. All copies hold their
weights in float64, so that nothing but the loss drives them apart. They leave the policy that was sampled from behind.

The optimiser is AdamW with a clipped norm, a learning rate that decays to 0, and an epsilon above the rounding of a
gradient: with 1e-8, an entry whose gradient is nothing but rounding moves by the whole learning rate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import records as json_lines
from benchmarks.harness.records import Record
from drpo_kernels import DRPO, PolicyLossOutput, linear_policy_loss

OBJECTIVE = DRPO(delta=0.2)
KNOWN = 0.4  # the share of the right answer in the behaviour policy
PROBE = 50  # steps between two comparisons of gradients
WINDOW = 100  # steps over which a loss curve is averaged
CURVES = ("loss", "ratio_max", "sparse_share")  # what a run records of every step


@dataclass(frozen=True)
class Size:
    """The size of a stream, which has `steps` batches of `batch` sequences, and of the model."""

    steps: int = 2000
    batch: int = 16
    length: int = 16
    vocab: int = 128
    hidden: int = 32
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Run:
    """How one copy of the weights is trained.

    dtype     of the hidden states and the head that the loss takes
    options   further keywords of the loss
    disturb   applied to the gradients of hidden states and head on their way back
    rate      factor on the learning rate
    """

    dtype: torch.dtype = torch.float32
    options: dict[str, object] = field(default_factory=dict)
    disturb: Callable[[Tensor], Tensor] | None = None
    rate: float = 1.0


class Batch(NamedTuple):
    """tokens [B, L + 1]; old_logprobs, advantages and mask [B, L]."""

    tokens: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor


class Policy(nn.Module):
    """This policy predicts a token from the two before it: [B, L] -> hidden states [B, L, H]; the head is
    `head.weight`.
    """

    def __init__(self, size: Size):
        super().__init__()
        self.embedding = nn.Embedding(size.vocab, size.hidden)
        self.inner = nn.Linear(2 * size.hidden, 4 * size.hidden)
        self.outer = nn.Linear(4 * size.hidden, size.hidden)
        self.head = nn.Linear(size.hidden, size.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        now = self.embedding(tokens)
        before = torch.cat([torch.zeros_like(now[:, :1]), now[:, :-1]], dim=1)
        return self.outer(torch.nn.functional.gelu(self.inner(torch.cat([now, before], dim=-1))))


def right_answer(tokens: Tensor, size: Size) -> Tensor:
    """Return the right token after each one, by a fixed permutation of the vocabulary."""
    return (5 * tokens + 3) % size.vocab


@torch.no_grad()
def sample(policy: Policy, size: Size, generator: torch.Generator) -> Batch:
    """Return a batch of sequences from the behaviour policy; a token is rewarded if it is the right answer."""
    tokens = torch.randint(size.vocab, (size.batch, 1), generator=generator)
    old = torch.zeros(size.batch, size.length)
    for i in range(size.length):
        answer = nn.functional.one_hot(right_answer(tokens[:, -1], size), size.vocab)
        probs = (1 - KNOWN) * policy.head(policy(tokens[:, -2:])[:, -1]).softmax(-1) + KNOWN * answer
        tokens = torch.cat([tokens, torch.multinomial(probs, 1, generator=generator)], dim=1)
        old[:, i] = probs.gather(1, tokens[:, -1:])[:, 0].log()
    right = (tokens[:, 1:] == right_answer(tokens[:, :-1], size)).float()
    advantages = (right - right.mean()) / (right.std() + 1e-3)
    lengths = torch.randint(size.length // 2, size.length + 1, (size.batch, 1), generator=generator)
    return Batch(tokens, old, advantages, torch.arange(size.length) < lengths)


def record_stream(policy: Policy, size: Size) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [sample(policy, size, generator) for _ in range(size.steps)]


def loss_of(policy: Policy, batch: Batch, run: Run) -> PolicyLossOutput:
    hidden, weight = policy(batch.tokens[:, :-1]).to(run.dtype), policy.head.weight.to(run.dtype)
    if run.disturb is not None:
        hidden.register_hook(run.disturb)
        weight.register_hook(run.disturb)
    return linear_policy_loss(
        hidden, weight, batch.tokens[:, 1:], batch.old_logprobs, batch.advantages, batch.mask,
        objective=OBJECTIVE, **run.options,
    )  # fmt: skip


def train(initial: Policy, stream: Iterable[Batch], size: Size, run: Run, exact: Run) -> tuple[Record, Policy]:
    """Train a copy of `initial`, and return (its curves and its gradient errors against those of `exact`, the copy)."""
    policy = copy.deepcopy(initial)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.rate * size.learning_rate, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=size.steps)
    curves: dict[str, list[float]] = {}
    errors = []
    for step, batch in enumerate(stream):
        if step % PROBE == 0:
            errors.append(gradient_error(policy, batch, run, exact))
        out = loss_of(policy, batch, run)
        optimizer.zero_grad()
        out.loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen = {"drpo/loss": out.loss, **out.metrics}
        for name in CURVES:
            if f"drpo/{name}" in seen:
                curves.setdefault(name, []).append(seen[f"drpo/{name}"].item())
    return curves | {"gradient_error_mean": float(np.mean(errors)), "gradient_error_max": max(errors)}, policy


def gradient_error(policy: Policy, batch: Batch, run: Run, exact: Run) -> float:
    """Return how far the gradient of all weights is from that of `exact`, relative to its norm."""
    want, found = (
        nn.utils.parameters_to_vector(torch.autograd.grad(loss_of(policy, batch, how).loss, list(policy.parameters())))
        for how in (exact, run)
    )
    return ((found - want).norm() / want.norm()).item()


def compare(initial: Policy, stream: Sequence[Batch], size: Size, runs: Mapping[str, Run]) -> dict[str, Record]:
    """Return a record per run: its curves, and how far its loss and its weights are from those of the run "exact"."""
    trained = {name: train(initial, stream, size, run, runs["exact"]) for name, run in runs.items()}
    vectors = {name: weights_of(policy) for name, (_, policy) in trained.items()}
    exact, travelled = trained["exact"][0]["loss"], (vectors["exact"] - weights_of(initial)).norm()
    records = {}
    for name, (record, _) in trained.items():
        records[name] = {
            "run": name,
            **record,
            "loss_gap_max": distance(record["loss"], exact).max(),
            "smoothed_gap_max": distance(smoothed(record["loss"]), smoothed(exact)).max(),
            "loss_scale": float(np.abs(exact).mean()),
            # The gap is relative to how far the weights have moved.
            "weight_gap": ((vectors[name] - vectors["exact"]).norm() / travelled).item(),
        }
    return records


def weights_of(policy: Policy) -> Tensor:
    return nn.utils.parameters_to_vector(policy.parameters()).detach()


def distance(curve: Sequence[float], other: Sequence[float]) -> np.ndarray:
    return np.abs(np.subtract(curve, other))


def smoothed(curve: Sequence[float]) -> np.ndarray:
    """Return the running mean over WINDOW steps, or over a quarter of a shorter run."""
    window = min(WINDOW, len(curve) // 4)
    return np.convolve(curve, np.full(window, 1 / window), "valid")


def write(records: Mapping[str, Record], path: Path, source: Record) -> None:
    """Write a line per run with the fields of `source` and about 200 values of every curve.
    Print all but the curves.
    """
    sampled = []
    for record in records.values():
        every = max(len(record["loss"]) // 200, 1)
        thin = {name: record[name][::every] for name in CURVES if name in record}
        sampled.append({**record, **thin, "every": every, **source})
        print(json_lines.line({key: value for key, value in record.items() if key not in CURVES}))
    json_lines.write(path, sampled)
