"""`python -m benchmarks.invariance` finds which bits of a row change with what is computed beside it.

A batch is computed once, then parts of it, permutations, other compactions and other chunks; what a row reports
(log-prob, entropy) and its dX are compared bit for bit. On a GPU this is done on real shapes, with and without
`batch_invariant`; on a CPU, which runs no Triton kernels, without. Each case is a JSON line.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import cli
from benchmarks.harness.blocks import NOT_YET, Block, origin
from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.records import Record, append, line, write
from benchmarks.harness.tables import NOTHING, table
from benchmarks.harness.workloads import Shape
from drpo_kernels import DRPO, linear_policy_loss

RESULTS = ROOT / "bench_results" / "invariance.jsonl"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
# The sizes are odd, or the weight of the head is cast in two blocks.
CPU_SHAPES = (Shape(64, 63, 1001), Shape(64, 512, 8192))
CUDA_SHAPES = (Shape(512, 1024, 32_003), Shape(512, 4096, 151_936))
QUICK_SHAPES = (Shape(8, 5, 33),)
BATCHES, PIECES = (1, 2, 5, 16, 17, 33), 4  # rows in a batch, and how many such batches
METHODS = {"default": False, "batch_invariant": True}
# bytes of workspace; a GPU keeps 16-bit dlogits beside the logits, so that two rows take the room of three
LOGIT_BYTES = 4


class Found(NamedTuple):
    """What a call gives for the rows [n] of the batch: logprobs and entropy [n], dX [n, H], dW [V, H]."""

    rows: Tensor
    logprobs: Tensor
    entropy: Tensor
    dx: Tensor
    dw: Tensor


class Batch:
    """Rows against one head; a row's coefficient is 1, so that its dX is its own."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        g, on = torch.Generator(device).manual_seed(0), {"device": device}
        hidden = torch.randn(shape.tokens, shape.hidden, generator=g, **on)
        weight = torch.randn(shape.vocab, shape.hidden, generator=g, **on).div_(shape.hidden**0.5)
        targets = torch.randint(shape.vocab, (shape.tokens,), generator=g, **on)
        old = -2 - torch.rand(shape.tokens, generator=g, **on)
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.per_row = [targets, old, torch.randn(shape.tokens, generator=g, **on)]
        self.everyone = torch.arange(shape.tokens, **on)

    def run(self, rows: Tensor | None = None, **options) -> Found:
        """Compute these rows in this order, or all rows for None."""
        rows = self.everyone if rows is None else rows
        leaves = [self.hidden[rows].requires_grad_(), self.weight.detach().requires_grad_()]
        out = linear_policy_loss(
            *leaves, *(x[rows] for x in self.per_row), objective=DRPO(delta=0.2), reduction="token-sum",
            entropy_coef=0.01, **options,
        )  # fmt: skip
        return Found(rows, out.logprobs, out.entropy, *torch.autograd.grad(out.loss, leaves))


def compared(pieces: Sequence[Found], whole: Found) -> Record:
    """Return how many rows differ from the same rows of `whole`, which has all of them, in what, and how far."""
    rows = torch.cat([found.rows for found in pieces])
    logprobs, entropy, dx = (torch.cat([found[i] for found in pieces]) for i in (1, 2, 3))
    changed = {
        "logprob": int((logprobs != whole.logprobs[rows]).sum()),
        "entropy": int((entropy != whole.entropy[rows]).sum()),
        "dX": int((dx != whole.dx[rows]).any(1).sum()),
    }
    largest = (logprobs - whole.logprobs[rows]).abs().max().item()
    return {"rows": len(rows), "changed": changed, "largest_logprob_change": largest}


