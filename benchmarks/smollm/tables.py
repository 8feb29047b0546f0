"""What the run of `make demo-llm` says, in Markdown: what `benchmarks.report` writes from its record."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.blocks import NOT_YET, Block, origin
from benchmarks.harness.records import Record
from benchmarks.harness.tables import table


def render_demo(records: Sequence[Record]) -> str:
    """Say what the run learned, and compare the losses on one of its batches."""
    first, last, results = records[0], records[-2], records[-1]
    settings, before, after = first["settings"], results["before"], results["after"]
    minutes = sum(results["seconds"].values()) / 60
    words = (
        f"In {minutes:.1f} minutes, {settings['steps']} rollouts of {settings['prompts']} × {settings['group']} "
        f"completions, the greedy answers to held-out sums that are exactly right went from {before['exact']:.0%} to "
        f"{after['exact']:.0%}, and those that begin right, whatever follows, from {before['lenient']:.0%} to "
        f"{after['lenient']:.0%}. Its last batch ({last['drpo/tokens']:.0f} tokens, {last['drpo/weighted']:.0f} of "
        "them with an advantage), forward and backward of the loss alone:"
    )
    rows = [
        ("trained" if found["trained_head"] else "frozen", _name(found["name"]), f"{1e3 * found['seconds']:.0f}",
         f"{found['peak_bytes'] / 2**20:.0f}")
        for found in results["losses"]
    ]  # fmt: skip
    return "\n\n".join([words, table(("head", "loss", "ms", "peak extra MiB"), rows, left=2), origin(records[:1])])


def render_groups(records: Sequence[Record]) -> str:
    """Say which share of the tokens had an advantage."""
    rollouts = [record for record in records[1:-1] if "reward" in record]
    shares = [record["drpo/weighted"] / record["drpo/tokens"] for record in rollouts]
    equal = statistics.mean(record["frac_reward_zero_std"] for record in rollouts)
    return (
        f"In the run of `make demo-llm` **{statistics.median(shares):.0%} of the tokens had an advantage** (median of "
        f"{len(shares)} rollouts; {min(shares):.0%} to {max(shares):.0%}). The completions of all other groups, "
        f"{equal:.0%} of the groups on average, were all right or all wrong: such tokens have A = 0 and need no "
        "backward. By default `DRPOTrainer` computes their forward, for TRL's metrics; "
        'with `compact="active"` it drops them altogether.'
    )


def draw(records: Sequence[Record], folder: Path, stem: str) -> None:
    """Write {stem}.png into `folder`, as the run itself draws it."""
    from examples.smollm_report import plot_run

    first, *history, results = records
    settings = first["settings"]
    title = "{model}, {objective}, seed {seed}".format(**settings)
    plot_run(history, settings["updates"], results["before"], results["after"], title, folder / f"{stem}.png")


def _name(loss: str) -> str:
    return f"`{loss}`" if loss.isidentifier() else loss


RESULTS = "smollm/demo.jsonl"
BLOCKS = (
    Block("demo-llm", "smollm", RESULTS, "README.md", render_demo, NOT_YET, "benchmarks.smollm.tables"),
    Block("demo-groups", "smollm", RESULTS, "docs/benchmarks.md", render_groups, NOT_YET),
)
