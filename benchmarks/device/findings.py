"""What a run of `benchmarks.device` has found, in tables and sentences whose every number comes from its records.

A finding is a function of the run that yields lines of Markdown. It yields none where its records are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.device import bars
from benchmarks.device.tiles import COPY
from benchmarks.harness.measure import largest_error
from benchmarks.harness.records import Record
from benchmarks.harness.runs import DEVICE, MAIN, SPEED, Run, once
from benchmarks.harness.speed_tables import LABELS, label
from benchmarks.harness.tables import NOTHING, gibibytes, table, times

WARP = 32  # threads


def lines_of(run: Run, field: str) -> list[Record]:
    return [record for record in run[DEVICE] if field in record]


def timed(run: Run, part: str) -> dict[tuple[str, int], dict[str, Record]]:
    """(model, T) -> method -> the part's record with a time, of trained-looking bf16 inputs with every row active."""
    wanted = {"part": part, "inputs": "trained", "dtype": "bfloat16", "active_share": 1.0}
    found: dict[tuple[str, int], dict[str, Record]] = {}
    for record in run[SPEED]:
        if wanted.items() <= record.items() and record["median_s"] is not None:
            found.setdefault((record["workload"], record["shape"]["tokens"]), {})[record["method"]] = record
    return found


def products(run: Run) -> Iterator[str]:
    """The rates of bare products over the number of rows, with bf16 and with float32 results."""
    found: dict[tuple[str, int, int], dict[str, Record]] = {}
    for record in lines_of(run, "product"):
        if record["median_s"] is not None:
            shape, name = record["shape"], record["product"]
            rows, width = {
                "logits": (shape["rows"], shape["inner"]),
                "dX": (shape["rows"], shape["columns"]),
                "dW": (shape["inner"], shape["columns"]),
            }[name]
            found.setdefault((name, rows, width), {})[record["out"]] = record
    if not found:
        return
    rates = {key[1]: r["bfloat16"]["TFLOP/s"] for key, r in found.items() if key[0] == "dX" and "bfloat16" in r}
    if rates:
        best, worst = max(rates, key=rates.get), min(rates, key=rates.get)
        yield (
            f"dX is fastest at M={best} with {rates[best]:.0f} TFLOP/s and slowest at M={worst} with "
            f"{rates[worst]:.0f}, {1 - rates[worst] / rates[best]:.0%} less. Float32 results are logits, and a dW that "
            "is added to a float32 buffer."
        )
    cells = []
    for (name, rows, width), outs in sorted(found.items()):
        narrow, wide = outs.get("bfloat16"), outs.get("float32")
        ratio = times(wide["median_s"] / narrow["median_s"]) if narrow and wide else NOTHING
        speeds = (f"{record['TFLOP/s']:.0f}" if record else NOTHING for record in (narrow, wide))
        cells.append((name, str(rows), str(width), *speeds, ratio))
    yield from ("", table(("product", "rows M", "H", "bf16, TFLOP/s", "float32, TFLOP/s", "float32's time"), cells))


def row_kernels(run: Run) -> Iterator[str]:
    """The row kernels by themselves at every number of threads, beside a copy; and the whole call on ready logits."""
    cells = []
    rows = [record for record in lines_of(run, "row_kernel") if record["TB/s"] is not None]
    rows.sort(key=lambda record: record["row_kernel"])
    for logits in ("float32", "bfloat16"):
        copies = [r["TB/s"] for r in rows if (r["logits"], r["row_kernel"]) == (logits, COPY)]
        if copies:
            cells += [
                (f"{record['row_kernel']}{', in use then' if record['chosen'] else ''}", logits,
                 str(WARP * record["tile"]["num_warps"]) if record["tile"] else NOTHING,
                 f"{1e3 * record['median_s']:.3f}", f"{record['TB/s']:.2f}", f"{record['TB/s'] / copies[-1]:.0%}")
                for record in rows if record["logits"] == logits
            ]  # fmt: skip
    if not cells:
        return
    yield (
        "{rows} rows of {vocab} logits; one read and one write of the logits are counted. Float32 logits have "
        "gradients in bf16, and the gradients of bf16 logits go over the logits.".format(**rows[0]["shape"])
    )
    yield from ("", table(("kernel", "logits", "threads to a row", "ms", "TB/s", "of a copy's"), cells, left=2), "")
    call = timed(run, "ours").get((MAIN.model, MAIN.tokens), {}).get("policy_loss")
    if call and call["floor_median_s"]:
        whole, floor = call["median_s"], call["floor_median_s"]
        yield (
            f"The whole call of `policy_loss` at T={MAIN.tokens} takes {1e3 * whole:.2f} ms, {times(whole / floor)} a "
            f"copy of the logits ({1e3 * floor:.2f} ms)."
        )


def profiles(run: Run) -> Iterator[str]:
    """Short kernels and idle time of a step."""
    cells = []
    for record in lines_of(run, "profile"):
        shape, whole, gaps = record["profile"], record["whole_us"], record["gaps"]
        where = f"{LABELS[shape.get('method', bars.LOSS)]}, {shape['model']}, T={shape['tokens']}"
        shares = (
            f"{us / 1e3:.2f} ({us / whole:.0%})" if whole else NOTHING for us in (record["short_us"], record["idle_us"])
        )
        longest = f"{gaps[0]['us']:.0f} µs behind `{gaps[0]['after'][:40]}`" if gaps else NOTHING
        cells.append((where, record["kernels"], f"{whole / 1e3:.2f}", record["short_kernels"], *shares, longest))
    if cells:
        yield "One call each under the profiler, which slows the host: shares can be compared, milliseconds cannot."
        header = ("step", "kernels and copies", "ms", "under 10 µs", "their ms", "idle ms", "longest gap")
        yield from ("", table(header, cells))


