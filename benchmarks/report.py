"""`python -m benchmarks.report`: rewrites the pages' blocks of results from bench_results/, never by hand."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import precision_tables

ROOT = Path(__file__).resolve().parent.parent
HEADER = ("method", "median ms (min to max)", "relative to bare GEMMs", "relative to eager", "peak extra MiB")
TRAINERS_HEADER = ("trainer", "median ms (min to max)", "relative to GRPOTrainer", "peak extra MiB")
NOTHING = "–"
TITLES = {"random": "Random inputs", "trained": "Trained-looking inputs"}
LABELS = {
    "gemms": "the three bare GEMMs, same chunks",
    "eager": "eager PyTorch",
    "trl": "TRL's fused head + objective",
    "linear_policy_loss": "`linear_policy_loss`",
    "linear_token_logprobs": "`linear_token_logprobs` + objective",
    "batch_invariant": "`linear_policy_loss`, `batch_invariant=True`",
}
Record = dict


@dataclass(frozen=True)
class Block:
    """A part of a page, between two markers, and the results it is written from."""

    name: str
    results: str  # in bench_results/
    page: str
    module: str  # what measures it
    render: Callable[[Sequence[Record]], str]

    @property
    def markers(self) -> tuple[str, str]:
        return f"<!-- benchmarks:{self.name} -->", f"<!-- /benchmarks:{self.name} -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the blocks; print one whose page has no such block, or whose run was a `--quick` one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--block", choices=BLOCKS, help="default: every block whose results are there")
    parser.add_argument("--results", type=Path, help="JSON lines in place of the block's own; with --block")
    parser.add_argument("--page", type=Path, help="a page in place of the block's own; with --block")
    options = parser.parse_args(argv)
    if options.block is None and (options.results or options.page):
        parser.error("--results and --page need --block")
    for block in [BLOCKS[options.block]] if options.block else BLOCKS.values():
        results = options.results or ROOT / "bench_results" / block.results
        if results.exists():
            _report(block, read(results), options.page or ROOT / block.page)
        elif options.block or block.name == "cpu":
            print(f"error: {results.name} is missing: run `python -m {block.module}` first", file=sys.stderr)
            return 2
    return 0


def _report(block: Block, records: Sequence[Record], page: Path) -> None:
    rehearsal = any("--quick" in record.get("command", "") for record in records)  # tiny shapes say nothing to a reader
    text = block.render(records)
    if rehearsal or not rewrite(page, block, text):
        print(text)


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def rewrite(page: Path, block: Block, text: str) -> bool:
    """Put the text between the block's markers; False where they are absent."""
    start, end = block.markers
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    if not pattern.search(before):
        return False
    page.write_text(pattern.sub(lambda _: f"{start}\n{text}\n{end}", before), encoding="utf-8")
    return True


def render_cpu(records: Sequence[Record]) -> str:
    """The Markdown of a run: a table per workload, then where the numbers come from."""
    workloads = dict.fromkeys(record["workload"] for record in records)
    parts = [part for name in workloads for part in _table([r for r in records if r["workload"] == name])]
    samples = max(len(record["seconds"] or ()) for record in records)
    return "\n".join([*parts, _origin(records[0], samples)])


def _table(records: Sequence[Record]) -> Iterator[str]:
    first = records[0]
    shape = "T={tokens} H={hidden} V={vocab}".format(**first["shape"])
    title = TITLES.get(first["workload"], first["workload"])
    yield f"{title} (mean entropy {first['entropy_nats']:.2g} nat), {shape}, {first['dtype']}, forward and backward:"
    yield ""
    yield _row(HEADER)
    yield _row(("---", *["---:"] * (len(HEADER) - 1)))
    yield from (_row(_cells(record)) for record in records)
    yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(record: Record) -> tuple[str, ...]:
    label = LABELS.get(record["method"], record["method"])
    if record["active_share"] != 1:
        label += f", {record['active_share']:.0%} of rows active"
    if record["median_s"] is None:
        return (label, record["status"], NOTHING, NOTHING, NOTHING)
    ratios = [_ratio(record, baseline) for baseline in ("gemms", "eager")]
    return (label, _milliseconds(record), *ratios, _mebibytes(record))


def _milliseconds(record: Record) -> str:
    median, least, most = (f"{record[key] * 1e3:.0f}" for key in ("median_s", "min_s", "max_s"))
    return f"{median} ({least} to {most})"


