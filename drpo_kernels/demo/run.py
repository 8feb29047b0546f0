"""The demo from start to end: warm up, evaluate, reinforce, evaluate, compare with the eager loss, plot."""

import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from drpo_kernels.demo.compare import (
    TOLERANCE,
    Comparison,
    compare,
    comparison_table,
    large_head_batch,
    run_batch,
)
from drpo_kernels.demo.model import build_model
from drpo_kernels.demo.plots import plot_run, plot_weights
from drpo_kernels.demo.settings import OBJECTIVES, Settings
from drpo_kernels.demo.task import ALPHABET, split_problems
from drpo_kernels.demo.train import History, train

LATE = 20  # the metrics of `sparse_grad` are averaged over this many steps at the end


def run(settings: Settings, device_name: str | None, out: Path) -> int:
    """Run the demo, print what it finds and write the plots into `out` -> exit status."""
    start = time.perf_counter()
    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    objective = OBJECTIVES[settings.objective]
    generator = torch.Generator(device).manual_seed(settings.seed)
    training, held_out = split_problems(settings.seed, settings.held_out)
    model = build_model(settings, device)
    console = Console()
    console.print(
        f"Two-digit additions, answers units first: {len(training)} problems to train on, {len(held_out)} held out.\n"
        f"Qwen3 architecture, {model.num_parameters():,} parameters, random weights, on {device}.\n"
        "It takes a minute on two CPU cores; make demo-llm, which trains a real language model, takes seven."
    )

    history, rollout, before, after = train(model, training, held_out, settings, generator)
    console.print(_reward_table(before, after, settings))
    if settings.sparse_grad:
        console.print(_sparsity(history, settings))

    batches = run_batch(model, rollout), large_head_batch(*settings.large_head, generator)
    comparisons = [compare(batch, objective, settings.repeats) for batch in batches]
    console.print(comparison_table(comparisons, objective))

    out.mkdir(parents=True, exist_ok=True)
    sparse = f", sparse_grad {settings.sparse_grad:g}" if settings.sparse_grad else ""
    title = f"{objective} on two-digit additions, seed {settings.seed}{sparse}"
    plot_run(history, (before, after), title, out / "run.png")
    plot_weights(out / "gradient_weight.png")
    console.print(f"Plots: {out / 'run.png'}, {out / 'gradient_weight.png'}")
    console.print(f"{time.perf_counter() - start:.0f} s in all.")
    return _verdict(after["sampled"] - before["sampled"], comparisons, settings)


def _reward_table(before: dict[str, float], after: dict[str, float], settings: Settings) -> Table:
    table = Table(title="Held-out problems: share of right answers")
    for column in ("", "before RL", "after RL", "gain"):
        table.add_column(column, justify="right" if column else "left")
    titles = {"sampled": f"sampled at temperature {settings.temperature:g}", "greedy": "greedy"}
    for key, title in titles.items():
        gain = after[key] - before[key]
        table.add_row(title, f"{before[key]:.1%}", f"{after[key]:.1%}", f"{gain:+.1%}")
    return table


def _sparsity(history: History, settings: Settings) -> str:
    late = history[-LATE:]
    share, entries = (sum(step[f"drpo/sparse_{name}"] for step in late) / len(late) for name in ("share", "entries"))
    found = f"{share:.0%} of the rows with a gradient were sparse, with {entries:.1f} of {len(ALPHABET)} entries each"
    return (
        f"sparse_grad = {settings.sparse_grad:g}: in the last {len(late)} steps "
        f"{found if share else 'no row had a sparse gradient'}."
    )


def _verdict(gain: float, comparisons: list[Comparison], settings: Settings) -> int:
    """0 if the reward rose and the losses agree; else 1, with the reasons on stderr."""
    failures = []
    if gain < settings.min_gain:
        failures.append(
            f"the reward on held-out problems changed by {gain:+.3f}; at least {settings.min_gain:+.3f} was expected"
        )
    failures += [
        f"fused and eager differ by more than {TOLERANCE:g} on {comparison.batch.title}"
        for comparison in comparisons
        if not comparison.agrees
    ]
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0
