"""The model's tables in Markdown, and the block of docs/roofline.md that `benchmarks.report` writes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from benchmarks.harness.blocks import NOT_YET, Block, origin
from benchmarks.harness.records import Record
from benchmarks.harness.tables import NOTHING, table, times
from benchmarks.harness.workloads import MODELS
from benchmarks.roofline import charges
from benchmarks.roofline.chips import CHIPS, Chip, Figure
from benchmarks.roofline.ours import METHODS
from benchmarks.roofline.predict import Comparison, Prediction, compared, predict
from benchmarks.roofline.work import Problem

GIB = 1 << 30
MODEL, TOKENS = "Qwen3-8B", 8192
CLOSE = 0.02  # a predicted peak of memory is called close if it is no further off than this


def problem_of(model: str = MODEL, tokens: int = TOKENS) -> Problem:
    return Problem(tokens, MODELS[model].hidden, MODELS[model].vocab)


def span(low: float, high: float, digits: int = 2) -> str:
    """Format both ends, or one number where they round to the same."""
    ends = [f"{end:.{digits}f}" for end in sorted((low, high))]
    return ends[0] if ends[0] == ends[1] else "–".join(ends)


# --- the tables of the command ----------------------------------------------------------------------------------------


def method_table(chip: Chip, methods: Sequence[str], problem: Problem) -> str:
    """Render a row per method, each against the floor that it is held to."""
    header = ("method", "TFLOP", "GB moved", "ms", "of its floor", "peak extra GiB", "beyond gradients")
    return table(header, [_row(predict(chip, method, problem)) for method in methods])


def _row(found: Prediction) -> tuple[str, ...]:
    cost = found.cost
    row = (
        METHODS[found.method].label, f"{cost.flops / 1e12:.1f}", f"{cost.moved / 1e9:.0f}",
        span(found.least * 1e3, found.most * 1e3, 1),
    )  # fmt: skip
    if found.floor is None:
        return (*row, NOTHING, NOTHING, NOTHING)
    extra = f"{cost.extra / GIB:.2f}" + ("" if found.fits else ", does not fit")
    return (*row, f"{span(*found.times_floor)}×", extra, f"{(cost.extra - cost.gradients) / GIB:.2f}")


def stage_table(found: Prediction) -> str:
    """Show where the time and the memory of a method go."""
    rows = [
        (
            time.name, f"{stage.flops / 1e12:.1f}", f"{stage.read / 1e9:.1f}", f"{stage.written / 1e9:.1f}",
            span(time.least * 1e3, time.most * 1e3), time.bound, f"{stage.live / GIB:.2f}",
        )
        for stage, time in zip(found.cost.stages, found.stages, strict=True)
    ]  # fmt: skip
    return table(("stage", "TFLOP", "GB read", "GB written", "ms", "bound by", "GiB live"), rows)


# --- the block of the page --------------------------------------------------------------------------------------------


def render(records: Sequence[Record]) -> str:
    """Render the comparison with measurements, the predictions, and the figures and assumptions behind them."""
    return "\n\n".join([
        f"## Prediction beside measurement\n\n{comparison(records)}",
        f"## Predicted times\n\n{predictions()}",
        f"## The chips\n\n{chips()}\n\n{assumed()}",
    ])  # fmt: skip


def comparison(records: Sequence[Record]) -> str:
    """Compare predictions and measurements, in sentences and case by case."""
    rows = compared(records)
    if not rows:
        return NOT_YET
    header = (
        "model", "T", "dtype", "method", "predicted ms", "measured ms", "over the least predicted", "predicted MiB",
        "measured MiB",
    )  # fmt: skip
    return "\n\n".join([
        " ".join(conclusions(rows)),
        "![Predicted stages and measured time of our methods and of plain PyTorch](../bench_results/gpu/roofline.png)",
        table(header, [_compared(row) for row in rows], left=4),
        origin([row.record for row in rows]),
    ])  # fmt: skip


def conclusions(rows: Sequence[Comparison]) -> Iterator[str]:
    """Yield sentences on how good the predictions of time and of memory were."""
    yield (
        f"Of {len(rows)} times measured on {rows[0].prediction.chip.name}, {sum(row.within for row in rows)} lie in "
        f"the predicted range; half take at most {times(statistics.median(row.ratio for row in rows))} the least that "
        "was predicted."
    )
    peaks = [abs(row.peak_off) for row in rows if row.peak_off is not None]
    if peaks:
        close = sum(off <= CLOSE for off in peaks)
        yield (
            f"Of {len(peaks)} peaks of memory, {close} are within {CLOSE:.0%} of the prediction; the furthest is "
            f"{max(peaks):.0%} off."
        )


def _compared(row: Comparison) -> tuple[str, ...]:
    record, found = row.record, row.prediction
    share, peak, milliseconds = record["active_share"], record["peak_extra_bytes"], record["median_s"] * 1e3
    digits = 0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2
    return (
        record["workload"],
        str(record["shape"]["tokens"]),
        record["dtype"],
        METHODS[found.method].label + ("" if share == 1 else f", {share:.0%} of rows active"),
        span(found.least * 1e3, found.most * 1e3, digits),
        f"{milliseconds:.{digits}f}",
        times(row.ratio),
        NOTHING if peak is None else f"{found.cost.extra / 2**20:.0f}",
        NOTHING if peak is None else f"{peak / 2**20:.0f}",
    )


def predictions() -> str:
    """Render the range of milliseconds on every chip, and in brackets what it is of the floor."""
    problem, rows = problem_of(), []
    for name, method in METHODS.items():
        found = [predict(chip, name, problem) for chip in CHIPS.values()]
        rows.append((method.label, *map(_cell, found), f"{found[0].cost.extra / GIB:.1f}"))
    return (
        f"PREDICTED milliseconds (times the floor it is held to) for {MODEL}, T={problem.tokens} H={problem.hidden} "
        f"V={problem.vocab}, bf16, default workspace; not measured:\n\n"
        + table(("method", *CHIPS, "peak extra GiB"), rows)
    )


def _cell(found: Prediction) -> str:
    text = span(found.least * 1e3, found.most * 1e3, 1)
    text += "" if found.floor is None else f" ({span(*found.times_floor)}×)"
    return text if found.fits else f"{text}, does not fit"


def chips() -> str:
    """Render the published figures, each with its source, and the assumed efficiencies with their reasons."""
    header = (
        "chip", "16-bit TFLOP/s", "float32 TFLOP/s", "TB/s", "GB", "cache MiB", "SMs or CUs", "products", "memory",
    )  # fmt: skip
    rows, sources = [], {}
    for chip in CHIPS.values():
        figures = (
            (chip.matrix, 1e12), (chip.vector, 1e12), (chip.bandwidth, 1e12),
            (chip.capacity, 1e9), (chip.cache, 1 << 20), (chip.processors, 1),
        )  # fmt: skip
        cells = [_figure(figure, unit, sources) for figure, unit in figures]
        efficiencies = (chip.matmul_efficiency, chip.memory_efficiency)
        assumed = [f"{each.value:.0%} [{_number(each.source, sources)}]" for each in efficiencies]
        rows.append((chip.name, *cells, *assumed))
    origins = "; ".join(
        f"[{number}] <{source}>" if source.startswith("https:") else f"[{number}] {source}"
        for source, number in sources.items()
    )
    return (
        f"{table(header, rows)}\n\nPublished figures, dense, never those with sparsity. The last two columns are "
        f"**assumptions**: the shares of the published rates that products and copies reach. {origins}."
    )


def _figure(figure: Figure, unit: float, sources: dict[str, int]) -> str:
    return f"{figure.value / unit:g} [{_number(figure.source, sources)}]"


def _number(source: str, sources: dict[str, int]) -> int:
    return sources.setdefault(source, len(sources) + 1)


def assumed() -> str:
    """Say what a call is charged for besides FLOPs and bytes."""
    first, second = charges.TWO_READS[4]
    narrow = sum(charges.TWO_READS[2])
    return (
        f"**Assumptions** too: {charges.LAUNCH * 1e6:g} µs for every kernel, and {charges.SMALL_KERNELS} small ones in "
        f"a call of ours with {charges.SMALL_KERNELS_OF_A_CHUNK} more in a chunk, as in the profiles of docs/gpu.md; "
        f"{charges.READ_BACK * 1e6:g} µs for the count that compaction reads back; and, per logit, {first} + {second} "
        f"instructions of two reads of float32, {narrow:.1f} of bf16, {charges.ONE_READ:g} of one read, of which a "
        f"multiprocessor issues {charges.ISSUED} in a clock at best and {charges.ISSUE_SHARE:.0%} of that at worst: "
        f"{charges.ISSUE_SOURCE}. Clocks are those that the float32 rates imply."
    )


BLOCKS = (
    Block("roofline", "speed", "gpu/speed.jsonl", "docs/roofline.md", render, NOT_YET, "benchmarks.roofline.plots"),
)
