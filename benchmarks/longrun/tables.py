"""The long run of `sparse_grad` in Markdown: what `benchmarks.report` writes into docs/sparse.md."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.harness.blocks import Block, origin
from benchmarks.harness.records import Record
from benchmarks.harness.tables import table

RUNS = {
    "sparse": "`sparse_grad={tau:g}`",
    "slower": "exact, learning rate lower by {tau:.0%}: **the bound**",
    "bf16": "exact, hidden states and head in bf16",
    "noise": "exact, dX and dW with random noise of 0.18 %",
}


def render(records: Sequence[Record]) -> str:
    """How many rows were sparse, and a row per run."""
    by_name = {record["run"]: record for record in records}
    sparse = by_name["sparse"]
    shares = sparse["sparse_share"]
    summary = (
        "{steps} steps, V={vocab} H={hidden}, ".format(**sparse["size"])
        + f"a mean |loss| of {sparse['loss_scale']:.2f}; {np.mean(shares):.0%} of the rows were sparse, "
        f"{shares[0]:.0%} at the beginning and {shares[-1]:.0%} at the end."
    )
    rows = []
    for name, label in RUNS.items():
        record = by_name[name]
        error = f"{record['gradient_error_mean']:.2%} ({record['gradient_error_max']:.2%})"
        gaps = f"{record['smoothed_gap_max']:.1e}", f"{record['weight_gap']:.2%}"
        rows.append((label.format(tau=record["sparse_grad"]), error, *gaps))
    header = ("run", "gradient error, mean (max)", "furthest from the exact loss", "weights: distance over way")
    return "\n".join([summary, "", table(header, rows), "", origin(records[:1])])


BLOCKS = (Block("sparse-longrun", "longrun_sparse", "longrun_sparse.jsonl", "docs/sparse.md", render),)
