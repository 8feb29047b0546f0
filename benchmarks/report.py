"""`python -m benchmarks.report`: the pages' blocks of results and the speed plots, from bench_results/ alone."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.device import page as gpu_page
from benchmarks.device.page import NOT_YET, speed_origin
from benchmarks.device.parts import DEVICE, INVARIANCE
from benchmarks.device.results import Run, read_run
from benchmarks.harness.provenance import origin
from benchmarks.harness.records import Record, read
from benchmarks.precision import tables as precision_tables
from benchmarks.roofline import tables as roofline
from benchmarks.sparsity import tables as sparsity_tables
from benchmarks.speed import tables as speed_tables
from benchmarks.speed.tables import NOTHING, milliseconds, row

ROOT = Path(__file__).resolve().parent.parent
TRAINERS_HEADER = ("trainer", "median ms (min to max)", "relative to GRPOTrainer", "peak extra MiB")
NOT_ON_A_GPU = """\
**Not measured yet: anything on a GPU.** The kernels are compiled ahead of time for four architectures (no register
spill, 128-bit loads and stores) and run in the interpreter against float64, but no GPU has run this code yet: GPU
correctness, speed and memory are open. `make bench` on a machine with a GPU fills this part in."""


@dataclass(frozen=True)
class Block:
    """A part of a page, between two markers, and the results it is written from.

    absent  what the page says while there are no such results
    plots   the module that draws PNG files beside the results from them
    """

    name: str
    results: str  # a file in bench_results/, or the folder of a run of `benchmarks.device`
    page: str
    module: str  # what measures it: `benchmarks.` and the name of the benchmark in the records
    render: Callable[[Sequence[Record]], str] | Callable[[Run], str]
    absent: str | None = None
    plots: str | None = None

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
    complaints = []
    for block in [BLOCKS[options.block]] if options.block else BLOCKS.values():
        results = options.results or ROOT / "bench_results" / block.results
        page = options.page or ROOT / block.page
        if not results.exists() and block.absent is not None:
            rewrite(page, block, block.absent)
        elif not results.exists() and (options.block or block.name == "cpu"):
            complaints.append(f"{results.name} is missing: run `python -m {block.module}` first")
        elif results.is_dir():
            run = read_run(results)
            _report(block, run, page, any(record.get("rehearsal") for record in run[DEVICE]))
        elif results.exists():
            records = read(results)
            if f"benchmarks.{records[0]['benchmark']}" != block.module:
                complaints.append(f"{results.name} is of another version: run `python -m {block.module}` again")
                continue
            _report(block, records, page, any("--quick" in record.get("command", "") for record in records))
        if results.exists() and block.plots is not None:
            draw_plots(block.plots, read_run(results) if results.is_dir() else records, results)
    for complaint in dict.fromkeys(complaints):
        print(f"error: {complaint}", file=sys.stderr)
    return 2 if complaints else 0


def draw_plots(module: str, records: Sequence[Record] | Run, results: Path) -> None:
    try:
        draw = importlib.import_module(f"benchmarks.{module}").draw
    except ModuleNotFoundError as error:  # a GPU machine without matplotlib: the tables are written all the same
        print(f"no plots: {error.name} not installed", file=sys.stderr)
        return
    draw(records, results.parent, results.stem)


def _report(block: Block, records: Sequence[Record] | Run, page: Path, rehearsal: bool) -> None:
    """The numbers of a rehearsal say nothing to a reader: they are printed."""
    text = block.render(records)
    if rehearsal or not rewrite(page, block, text):
        print(text)


def rewrite(page: Path, block: Block, text: str) -> bool:
    """Put the text between the block's markers; False where they are absent."""
    start, end = block.markers
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    if not pattern.search(before):
        return False
    page.write_text(pattern.sub(lambda _: f"{start}\n{text}\n{end}", before), encoding="utf-8")
    return True


def render_speed(records: Sequence[Record]) -> str:
    """The tables of the main workload, the plots, and where the numbers come from."""
    names = speed_tables.pictures(records)
    images = [f"![{speed_tables.PLOTS[name]}](bench_results/cpu_{name}.png)" for name in names]
    return "\n".join([speed_tables.render_main(records), *images, "", speed_origin(records)])


def render_every_speed(records: Sequence[Record]) -> str:
    return "\n".join([speed_tables.render_all(records), speed_origin(records)])


def render_sparse_speed(records: Sequence[Record]) -> str:
    records = sparsity_tables.of_part(records, "speed")
    if not sparsity_tables.by_kind(records):
        return NOT_YET
    lines = [*sparsity_tables.speed(records), "", *sparsity_tables.cce(records), ""]
    return "\n".join([*lines, speed_origin(records)])


def render_sparsity(part: str, table: Callable, records: Sequence[Record]) -> str:
    records = sparsity_tables.of_part(records, part)
    return "\n".join([*table(records), "", origin(records[:1])]) if records else NOT_YET


