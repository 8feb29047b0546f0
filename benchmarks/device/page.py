"""A run of `benchmarks.device` in Markdown: its summary.md, and what `benchmarks.report` writes into the pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks.device import bars
from benchmarks.device.findings import FINDINGS, PICTURES, main_heads, small_shapes, timed
from benchmarks.harness import speed_tables
from benchmarks.harness.blocks import NOT_YET, Block, origin, origin_with_samples
from benchmarks.harness.measure import largest_error
from benchmarks.harness.records import Record
from benchmarks.harness.runs import DEVICE, MAIN, SPEED, Run, once
from benchmarks.harness.speed_tables import LABELS
from benchmarks.harness.tables import gibibytes, table, times

NOT_ON_A_GPU = """\
**Not measured yet: anything on a GPU.** The kernels are compiled ahead of time for four architectures (no register
spill, 128-bit loads and stores) and run in the interpreter against float64, but no GPU has run this code yet: GPU
correctness, speed and memory are open. `make bench` on a machine with a GPU fills this part in."""


def gpus(run: Run) -> str:
    names = {record["device"]["gpu"]: None for record in run[SPEED] + run[DEVICE] if "gpu" in record.get("device", {})}
    return " and an ".join(names)


def summary(run: Run, short: bool = False) -> str:
    """The bars, the tests and the parts of a run; the short one has only the parts that have not come to their end, and
    no findings.
    """
    sourced = [record for record in run[DEVICE] if "device" in record]
    title = "Device unknown: the part `environment` has not run"
    if sourced:
        name = sourced[0]["device"].get("gpu", "A rehearsal on a CPU: numbers mean nothing")
        title = "{}, torch {torch}, triton {triton}".format(name, **sourced[0]["versions"])
    ends = [r for r in run[DEVICE] if "end" in r and not (short and r["end"] == "done")]
    rows = [(r["part"], r["end"], f"{r['seconds']:.0f} of {r['box']:.0f} s") for r in ends]
    sections = {"Bars": bar_table(run), "Tests": "\n".join(tests(run))}
    sections["Parts"] = table(("part", "end", "time"), rows, left=3) if rows else ""
    if not short:
        sections |= findings(run)
    return f"# {title}\n\n" + "".join(f"## {name}\n\n{text}\n\n" for name, text in sections.items() if text)


def findings(run: Run) -> dict[str, str]:
    """Title -> Markdown, empty where the records are missing."""
    return {title: "\n".join(find(run)).strip() for title, find in FINDINGS.items()}


def bar_table(run: Run) -> str:
    rows = [
        (v.bar.what, f"{'≥' if v.bar.at_least else '≤'} {v.bar.form.format(v.bar.limit)}", v.number, v.word, v.remark)
        for v in bars.verdicts(run)
    ]
    return table(("bar", "limit", "measured", "verdict", "remark"), rows, left=5)


def tests(run: Run) -> Iterator[str]:
    """The counts of every run of tests, and the names of those that failed."""
    for record in run[DEVICE]:
        if "tests" in record:
            end = f", exit {record['exit']}" if record["finished"] else ", stopped before the end"
            counts = f"{record['passed']} passed, {len(record['failed'])} failed, {record['skipped']} skipped"
            yield f"* `pytest {record['tests']}`: {counts}{end}"
            yield from (f"    * failed: `{name}`" for name in record["failed"])
        if "memcheck" in record:
            yield f"* compute-sanitizer: {record['memcheck']}, exit {record['exit']}"


# --- docs/gpu.md ------------------------------------------------------------------------------------------------------


def render_bars(run: Run) -> str:
    """How many bars are met, and every bar beside its number."""
    if not run[DEVICE] and not run[SPEED]:
        return NOT_YET
    words = [verdict.word for verdict in bars.verdicts(run)]
    counts = f"{words.count('PASS')} of {len(words)} bars are met, {words.count('MISS')} are missed"
    counts += f" and {words.count('not measured')} could not be measured"
    return "\n\n".join([f"**On an {gpus(run)}, {counts}.**", bar_table(run), run_origin(run)])


def run_origin(run: Run) -> str:
    return origin([record for records in run.values() for record in records if "versions" in record])


def render_tests(run: Run) -> str:
    return "\n".join(tests(run)) or NOT_YET


def render_findings(run: Run) -> str:
    """Every finding under its title, with its picture."""
    if not any(run.values()):
        return NOT_YET
    parts = []
    for title, text in findings(run).items():
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
    setting = speed_tables.setting_of(heads[0])
    floors = [r for r in once(run[SPEED]) if r["method"] == bars.WHOLE and speed_tables.setting_of(r) == setting]
    records = sorted(floors + heads, key=lambda record: list(LABELS).index(record["method"]))
    words = [verdict.word for verdict in bars.verdicts(run)]
    return "\n".join([
        " ".join([f"**On an {gpus(run)}**", *_headline(heads), *_where_eager_wins(run)]),
        f"{words.count('PASS')} of the {len(words)} bars are met: [docs/gpu.md](docs/gpu.md) has each with its number, "
        "what the runs decide, and pictures.",
        "",
        *speed_tables.section(records),
        origin_with_samples(records),
    ])  # fmt: skip


def _headline(heads: Sequence[Record]) -> Iterator[str]:
    """Our time at the workload of the bars, and the two heads that a reader has at hand."""
    found = {record["method"]: record for record in heads if record["median_s"] and record["floor_median_s"]}
    ours = found.get(bars.LOSS)
    if ours is None:
        return
    floors, shape = bars.in_floors(ours), "T={tokens} H={hidden} V={vocab}".format(**ours["shape"])
    yield (
        f"one forward and backward of `linear_policy_loss` at {shape} takes {1e3 * ours['median_s']:.1f} ms, "
        f"{times(floors)} the bare matrix products, with {gibibytes(ours['peak_beyond_gradients_bytes'])} beyond the "
        "gradients."
    )
    for name in ("trl", "eager_compiled"):
        if name in found:
            yield (
                f"{LABELS[name][0].upper()}{LABELS[name][1:]} takes {times(bars.in_floors(found[name]) / floors)} its "
                f"time with {gibibytes(found[name]['peak_beyond_gradients_bytes'])}, its gradients "
                f"{largest_error(found[name]):.1%} off."
            )


def _where_eager_wins(run: Run) -> Iterator[str]:
    slower = [
        f"{model} T={tokens} ({1e3 * methods['eager']['median_s']:.2f} against "
        f"{1e3 * methods[bars.LOSS]['median_s']:.2f} ms)"
        for (model, tokens), methods in sorted(small_shapes(run).items())
        if "eager" in methods and methods["eager"]["median_s"] < methods[bars.LOSS]["median_s"]
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
    invariant = timed(run, "ours").get((MAIN.model, MAIN.tokens), {}).get("batch_invariant")
    try:
        default = invariant and bars.dense_beside(invariant, run[SPEED])
    except bars.NotMeasured:
        default = None
    if default is None:
        return NOT_YET
    shape = "T={tokens} H={hidden} V={vocab}".format(**default["shape"])
    return (
        f"{shape}, {default['dtype']}: {1e3 * invariant['median_s']:.1f} ms, "
        f"{times(invariant['median_s'] / default['median_s'])} the default's {1e3 * default['median_s']:.1f}.\n\n"
        + origin_with_samples([default, invariant])
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
