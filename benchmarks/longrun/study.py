"""`python -m benchmarks.longrun`: 2,000 optimiser steps on one recorded stream of off-policy batches, ours beside fp64.

The stream is recorded once, by sampling from a fixed behaviour policy: the initial one, mixed with the right answers.
Sampling afresh in each run would diverge chaotically after the first token that differs. Then three copies of the same
weights train on that stream, ever further from the policy it was sampled from. All hold their weights in float64, so
that what drives them apart is the loss alone: `exact` takes them as they are, `ours` (linear_policy_loss) and `eager`
(naive autograd) take hidden states and head rounded to float32, and `eager` measures how far float32 alone drifts.
The optimiser is AdamW with an epsilon above the rounding of a gradient (with 1e-8, an entry whose gradient is nothing
but rounding moves by the whole learning rate), a clipped norm and a learning rate that decays to 0.

The bound, by which the exit status goes: curves within 1e-4 of the mean |loss| of each other (the contract on one loss)
and ours within 10 times eager's distance, in the curve and in the weights.

Writes one JSON line per run to bench_results/longrun.jsonl, curves sampled, and a plot beside it.
`python -m benchmarks.longrun.sparse` does the same for `sparse_grad`.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import cli
from benchmarks.harness import records as json_lines
from benchmarks.harness.memory import STATUS
from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.records import Record
from drpo_kernels import DRPO, PolicyLossOutput, linear_policy_loss

RESULTS = ROOT / "bench_results" / "longrun.jsonl"
OBJECTIVE = DRPO(delta=0.2)
LOSS_BOUND, EAGER_BOUND = 1e-4, 10.0
EDGE = 50  # steps whose times are averaged at either end of a run
KNOWN = 0.4  # how much of the behaviour policy is the right answer
CURVES = ("loss", "ratio_max", "sparse_share", "sparse_entries")  # a number per step, the latter two of `sparse_grad`


@dataclass(frozen=True)
class Size:
    """A stream of `steps` batches of `batch` sequences, and the model."""

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
    disturb   what becomes of the gradients of those two on their way back
    rate      factor on the learning rate
    """

    dtype: torch.dtype = torch.float32
    options: dict[str, object] = field(default_factory=dict)
    disturb: Callable[[Tensor], Tensor] | None = None
    rate: float = 1.0


RUNS = {
    "exact": Run(torch.float64, {"entropy_coef": 1e-3, "backend": "reference"}),
    "eager": Run(torch.float32, {"entropy_coef": 1e-3, "backend": "reference"}),
    "ours": Run(torch.float32, {"entropy_coef": 1e-3}),
}


class Batch(NamedTuple):
    """tokens [B, L + 1]; old_logprobs, advantages and mask [B, L]."""

    tokens: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor


class Policy(nn.Module):
    """Predicts a token from the two before it: [B, L] -> hidden states [B, L, H]; the head is `head.weight`."""

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


def fresh(size: Size) -> Policy:
    torch.manual_seed(0)
    return Policy(size).double()


def loss_of(policy: Policy, batch: Batch, run: Run) -> PolicyLossOutput:
    hidden, weight = policy(batch.tokens[:, :-1]).to(run.dtype), policy.head.weight.to(run.dtype)
    if run.disturb is not None:
        hidden.register_hook(run.disturb)
        weight.register_hook(run.disturb)
    return linear_policy_loss(
        hidden, weight, batch.tokens[:, 1:], batch.old_logprobs, batch.advantages, batch.mask,
        objective=OBJECTIVE, **run.options,
    )  # fmt: skip


@torch.no_grad()
def sample(policy: Policy, size: Size, generator: torch.Generator) -> Batch:
    """Reward: whether a token continues its sequence by a fixed permutation of the vocabulary."""
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


def right_answer(tokens: Tensor, size: Size) -> Tensor:
    return (5 * tokens + 3) % size.vocab


def record_stream(policy: Policy, size: Size) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [sample(policy, size, generator) for _ in range(size.steps)]


def _step(policy: Policy, optimizer, schedule, batch: Batch, run: Run) -> PolicyLossOutput:
    out = loss_of(policy, batch, run)
    optimizer.zero_grad()
    out.loss.backward()
    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    return out


