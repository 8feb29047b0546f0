"""Measurements of a GPU run: rates of bare products, a profile of a step, and the demo's training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.harness.method import Unsupported
from benchmarks.harness.methods import METHODS
from benchmarks.harness.records import Record
from benchmarks.harness.timing import clock, interleaved_seconds
from benchmarks.harness.workloads import MODELS, Workload

# The logits of a chunk are measured at CHUNKS rows and WIDTHS hidden sizes, dX and dW of a window at WINDOWS rows.
CHUNKS, WIDTHS, WINDOWS = (512, 1664, 8192), (1536, 4096), (2048, 2432, 4096, 8192)
VOCAB = MODELS["Qwen3-8B"].vocab
# Kernels shorter than this are counted as overhead.
SHORT_US = 10.0
# A profile keeps this many kernels, those with the most time, and this many gaps, the longest between kernels.
KERNELS, GAPS = 24, 6
SMALL_DEMO = {"steps": 4, "warmup_steps": 4, "held_out": 20, "min_gain": -1.0, "large_head": (2, 8, 16, 256)}


@dataclass(frozen=True)
class Product:
    """out = a @ b of [rows, inner] and [inner, columns], or out += a @ b; `out` names a dtype."""

    name: str
    rows: int
    inner: int
    columns: int
    out: str
    accumulates: bool = False

    @property
    def flop(self) -> int:
        return 2 * self.rows * self.inner * self.columns


def products(device: torch.device, rehearse: bool, deadline: float) -> Iterator[Record]:
    """TFLOP/s of the head's products at chunk shapes, with results in bf16 and in float32, one shape after another."""
    width, vocab = (64, 256) if rehearse else (4096, VOCAB)
    shapes = [(rows, inner) for inner in ((64,) if rehearse else WIDTHS) for rows in ((16,) if rehearse else CHUNKS)]
    windows = (16,) if rehearse else WINDOWS
    groups = [[Product("logits", rows, inner, vocab, out) for out in ("bfloat16", "float32")] for rows, inner in shapes]
    groups += [
        [
            Product("dX", rows, vocab, width, "bfloat16"),
            Product("dW", vocab, rows, width, "bfloat16"),
            Product("dW", vocab, rows, width, "float32", accumulates=True),
        ]
        for rows in windows
    ]
    for group in groups:
        work = {product: _multiplication(product, device) for product in group}
        seconds = interleaved_seconds(work, 2 if rehearse else 10, lambda: None, clock(device), deadline)
        for product, samples in seconds.items():
            median = statistics.median(samples) if samples else None
            yield {
                "product": product.name,
                "shape": {"rows": product.rows, "inner": product.inner, "columns": product.columns},
                "out": product.out,
                "accumulates": product.accumulates,
                "median_s": median,
                "TFLOP/s": median and product.flop / median / 1e12,
            }


def _multiplication(product: Product, device: torch.device) -> Callable[[], object]:
    """A call as in `backends/matmul.py`, with operands that are transposed views where they are views there."""
    a, b, out = _operands(product, device)
    if device.type == "cpu":  # A CPU has no products of 16-bit operands with float32 results.
        return lambda: out.copy_(a @ b)
    if out.dtype == a.dtype:
        return lambda: torch.mm(a, b, out=out)
    if product.accumulates:
        return lambda: torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return lambda: torch.mm(a, b, out_dtype=out.dtype, out=out)


def _operands(product: Product, device: torch.device) -> tuple[torch.Tensor, ...]:
    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)

    out = torch.zeros(product.rows, product.columns, device=device, dtype=getattr(torch, product.out))
    if product.name == "logits":
        return normal(product.rows, product.inner), normal(product.columns, product.inner).T, out
    if product.name == "dX":
        return normal(product.rows, product.inner), normal(product.inner, product.columns), out
    return normal(product.inner, product.rows).T, normal(product.inner, product.columns), out


# --- a profile --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """One kernel or copy on the device, in microseconds of the trace."""

    name: str
    start: float
    end: float


def profile(steps: Sequence[tuple[str, Workload]], device: torch.device) -> Iterator[Record]:
    """The kernels of a step of each method on its workload, the time in short ones, and the gaps between kernels."""
    for method, workload in steps:
        step = METHODS[method].prepare(workload.inputs(device))
        for _ in range(3):
            step()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as trace:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
        wanted = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
        spans = [
            Span(event.name, event.time_range.start, event.time_range.end)
            for event in trace.events()
            if event.device_type == wanted
        ]
        shape = {"model": workload.model, "method": method, **vars(workload.shape)}
        yield {"profile": shape, **overheads(spans)}
        for name, calls, microseconds in by_kernel(spans)[:KERNELS]:
            yield {"kernel": name[:160], "shape": shape, "calls": calls, "microseconds": round(microseconds, 1)}


def overheads(spans: Sequence[Span]) -> Record:
    """Microseconds from the first kernel to the last, busy and in short kernels, and the longest gaps."""
    ordered = sorted(spans, key=lambda span: span.start)
    short = [span for span in ordered if span.end - span.start < SHORT_US]
    gaps, busy_until = [], ordered[0].start if ordered else 0.0
    for before, span in zip([None, *ordered], ordered, strict=False):
        if before is not None and span.start > busy_until:
            gaps.append((span.start - busy_until, before.name, span.name))
        busy_until = max(busy_until, span.end)
    gaps.sort(reverse=True)
    whole = busy_until - ordered[0].start if ordered else 0.0
    return {
        "kernels": len(ordered),
        "short_kernels": len(short),
        "short_us": round(sum(span.end - span.start for span in short), 1),
        "idle_us": round(sum(gap for gap, _, _ in gaps), 1),
        "whole_us": round(whole, 1),
        "gaps": [{"us": round(us, 1), "after": after[:80], "before": before[:80]} for us, after, before in gaps[:GAPS]],
    }


def by_kernel(spans: Sequence[Span]) -> list[tuple[str, int, float]]:
    """(name, calls, microseconds) of every kernel, the one with the most time first."""
    found: dict[str, list[float]] = {}
    for span in spans:
        found.setdefault(span.name, []).append(span.end - span.start)
    rows = [(name, len(times), sum(times)) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])


# --- a run ------------------------------------------------------------------------------------------------------------


def demo(device: torch.device, rehearse: bool) -> Iterator[Record]:
    """The demo's training, evaluated before and after, and its comparison with the eager loss."""
    try:
        from drpo_kernels.demo.compare import compare, large_head_batch, run_batch
        from drpo_kernels.demo.model import build_model
        from drpo_kernels.demo.settings import OBJECTIVES, Settings
        from drpo_kernels.demo.task import split_problems
        from drpo_kernels.demo.train import train
    except ModuleNotFoundError as error:
        raise Unsupported(f"{error.name} not installed") from error
    settings = Settings.quick(**SMALL_DEMO) if rehearse else Settings()
    generator = torch.Generator(device).manual_seed(settings.seed)
    training, held_out = split_problems(settings.seed, settings.held_out)
    model, start = build_model(settings, device), time.perf_counter()
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