def render_sparse_longrun(records: Sequence[Record]) -> str:
    return "\n".join([*sparsity_tables.longrun(records), "", origin(records[:1])])


def render_trainers(records: Sequence[Record]) -> str:
    """The Markdown of a comparison of trainers."""
    size = records[0]["size"]
    lines = [
        "One training step on a batch of {batch} × ({prompt} + {completion}) tokens, a {layers}-layer Qwen3 with "
        "H={hidden} and V={vocab},".format(**size),
        f"{records[0]['dtype']}, the loss and its backward through the whole model:",
        "",
        row(TRAINERS_HEADER),
        row(("---", *["---:"] * (len(TRAINERS_HEADER) - 1))),
    ]
    for record in records:
        peak = record["peak_extra_bytes"]
        memory = NOTHING if peak is None else f"{peak / 2**20:.0f}"
        lines.append(row((record["trainer"], milliseconds(record), f"{record['time_ratio']:.2f}×", memory)))
    return "\n".join([*lines, "", origin(records[:1], len(records[0]["seconds"]))])


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
            row(("rows computed", *dtypes, "norm-wise change of dW")),
            row(("---", *["---:"] * (len(dtypes) + 1))),
        ]
        for variation in dict.fromkeys(record["variation"] for record in chosen):
            same = [record for record in chosen if record["variation"] == variation]
            cells = (_changed_share([record for record in same if record["dtype"] == dtype]) for dtype in dtypes)
            weights = [record["dW_change"] for record in same if "dW_change" in record]
            parts.append(row((variation, *cells, f"{max(weights):.1e}" if weights else NOTHING)))
        parts.append("")
    return "\n".join([*parts, origin(records[:1])])


def _changed_share(records: Sequence[Record]) -> str:
    rows = sum(record["rows"] for record in records)
    return " / ".join(f"{sum(r['changed'][name] for r in records) / rows:.0%}" for name in ("logprob", "dX"))


def render_gpu_invariance(run: Run) -> str:
    if not run[INVARIANCE]:
        return NOT_YET
    return f"With `batch_invariant` and run to run, {gpu_page.promises(run[INVARIANCE])}\n\n" + render_invariance(
        run[INVARIANCE]
    )


def _gpu(name: str, page: str, render: Callable[[Run], str], absent: str = NOT_YET, plots: str | None = None) -> Block:
    return Block(name, "gpu", page, "benchmarks.device", render, absent, plots)


BLOCKS = {
    block.name: block
    for block in (
        Block("cpu", "cpu.jsonl", "README.md", "benchmarks.speed", render_speed, plots="speed.plots"),
        _gpu("gpu", "README.md", gpu_page.render_readme, NOT_ON_A_GPU, plots="device.plots"),
        *(_gpu(f"gpu-{name}", "docs/gpu.md", render) for name, render in gpu_page.RENDER.items()),
        Block("every-cpu", "cpu.jsonl", "docs/benchmarks.md", "benchmarks.speed", render_every_speed),
        _gpu("every-gpu", "docs/benchmarks.md", gpu_page.render_every_speed),
        Block("roofline", "cpu.jsonl", "docs/roofline.md", "benchmarks.speed", roofline.render),
        _gpu("roofline-gpu", "docs/roofline.md", gpu_page.render_roofline),
        Block(
            "sparse-speed", "sparsity.jsonl", "docs/sparse.md", "benchmarks.sparsity", render_sparse_speed,
            plots="sparsity.plots",
        ),
        _gpu("sparse-gpu", "docs/sparse.md", gpu_page.render_sparse_speed),
        *(
            Block(
                f"sparse-{part}", "sparsity.jsonl", "docs/sparse.md", "benchmarks.sparsity",
                partial(render_sparsity, part, table),
            )
            for part, table in sparsity_tables.PARTS.items()
        ),
        Block(
            "sparse-longrun", "longrun_sparse.jsonl", "docs/sparse.md", "benchmarks.longrun_sparse",
            render_sparse_longrun,
        ),
        Block("trainers", "trainers.jsonl", "docs/integrations/trl.md", "benchmarks.trainers", render_trainers),
        Block("invariance", "invariance.jsonl", "docs/determinism.md", "benchmarks.invariance", render_invariance),
        _gpu("invariance-gpu", "docs/determinism.md", render_gpu_invariance),
        _gpu("invariance-cost", "docs/determinism.md", gpu_page.render_invariance_cost),
        _gpu("precision-gpu", "docs/precision.md", gpu_page.render_precision),
        *(
            Block(f"precision-{name}", "precision/precision.jsonl", "docs/precision.md", "benchmarks.precision", render)
            for name, render in precision_tables.RENDER.items()
        ),
    )
}


if __name__ == "__main__":
    sys.exit(main())
