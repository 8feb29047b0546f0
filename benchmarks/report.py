"""`python -m benchmarks.report` rewrites the pages' blocks of results and the plots, from bench_results/ alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import invariance, trainers
from benchmarks.device import page as device
from benchmarks.harness import cli
from benchmarks.harness.blocks import Block, rewrite
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.records import Record, read
from benchmarks.harness.runs import Run, read_run
from benchmarks.longrun import sparse as longrun
from benchmarks.precision import tables as precision
from benchmarks.roofline import tables as roofline
from benchmarks.smollm import tables as smollm
from benchmarks.sparsity import tables as sparsity
from benchmarks.speed import tables as speed
from benchmarks.stability import tables as stability

STUDIES = (
    speed, device, roofline, sparsity, longrun, precision, invariance, trainers, smollm, stability,
)  # fmt: skip
REHEARSALS = ("--quick", "--rehearse")  # A run whose command has one of these has measured nothing that counts.
BLOCKS = {block.name: block for study in STUDIES for block in study.BLOCKS}


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the blocks. Print a block whose page has no place for it, or whose run was a `--quick` one."""
    parser = cli.parser("benchmarks.report", __doc__)
    parser.add_argument("--block", choices=BLOCKS, help="default: every block whose results are there")
    parser.add_argument("--results", type=Path, help="JSON lines in place of the block's own; with --block")
    parser.add_argument("--page", type=Path, help="a page in place of the block's own; with --block")
    options = parser.parse_args(argv)
    if options.block is None and (options.results or options.page):
        parser.error("--results and --page need --block")
    complaints = []
    for block in [BLOCKS[options.block]] if options.block else BLOCKS.values():
        results = options.results or ROOT / "bench_results" / block.results
        page = options.page or ROOT / block.page
        if not results.exists() and block.absent is not None:
            rewrite(page, block.markers, block.absent)
        elif not results.exists() and (options.block or block.name == "every-cpu"):
            complaints.append(f"{results.name} is missing: run `python -m {block.module}` first")
        elif results.is_dir():
            run = read_run(results)
            _report(block, run, page, [record for lines in run.values() for record in lines])
        elif results.exists():
            records = read(results)
            if records[0].get("benchmark") != block.benchmark:
                complaints.append(f"{results.name} is of another version: run `python -m {block.module}` again")
                continue
            _report(block, records, page, records)
        if results.exists() and block.plots is not None:
            draw_plots(block.plots, read_run(results) if results.is_dir() else records, results)
    for complaint in dict.fromkeys(complaints):
        print(f"error: {complaint}", file=sys.stderr)
    return 2 if complaints else 0


def _report(block: Block, results: Sequence[Record] | Run, page: Path, records: Sequence[Record]) -> None:
    """Write the block, or print it where the page has no place for it or its numbers are those of a rehearsal."""
    text = block.render(results)
    rehearsal = any(word in REHEARSALS for record in records for word in record.get("command", "").split())
    if rehearsal or not rewrite(page, block.markers, text):
        print(text)


def draw_plots(module: str, records: Sequence[Record] | Run, results: Path) -> None:
    try:
        draw = importlib.import_module(module).draw
    except ModuleNotFoundError as error:  # without matplotlib, as on a GPU machine, the tables are still written
        print(f"no plots: {error.name} not installed", file=sys.stderr)
        return
    draw(records, results.parent, results.stem)


if __name__ == "__main__":
    sys.exit(main())