def _ratio(record: Record, baseline: str) -> str:
    ratio = record["time_ratio"].get(baseline)
    return NOTHING if ratio is None else f"{ratio:.2f}×"


def _mebibytes(record: Record) -> str:
    peak, beyond = record["peak_extra_bytes"], record["peak_beyond_gradients_bytes"]
    if peak is None:
        return NOTHING
    return f"{peak / 2**20:.0f} ({beyond / 2**20:.0f} beyond the gradients)"


def render_trainers(records: Sequence[Record]) -> str:
    """The Markdown of a comparison of trainers."""
    size = records[0]["size"]
    lines = [
        "One training step on a batch of {batch} × ({prompt} + {completion}) tokens, a {layers}-layer Qwen3 with "
        "H={hidden} and V={vocab},".format(**size),
        f"{records[0]['dtype']}, the loss and its backward through the whole model:",
        "",
        _row(TRAINERS_HEADER),
        _row(("---", *["---:"] * (len(TRAINERS_HEADER) - 1))),
    ]
    for record in records:
        peak = record["peak_extra_bytes"]
        memory = NOTHING if peak is None else f"{peak / 2**20:.0f}"
        lines.append(_row((record["trainer"], _milliseconds(record), f"{record['time_ratio']:.2f}×", memory)))
    return "\n".join([*lines, "", _origin(records[0], len(records[0]["seconds"]))])


def render_invariance(records: Sequence[Record]) -> str:
    """The Markdown of a run: a table per method, of shares of rows in which a bit changed."""
    parts = []
    for method in dict.fromkeys(record["method"] for record in records):
        chosen = [record for record in records if record["method"] == method]
        if chosen[0]["status"] != "ok":
            parts += [f"`{method}`: {chosen[0]['status']}.", ""]
            continue
        dtypes = list(dict.fromkeys(record["dtype"] for record in chosen))
        shapes = dict.fromkeys("H={hidden} V={vocab}".format(**record["shape"]) for record in chosen)
        largest = max(record["largest_logprob_change"] for record in chosen)
        parts += [
            f"`{method}`, {' and '.join(shapes)}: share of rows with a changed bit in log-prob / in dX; the largest "
            f"change of a log-prob is {largest:.1e}.",
            "",
            _row(("rows computed", *dtypes, "norm-wise change of dW")),
            _row(("---", *["---:"] * (len(dtypes) + 1))),
        ]
        for variation in dict.fromkeys(record["variation"] for record in chosen):
            same = [record for record in chosen if record["variation"] == variation]
            cells = (_changed_share([record for record in same if record["dtype"] == dtype]) for dtype in dtypes)
            weights = [record["dW_change"] for record in same if "dW_change" in record]
            parts.append(_row((variation, *cells, f"{max(weights):.1e}" if weights else NOTHING)))
        parts.append("")
    return "\n".join([*parts, _origin(records[0])])


def _changed_share(records: Sequence[Record]) -> str:
    rows = sum(record["rows"] for record in records)
    return " / ".join(f"{sum(r['changed'][name] for r in records) / rows:.0%}" for name in ("logprob", "dX"))


def _origin(record: Record, samples: int | None = None) -> str:
    device, versions = record["device"], record["versions"]
    software = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    commit = (record["commit"] or "unknown")[:12] + (" with uncommitted changes" if record["dirty"] else "")
    return (
        f"Measured on {device.get('gpu', device['cpu'])}, {device['cores']} cores, {device['threads']} threads; "
        f"{software}; commit {commit}; `{record['command']}`; {record['date'][:10]}"
        f"{f'; {samples} samples each' if samples else ''}."
    )


BLOCKS = {
    block.name: block
    for block in (
        Block("cpu", "cpu.jsonl", "README.md", "benchmarks.cpu", render_cpu),
        Block("trainers", "trainers.jsonl", "docs/integrations/trl.md", "benchmarks.trainers", render_trainers),
        Block("invariance", "invariance.jsonl", "docs/determinism.md", "benchmarks.invariance", render_invariance),
        *(
            Block(f"precision-{name}", "precision/precision.jsonl", "docs/precision.md", "benchmarks.precision", render)
            for name, render in precision_tables.RENDER.items()
        ),
    )
}


if __name__ == "__main__":
    sys.exit(main())