def measure(batch: Batch, shape: Shape, **options) -> Iterator[Record]:
    """Yield a record per variation. A change of dW is recorded where dW is computed from the same rows."""
    count = shape.tokens
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).to(batch.everyone.device)
    whole = batch.run(**options)
    for size in BATCHES:
        pieces = [batch.run(rows, **options) for rows in order[: min(count, PIECES * size)].split(size)]
        yield {"variation": f"in batches of {size}", **compared(pieces, whole)}
    yield {"variation": "permuted", **compared([batch.run(order, **options)], whole)}
    mask = batch.everyone % 3 > 0
    masked, every = (batch.run(mask=mask, compact=compact, **options) for compact in ("active", "none"))
    kept = Found(*(x[mask] for x in every[:4]), every.dw)
    yield {"variation": "not compacted", **compared([kept], masked), "dW_change": _distance(every.dw, masked.dw)}
    for rows in (1, 7, count // 2):
        found = batch.run(workspace_bytes=rows * shape.vocab * LOGIT_BYTES, **options)
        record = compared([found], whole)
        yield {"variation": f"in chunks of {rows}", **record, "dW_change": _distance(found.dw, whole.dw)}
    again = batch.run(**options)
    yield {"variation": "run again", **compared([again], whole), "dW_change": _distance(again.dw, whole.dw)}


def _distance(found: Tensor, want: Tensor) -> float:
    """Return |found - want| / |want|, and 0 only where every bit is the same."""
    if torch.equal(found, want):
        return 0.0
    return max(((found.double() - want.double()).norm() / want.double().norm()).item(), 1e-30)


def broken(record: Record) -> bool:
    """Return whether a promise is broken: a second run has the same bits, and `batch_invariant` rows never change."""
    if record["status"] != "ok":
        return False
    rows_changed = any(record["changed"].values())
    if record["variation"] == "run again":
        return rows_changed or record["dW_change"] != 0
    chunked = record["variation"].startswith("in chunks")
    return record["method"] == "batch_invariant" and (rows_changed or (chunked and record["dW_change"] != 0))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print. Return 1 if a row of `batch_invariant` or a second run changed a bit."""
    parser = cli.parser("benchmarks.invariance", __doc__)
    cli.add_device(parser)
    cli.add_quick(parser, "a tiny shape")
    cli.add_out(parser, RESULTS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args(argv)
    shapes = QUICK_SHAPES if options.quick else CPU_SHAPES if options.device == "cpu" else CUDA_SHAPES
    source = provenance(cli.command(parser, options), torch.device(options.device))
    out, failed = cli.results(options, RESULTS), False
    if out is not None:
        write(out, [])
    for record in _records(options.device, shapes, options.dtypes):
        print(line(record), flush=True)
        failed |= broken(record)
        if out is not None:
            append(out, record | source)
    return int(failed)


def _records(device: str, shapes: Sequence[Shape], dtypes: Sequence[str]) -> Iterator[Record]:
    for name in dtypes:
        for method, batch_invariant in METHODS.items():
            for shape in shapes:
                common = {"benchmark": "invariance", "method": method, "dtype": name, "shape": vars(shape)}
                if batch_invariant and device == "cpu":
                    yield {**common, "status": "needs a GPU", "variation": None}
                    continue
                for record in measure(Batch(shape, DTYPES[name], device), shape, batch_invariant=batch_invariant):
                    yield {**common, "status": "ok", **record}


def render(records: Sequence[Record]) -> str:
    """Return the Markdown of a run: a table per method, with the shares of rows in which a bit changed."""
    import pandas as pd  # a GPU machine measures without it

    parts, lines = [], pd.json_normalize([{"dW_change": float("nan")} | record for record in records])
    for method, chosen in lines.groupby("method", sort=False):
        if (chosen["status"] != "ok").any():
            parts.append(f"`{method}`: {chosen['status'].iloc[0]}.\n")
            continue
        shapes = dict.fromkeys("H={hidden} V={vocab}".format(**r["shape"]) for r in records if r["method"] == method)
        counts = chosen.pivot_table(
            ["rows", "changed.logprob", "changed.dX"], "variation", "dtype", aggfunc="sum", sort=False
        )
        logprob, dx = ((counts[f"changed.{x}"] / counts["rows"]).map("{:.0%}".format) for x in ("logprob", "dX"))
        cells = logprob + " / " + dx
        largest_dw = chosen.groupby("variation", sort=False)["dW_change"].max()
        cells["norm-wise change of dW"] = [NOTHING if math.isnan(change) else f"{change:.1e}" for change in largest_dw]
        parts.append(
            f"`{method}`, {' and '.join(shapes)}: share of rows with a changed bit in log-prob / in dX; the largest "
            f"change of a log-prob is {chosen['largest_logprob_change'].max():.1e}.\n\n"
            + table(("rows computed", *cells), cells.itertuples(name=None)) + "\n"
        )  # fmt: skip
    return "\n".join([*parts, origin(records[:1])])


def render_gpu(records: Sequence[Record]) -> str:
    """Return whether the promises hold on a GPU, and the tables."""
    return f"With `batch_invariant` and run to run, {promises(records)}\n\n{render(records)}"


def promises(records: Sequence[Record]) -> str:
    """Return a sentence about the promises that are broken."""
    wrong = [record for record in records if broken(record)]
    dtypes = ", ".join(dict.fromkeys(record["dtype"] for record in records))
    if not wrong:
        return f"every promise holds in {len(records)} cases ({dtypes})."
    cases = "; ".join(map(_broken_case, wrong))
    return f"**a promise is broken in {len(wrong)} of {len(records)} cases ({dtypes})**: {cases}."


def _broken_case(record: Record) -> str:
    shape = "T={tokens} H={hidden} V={vocab}".format(**record["shape"])
    changed = ", ".join(f"{name} of {count}" for name, count in record["changed"].items() if count) or "dW, in none"
    case = f"`{record['method']}` in {record['dtype']}, {record['variation']}, {shape}"
    return f"{case}, bits changed in {changed} of {record['rows']} rows"


PAGE = "docs/determinism.md"
BLOCKS = (
    Block("invariance", "invariance", "invariance.jsonl", PAGE, render),
    Block("invariance-gpu", "invariance", "gpu/invariance.jsonl", PAGE, render_gpu, NOT_YET),
)


if __name__ == "__main__":
    sys.exit(main())
