"""What a run of `benchmarks.device` decides, in sentences and small tables whose every number comes from its records.

A finding is a function of the `Run` that yields lines of Markdown; it yields none where its records are missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from benchmarks.device import bars
from benchmarks.device import summary as device_summary
from benchmarks.device.parts import DEVICE, MAIN, SPEED
from benchmarks.device.results import Run, once
from benchmarks.device.tiles import COPY, ONE_READ, TWO_READS
from benchmarks.harness.records import Record
from benchmarks.harness.tables import NOTHING, gibibytes, table, times
from benchmarks.speed.tables import LABELS, largest_error

GIB = bars.GIB
# A tile of a matrix product on Hopper has 128 x 256 results, and a warp has 32 threads.
TILE, WARP = (128, 256), 32


def lines_of(run: Run, field: str) -> list[Record]:
    return [record for record in run[DEVICE] if field in record]


def timed(run: Run, **wanted: object) -> dict[tuple[str, int], dict[str, Record]]:
    """(model, T) -> method -> the record with a time, of dense trained-looking bf16 inputs."""
    wanted = {"inputs": "trained", "dtype": "bfloat16", "active_share": 1.0} | wanted
    found: dict[tuple[str, int], dict[str, Record]] = {}
    for record in run[SPEED]:
        if wanted.items() <= record.items() and record["median_s"] is not None:
            found.setdefault((record["workload"], record["shape"]["tokens"]), {})[record["method"]] = record
    return found


# --- products ---------------------------------------------------------------------------------------------------------


def _rates(run: Run, name: str) -> dict[tuple[int, int], dict[str, Record]]:
    """(rows M, hidden size H) -> dtype of the result -> record."""
    found: dict[tuple[int, int], dict[str, Record]] = {}
    for record in lines_of(run, "product"):
        if record["product"] == name and record["median_s"] is not None:
            shape = record["shape"]
            rows, width = {
                "logits": (shape["rows"], shape["inner"]),
                "dX": (shape["rows"], shape["columns"]),
                "dW": (shape["inner"], shape["columns"]),
            }[name]
            found.setdefault((rows, width), {})[record["out"]] = record
    return found


def float32_results(run: Run) -> Iterator[str]:
    """Float32 against bf16 results, of logits and of an accumulated dW."""
    cells = []
    sentences = {
        "logits": "Float32 logits take {} to {} the time of bf16 logits",
        "dW": "Adding dW to a float32 buffer takes {} to {} the time of a dW in bf16",
    }
    for name, sentence in sentences.items():
        pairs = {key: found for key, found in _rates(run, name).items() if {"bfloat16", "float32"} <= found.keys()}
        if not pairs:
            continue
        ratios = {key: found["float32"]["median_s"] / found["bfloat16"]["median_s"] for key, found in pairs.items()}
        worst = max(ratios, key=ratios.get)
        ends = times(min(ratios.values())), times(max(ratios.values()))
        yield f"* {sentence.format(*ends)}, the most at M={worst[0]} H={worst[1]}."
        cells += [
            (name, str(key[0]), str(key[1]), *(f"{found[out]['TFLOP/s']:.0f}" for out in ("bfloat16", "float32")),
             times(ratios[key]))
            for key, found in pairs.items()
        ]  # fmt: skip
    if cells:
        yield from ("", table(("product", "rows M", "H", "bf16, TFLOP/s", "float32, TFLOP/s", "float32's time"), cells))


def waves(run: Run) -> Iterator[str]:
    """The rate of dX over M, beside how full the last wave of tiles would be."""
    found = {key: record["bfloat16"] for key, record in _rates(run, "dX").items() if "bfloat16" in record}
    processors = next((r["device"]["sms"] for r in run[DEVICE] + run[SPEED] if "gpu" in r.get("device", {})), None)
    if not found or processors is None:
        return
    full = {key: _full(*key, processors) for key in found}
    rates = {key: record["TFLOP/s"] for key, record in found.items()}
    best, worst, emptiest = max(rates, key=rates.get), min(rates, key=rates.get), min(full, key=full.get)
    also = "the slowest too" if emptiest == worst else "not the slowest"
    yield (
        f"dX is fastest at M={best[0]} with {rates[best]:.0f} TFLOP/s and slowest at M={worst[0]} with "
        f"{rates[worst]:.0f}, {1 - rates[worst] / rates[best]:.0%} less. Tiles of {TILE[0]} × {TILE[1]} would leave "
        f"the most room in their waves at M={emptiest[0]} ({full[emptiest]:.0%} full), which is {also}."
    )
    cells = [(str(key[0]), f"{full[key]:.0%}", f"{rates[key]:.0f}") for key in found]
    yield from ("", table(("rows M", "waves filled", "dX, TFLOP/s"), cells, left=0))


def _full(rows: int, columns: int, processors: int) -> float:
    tiles = math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
    return tiles / (math.ceil(tiles / processors) * processors)


# --- row kernels ------------------------------------------------------------------------------------------------------


def row_kernels(run: Run, logits: str) -> dict[str, list[Record]]:
    """Kernel -> its records with a rate."""
    found: dict[str, list[Record]] = {}
    for record in lines_of(run, "row_kernel"):
        if record["logits"] == logits and record["TB/s"] is not None:
            found.setdefault(record["row_kernel"], []).append(record)
    return found


def threads(record: Record) -> int:
    return WARP * record["tile"]["num_warps"]


def _row_table(kernels: dict[str, list[Record]]) -> Iterator[str]:
    copy = kernels[COPY][-1]["TB/s"]
    cells = [
        (f"{name}{', in use then' if record['chosen'] else ''}", str(threads(record)) if record["tile"] else NOTHING,
         f"{1e3 * record['median_s']:.3f}", f"{record['TB/s']:.2f}", f"{record['TB/s'] / copy:.0%}")
        for name, records in kernels.items()
        for record in records
    ]  # fmt: skip
    yield from ("", table(("kernel", "threads to a row", "ms", "TB/s", "of a copy's"), cells))


def one_read(run: Run) -> Iterator[str]:
    """A chunk of the linear path: the kernel that reads a logit twice against the one that reads it once."""
    kernels = row_kernels(run, "float32")
    if not all(kernels.get(name) for name in (TWO_READS, ONE_READ, COPY)):
        return
    twice, once = (max(kernels[name], key=lambda r: r["TB/s"]) for name in (TWO_READS, ONE_READ))
    copy = kernels[COPY][-1]["TB/s"]
    in_use = "once" if any(record["chosen"] for record in kernels[ONE_READ]) else "twice"
    yield (
        "On {rows} rows of {vocab} float32 logits with bf16 gradients, ".format(**once["shape"])
        + f"the kernel that reads a logit twice moves {twice['TB/s']:.2f} TB/s at best, {twice['TB/s'] / copy:.0%} of "
        f"a copy's {copy:.2f}, one read and one write counted, and the one that reads it once {once['TB/s']:.2f} "
        f"({once['TB/s'] / copy:.0%}) at {threads(once)} threads to a row: "
        f"{times(twice['median_s'] / once['median_s'])} as fast. At that commit the one that reads {in_use} was in use."
    )
    yield from _row_table(kernels)


def ready_logits(run: Run) -> Iterator[str]:
    """The kernel of `policy_loss` on bf16 logits at every number of threads, and the whole call."""
    kernels = row_kernels(run, "bfloat16")
    if kernels.get(TWO_READS) and kernels.get(COPY):
        copy, tried = kernels[COPY][-1]["TB/s"], kernels[TWO_READS]
        best, chosen = max(tried, key=lambda r: r["TB/s"]), [r for r in tried if r["chosen"]]
        shares = ", ".join(f"{r['TB/s'] / copy:.0%} at {threads(r)}" for r in tried)
        yield (
            f"Of a copy's {copy:.2f} TB/s the kernel reaches, by threads to a row: {shares}. Best are {threads(best)}"
            + (f"; in use at that commit were {threads(chosen[-1])}." if chosen else ".")
        )
        yield from _row_table(kernels)
        yield ""
    for record in timed(run, part="ours").get((MAIN.model, MAIN.tokens), {}).values():
        if record["method"] == "policy_loss" and record["floor_median_s"]:
            whole, floor = record["median_s"], record["floor_median_s"]
            yield (
                f"The whole call at T={MAIN.tokens} takes {1e3 * whole:.2f} ms, {times(whole / floor)} a copy of the "
                f"logits ({1e3 * floor:.2f} ms)."
            )


# --- a step -----------------------------------------------------------------------------------------------------------


def gaps(run: Run) -> Iterator[str]:
    """Short kernels and idle time of a step, from its profile."""
    found = lines_of(run, "profile")
    if found:
        yield "One call each under the profiler, which slows the host: shares can be compared, milliseconds cannot."
        yield ""
    for record in found:
        whole = record["whole_us"]
        shape = record["profile"]
        where = LABELS[shape.get("method", bars.LOSS)] + ", {model}, T={tokens} H={hidden}".format(**shape)
        yield (
            f"* {where}: {record['kernels']} kernels and copies in {whole / 1e3:.2f} ms, {record['short_kernels']} of "
            f"them under 10 µs, {record['short_us'] / 1e3:.2f} ms together ({record['short_us'] / whole:.0%}); idle "
            f"for {record['idle_us'] / 1e3:.2f} ms ({record['idle_us'] / whole:.0%})"
            + (f", at most {record['gaps'][0]['us']:.0f} µs at a stretch, behind `{record['gaps'][0]['after']}`."
               if record["gaps"] else ".")
        )  # fmt: skip


def small_models(run: Run) -> Iterator[str]:
    """Ours against eager and compiled eager, and the floor."""
    found, latest = small_shapes(run), small_shapes(run, latest=True)
    if not found:
        return
    names = ("eager", "eager_compiled")
    for name in names:
        ratios = {k: m[name]["median_s"] / m[bars.LOSS]["median_s"] for k, m in latest.items() if name in m}
        if ratios:
            wins, worst = sum(value >= 1 for value in ratios.values()), min(ratios, key=ratios.get)
            yield (
                f"* `linear_policy_loss` is at least as fast as {LABELS[name]} at {wins} of {len(ratios)} shapes. At "
                f"the worst, {worst[0]} T={worst[1]}, {name.replace('_', ' ')} takes {times(ratios[worst])} its time."
            )
    cells, several = [], len({methods[bars.LOSS]["commit"] for methods in found.values()}) > 1
    for (model, tokens), methods in sorted(found.items()):
        ours = methods[bars.LOSS]
        floor = ours["floor_median_s"]
        over = times(ours["median_s"] / floor) if floor else NOTHING
        values = (methods.get(name) for name in (bars.WHOLE, *names))
        commit = [(ours["commit"] or "unknown")[:12]] if several else []
        cells.append((model, str(tokens), *(_ms(value) for value in values), _ms(ours), over, *commit))
    header = ("model", "T", "three bare products, ms", "eager", "compiled eager", "`linear_policy_loss`", "× its floor")
    yield from ("", table((*header, "commit") if several else header, cells))


def small_shapes(run: Run, latest: bool = False) -> dict[tuple[str, int], dict[str, Record]]:
    """(model, T) -> method -> record; `latest`: of the newest code that was measured alone."""
    found = {key: methods for key, methods in timed(run, part="small").items() if bars.LOSS in methods}
    newest = bars.newest_commit([methods[bars.LOSS] for methods in found.values()])
    return {key: m for key, m in found.items() if not latest or m[bars.LOSS]["commit"] == newest}


def _ms(record: Record | None) -> str:
    return NOTHING if record is None else f"{1e3 * record['median_s']:.2f}"


def peers(run: Run) -> Iterator[str]:
    """Every head at the workload of the bars: times in floors, because each process has its own."""
    here = [r for r in main_heads(run) if r["median_s"] is not None and r["floor_median_s"]]
    ours = next((record for record in here if record["method"] == bars.LOSS), None)
    if ours is None or len(here) < 2:
        return
    others = [record for record in here if record["method"] not in OURS_OF_THE_PEERS]
    yield (
        f"`linear_policy_loss` takes {times(bars.in_floors(ours))} three bare products and "
        f"{beyond_gradients(ours)} beyond the gradients. The others, by time:"
    )
    yield ""
    for record in sorted(others, key=bars.in_floors):
        floors, error = bars.in_floors(record), largest_error(record)
        yield (
            f"* {label(record)}: {times(floors)}, {times(floors / bars.in_floors(ours))} of ours; "
            + beyond_gradients(record)
            + (f"; gradient error {error:.1%}" if error is not None else "")
        )
    absent = [r for r in main_heads(run) if r["median_s"] is None]
    if absent:
        yield ""
        yield "Without a time: " + "; ".join(f"{label(r)} ({r['status']})" for r in absent) + "."


OURS_OF_THE_PEERS = (bars.LOSS, bars.LOGPROBS)
HEADS = (*OURS_OF_THE_PEERS, "eager", "eager_compiled", *bars.PEERS)


def main_heads(run: Run) -> list[Record]:
    """Of the workload of the bars, every head that trains a weight, once."""
    wanted = {"workload": MAIN.model, "inputs": MAIN.kind, "dtype": MAIN.dtype, "active_share": 1.0, "takes": "hidden"}
    return [
        record
        for record in once(run[SPEED])
        if wanted.items() <= record.items() and record["shape"]["tokens"] == MAIN.tokens and record["method"] in HEADS
    ]


def label(record: Record) -> str:
    return LABELS[record["method"]] + ("" if record["same_loss"] else " (same cost, other loss)")


def beyond_gradients(record: Record) -> str:
    return gibibytes(record["peak_beyond_gradients_bytes"])


# --- memory -----------------------------------------------------------------------------------------------------------

TRAINS_WEIGHT = {bars.LOSS: True, bars.FROZEN: False}


def peaks(run: Run, method: str) -> list[tuple[int, int, int]]:
    """(T, bytes beyond the gradients, bytes allowed), by T."""
    return sorted(
        (record["shape"]["tokens"], beyond, beyond - bars.excess(TRAINS_WEIGHT[method], record))
        for record in run[SPEED]
        if (record["part"], record["method"]) == ("memory", method)
        and (beyond := record["peak_beyond_gradients_bytes"]) is not None
    )


def memory(run: Run) -> Iterator[str]:
    """Peaks over T beside what is allowed."""
    found = {method: peaks(run, method) for method in TRAINS_WEIGHT}
    if not any(found.values()):
        return
    for method, points in found.items():
        if points:
            tokens, beyond, allowed = max(points, key=lambda point: point[1] - point[2])
            most, side = max(point[1] for point in points), "above" if beyond > allowed else "below"
            yield (
                f"* {LABELS[method]}, T from {points[0][0]:,} to {points[-1][0]:,}: the peak beyond the gradients is "
                f"at most {most / GIB:.2f} GiB. It comes closest to the allowance at T={tokens:,}: "
                f"{beyond / GIB:.2f} GiB, {abs(beyond - allowed) / GIB:.2f} GiB {side} {allowed / GIB:.2f}."
            )
    rows = {tokens for points in found.values() for tokens, *_ in points}
    by_tokens = {method: {point[0]: point[1:] for point in points} for method, points in found.items()}
    cells = [
        (f"{tokens:,}", *(NOTHING if tokens not in each else f"{each[tokens][place] / GIB:.2f}"
                          for each in by_tokens.values() for place in (0, 1)))
        for tokens in sorted(rows)
    ]  # fmt: skip
    header = ("T", *(f"{LABELS[method]}{what}" for method in found for what in (", GiB", ": allowed")))
    yield from ("", table(header, cells, left=0))


def whole_run(run: Run) -> Iterator[str]:
    """The demo's training on the GPU."""
    yield from device_summary.demo(run[DEVICE])


