"""Measurements of a GPU run: rates of bare products, a profile of a step, and the demo's training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch

from benchmarks.device.plan import COMPILED, LOSS, SPARSE, Job
from benchmarks.harness import plans
from benchmarks.harness.method import Unsupported
from benchmarks.harness.methods import METHODS
from benchmarks.harness.records import Record
from benchmarks.harness.runs import MAIN
from benchmarks.harness.timing import clock, interleaved_seconds
from benchmarks.harness.workloads import Workload

# The logits of a chunk are measured at CHUNKS rows and WIDTHS hidden sizes, dX and dW of a window at WINDOWS rows.
CHUNKS, WIDTHS, WINDOWS = (512, 1664, 8192), (1536, 4096), (2048, 2432, 4096, 8192)
# Kernels shorter than this are counted as overhead.
SHORT_US = 10.0
# A profile keeps this many kernels, those with the most time, and this many gaps, the longest between kernels.
KERNELS, GAPS = 24, 6
SMALL_DEMO = {"steps": 4, "warmup_steps": 4, "held_out": 20, "min_gain": -1.0, "large_head": (2, 8, 16, 256)}


# --- bare products ----------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """A bf16 product of [rows, inner] and [inner, columns]. `out` is the dtype of the result; a float32 dW is added to
    what its buffer holds.
    """

    name: str
    rows: int
    inner: int
    columns: int
    out: str


def products(job: Job) -> Iterator[Record]:
    """Yield TFLOP/s of the head's products at chunk shapes, with results in bf16 and in float32, one shape after
    another.
    """
    chunks, widths, windows = ((16,), (64,), (16,)) if job.rehearse else (CHUNKS, WIDTHS, WINDOWS)
    width, vocab = (64, 256) if job.rehearse else (MAIN.shape.hidden, MAIN.shape.vocab)
    groups = [
        [Product("logits", rows, hidden, vocab, out) for out in ("bfloat16", "float32")]
        for hidden in widths
        for rows in chunks
    ]
    for rows in windows:
        gradients = [Product("dW", vocab, rows, width, out) for out in ("bfloat16", "float32")]
        groups.append([Product("dX", rows, vocab, width, "bfloat16"), *gradients])
    for group in groups:
        work = {product: _multiplication(product, job.device) for product in group}
        seconds = interleaved_seconds(work, 2 if job.rehearse else 10, clock(job.device), job.deadline)
        for product, samples in seconds.items():
            median = statistics.median(samples) if samples else None
            rate = median and 2 * product.rows * product.inner * product.columns / median / 1e12
            shape = {"rows": product.rows, "inner": product.inner, "columns": product.columns}
            yield {"product": product.name, "shape": shape, "out": product.out, "median_s": median, "TFLOP/s": rate}


def _multiplication(product: Product, device: torch.device) -> Callable[[], object]:
    """Return a call as in `backends/matmul.py`, with operands that are transposed views where they are views there."""

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)

    name, rows, inner, columns, out_dtype = product
    a = normal(inner, rows).T if name == "dW" else normal(rows, inner)
    b = normal(columns, inner).T if name == "logits" else normal(inner, columns)
    out = torch.zeros(rows, columns, device=device, dtype=getattr(torch, out_dtype))
    if device.type == "cpu":  # A CPU has no products of 16-bit operands with float32 results.
        return lambda: out.copy_(a @ b)
    if out.dtype == a.dtype:
        return lambda: torch.mm(a, b, out=out)
    if name == "dW":
        return lambda: torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return lambda: torch.mm(a, b, out_dtype=out.dtype, out=out)


# --- a profile --------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """One kernel or copy on the device, in microseconds of the trace."""

    name: str
    start: float
    end: float


def profile(job: Job) -> Iterator[Record]:
    """Yield the kernels of a step at the workload of the bars and where a call is short; the time in short ones, and
    the gaps between kernels.
    """
    steps = [(LOSS, MAIN), *((LOSS, workload) for workload in COMPILED), (SPARSE, replace(MAIN, kind="mixed"))]
    if job.rehearse:
        steps = [(LOSS, plans.tiny(MAIN, MAIN.tokens))]
    for method, workload in steps:
        spans = _spans(method, workload, job.device)
        shape = {"model": workload.model, "method": method, **vars(workload.shape)}
        yield {"profile": shape, **overheads(spans)}
        for name, calls, microseconds in by_kernel(spans)[:KERNELS]:
            yield {"kernel": name[:160], "shape": shape, "calls": calls, "microseconds": round(microseconds, 1)}


def _spans(method: str, workload: Workload, device: torch.device) -> list[Span]:
    """Return the spans of one step under the profiler, after three steps to warm up."""
    kind = device.type.upper()
    step = METHODS[method].prepare(workload.inputs(device))
    for _ in range(3):
        step()
    activities = {getattr(torch.profiler.ProfilerActivity, name) for name in ("CPU", kind)}
    with torch.profiler.profile(activities=activities) as trace:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    wanted = getattr(torch.autograd.DeviceType, kind)
    events = [event for event in trace.events() if event.device_type == wanted]
    return [Span(event.name, event.time_range.start, event.time_range.end) for event in events]


def overheads(spans: Sequence[Span]) -> Record:
    """Return microseconds from the first kernel to the last, idle and in short kernels, and the longest gaps."""
    spans = sorted(spans, key=lambda span: span.start)
    short = [span.end - span.start for span in spans if span.end - span.start < SHORT_US]
    busy_until = list(accumulate((span.end for span in spans), max))
    gaps = [
        (after.start - until, before.name[:80], after.name[:80])
        for before, until, after in zip(spans, busy_until, spans[1:], strict=False)
        if after.start > until
    ]
    longest = sorted(gaps, reverse=True)[:GAPS]
    return {
        "kernels": len(spans),
        "short_kernels": len(short),
        "short_us": round(sum(short), 1),
        "idle_us": round(sum(gap for gap, _, _ in gaps), 1),
        "whole_us": round(busy_until[-1] - spans[0].start, 1) if spans else 0.0,
        "gaps": [{"us": round(gap, 1), "after": before, "before": after} for gap, before, after in longest],
    }


def by_kernel(spans: Sequence[Span]) -> list[tuple[str, int, float]]:
    """Return (name, calls, microseconds) of every kernel, the one with the most time first."""
    found: dict[str, list[float]] = {}
    for span in spans:
        found.setdefault(span.name, []).append(span.end - span.start)
    rows = [(name, len(times), sum(times)) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])


# --- a run ------------------------------------------------------------------------------------------------------------


def demo(job: Job) -> Iterator[Record]:
    """Yield the demo's training, evaluated before and after, and its comparison with the eager loss."""
    try:
        from drpo_kernels.demo.compare import compare, large_head_batch, run_batch
        from drpo_kernels.demo.model import build_model
        from drpo_kernels.demo.settings import OBJECTIVES, Settings
        from drpo_kernels.demo.task import split_problems
        from drpo_kernels.demo.train import train
    except ModuleNotFoundError as error:
        raise Unsupported(f"{error.name} not installed") from error
    settings = Settings.quick(**SMALL_DEMO) if job.rehearse else Settings()
    generator = torch.Generator(job.device).manual_seed(settings.seed)
    training, held_out = split_problems(settings.seed, settings.held_out)
    model, start = build_model(settings, job.device), time.perf_counter()
    result = train(model, training, held_out, settings, generator)
    seconds = time.perf_counter() - start
    yield {
        "demo": {"before": result.before, "after": result.after},
        "parameters": model.num_parameters(),
        "steps": settings.steps,
        "objective": str(OBJECTIVES[settings.objective]),
        "seconds": round(seconds, 1),
        "history": [{name: round(value, 5) for name, value in step.items()} for step in result.history],
    }
    batches = run_batch(model, result.rollout), large_head_batch(*settings.large_head, generator)
    for batch in batches:
        found = compare(batch, OBJECTIVES[settings.objective], settings.repeats)
        fields = ("loss", "hidden_gradient", "weight_gradient", "seconds", "peak_bytes")
        yield {"comparison": batch.title, "shape": batch.shape, **{name: getattr(found, name) for name in fields}}
