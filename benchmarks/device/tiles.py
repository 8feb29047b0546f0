"""This measures the row kernels by themselves, beside a copy of the same logits: TB/s at the tiles that a GPU may want.

A chunk of the linear path has float32 logits and bf16 gradients beside them. One kernel reads a logit of it once and
leaves a factor per row, and another reads it twice. Ready bf16 logits have their gradient written over them. What a
call launches around its kernel is not measured here.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from benchmarks.device.plan import Job
from benchmarks.harness.measure import OVER_BUDGET
from benchmarks.harness.method import OBJECTIVE, Unsupported
from benchmarks.harness.records import Record
from benchmarks.harness.timing import clock, interleaved_seconds
from drpo_kernels.backends.devices import device_properties
from drpo_kernels.backends.rows import Field, RowBatch, RowKind, Terms, Transform
from drpo_kernels.backends.triton.tiles import RowTile, row_tile
from drpo_kernels.triton_support import INTERPRETING

# (rows, vocabulary) of a chunk of the linear path, and of what the interpreter can bear
FULL, TINY = (1664, 151_936), (2, 600)
# (dtype of the logits, of dlogits): a float32 chunk whose dlogits have their own buffer, and bf16 logits under dlogits
PAIRS = ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16))
THREADS = (256, 512, 1024)
ROUNDS = 10
COPY, TWO_READS, ONE_READ = "copy", "two reads", "one read"


def measure(job: Job) -> Iterator[Record]:
    """Yield a record per dtype, kernel and tile: seconds of a launch, and TB/s counting one read and one write of the
    logits; a copy reads and writes the logits' own dtype.
    """
    device = job.device
    if device.type == "cpu" and not INTERPRETING:
        raise Unsupported("needs a GPU")
    count, vocab = TINY if job.rehearse else FULL
    for source, target in PAIRS:
        properties = device_properties(device)
        tiles = dict.fromkeys(row_tile(vocab, source.itemsize, properties, threads) for threads in THREADS)
        launches = _launches(_batch(count, vocab, source, device), target, tiles)
        failed = {key: reason for key, launch in launches.items() if (reason := _fails(launch))}
        working = {key: launch for key, launch in launches.items() if key not in failed}
        seconds = interleaved_seconds(working, 1 if job.rehearse else ROUNDS, clock(device), job.deadline)
        in_use = ONE_READ if any(kernel == ONE_READ for kernel, _ in launches) else TWO_READS
        for kernel, tile in launches:
            samples = seconds.get((kernel, tile))
            median = statistics.median(samples) if samples else None
            written = source if kernel == COPY else target
            moved = count * vocab * (source.itemsize + written.itemsize)
            yield {
                "row_kernel": kernel,
                "tile": tile and dataclasses.asdict(tile),
                "chosen": kernel == in_use and tile == row_tile(vocab, source.itemsize, properties),
                "logits": str(source).removeprefix("torch."),
                "shape": {"rows": count, "vocab": vocab},
                "status": failed.get((kernel, tile), "ok" if median else OVER_BUDGET),
                "median_s": median,
                "TB/s": moved / median / 1e12 if median else None,
            }


def _launches(batch: RowBatch, target: torch.dtype, tiles: Iterable[RowTile]) -> dict[tuple, Callable]:
    """Return the launches by kernel and tile. The gradient goes over the logits where it has their dtype."""
    from drpo_kernels.backends.triton.launch import TritonRows

    in_place = batch.logits.dtype == target
    out = batch.logits if in_place else torch.empty_like(batch.logits, dtype=target)
    copied, factors = torch.empty_like(batch.logits), torch.empty_like(batch.rows[0])
    launches: dict[tuple, Callable] = {(COPY, None): partial(copied.copy_, batch.logits)}
    for tile in tiles:
        ops, terms = TritonRows(tile), Terms(OBJECTIVE)
        launches[TWO_READS, tile] = partial(ops.policy, batch, terms, out)
        if ops.factors(terms, batch.logits.dtype, target):
            launches[ONE_READ, tile] = partial(ops.policy, batch, terms, out, factors)
    return launches


def _batch(count: int, vocab: int, dtype: torch.dtype, device: torch.device) -> RowBatch:
    """Return rows of a policy near its rollout's: log μ is the log-prob with noise of 0.2 nat."""
    logits = 3 * torch.randn(count, vocab, device=device)
    targets = torch.randint(vocab, (count,), device=device)
    logprobs = logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    rows = torch.zeros(len(Field), count, device=device)
    rows[Field.OLD_LOGPROB] = (logprobs + 0.2 * torch.randn(count, device=device)).clamp(max=0)
    rows[Field.ADVANTAGE] = rows[Field.POLICY] = rows[Field.INV_TEMPERATURE] = 1.0
    rows[Field.KIND] = RowKind.ACTIVE
    return RowBatch(logits.to(dtype), targets, rows, Transform())


def _fails(launch: Callable) -> str | None:
    """Return why a tile cannot run, in a word, or None. It may want more of a multiprocessor than there is."""
    try:
        launch()
    except Exception as error:  # the errors of Triton and of the driver have no common base
        return f"failed: {type(error).__name__}"
    return None
