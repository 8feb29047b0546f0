"""A run of `benchmarks.device` in Markdown: what `benchmarks.report` writes into README.md and the pages of docs/."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks.device import bars
from benchmarks.device import summary as device_summary
from benchmarks.device.findings import beyond_gradients, findings, main_heads, small_shapes, timed
from benchmarks.device.parts import DEVICE, INVARIANCE, MAIN, PRECISION, SPEED
from benchmarks.device.results import Run, once
from benchmarks.harness.blocks import NOT_YET, Block, origin, origin_with_samples
from benchmarks.harness.records import Record
from benchmarks.harness.tables import times, two_figures
from benchmarks.invariance import broken
from benchmarks.invariance import render as invariance_tables
from benchmarks.precision import tables as precision_tables
from benchmarks.sparsity import tables as sparsity_tables
from benchmarks.speed import tables as speed_tables
from benchmarks.speed.tables import LABELS, largest_error

NOT_ON_A_GPU = """\
**Not measured yet: anything on a GPU.** The kernels are compiled ahead of time for four architectures (no register
spill, 128-bit loads and stores) and run in the interpreter against float64, but no GPU has run this code yet: GPU
correctness, speed and memory are open. `make bench` on a machine with a GPU fills this part in."""
WORDS = {"PASS": "Met", "MISS": "Missed", "not measured": "Not measured"}


def gpus(run: Run) -> str:
    names = {record["device"]["gpu"]: None for record in run[SPEED] + run[DEVICE] if "gpu" in record.get("device", {})}
    return " and an ".join(names)


def render_readme(run: Run) -> str:
    """A sentence, the heads at the workload of the bars, and where the rest is."""
    heads = main_heads(run)
    floors = [r for r in once(run[SPEED]) if r["method"] == bars.WHOLE and same_setting(r, heads)]
    records = sorted(floors + heads, key=lambda record: list(LABELS).index(record["method"]))
    if not any(record["median_s"] for record in heads):
        return NOT_YET
    verdicts = bars.verdicts(run[SPEED], run[DEVICE])
    met = sum(verdict.word == "PASS" for verdict in verdicts)
    return "\n".join([
        " ".join([f"**On an {gpus(run)}**", *_headline(heads), *_where_eager_wins(run)]),
        f"{met} of the {len(verdicts)} bars are met: [docs/gpu.md](docs/gpu.md) has each with its number, what the "
        "runs decide, and pictures.",
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
        f"{times(floors)} the bare matrix products, with {beyond_gradients(ours)} beyond the gradients."
    )
    for name in ("trl", "eager_compiled"):
        if name in found:
            yield (
                f"{LABELS[name][0].upper()}{LABELS[name][1:]} takes {times(bars.in_floors(found[name]) / floors)} its "
                f"time with {beyond_gradients(found[name])}, its gradients {largest_error(found[name]):.1%} off."
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


def same_setting(record: Record, heads: Sequence[Record]) -> bool:
    return bool(heads) and speed_tables.setting_of(record) == speed_tables.setting_of(heads[0])


def render_bars(run: Run) -> str:
    """What came out, in words and bar by bar."""
    verdicts = bars.verdicts(run[SPEED], run[DEVICE])
    if not run[DEVICE] and not run[SPEED]:
        return NOT_YET
    words = [verdict.word for verdict in verdicts]
    counts = f"{words.count('PASS')} of {len(verdicts)} bars are met, {words.count('MISS')} are missed"
    counts += f" and {words.count('not measured')} could not be measured"
    sentences = [
        f"* {name}: "
        + "; ".join(v.bar.what + (f" ({v.number})" if v.number != "–" else "") for v in verdicts if v.word == word)
        + "."
        for word, name in WORDS.items()
        if word in words
    ]
    lines = [f"**On an {gpus(run)}, {counts}.**", "", *sentences, "", *device_summary.bars(run[SPEED], run[DEVICE])]
    return "\n".join([*lines, "", run_origin(run)])


def run_origin(run: Run) -> str:
    """Of all that has device, versions and commit."""
    return origin([record for records in run.values() for record in records if "versions" in record])


def render_findings(run: Run) -> str:
    return findings(run) if any(run.values()) else NOT_YET


def render_tests(run: Run) -> str:
    """Tests by name where they failed, and the promises that another run of numbers checks."""
    lines = [
        *device_summary.tests(run[DEVICE]),
        *(f"* batch invariance: {promises(run[INVARIANCE])}" for _ in run[INVARIANCE][:1]),
        *(f"* precision: {precision_bars(run[PRECISION])}" for _ in run[PRECISION][:1]),
    ]
    return "\n".join(lines) or NOT_YET


def promises(records: Sequence[Record]) -> str:
    """A sentence about what `invariance.broken` finds."""
    wrong = [record for record in records if broken(record)]
    dtypes = ", ".join(dict.fromkeys(record["dtype"] for record in records))
    if not wrong:
        return f"every promise holds in {len(records)} cases ({dtypes})."
    cases = "; ".join(
        f"`{r['method']}` in {r['dtype']}, {r['variation']}, T={{tokens}} H={{hidden}} V={{vocab}}".format(**r["shape"])
        + f", bits changed in {_changed(r)} of {r['rows']} rows"
        for r in wrong
    )
    return f"**a promise is broken in {len(wrong)} of {len(records)} cases ({dtypes})**: {cases}."


def _changed(record: Record) -> str:
    """How many rows, by what changed in them; of a change of dW alone there is no row."""
    return ", ".join(f"{name} of {count}" for name, count in record["changed"].items() if count) or "dW, in none"


def precision_bars(records: Sequence[Record]) -> str:
    """A sentence about the bars of the default path that are not met."""
    found = precision_tables.of_kind(records, "bar")
    missed: dict[str, list[str]] = {}
    labels = precision_tables.labels_of(records)
    for record in found:
        if not record["met"]:
            value, bound = (two_figures(record[name]) for name in ("value", "bound"))
            numbers = f"{precision_tables.BARS[record['bar']]} {value} > {bound}"
            missed.setdefault(labels[record["regime"]], []).append(numbers)
    if not missed:
        return f"all {len(found)} bars are met."
    count = sum(map(len, missed.values()))
    regimes = "; ".join(f"{label}: {', '.join(numbers)}" for label, numbers in missed.items())
    return f"**{count} of {len(found)} bars are not met**: {regimes}."


# --- parts of other pages ---------------------------------------------------------------------------------------------


def render_every_speed(run: Run) -> str:
    """Every table but those of sparse gradients, which have their own page."""
    records = once([record for record in run[SPEED] if record["part"] != "sparse"])
    if not any(record["median_s"] for record in records):
        return NOT_YET
    return "\n".join([speed_tables.render_all(records), origin_with_samples(records)])


def render_sparse_speed(run: Run) -> str:
    records = [record for record in run[SPEED] if record["part"] == "sparse"]
    if not sparsity_tables.by_kind(records):
        return NOT_YET
    absent = dict.fromkeys(
        f"{speed_tables.KINDS[r['inputs']]} ({r['status']})" for r in records
        if r["method"] == bars.SPARSE and r["median_s"] is None
    )  # fmt: skip
    lines = [*sparsity_tables.speed(records), ""]
    lines += [f"Without a time: {'; '.join(absent)}.", ""] if absent else []
    return "\n".join([*lines, origin_with_samples(records)])


def render_invariance_cost(run: Run) -> str:
    """The time of `batch_invariant` over that of the default."""
    found = timed(run, part="ours").get((MAIN.model, MAIN.tokens), {})
    if "batch_invariant" not in found:
        return NOT_YET
    invariant = found["batch_invariant"]
    try:
        default = bars.dense_beside(invariant, run[SPEED])
    except bars.NotMeasured:
        return NOT_YET
    return (
        "T={tokens} H={hidden} V={vocab}, ".format(**default["shape"])
        + f"{default['dtype']}: {1e3 * invariant['median_s']:.1f} ms, "
        f"{times(invariant['median_s'] / default['median_s'])} the default's {1e3 * default['median_s']:.1f}.\n\n"
        + origin_with_samples([default, invariant])
    )


def render_precision(run: Run) -> str:
    """The bars of the default path, and the mismatch with an engine that has an fp8 head."""
    records = run[PRECISION]
    if not precision_tables.of_kind(records, "bar"):
        return NOT_YET
    sentence = f"Of the default path, {precision_bars(records)}"
    regimes, done = precision_tables.labels_of(records), {r["regime"] for r in precision_tables.of_kind(records, "bar")}
    cut = [label for name, label in regimes.items() if name not in done]
    return "\n\n".join([
        sentence,
        *([f"The run ended before: {', '.join(cut)}."] if cut else []),
        precision_tables.render_bars(records),
        "Mismatch between engines and trainers, mean (99th percentile) of |r - 1|:",
        precision_tables.render_mismatch(records),
        origin(precision_tables.of_kind(records, "run")),
    ])  # fmt: skip


def render_invariance(run: Run) -> str:
    if not run[INVARIANCE]:
        return NOT_YET
    promised = f"With `batch_invariant` and run to run, {promises(run[INVARIANCE])}"
    return f"{promised}\n\n{invariance_tables(run[INVARIANCE])}"


def _block(name: str, page: str, render: Callable[[Run], str], absent: str = NOT_YET, **further: str) -> Block:
    return Block(name, "device", "gpu", page, render, absent, **further)


BLOCKS = (
    _block("gpu", "README.md", render_readme, NOT_ON_A_GPU, plots="benchmarks.device.plots"),
    _block("gpu-bars", "docs/gpu.md", render_bars),
    _block("gpu-findings", "docs/gpu.md", render_findings),
    _block("gpu-tests", "docs/gpu.md", render_tests),
    _block("every-gpu", "docs/benchmarks.md", render_every_speed),
    _block("sparse-gpu", "docs/sparse.md", render_sparse_speed),
    _block("invariance-gpu", "docs/determinism.md", render_invariance),
    _block("invariance-cost", "docs/determinism.md", render_invariance_cost),
    _block("precision-gpu", "docs/precision.md", render_precision),
)
