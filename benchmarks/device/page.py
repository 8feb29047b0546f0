"""A run of `benchmarks.device` in Markdown: its summary.md, and what `benchmarks.report` writes into the pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.device import bars
from benchmarks.device.findings import FINDINGS, PICTURES, compared_heads, main_heads, small_shapes
from benchmarks.device.plan import LOSS, WHOLE
from benchmarks.harness import speed_tables
from benchmarks.harness.blocks import NOT_YET, Block, origin, origin_with_samples
from benchmarks.harness.measure import largest_error
from benchmarks.harness.runs import DEVICE, SPEED, Run, once, record_of
from benchmarks.harness.speed_tables import LABELS
from benchmarks.harness.tables import gibibytes, table, times

NOT_ON_A_GPU = """\
**Not measured yet: anything on a GPU.** The kernels are compiled ahead of time for four architectures (no register
spill, 128-bit loads and stores) and run in the interpreter against float64, but no GPU has run this code yet: GPU
correctness, speed and memory are open. `make bench` on a machine with a GPU fills this part in."""


def gpus(run: Run) -> str:
    names = {record["device"]["gpu"]: None for record in run[SPEED] + run[DEVICE] if "gpu" in record.get("device", {})}
    return " and an ".join(names)


def summary(run: Run) -> str:
    """The bars, the tests and the parts of a run."""
    title = f"# {gpus(run) or 'A rehearsal on a CPU: numbers mean nothing'}"
    ends = [record for record in run[DEVICE] if "end" in record]
    rows = [(r["part"], r["end"], f"{r['seconds']:.0f} of {r['box']:.0f} s") for r in ends]
    parts = table(("part", "end", "time"), rows, left=3)
    return f"{title}\n\n## Bars\n\n{bar_table(run)}\n\n## Tests\n\n{render_tests(run)}\n\n## Parts\n\n{parts}\n"


def bar_table(run: Run) -> str:
    rows = [
        (v.bar.what, f"{'≥' if v.bar.at_least else '≤'} {v.bar.form.format(v.bar.limit)}", v.number, v.word, v.remark)
        for v in bars.verdicts(run)
    ]
    return table(("bar", "limit", "measured", "verdict", "remark"), rows, left=5)


# --- docs/gpu.md ------------------------------------------------------------------------------------------------------


def render_tests(run: Run) -> str:
    """The counts of every run of tests, and the names of those that failed."""
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
    """How many bars are met, and every bar beside its number."""
    if not run[DEVICE] and not run[SPEED]:
        return NOT_YET
    words = [verdict.word for verdict in bars.verdicts(run)]
    counts = f"{words.count(bars.PASS)} of {len(words)} bars are met, {words.count(bars.MISS)} are missed"
    counts += f" and {words.count(bars.NOT_MEASURED)} could not be measured"
    return "\n\n".join([f"**On an {gpus(run)}, {counts}.**", bar_table(run), run_origin(run)])


def run_origin(run: Run) -> str:
    return origin([record for records in run.values() for record in records if "versions" in record])


def render_findings(run: Run) -> str:
    """Every finding under its title, with its picture."""
    if not any(run.values()):
        return NOT_YET
    parts = []
    for title, find in FINDINGS.items():
        text = find(run)
        parts += [f"### {title}", text or NOT_YET]
        if text and title in PICTURES:
            name, what = PICTURES[title]
            parts.append(f"![{what}](../bench_results/gpu_{name}.png)")
    return "\n\n".join(parts)


# --- parts of other pages ---------------------------------------------------------------------------------------------


def render_readme(run: Run) -> str:
    """A few sentences, the heads at the workload of the bars, and where the rest is."""
    heads = main_heads(run)
    if not any(record["median_s"] for record in heads):
        return NOT_YET
    floor = record_of(run, WHOLE)
    records = [floor, *heads] if floor else heads
    met = sum(verdict.word == bars.PASS for verdict in bars.verdicts(run))
    return "\n".join([
        " ".join([f"**On an {gpus(run)}**", *_headline(run), *_where_eager_wins(run)]),
        f"{met} of the {len(bars.BARS)} bars are met: [docs/gpu.md](docs/gpu.md) has each with its number, "
        "what the runs decide, and pictures.",
        "",
        *speed_tables.section(records),
        origin_with_samples(records),
    ])  # fmt: skip


def _headline(run: Run) -> Iterator[str]:
    """Our time at the workload of the bars, and the two heads that a reader has at hand."""
    heads = {record["method"]: record for record in compared_heads(run)}
    ours = heads.get(LOSS)
    if ours is None:
        return
    floors, shape = bars.in_floors(ours), "T={tokens} H={hidden} V={vocab}".format(**ours["shape"])
    yield (
        f"one forward and backward of `linear_policy_loss` at {shape} takes {1e3 * ours['median_s']:.1f} ms, "
        f"{times(floors)} the bare matrix products, with {gibibytes(ours['peak_beyond_gradients_bytes'])} beyond the "
        "gradients."
    )
    for name, head in ((name, heads[name]) for name in ("trl", "eager_compiled") if name in heads):
        yield (
            f"{LABELS[name][0].upper()}{LABELS[name][1:]} takes {times(bars.in_floors(head) / floors)} its time with "
            f"{gibibytes(head['peak_beyond_gradients_bytes'])}, its gradients {largest_error(head):.1%} off."
        )


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
    """Every table but those of sparse gradients, which have their own page."""
    records = once([record for record in run[SPEED] if record["part"] != "sparse"])
    if not any(record["median_s"] for record in records):
        return NOT_YET
    return "\n".join([speed_tables.render_all(records), origin_with_samples(records)])


def render_invariance_cost(run: Run) -> str:
    """The time of `batch_invariant` over that of the default."""
    try:
        invariant = bars.timed(run, "batch_invariant")
        default = bars.dense_beside(invariant, run)
    except bars.NotMeasured:
        return NOT_YET
    shape, ratio = (
        "T={tokens} H={hidden} V={vocab}".format(**default["shape"]),
        invariant["median_s"] / default["median_s"],
    )
    return (
        f"{shape}, {default['dtype']}: {1e3 * invariant['median_s']:.1f} ms, {times(ratio)} the default's "
        f"{1e3 * default['median_s']:.1f}.\n\n{origin_with_samples([default, invariant])}"
    )


def _block(name: str, page: str, render: Callable[[Run], str], absent: str = NOT_YET, **further: str) -> Block:
    return Block(name, "device", "gpu", page, render, absent, **further)


BLOCKS = (
    _block("gpu", "README.md", render_readme, NOT_ON_A_GPU, plots="benchmarks.device.plots"),
    _block("gpu-bars", "docs/gpu.md", render_bars),
    _block("gpu-findings", "docs/gpu.md", render_findings),
    _block("gpu-tests", "docs/gpu.md", render_tests),
    _block("every-gpu", "docs/benchmarks.md", render_every_speed),
    _block("invariance-cost", "docs/determinism.md", render_invariance_cost),
)
