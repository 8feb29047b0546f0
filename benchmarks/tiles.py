"""The row kernel with every tile that `row_tile_candidates` offers, beside the one that is chosen without asking."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measure import Record
from benchmarks.method import OBJECTIVE, Unsupported
from benchmarks.timing import clock, interleaved_seconds
from drpo_kernels.backends.devices import device_properties
from drpo_kernels.backends.rows import Row, RowBatch, RowKind, Terms, Transform
from drpo_kernels.triton_support import INTERPRETING

# rows and vocabulary: a chunk of the linear path, and what the interpreter can bear
FULL, TINY = (1024, 151_936), (2, 600)
# a float32 chunk whose dlogits go to their own buffer, and bf16 logits over which they are written
PAIRS = ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16))
ROUNDS = 10


def measure(device: torch.device, rehearse: bool, deadline: float) -> Iterator[Record]:
    """A record per dtype and tile: seconds of a launch, and TB/s counting one read and one write of the logits."""
    if device.type == "cpu" and not INTERPRETING:
        raise Unsupported("needs a GPU")
    from drpo_kernels.backends.triton.launch import TritonRows
    from drpo_kernels.backends.triton.tiles import row_tile, row_tile_candidates

    count, vocab = TINY if rehearse else FULL
    for source, target in PAIRS:
        batch = _batch(count, vocab, source, device)
        out = batch.logits if source == target else torch.empty(count, vocab, dtype=target, device=device)
        properties = device_properties(device)
        chosen = row_tile(vocab, source.itemsize, properties)
        candidates = row_tile_candidates(vocab, source.itemsize, properties)
        launches = {tile: _launch(TritonRows(tile), batch, out) for tile in candidates}
        failed = {tile: reason for tile in candidates if (reason := _fails(launches[tile]))}
        working = {tile: launch for tile, launch in launches.items() if tile not in failed}
        seconds = interleaved_seconds(working, 1 if rehearse else ROUNDS, lambda: None, clock(device), deadline)
        moved = count * vocab * (source.itemsize + target.itemsize)
        for tile in candidates:
            median = statistics.median(seconds[tile]) if seconds.get(tile) else None
            yield {
                "tile": dataclasses.asdict(tile),
                "chosen": tile == chosen,
                "logits": str(source).removeprefix("torch."),
                "shape": {"rows": count, "vocab": vocab},
                "status": failed.get(tile, "ok" if median else "not run: time budget"),
                "median_s": median,
                "TB/s": moved / median / 1e12 if median else None,
            }


def _batch(count: int, vocab: int, dtype: torch.dtype, device: torch.device) -> RowBatch:
    rows = torch.zeros(len(Row), count, device=device)
    rows[Row.OLD_LOGPROB], rows[Row.ADVANTAGE], rows[Row.POLICY] = -2.0, 1.0, 1.0
    rows[Row.INV_TEMPERATURE], rows[Row.KIND] = 1.0, RowKind.ACTIVE
    logits = 3 * torch.randn(count, vocab, device=device)
    targets = torch.randint(vocab, (count,), device=device)
    return RowBatch(logits.to(dtype), targets, rows, Transform())


def _launch(ops, batch: RowBatch, out: Tensor):
    return lambda: ops.policy(batch, Terms(OBJECTIVE), out)


def _fails(launch) -> str | None:
    """Why a tile cannot run, in a word: it may want more of a multiprocessor than there is."""
    try:
        launch()
    except Exception as error:  # Triton's and the driver's errors have no base of their own
        return f"failed: {type(error).__name__}"
    return None
