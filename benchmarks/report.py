"""`python -m benchmarks.report`: rewrites the README's block of CPU results from bench_results/, never by hand."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- benchmarks:cpu -->", "<!-- /benchmarks:cpu -->"
BLOCK = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
HEADER = ("method", "median ms (min to max)", "relative to bare GEMMs", "relative to eager", "peak extra MiB")
NOTHING = "–"
TITLES = {"random": "Random inputs", "trained": "Trained-looking inputs"}
LABELS = {
    "gemms": "the three bare GEMMs, same chunks",
    "eager": "eager PyTorch",
    "trl": "TRL's fused head + objective",
    "linear_policy_loss": "`linear_policy_loss`",
    "linear_token_logprobs": "`linear_token_logprobs` + objective",
}
Record = dict


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the block; print it where the README has no such block, or the run was a `--quick` one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench_results" / "cpu.jsonl")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(argv)
    if not options.results.exists():
        print(f"error: {options.results.name} is missing: run `python -m benchmarks.cpu` first", file=sys.stderr)
        return 2
    records = read(options.results)
    rehearsal = any("--quick" in record["command"] for record in records)  # tiny shapes say nothing to a reader
    if rehearsal or not rewrite(options.readme, render(records)):
        print(render(records))
    return 0


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def rewrite(readme: Path, block: str) -> bool:
    """Put the block between the markers; False where they are absent."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if not BLOCK.search(text):
        return False
    readme.write_text(BLOCK.sub(lambda _: f"{START}\n{block}\n{END}", text), encoding="utf-8")
    return True


def render(records: Sequence[Record]) -> str:
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
    times = [f"{record[key] * 1e3:.0f}" for key in ("median_s", "min_s", "max_s")]
    ratios = [_ratio(record, baseline) for baseline in ("gemms", "eager")]
    return (label, f"{times[0]} ({times[1]} to {times[2]})", *ratios, _mebibytes(record))


def _ratio(record: Record, baseline: str) -> str:
    ratio = record["time_ratio"].get(baseline)
    return NOTHING if ratio is None else f"{ratio:.2f}×"


def _mebibytes(record: Record) -> str:
    peak, beyond = record["peak_extra_bytes"], record["peak_beyond_gradients_bytes"]
    if peak is None:
        return NOTHING
    return f"{peak / 2**20:.0f} ({beyond / 2**20:.0f} beyond the gradients)"


def _origin(record: Record, samples: int) -> str:
    device, versions = record["device"], record["versions"]
    software = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    commit = (record["commit"] or "unknown")[:12] + (" with uncommitted changes" if record["dirty"] else "")
    return (
        f"Measured on {device['cpu']}, {device['cores']} cores, {device['threads']} threads; {software}; "
        f"commit {commit}; `{record['command']}`; {record['date'][:10]}; {samples} samples each."
    )


if __name__ == "__main__":
    sys.exit(main())
