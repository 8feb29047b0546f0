"""`python -m benchmarks.longrun.sparse`: 2,000 optimiser steps on one recorded stream, `sparse_grad` on and off.

The model, the optimiser and the way a stream is recorded are those of `benchmarks.longrun`. The vocabulary is larger
and the policy is pretrained, so that most rows are peaked enough to be sparse: on a language in which token t is
followed by a + j with probability 2^-(j+1), a the right answer of t. Copies of that policy train on the stream:

    exact     sparse_grad = 0
    sparse    sparse_grad = τ
    slower    sparse_grad = 0, and a learning rate of (1 - τ) times the others'
    bf16      sparse_grad = 0, hidden states and head in bf16
    noise     sparse_grad = 0, every entry of dX and dW times 1 + 0.0018 ε, ε normal: what bf16 would round, at random

The bound, by which the exit status goes: the loss curve of `sparse`, averaged over 100 steps, is no further from the
exact one than `slower` is. To first order a step lowers the loss by the product of gradient and step; a learning rate
that is lower by τ changes that by τ of itself, and a relative gradient error of δ by δ of itself at most. δ is at most
τ in a row's dlogits, and smaller in the gradients where what is left out points many ways: it is measured every 50
steps. It is no noise: a token that is left out is not pushed down in the next step either. So `sparse` is not held to
the distance of `noise`, which averages out over the steps.

The check says nothing unless rows are sparse: at least half of them, over the run, or the exit status is 1 too.

Writes one JSON line per run to bench_results/longrun_sparse.jsonl, curves sampled, and a plot beside it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import cli
from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.records import Record
from benchmarks.longrun.study import (
    Batch,
    Policy,
    Run,
    Size,
    distances,
    loss_of,
    record_stream,
    right_answer,
    train,
    write,
)

RESULTS = ROOT / "bench_results" / "longrun_sparse.jsonl"
SIZE = Size(vocab=4096, hidden=64, learning_rate=2e-4)  # slow enough to learn until the end
PRETRAINING = 800  # steps
LEAST_SHARE = 0.5
WINDOW, PROBE = 100, 50
BF16_ROUNDING = 0.0018  # its root mean square, relative


def runs(tau: float) -> dict[str, Run]:
    generator = torch.Generator().manual_seed(3)

    def disturb(gradient: Tensor) -> Tensor:
        return gradient * (1 + BF16_ROUNDING * torch.randn(gradient.shape, generator=generator))

    return {
        "exact": Run(),
        "sparse": Run(options={"sparse_grad": tau}),
        "slower": Run(rate=1 - tau),
        "bf16": Run(torch.bfloat16),
        "noise": Run(disturb=disturb),
    }


def pretrained(size: Size, steps: int) -> Policy:
    """A policy in float32 that knows the language but for its tail."""
    torch.manual_seed(0)
    policy, generator = Policy(size), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        tokens = sentences(4 * size.batch, size, generator)
        logits = policy.head(policy(tokens[:, :-1]))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy


def sentences(count: int, size: Size, generator: torch.Generator) -> Tensor:
    """[count, L + 1] of the language."""
    tokens = torch.randint(size.vocab, (count, 1), generator=generator)
    for _ in range(size.length):
        detour = torch.empty(count, 1).geometric_(0.5, generator=generator).long().clamp(max=8) - 1
        tokens = torch.cat([tokens, (right_answer(tokens[:, -1:], size) + detour) % size.vocab], dim=1)
    return tokens


def measure(size: Size, tau: float, pretraining: int = PRETRAINING) -> dict[str, Record]:
    policy = pretrained(size, pretraining)
    stream = record_stream(policy, size)
    initial = copy.deepcopy(policy).double()
    records, policies = {}, {}
    for name, run in runs(tau).items():
        errors: list[float] = []
        record, policies[name] = train(initial, stream, size, run, _probe(run, errors))
        probed = {"gradient_error_mean": sum(errors) / len(errors), "gradient_error_max": max(errors)}
        records[name] = {"run": name, **record, **probed}
    distances(records, policies, initial)
    exact = smoothed(records["exact"]["loss"])
    for record in records.values():
        record["smoothed_gap_max"] = (smoothed(record["loss"]) - exact).abs().max().item()
    return records


def _probe(run: Run, errors: list[float]) -> Callable[[int, Policy, Batch], None]:
    """Every so many steps, how far the run's gradient is from the exact one, over that one's norm."""

    def before(step: int, policy: Policy, batch: Batch) -> None:
        if step % PROBE == 0:
            exact, own = (_gradient(policy, batch, how) for how in (Run(), run))
            errors.append(((own - exact).norm() / exact.norm()).item())

    return before


def _gradient(policy: Policy, batch: Batch, run: Run) -> Tensor:
    gradients = torch.autograd.grad(loss_of(policy, batch, run).loss, list(policy.parameters()))
    return nn.utils.parameters_to_vector(gradients)


def smoothed(curve: Sequence[float]) -> Tensor:
    """The running mean over 100 steps, or a quarter of a shorter run."""
    return torch.tensor(curve, dtype=torch.float64).unfold(0, min(WINDOW, len(curve) // 4), 1).mean(1)


def share_of(record: Record) -> float:
    return sum(record["sparse_share"]) / len(record["sparse_share"])


def stays_together(records: dict[str, Record]) -> bool:
    sparse, slower = records["sparse"], records["slower"]
    return share_of(sparse) >= LEAST_SHARE and sparse["smoothed_gap_max"] <= slower["smoothed_gap_max"]


def plot(records: dict[str, Record], tau: float, path: Path) -> None:
    from benchmarks.harness.pictures import BLACK, BLUE, GREEN, GREY, ORANGE, frame, plt, save

    colours = {"sparse": BLUE, "slower": ORANGE, "bf16": GREEN, "noise": GREY}
    titles = {
        "sparse": f"sparse_grad = {tau:g}",
        "slower": f"learning rate lower by {tau:.0%}: the bound",
        "bf16": "bf16 hidden states and head",
        "noise": "gradients with noise of bf16's size",
    }
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(8, 8.5), sharex=True, height_ratios=(3, 3, 2), layout="constrained"
    )
    exact = smoothed(records["exact"]["loss"])
    window = len(records["exact"]["loss"]) - len(exact) + 1
    steps = torch.arange(len(exact)) + window
    top.plot(steps, exact, color=BLACK, linewidth=3, alpha=0.35, label="sparse_grad = 0")
    top.plot(steps, smoothed(records["sparse"]["loss"]), color=colours["sparse"], linewidth=1.2, label=titles["sparse"])
    for name, title in titles.items():
        gap = (smoothed(records[name]["loss"]) - exact).abs()
        middle.semilogy(steps, gap, color=colours[name], linewidth=1.2, label=title)
    middle.axhline(records["slower"]["smoothed_gap_max"], color=colours["slower"], linestyle=":", linewidth=1)
    bottom.plot(steps, smoothed(records["sparse"]["sparse_share"]), color=colours["sparse"], linewidth=1.2)
    top.set(ylabel=f"loss, mean of {window} steps", title="One recorded stream, sparse gradients on and off")
    middle.set(ylabel="distance from sparse_grad = 0", ylim=(1e-8, 1))
    bottom.set(xlabel="optimiser step", ylabel="share of sparse rows", ylim=(0, 1.02))
    for axes in (top, middle, bottom):
        frame(axes)
    top.legend(frameon=False)
    middle.legend(frameon=False, ncols=2, loc="upper right")
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("benchmarks.longrun.sparse", __doc__)
    parser.add_argument("--steps", type=int, default=SIZE.steps)
    parser.add_argument("--sparse-grad", type=float, default=0.01)
    cli.add_out(parser, RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    size, tau = replace(SIZE, steps=options.steps), options.sparse_grad
    source, out = provenance(cli.command(parser, options)), options.out or RESULTS
    records = measure(size, tau)
    setting = {"sparse_grad": tau, "pretraining": PRETRAINING, "size": vars(size)}
    write(records, out, {"benchmark": "longrun_sparse", **setting, **source})
    plot(records, tau, out.with_suffix(".png"))
    print(f"share of sparse rows {share_of(records['sparse']):.1%}")
    return int(not stays_together(records))


if __name__ == "__main__":
    sys.exit(main())
