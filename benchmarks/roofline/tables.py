"""The model's tables, as Markdown. Everything predicted says so."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.blocks import Block
from benchmarks.harness.records import Record
from benchmarks.harness.tables import NOTHING, table
from benchmarks.harness.workloads import MODELS
from benchmarks.roofline import charges, measured
from benchmarks.roofline.bars import GIB, LINEAR, bars, span
from benchmarks.roofline.chips import CHIPS, Chip, Figure
from benchmarks.roofline.methods import METHODS, UNPREDICTED
from benchmarks.roofline.peers import PUBLISHED, Published
from benchmarks.roofline.predict import Prediction, predict
from benchmarks.roofline.work import Problem

# the case of the bars
MODEL, TOKENS, CHIP = "Qwen3-8B", 8192, "H200"


def headline() -> Problem:
    return Problem(TOKENS, MODELS[MODEL].hidden, MODELS[MODEL].vocab)


def chips() -> str:
    """The published figures, each with its source, and the assumed efficiencies with their reasons."""
    header = (
        "chip",
        "16-bit TFLOP/s",
        "float32 TFLOP/s",
        "TB/s",
        "GB",
        "cache MiB",
        "SMs or CUs",
        "products",
        "memory",
    )
    rows, sources = [], {}
    for chip in CHIPS.values():
        figures = (
            (chip.matrix, 1e12), (chip.vector, 1e12), (chip.bandwidth, 1e12),
            (chip.capacity, 1e9), (chip.cache, 1 << 20), (chip.processors, 1),
        )  # fmt: skip
        cells = [_figure(figure, unit, sources) for figure, unit in figures]
        efficiencies = (chip.matmul_efficiency, chip.memory_efficiency)
        assumed = [f"{each.share:.0%} [{_number(each.source, sources)}]" for each in efficiencies]
        rows.append((chip.name, *cells, *assumed))
    origins = "; ".join(
        f"[{number}] <{source}>" if source.startswith("https:") else f"[{number}] {source}"
        for source, number in sources.items()
    )
    lines = [
        table(header, rows),
        "",
        "Published figures, dense, never those with sparsity. The last two columns are **assumptions**: the shares of "
        f"the published rates that products and copies reach. {origins}.",
    ]
    return "\n".join(lines)


def _figure(figure: Figure, unit: float, sources: dict[str, int]) -> str:
    return f"{figure.value / unit:g} [{_number(figure.source, sources)}]"


def _number(source: str, sources: dict[str, int]) -> int:
    return sources.setdefault(source, len(sources) + 1)


def chip_table(chip: Chip, methods: Sequence[str], problem: Problem) -> str:
    """Methods down; each against the floor that it is held to."""
    header = ("method", "TFLOP", "GB moved", "ms", "of its floor", "peak extra GiB", "beyond gradients")
    return table(header, [_row(predict(chip, method, problem)) for method in methods])


def _row(found: Prediction) -> tuple[str, ...]:
    cost, extra = found.cost, NOTHING
    if found.floor is not None:
        extra = f"{cost.extra / GIB:.2f}" + ("" if found.fits else ", does not fit")
    return (
        METHODS[found.method].label,
        f"{cost.flops / 1e12:.1f}",
        f"{cost.moved / 1e9:.0f}",
        span(found.least * 1e3, found.most * 1e3, 1),
        NOTHING if found.floor is None else f"{span(*found.times_floor)}×",
        extra,
        NOTHING if found.floor is None else f"{(cost.extra - cost.gradients) / GIB:.2f}",
    )


def stage_table(found: Prediction) -> str:
    """Where the time and the memory go."""
    rows = [
        (
            time.name, f"{stage.flops / 1e12:.1f}", f"{stage.read / 1e9:.1f}", f"{stage.written / 1e9:.1f}",
            span(time.least * 1e3, time.most * 1e3), time.bound, f"{stage.live / GIB:.2f}",
        )
        for stage, time in zip(found.cost.stages, found.stages, strict=True)
    ]  # fmt: skip
    return table(("stage", "TFLOP", "GB read", "GB written", "ms", "bound by", "GiB live"), rows)


def predictions() -> str:
    """The case of the bars on every chip: the range of milliseconds, and of the least what it is of the floor."""
    problem = headline()
    rows = []
    for name, method in METHODS.items():
        found = [predict(chip, name, problem) for chip in CHIPS.values()]
        rows.append((method.label, *(_cell(each) for each in found), f"{found[0].cost.extra / GIB:.1f}"))
    lines = [
        f"PREDICTED milliseconds (times the floor it is held to) for {MODEL}, T={problem.tokens} H={problem.hidden} "
        f"V={problem.vocab}, bf16, default workspace; not measured:",
        "",
        table(("method", *CHIPS, "peak extra GiB"), rows),
        "",
        f"Not predicted: {UNPREDICTED}.",
    ]
    return "\n".join(lines)


def _cell(found: Prediction) -> str:
    text = span(found.least * 1e3, found.most * 1e3, 1)
    text += "" if found.floor is None else f" ({span(*found.times_floor)}×)"
    return text if found.fits else f"{text}, does not fit"


def published() -> str:
    """Heads with rates of their authors, at the shape of the bars, beside ours."""
    header = ("head", "chip", "FLOPs", "TFLOP/s", "ms", "in times of ours", "remark")
    lines = [
        f"PREDICTED for {MODEL}, T={TOKENS}, from the rates at H=4096 that their authors publish, or the time beside "
        "bare products; none of it is measured here:",
        "",
        table(header, [_published(head) for head in PUBLISHED], 2),
    ]
    return "\n".join(lines)


def _published(head: Published) -> tuple[str, ...]:
    problem, chip = headline(), CHIPS[head.chip]
    flops = 2 * head.products * problem.logits * problem.hidden
    if head.rates is None:
        rate, least = NOTHING, predict(chip, "gemms_whole", problem).least
        times = [share * least for share in head.of_floor]
    else:
        rate, times = span(*head.rates, 0), [flops / 1e12 / each for each in head.rates]
    ours = predict(chip, LINEAR, problem)
    milliseconds = span(times[0] * 1e3, times[1] * 1e3, 1)
    ratios = f"{span(min(times) / ours.most, max(times) / ours.least)}×"
    remark = f"{head.remark}, <{head.source}>" if head.remark else f"<{head.source}>"
    return head.label, head.chip, f"{2 * head.products}F", rate, milliseconds, ratios, remark


def assumed() -> str:
    """What a call is charged for besides FLOPs and bytes."""
    first, second = charges.TWO_READS[4]
    narrow = sum(charges.TWO_READS[2])
    clocks = ", ".join(f"{chip.name} {chip.clock / 1e9:.2f}" for chip in CHIPS.values() if chip.clock)
    return (
        f"**Assumptions** too: {charges.LAUNCH * 1e6:g} µs for every kernel, and {charges.SMALL_KERNELS} small ones in "
        f"a call of ours with {charges.SMALL_KERNELS_OF_A_CHUNK} more in a chunk, as in the profiles of docs/gpu.md; "
        f"{charges.READ_BACK * 1e6:g} µs for the count that compaction reads back; and, per logit, {first} + {second} "
        f"instructions of two reads of float32, {narrow:.1f} of bf16, {charges.ONE_READ:g} of one read, of which a "
        f"multiprocessor issues {charges.ISSUED} in a clock at best and {charges.ISSUE.share:.0%} of that at worst: "
        f"{charges.ISSUE.source}. Clocks are those that the float32 rates imply, in GHz: {clocks}."
    )


def verdicts(chip: Chip | None = None) -> str:
    chip = CHIPS[CHIP] if chip is None else chip
    found = bars(chip, headline())
    rows = [(bar.what, bar.bound, f"{span(bar.low, bar.high, 3)}×", f"predicted {bar.verdict}") for bar in found]
    lines = [f"PREDICTED on {chip.name} for {MODEL}, bf16, T={TOKENS} unless said otherwise; not measured:", ""]
    lines.append(table(("what", "bar", "predicted", ""), rows))
    for bar in found:
        lines += ["", f"**{bar.what}.** {' '.join(bar.why)}"]
    return "\n".join(lines)


def comparison(records: Sequence[Record]) -> str:
    """Prediction beside measurement, for every device there is."""
    lines = []
    for chip, rows in measured.compared(records):
        record = rows[0].record
        shape = "T={tokens} H={hidden} V={vocab}".format(**record["shape"])
        lines += [f"{chip.name}, {shape}, {record['dtype']}, {measured.inputs_of(record)} inputs. {_basis(chip)}", ""]
        header = ("method", "predicted ms", "measured ms", "over the least predicted", "predicted MiB", "measured MiB")
        lines += [table(header, [_compared(row) for row in rows]), ""]
    return "\n".join(lines).rstrip() or "No measurement of a known chip is there yet."


def _basis(chip: Chip) -> str:
    if chip.matrix is not None:
        return "Predicted from published rates and the assumed efficiencies."
    text = f"Predicted from {chip.vector.value / 1e9:.0f} GFLOP/s, measured in the same run: {chip.vector.source}."
    if chip.bandwidth is None:
        text += " No copy was measured there, so bytes cost nothing in the prediction: it is of the products alone."
    return f"{text} TRL's head is predicted as it is on a GPU; here it folds its tiles in eager PyTorch."


def _compared(row: measured.Comparison) -> tuple[str, ...]:
    record, found = row.record, row.prediction
    share = record["active_share"]
    peak, milliseconds = record["peak_extra_bytes"], record["median_s"] * 1e3
    digits = 0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2
    return (
        METHODS[found.method].label + ("" if share == 1 else f", {share:.0%} of rows active"),
        span(found.least * 1e3, found.most * 1e3, digits),
        f"{milliseconds:.{digits}f}",
        f"{row.ratio:.2f}×",
        f"{found.cost.extra / 2**20:.0f}",
        NOTHING if peak is None else f"{peak / 2**20:.0f}",
    )


def render(records: Sequence[Record]) -> str:
    """The page's main block: predictions, bars, these measurements beside their predictions, and the assumptions."""
    return "\n\n".join([
        f"## Predicted times\n\n{predictions()}",
        f"## The bars, predicted\n\n{verdicts()}",
        f"## Heads with published rates\n\n{published()}",
        f"## Prediction beside measurement\n\n{comparison(records)}",
        f"## The chips\n\n{chips()}\n\n{assumed()}",
    ])  # fmt: skip


BLOCKS = (Block("roofline", "speed", "cpu.jsonl", "docs/roofline.md", render),)
