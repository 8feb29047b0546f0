"""What a run of `benchmarks.device` has found, in tables whose every number comes from its records.

A finding is a function of the run that returns Markdown: "" where its records are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.device import bars
from benchmarks.device.plan import LOGPROBS, LOSS, MIDDLE, SMALL, WHOLE
from benchmarks.device.tiles import COPY
from benchmarks.harness.methods import METHODS
from benchmarks.harness.records import Record, select
from benchmarks.harness.runs import DEVICE, Run, record_of
from benchmarks.harness.speed_tables import label_of
from benchmarks.harness.tables import NOTHING, table, times
from benchmarks.harness.workloads import Workload

WARP = 32  # threads of a warp
HEADS = (LOSS, LOGPROBS, "eager", "eager_compiled", *bars.PEERS)
SMALL_METHODS = (WHOLE, "eager", "eager_compiled", LOSS)


# --- which records ----------------------------------------------------------------------------------------------------


def lines_of(run: Run, field: str) -> list[Record]:
    return [record for record in run[DEVICE] if field in record]


def small_shapes(run: Run) -> dict[Workload, dict[str, Record]]:
    """Return {workload: {method: record with a time}}, sorted, for the workloads where ours has a time."""
    found = {}
    for workload in sorted((*SMALL, MIDDLE), key=lambda workload: (workload.model, workload.tokens)):
        records = {name: record_of(run, name, workload) for name in SMALL_METHODS}
        records = {name: record for name, record in records.items() if record and record["median_s"]}
        if LOSS in records:
            found[workload] = records
    return found


def main_heads(run: Run) -> list[Record]:
    """Return every head that trains a weight, once, at the workload of the bars."""
    records = [record_of(run, name) for name in METHODS if name in HEADS]
    return [record for record in records if record and record["takes"] == "hidden"]


def compared_heads(run: Run) -> list[Record]:
    """Return the heads that have a time and a floor with a time, the fastest in units of its floor first, because each
    process has a floor of its own.
    """
    heads = [record for record in main_heads(run) if record["median_s"] and record["floor_median_s"]]
    return sorted(heads, key=bars.in_floors)


# --- findings ---------------------------------------------------------------------------------------------------------


def products(run: Run) -> str:
    """Return the rates of bare products over the number of rows, with bf16 and with float32 results."""
    found: dict[tuple, dict[str, Record]] = {}
    for record in lines_of(run, "product"):
        if record["median_s"] is not None:
            # The key has rows M and hidden size H, in this order. The largest size of a product is the vocabulary.
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
    """Compare the row kernels, at every number of threads, with a copy."""
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
    """Return the short kernels and the idle time of a step."""
    cells = []
    for record in lines_of(run, "profile"):
        shape, whole, gaps = record["profile"], record["whole_us"], record["gaps"]
        where = f"{label_of(shape.get('method', LOSS))}, {shape['model']}, T={shape['tokens']}"
        shares = (
            f"{us / 1e3:.2f} ({us / whole:.0%})" if whole else NOTHING for us in (record["short_us"], record["idle_us"])
        )
        longest = f"{gaps[0]['us']:.0f} µs behind `{gaps[0]['after'][:40]}`" if gaps else NOTHING
        cells.append((where, record["kernels"], f"{whole / 1e3:.2f}", record["short_kernels"], *shares, longest))
    text = "One call each under the profiler, which slows the host: shares can be compared, milliseconds cannot."
    header = ("step", "kernels and copies", "ms", "under 10 µs", "their ms", "idle ms", "longest gap")
    return _described(text, header, cells)


def demo(run: Run) -> str:
    """Describe the demo's training on the GPU, and its comparisons with the eager loss."""
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


def _described(text: str, header: Sequence[str], cells: list, left: int = 1) -> str:
    """Return a sentence and a table below it, or "" where the table would be empty."""
    return f"{text}\n\n{table(header, cells, left)}" if cells else ""


FINDINGS: dict[str, Callable[[Run], str]] = {
    "Bare products": products,
    "The row kernels": row_kernels,
    "Short kernels and gaps": profiles,
    "A run from beginning to end": demo,
}
