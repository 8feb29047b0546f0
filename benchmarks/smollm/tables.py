"""What the run of `make demo-llm` says, in Markdown: what `benchmarks.report` writes from its record."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.harness.blocks import NOT_YET, Block, origin
from benchmarks.harness.records import Record
from benchmarks.harness.tables import table


def render_demo(records: Sequence[Record]) -> str:
    """Say what the run learned, and compare the losses on one of its batches."""
    first, results = records[0], records[-1]
    settings, before, after = first["settings"], results["before"], results["after"]
    minutes = sum(results["seconds"].values()) / 60
    words = (
        f"In {minutes:.1f} minutes, {settings['steps']} rollouts of {settings['prompts']} × {settings['group']} "
        f"completions, the greedy answers to held-out sums that are exactly right went from {before['exact']:.0%} to "
        f"{after['exact']:.0%}, and those that begin right, whatever follows, from {before['lenient']:.0%} to "
        f"{after['lenient']:.0%}. One of its batches, forward and backward of the loss alone:"
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
        'backward, and with `compact="active"` they cost nothing.'
    )


def _name(loss: str) -> str:
    return f"`{loss}`" if loss.isidentifier() else loss


RESULTS = "smollm/demo.jsonl"
BLOCKS = (
    Block("demo-llm", "smollm", RESULTS, "README.md", render_demo, NOT_YET),
    Block("demo-groups", "smollm", RESULTS, "docs/benchmarks.md", render_groups, NOT_YET),
)
