"""What a run of `benchmarks.device` has found, in tables whose every number comes from its records.

A finding is a function of the run that returns Markdown: "" where its records are missing.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.device import bars
from benchmarks.device.plan import FROZEN, LOGPROBS, LOSS, MIDDLE, SMALL, WHOLE
from benchmarks.device.tiles import COPY
from benchmarks.harness.measure import largest_error
from benchmarks.harness.records import Record, select
from benchmarks.harness.runs import DEVICE, SPEED, Run, record_of
from benchmarks.harness.speed_tables import LABELS, label
from benchmarks.harness.tables import NOTHING, gibibytes, table, times
from benchmarks.harness.workloads import Workload

WARP = 32  # threads
HEADS = (LOSS, LOGPROBS, "eager", "eager_compiled", *bars.PEERS)
SMALL_METHODS = (WHOLE, "eager", "eager_compiled", LOSS)


# --- which records ----------------------------------------------------------------------------------------------------


def lines_of(run: Run, field: str) -> list[Record]:
    return [record for record in run[DEVICE] if field in record]


def small_shapes(run: Run) -> dict[Workload, dict[str, Record]]:
    """Workload -> method -> its record with a time, sorted, where ours has a time."""
    found = {}
    for workload in sorted((*SMALL, MIDDLE), key=lambda workload: (workload.model, workload.tokens)):
        records = {name: record_of(run, name, workload) for name in SMALL_METHODS}
        records = {name: record for name, record in records.items() if record and record["median_s"]}
        if LOSS in records:
            found[workload] = records
    return found


def main_heads(run: Run) -> list[Record]:
    """Every head that trains a weight, once, at the workload of the bars."""
    records = [record_of(run, name) for name in LABELS if name in HEADS]
    return [record for record in records if record and record["takes"] == "hidden"]


def compared_heads(run: Run) -> list[Record]:
    """Those that have a time beside that of their floor, the fastest first: each process has a floor of its own."""
    heads = [record for record in main_heads(run) if record["median_s"] and record["floor_median_s"]]
    return sorted(heads, key=bars.in_floors)


# --- findings ---------------------------------------------------------------------------------------------------------


def products(run: Run) -> str:
    """The rates of bare products over the number of rows, with bf16 and with float32 results."""
    found: dict[tuple, dict[str, Record]] = {}
    for record in lines_of(run, "product"):
        if record["median_s"] is not None:
            # Rows M and hidden size H, in this order: what a product's sizes are besides the vocabulary, the largest.
            sizes = record["shape"].values()
            key = record["product"], *(size for size in sizes if size != max(sizes))
            found.setdefault(key, {})[record["out"]] = record
    cells = []
    for key, outs in sorted(found.items()):
        narrow, wide = outs.get("bfloat16"), outs.get("float32")
        rates = (f"{record['TFLOP/s']:.0f}" if record else NOTHING for record in (narrow, wide))
        cells.append((*key, *rates, times(wide["median_s"] / narrow["median_s"]) if narrow and wide else NOTHING))
    header = ("product", "rows M", "H", "bf16, TFLOP/s", "float32, TFLOP/s", "float32's time")
    return _described("Float32 results are logits, and a dW that is added to a float32 buffer.", header, cells)


def row_kernels(run: Run) -> str:
    """The row kernels by themselves at every number of threads, beside a copy."""
    cells, rows = [], [record for record in lines_of(run, "row_kernel") if record["TB/s"] is not None]
    for logits in ("float32", "bfloat16"):
        records = sorted(select(rows, logits=logits), key=lambda record: record["row_kernel"])
        copies = select(records, row_kernel=COPY)
        for record in records if copies else ():
            name = record["row_kernel"] + (", in use then" if record["chosen"] else "")
            threads = WARP * record["tile"]["num_warps"] if record["tile"] else NOTHING
            rate, share = record["TB/s"], record["TB/s"] / copies[-1]["TB/s"]
            cells.append((name, logits, threads, f"{1e3 * record['median_s']:.3f}", f"{rate:.2f}", f"{share:.0%}"))
    text = (
        "{rows} rows of {vocab} logits; one read and one write of the logits are counted. Float32 logits have "
        "gradients in bf16, and the gradients of bf16 logits go over the logits."
    )
    header = ("kernel", "logits", "threads to a row", "ms", "TB/s", "of a copy's")
    return _described(text.format(**rows[0]["shape"]) if cells else "", header, cells, left=2)


def profiles(run: Run) -> str:
    """Short kernels and idle time of a step."""
    cells = []
    for record in lines_of(run, "profile"):
        shape, whole, gaps = record["profile"], record["whole_us"], record["gaps"]
        where = f"{LABELS[shape.get('method', LOSS)]}, {shape['model']}, T={shape['tokens']}"
        shares = (
            f"{us / 1e3:.2f} ({us / whole:.0%})" if whole else NOTHING for us in (record["short_us"], record["idle_us"])
        )
        longest = f"{gaps[0]['us']:.0f} µs behind `{gaps[0]['after'][:40]}`" if gaps else NOTHING
        cells.append((where, record["kernels"], f"{whole / 1e3:.2f}", record["short_kernels"], *shares, longest))
    text = "One call each under the profiler, which slows the host: shares can be compared, milliseconds cannot."
    header = ("step", "kernels and copies", "ms", "under 10 µs", "their ms", "idle ms", "longest gap")
    return _described(text, header, cells)


def small_models(run: Run) -> str:
    """Ours against eager and compiled eager, and the floor."""
    cells = []
    for workload, methods in small_shapes(run).items():
        medians = (methods[name]["median_s"] if name in methods else None for name in SMALL_METHODS)
        milliseconds = (NOTHING if median is None else f"{1e3 * median:.2f}" for median in medians)
        ours = methods[LOSS]
        over = times(ours["median_s"] / ours["floor_median_s"]) if ours["floor_median_s"] else NOTHING
        cells.append((workload.model, workload.tokens, *milliseconds, over))
    header = ("model", "T", "three bare products, ms", "eager", "compiled eager", "`linear_policy_loss`", "× its floor")
    return _described("", header, cells)


def heads(run: Run) -> str:
    """Every head at the workload of the bars."""
    found = compared_heads(run)
    ours = select(found, method=LOSS)
    if not ours or len(found) < 2:
        return ""
    cells = []
    for record in found:
        floors, error = bars.in_floors(record), largest_error(record)
        relative = times(floors / bars.in_floors(ours[0]))
        memory = gibibytes(record["peak_beyond_gradients_bytes"])
        cells.append((label(record), times(floors), relative, memory, NOTHING if error is None else f"{error:.1%}"))
    header = ("head", "× three bare products", "× `linear_policy_loss`", "beyond the gradients", "gradient error")
    absent = [f"{label(record)} ({record['status']})" for record in main_heads(run) if record["median_s"] is None]
    return table(header, cells) + (f"\n\nWithout a time: {'; '.join(absent)}." if absent else "")


def memory(run: Run) -> str:
    """Peaks over T beside what is allowed."""
    methods = (LOSS, FROZEN)
    peaks = [r for r in select(run[SPEED], part="memory") if r["peak_beyond_gradients_bytes"] is not None]
    cells = []
    for tokens in sorted({record["shape"]["tokens"] for record in peaks}):
        row = [f"{tokens:,}"]
        for name in methods:
            found = [r for r in select(peaks, method=name) if r["shape"]["tokens"] == tokens]
            sizes = (found[-1]["peak_beyond_gradients_bytes"], bars.allowance(found[-1])) if found else (None, None)
            row += map(gibibytes, sizes)
        cells.append(row)
    header = ("T", *(f"{LABELS[name]}{what}" for name in methods for what in ("", ": allowed")))
    return _described("The peak beyond inputs and gradients, and what the bars allow.", header, cells, left=0)


def demo(run: Run) -> str:
    """The demo's training on the GPU, and its comparisons with the eager loss."""
    lines = []
    for record in lines_of(run, "demo"):
        before, after = record["demo"]["before"], record["demo"]["after"]
        gains = ", ".join(f"{name} {before[name]:.1%} before and {after[name]:.1%} after" for name in before)
        lines.append("the demo, {steps} steps of {objective} in {seconds:.0f} s: {gains}".format(**record, gains=gains))
    for record in lines_of(run, "comparison"):
        eager, fused = (1e3 * seconds for seconds in record["seconds"])
        larger, smaller = (size / 2**20 for size in record["peak_bytes"])
        milliseconds = f"fused {fused:.2f} ms against eager's {eager:.2f}"
        lines.append(f"{record['comparison']}: {milliseconds}; peaks {smaller:.0f} and {larger:.0f} MiB")
    return "\n".join(f"* {line}" for line in lines)


def _described(text: str, header: tuple[str, ...], cells: list, left: int = 1) -> str:
    """A sentence and a table below it, or "" where the table would be empty."""
    return f"{text}\n\n{table(header, cells, left)}".strip() if cells else ""


FINDINGS: dict[str, Callable[[Run], str]] = {
    "Bare products": products,
    "The row kernels": row_kernels,
    "Short kernels and gaps": profiles,
    "Small models and batches": small_models,
    "Other heads": heads,
    "Memory over T": memory,
    "A run from beginning to end": demo,
}
# These findings have a picture: its name in bench_results/gpu_<name>.png, and what it shows.
PICTURES = {
    "Small models and batches": ("small", "Time per token and share of the floor over T for small models"),
    "Other heads": ("peers", "Time and peak memory of every head at the workload of the bars"),
}