def small_models(run: Run) -> Iterator[str]:
    """Ours against eager and compiled eager, and the floor."""
    found = small_shapes(run)
    if not found:
        return
    for name in ("eager", "eager_compiled"):
        ratios = {k: m[name]["median_s"] / m[bars.LOSS]["median_s"] for k, m in found.items() if name in m}
        if ratios:
            wins, worst = sum(value >= 1 for value in ratios.values()), min(ratios, key=ratios.get)
            yield (
                f"* `linear_policy_loss` is at least as fast as {LABELS[name]} at {wins} of {len(ratios)} shapes. At "
                f"the worst, {worst[0]} T={worst[1]}, {name.replace('_', ' ')} takes {times(ratios[worst])} its time."
            )
    cells = []
    for (model, tokens), methods in sorted(found.items()):
        ours = methods[bars.LOSS]
        over = times(ours["median_s"] / ours["floor_median_s"]) if ours["floor_median_s"] else NOTHING
        columns = (methods.get(name) for name in (bars.WHOLE, "eager", "eager_compiled", bars.LOSS))
        milliseconds = (NOTHING if record is None else f"{1e3 * record['median_s']:.2f}" for record in columns)
        cells.append((model, str(tokens), *milliseconds, over))
    header = ("model", "T", "three bare products, ms", "eager", "compiled eager", "`linear_policy_loss`", "× its floor")
    yield from ("", table(header, cells))


def small_shapes(run: Run) -> dict[tuple[str, int], dict[str, Record]]:
    """(model, T) -> method -> record, where ours has a time."""
    return {key: methods for key, methods in timed(run, "small").items() if bars.LOSS in methods}


HEADS = (bars.LOSS, bars.LOGPROBS, "eager", "eager_compiled", *bars.PEERS)


def main_heads(run: Run) -> list[Record]:
    """Every head that trains a weight, once, at the workload of the bars."""
    wanted = {"workload": MAIN.model, "inputs": MAIN.kind, "dtype": MAIN.dtype, "active_share": 1.0, "takes": "hidden"}
    return [
        record
        for record in once(run[SPEED])
        if wanted.items() <= record.items() and record["shape"]["tokens"] == MAIN.tokens and record["method"] in HEADS
    ]


def heads(run: Run) -> Iterator[str]:
    """Every head at the workload of the bars: times in floors, because each process has its own."""
    here = [record for record in main_heads(run) if record["median_s"] and record["floor_median_s"]]
    ours = next((record for record in here if record["method"] == bars.LOSS), None)
    if ours is None or len(here) < 2:
        return
    cells = []
    for record in sorted(here, key=bars.in_floors):
        floors, error = bars.in_floors(record), largest_error(record)
        relative = times(floors / bars.in_floors(ours))
        memory = gibibytes(record["peak_beyond_gradients_bytes"])
        cells.append((label(record), times(floors), relative, memory, NOTHING if error is None else f"{error:.1%}"))
    header = ("head", "× three bare products", "× `linear_policy_loss`", "beyond the gradients", "gradient error")
    yield from (table(header, cells), "")
    absent = [f"{label(record)} ({record['status']})" for record in main_heads(run) if record["median_s"] is None]
    if absent:
        yield f"Without a time: {'; '.join(absent)}."


def memory(run: Run) -> Iterator[str]:
    """Peaks over T beside what is allowed."""
    found: dict[int, dict[str, Record]] = {}
    for record in run[SPEED]:
        if record["part"] == "memory" and record["peak_beyond_gradients_bytes"] is not None:
            found.setdefault(record["shape"]["tokens"], {})[record["method"]] = record
    cells = []
    for tokens, methods in sorted(found.items()):
        row = [f"{tokens:,}"]
        for name in (bars.LOSS, bars.FROZEN):
            record = methods.get(name)
            sizes = (None, None) if record is None else (record["peak_beyond_gradients_bytes"], bars.allowance(record))
            row += map(gibibytes, sizes)
        cells.append(row)
    if cells:
        header = ("T", *(f"{LABELS[name]}{what}" for name in (bars.LOSS, bars.FROZEN) for what in ("", ": allowed")))
        yield "The peak beyond inputs and gradients, and what the bars allow."
        yield from ("", table(header, cells, left=0))


def demo(run: Run) -> Iterator[str]:
    """The demo's training on the GPU."""
    for record in run[DEVICE]:
        if "demo" in record:
            before, after = record["demo"]["before"], record["demo"]["after"]
            gains = ", ".join(f"{name} {before[name]:.1%} before and {after[name]:.1%} after" for name in before)
            yield f"* the demo, {record['steps']} steps of {record['objective']} in {record['seconds']:.0f} s: {gains}"
        if "comparison" in record:
            (eager, fused), (larger, smaller) = record["seconds"], record["peak_bytes"]
            yield (
                f"* {record['comparison']}: fused {1e3 * fused:.2f} ms against eager's {1e3 * eager:.2f}; peaks "
                f"{smaller / 2**20:.0f} and {larger / 2**20:.0f} MiB"
            )


FINDINGS: dict[str, Callable[[Run], Iterator[str]]] = {
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