FINDINGS: dict[str, Callable[[Run], Iterator[str]]] = {
    "Float32 results of the products": float32_results,
    "dX over the number of rows": waves,
    "The row kernel: two reads or one": one_read,
    "The row kernel on ready bf16 logits": ready_logits,
    "Short kernels and gaps": gaps,
    "Small models and batches": small_models,
    "Other heads": peers,
    "Memory over T": memory,
    "A run from beginning to end": whole_run,
}
# These findings have a picture: its name in bench_results/gpu_<name>.png, and what it shows.
PICTURES = {
    "The row kernel: two reads or one": ("rows", "TB/s of the row kernels beside a copy"),
    "Small models and batches": ("small", "Time per token and share of the floor over T for small models"),
    "Other heads": ("peers", "Time and peak memory of every head at the workload of the bars"),
    "Memory over T": ("memory", "Measured peak memory over T beside what is allowed"),
}


def findings(run: Run) -> str:
    """Every finding under its title, with its picture."""
    parts = []
    for title, find in FINDINGS.items():
        lines = list(find(run))
        if lines and title in PICTURES:
            name, what = PICTURES[title]
            lines += ["", f"![{what}](../bench_results/gpu_{name}.png)"]
        parts += [f"### {title}", "", *(lines or ["Not measured yet."]), ""]
    return "\n".join(parts).rstrip()