def train(
    initial: Policy,
    stream: Sequence[Batch],
    size: Size,
    run: Run,
    before: Callable[[int, Policy, Batch], None] | None = None,
) -> tuple[Record, Policy]:
    """One run over the stream: its curves, memory and step times, and the trained policy. `before` sees every step."""
    policy = copy.deepcopy(initial)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.rate * size.learning_rate, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=size.steps)
    curves: dict[str, list[float]] = {"loss": []}
    seconds, tensors, resident = [], [], []
    for step, batch in enumerate(stream):
        if before is not None:
            before(step, policy, batch)
        start = time.perf_counter()
        out = _step(policy, optimizer, schedule, batch, run)
        curves["loss"].append(out.loss.item())
        seconds.append(time.perf_counter() - start)
        for name in CURVES:
            if f"drpo/{name}" in out.metrics:
                curves.setdefault(name, []).append(out.metrics[f"drpo/{name}"].item())
        if step in (20, len(stream) // 2, len(stream) - 1):
            del out
            tensors.append(live_tensors())
            resident.append(resident_bytes())
    record = curves | {"live_tensors": tensors, "resident_bytes": resident}
    edge = min(EDGE, len(stream) // 2 - 10)
    early, late = seconds[20 : 20 + edge], seconds[-edge:]
    record["step_ms"] = [round(1e3 * statistics.median(part), 3) for part in (early, late)]
    return record, policy


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def resident_bytes() -> int | None:
    """None where Linux's counters are missing."""
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def distances(records: dict[str, Record], policies: dict[str, Policy], initial: Policy) -> None:
    """Add to each record how far its curve and its weights are from the exact run's."""
    exact = torch.tensor(records["exact"]["loss"], dtype=torch.float64)
    weights = weights_of(policies["exact"])
    travelled = weights - weights_of(initial)
    for name, record in records.items():
        gap = (torch.tensor(record["loss"], dtype=torch.float64) - exact).abs()
        record["loss_gap_max"] = gap.max().item()
        record["loss_scale"] = exact.abs().mean().item()
        # over the way the weights went
        record["weight_gap"] = ((weights_of(policies[name]) - weights).norm() / travelled.norm()).item()


def weights_of(policy: Policy) -> Tensor:
    return nn.utils.parameters_to_vector(policy.parameters()).detach()


def measure(size: Size) -> dict[str, Record]:
    initial = fresh(size)
    stream = record_stream(initial, size)
    records, policies = {}, {}
    for name, run in RUNS.items():
        record, policies[name] = train(initial, stream, size, run)
        records[name] = {"run": name, **record}
    distances(records, policies, initial)
    return records


def plot(records: dict[str, Record], path: Path) -> None:
    from benchmarks.harness.pictures import plt, save

    exact = torch.tensor(records["exact"]["loss"])
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True)
    for name, record in records.items():
        curve = torch.tensor(record["loss"])
        top.plot(curve.unfold(0, 25, 25).mean(1).repeat_interleave(25), label=name, linewidth=1)
        if name != "exact":
            bottom.semilogy((curve - exact).abs() + 1e-12, label=f"|{name} - exact|", linewidth=0.6)
    top.set(ylabel="loss, mean of 25 steps", title="One recorded stream, three copies of the weights")
    bottom.set(xlabel="optimiser step", ylabel="distance of the loss")
    for axis in (top, bottom):
        axis.legend()
    figure.tight_layout()
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("benchmarks.longrun", __doc__)
    parser.add_argument("--steps", type=int, default=Size.steps)
    cli.add_out(parser, RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    size = Size(steps=options.steps)
    source, out = provenance(cli.command(parser, options)), options.out or RESULTS
    records = measure(size)
    write(records, out, {"size": vars(size), **source})
    plot(records, out.with_suffix(".png"))
    return int(not stays_together(records))


def write(records: dict[str, Record], path: Path, further: Record) -> None:
    """One line per run, its curves sampled, with the `further` fields; the rest of each is printed too."""
    sampled = []
    for name, record in records.items():
        curves = {key: record[key] for key in CURVES if key in record}
        every = max(len(record["loss"]) // 200, 1)
        thin = {key: curve[::every] for key, curve in curves.items()}
        sampled.append({**record, **thin, "every": every, **further})
        print(name, json_lines.line({key: value for key, value in record.items() if key not in curves}))
    json_lines.write(path, sampled)


def stays_together(records: dict[str, Record]) -> bool:
    ours, eager = records["ours"], records["eager"]
    near = all(ours[gap] <= EAGER_BOUND * eager[gap] + 1e-6 for gap in ("loss_gap_max", "weight_gap"))
    return near and ours["loss_gap_max"] <= LOSS_BOUND * ours["loss_scale"]
