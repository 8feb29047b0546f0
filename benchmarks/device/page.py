"""A run of `benchmarks.device` in Markdown: its summary.md, and what `benchmarks.report` writes into the pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.device import bars
from benchmarks.device.findings import FINDINGS, main_heads, small_shapes
from benchmarks.device.plan import LOSS, WHOLE
from benchmarks.harness import speed_tables
from benchmarks.harness.blocks import NOT_YET, Block, origin, origin_with_samples
from benchmarks.harness.runs import DEVICE, SPEED, Run, once, record_of
from benchmarks.harness.tables import gibibytes, table, times

NOT_ON_A_GPU = """\
**Not measured yet: anything on a GPU.** The kernels are compiled ahead of time for four architectures (no register
spill, 128-bit loads and stores) and run in the interpreter against float64, but no GPU has run this code yet: GPU
correctness, speed and memory are open. `make bench` on a machine with a GPU fills this part in."""


def gpus(run: Run) -> str:
    names = {record["device"]["gpu"]: None for record in run[SPEED] + run[DEVICE] if "gpu" in record.get("device", {})}
    return " and an ".join(names)


def summary(run: Run) -> str:
    """Return the bars, the tests and the parts of a run."""
    title = f"# {gpus(run) or 'A rehearsal on a CPU: numbers mean nothing'}"
    ends = [record for record in run[DEVICE] if "end" in record]
    rows = [(r["part"], r["end"], f"{r['seconds']:.0f} of {r['box']:.0f} s") for r in ends]
    parts = table(("part", "end", "time"), rows, left=3) if rows else NOT_YET
    return f"{title}\n\n## Bars\n\n{bar_table(run)}\n\n## Tests\n\n{render_tests(run)}\n\n## Parts\n\n{parts}\n"


def bar_table(run: Run) -> str:
    rows = [
        (v.bar.what, f"{'≥' if v.bar.at_least else '≤'} {v.bar.form.format(v.bar.limit)}", v.number, v.word, v.remark)
        for v in bars.verdicts(run)
    ]
    return table(("bar", "limit", "measured", "verdict", "remark"), rows, left=5)


# --- docs/gpu.md ------------------------------------------------------------------------------------------------------


def render_tests(run: Run) -> str:
    """Return the counts of every run of tests, and the names of those that failed."""
    lines = []
    for record in run[DEVICE]:
        if "tests" in record:
            end = f", exit {record['exit']}" if record["finished"] else ", stopped before the end"
            counts = f"{record['passed']} passed, {len(record['failed'])} failed, {record['skipped']} skipped"
            lines.append(f"* `pytest {record['tests']}`: {counts}{end}")
            lines += [f"    * failed: `{name}`" for name in record["failed"]]
        if "memcheck" in record:
            lines.append(f"* compute-sanitizer: {record['memcheck']}, exit {record['exit']}")
    return "\n".join(lines) or NOT_YET


def render_bars(run: Run) -> str:
    """Return how many bars are met, and every bar beside its number."""
    if not run[DEVICE] and not run[SPEED]:
        return NOT_YET
    words = [verdict.word for verdict in bars.verdicts(run)]
    counts = f"{words.count(bars.PASS)} of {len(words)} bars are met, {words.count(bars.MISS)} are missed"
    counts += f" and {words.count(bars.NOT_MEASURED)} could not be measured"
    return "\n\n".join([f"**On an {gpus(run)}, {counts}.**", bar_table(run), run_origin(run)])


def run_origin(run: Run) -> str:
    return origin([record for records in run.values() for record in records if "versions" in record])


def render_findings(run: Run) -> str:
    """Return every finding under its title."""
    if not any(run.values()):
        return NOT_YET
    return "\n\n".join(f"### {title}\n\n{find(run) or NOT_YET}" for title, find in FINDINGS.items())


# --- parts of other pages ---------------------------------------------------------------------------------------------


def render_readme(run: Run) -> str:
    """Return a few sentences, the heads at the workload of the bars, and where the rest is."""
    ours, floor = record_of(run, LOSS), record_of(run, WHOLE)
    if not (ours and ours["median_s"] and ours["floor_median_s"]):
        return NOT_YET
    records = [*([floor] if floor else []), *main_heads(run)]
    met = sum(verdict.word == bars.PASS for verdict in bars.verdicts(run))
    shape = "T={tokens} H={hidden} V={vocab}".format(**ours["shape"])
    headline = (
        f"**On an {gpus(run)}** one forward and backward of `linear_policy_loss` at {shape} takes "
        f"{1e3 * ours['median_s']:.1f} ms, {times(bars.in_floors(ours))} the bare matrix products, with "
        f"{gibibytes(ours['peak_beyond_gradients_bytes'])} beyond the gradients."
    )
    return "\n".join([
        " ".join([headline, *_where_eager_wins(run)]),
        f"{met} of the {len(bars.BARS)} bars are met: [docs/gpu.md](docs/gpu.md) has each with its number, "
        "what the runs decide, and pictures.",
        "",
        *speed_tables.section(records),
        origin_with_samples(records),
    ])  # fmt: skip


def _where_eager_wins(run: Run) -> Iterator[str]:
    medians = {
        workload: [1e3 * methods[name]["median_s"] for name in ("eager", LOSS)]
        for workload, methods in small_shapes(run).items()
        if "eager" in methods
    }
    slower = [
        f"{workload.model} T={workload.tokens} ({eager:.2f} against {ours:.2f} ms)"
        for workload, (eager, ours) in medians.items()
        if eager < ours
    ]
    if slower:
        yield f"Where the host decides, eager PyTorch is faster: {', '.join(slower)}."


def render_every_speed(run: Run) -> str:
    """Return every table but those of sparse gradients, which have their own page."""
    records = once([record for record in run[SPEED] if record["part"] != "sparse"])
    if not any(record["median_s"] for record in records):
        return NOT_YET
    return "\n".join([speed_tables.render_all(records), origin_with_samples(records)])


def _block(name: str, page: str, render: Callable[[Run], str], absent: str = NOT_YET, **further: str) -> Block:
    return Block(name, "device", "gpu", page, render, absent, **further)


BLOCKS = (
    _block("gpu", "README.md", render_readme, NOT_ON_A_GPU, plots="benchmarks.device.plots"),
    _block("gpu-bars", "docs/gpu.md", render_bars),
    _block("gpu-findings", "docs/gpu.md", render_findings),
    _block("gpu-tests", "docs/gpu.md", render_tests),
    _block("every-gpu", "docs/benchmarks.md", render_every_speed),
)
