"""What `sparse_grad` takes on a GPU, from the lines of its run: what `benchmarks.report` writes into docs/sparse.md."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.blocks import NOT_YET, Block, origin_with_samples
from benchmarks.harness.records import Record
from benchmarks.harness.runs import latest
from benchmarks.harness.workloads import KINDS
from benchmarks.sparsity.tables import SPARSE, by_kind, of_part, speed


def render(records: Sequence[Record]) -> str:
    records = of_part(latest(records), "sparse")
    if not by_kind(records):
        return NOT_YET
    absent = [r for r in records if r["method"] == SPARSE and r["median_s"] is None]
    lines = [*speed(records), ""]
    if absent:
        reasons = "; ".join(f"{KINDS[record['inputs']]} ({record['status']})" for record in absent)
        lines += [f"Without a time: {reasons}.", ""]
    return "\n".join([*lines, origin_with_samples(records)])


BLOCKS = (Block("sparse-gpu", "speed", "gpu/speed.jsonl", "docs/sparse.md", render, NOT_YET),)
