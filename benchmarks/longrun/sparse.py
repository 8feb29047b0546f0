"""`python -m benchmarks.longrun.sparse` takes 2,000 optimiser steps on one stream, with and without `sparse_grad`.

The vocabulary is larger than in `benchmarks.longrun` and the policy is pretrained, so that most rows are peaked enough
to be sparse. In its language token t is followed by a + j with probability 2^-(j+1), where a is the right answer of t.
Copies of that policy train on the stream (see `stream`):

    exact     sparse_grad = 0
    sparse    sparse_grad = τ
    slower    sparse_grad = 0, and a learning rate of (1 - τ) times the others'
    bf16      sparse_grad = 0, hidden states and head in bf16
    noise     sparse_grad = 0, every entry of dX and dW times 1 + 0.0018 ε, ε normal: what bf16 would round, at random

The exit status tells whether the bound holds: the loss curve of `sparse`, averaged over 100 steps, is no further from
the exact one than that of `slower` is. To first order a step lowers the loss by the product of gradient and step; a
learning rate that is lower by τ changes that by τ of itself, and a relative gradient error of δ by δ of itself at most.
δ is at most τ in a row's dlogits, and smaller in the gradients where what is left out points many ways: it is measured
every 50 steps. It is not noise: a token that is left out is not pushed down in the next step either. So `sparse` is not
held to the distance of `noise`, which averages out over the steps.

The check says nothing unless rows are sparse. If fewer than half are, over the run, the exit status is 1 too.

The program writes one JSON line per run, with sampled curves, to bench_results/longrun_sparse.jsonl, and a plot beside
it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import cli
from benchmarks.harness.blocks import Block, origin
from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.records import Record
from benchmarks.harness.tables import table
from benchmarks.longrun.stream import (
    Policy,
    Run,
    Size,
    compare,
    distance,
    record_stream,
    right_answer,
    smoothed,
    write,
)

RESULTS = ROOT / "bench_results" / "longrun_sparse.jsonl"
SIZE = Size(vocab=4096, hidden=64, learning_rate=2e-4)  # slow enough to learn until the end
PRETRAINING = 800  # steps
LEAST_SHARE = 0.5
BF16_ROUNDING = 0.0018  # root mean square of the relative error of a number rounded to bf16

LABELS = {
    "sparse": "`sparse_grad={tau:g}`",
    "slower": "exact, learning rate lower by {tau:.0%}: **the bound**",
    "bf16": "exact, hidden states and head in bf16",
    "noise": "exact, dX and dW with random noise of 0.18 %",
}


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


def pretrained(size: Size, steps: int = PRETRAINING) -> Policy:
    """Return a policy in float32 that has learnt the language, except for its rare tokens."""
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
    """Draw sentences [count, L + 1] of the language."""
    tokens = torch.randint(size.vocab, (count, 1), generator=generator)
    for _ in range(size.length):
        detour = torch.empty(count, 1).geometric_(0.5, generator=generator).long().clamp(max=8) - 1
        tokens = torch.cat([tokens, (right_answer(tokens[:, -1:], size) + detour) % size.vocab], dim=1)
    return tokens


def measure(size: Size, tau: float) -> dict[str, Record]:
    policy = pretrained(size)
    return compare(copy.deepcopy(policy).double(), record_stream(policy, size), size, runs(tau))


def stays_together(records: Mapping[str, Record]) -> bool:
    sparse, slower = records["sparse"], records["slower"]
    return np.mean(sparse["sparse_share"]) >= LEAST_SHARE and sparse["smoothed_gap_max"] <= slower["smoothed_gap_max"]


def plot(records: Mapping[str, Record], tau: float, path: Path) -> None:
    from benchmarks.harness.pictures import BLACK, BLUE, GREEN, GREY, ORANGE, frame, plt, save

    styles = {
        "sparse": (f"sparse_grad = {tau:g}", BLUE),
        "slower": (f"learning rate lower by {tau:.0%}: the bound", ORANGE),
        "bf16": ("bf16 hidden states and head", GREEN),
        "noise": ("gradients with noise of bf16's size", GREY),
    }
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(8, 8.5), sharex=True, height_ratios=(3, 3, 2), layout="constrained"
    )
    exact = smoothed(records["exact"]["loss"])
    window = len(records["exact"]["loss"]) - len(exact) + 1
    steps = np.arange(len(exact)) + window
    top.plot(steps, exact, color=BLACK, linewidth=3, alpha=0.35, label="sparse_grad = 0")
    top.plot(steps, smoothed(records["sparse"]["loss"]), color=BLUE, linewidth=1.2, label=styles["sparse"][0])
    for name, (title, colour) in styles.items():
        gap = distance(smoothed(records[name]["loss"]), exact)
        middle.semilogy(steps, gap, color=colour, linewidth=1.2, label=title)
    middle.axhline(records["slower"]["smoothed_gap_max"], color=ORANGE, linestyle=":", linewidth=1)
    bottom.plot(steps, smoothed(records["sparse"]["sparse_share"]), color=BLUE, linewidth=1.2)
    top.set(ylabel=f"loss, mean of {window} steps", title="One recorded stream, sparse gradients on and off")
    middle.set(ylabel="distance from sparse_grad = 0", ylim=(1e-8, 1))
    bottom.set(xlabel="optimiser step", ylabel="share of sparse rows", ylim=(0, 1.02))
    for axes in (top, middle, bottom):
        frame(axes)
    top.legend(frameon=False)
    middle.legend(frameon=False, ncols=2, loc="upper right")
    save(figure, path)


def render(records: Sequence[Record]) -> str:
    """Return how many rows were sparse, and a table with a row per run."""
    by_name = {record["run"]: record for record in records}
    sparse = by_name["sparse"]
    shares = sparse["sparse_share"]
    summary = (
        "{steps} steps, V={vocab} H={hidden}, ".format(**sparse["size"])
        + f"a mean |loss| of {sparse['loss_scale']:.2f}; {np.mean(shares):.0%} of the rows were sparse, "
        f"{shares[0]:.0%} at the beginning and {shares[-1]:.0%} at the end."
    )
    rows = []
    for name, label in LABELS.items():
        record = by_name[name]
        error = f"{record['gradient_error_mean']:.2%} ({record['gradient_error_max']:.2%})"
        gaps = f"{record['smoothed_gap_max']:.1e}", f"{record['weight_gap']:.2%}"
        rows.append((label.format(tau=record["sparse_grad"]), error, *gaps))
    header = ("run", "gradient error, mean (max)", "furthest from the exact loss", "weights: distance over way")
    return "\n".join([summary, "", table(header, rows), "", origin(records[:1])])


BLOCKS = (Block("sparse-longrun", "longrun_sparse", "longrun_sparse.jsonl", "docs/sparse.md", render),)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("benchmarks.longrun.sparse", __doc__)
    parser.add_argument("--steps", type=int, default=SIZE.steps)
    parser.add_argument("--sparse-grad", type=float, default=0.01)
    cli.add_out(parser, RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    size, tau, out = replace(SIZE, steps=options.steps), options.sparse_grad, options.out or RESULTS
    source = provenance(cli.command(parser, options))
    records = measure(size, tau)
    setting = {"sparse_grad": tau, "pretraining": PRETRAINING, "size": vars(size)}
    write(records, out, {"benchmark": "longrun_sparse", **setting, **source})
    plot(records, tau, out.with_suffix(".png"))
    return int(not stays_together(records))


if __name__ == "__main__":
    sys.exit(main())
