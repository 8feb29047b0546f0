"""A candidate for the row kernel of the linear path: one that reads a logit once.

A softmax needs the largest logit of a row before it can add up, because nobody knows the scale of the sum. Here the
rollout does: with x the logits, c = log2(e) / temperature, y the target and μ its behaviour probability,

    q_j = (x_j - x_y) · c + log2 μ        E_j = 2^q_j        S = Σ_j E_j = μ / π        log π = log μ - ln S

so that S is near 1. One pass adds up S and the entropy's moment and stores E in bf16, with -Σ_{j≠y} E_j at the target;
the gradient of the row's logits is v · E with the factor v = -c_t dℓ/dlogπ / (temperature · S), which the products can
take: dX = v ⊙ (E W), dW = Eᵀ (v ⊙ X). Where S leaves [1e-30, 1e30], the guess was wrong by 70 nats and more, and the
program starts again from the largest logit. `benchmarks.tiles` measures it beside the kernel that reads twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.method import OBJECTIVE
from drpo_kernels.backends.rows import Outcome, RowBatch
from drpo_kernels.backends.triton.tiles import RowTile
from drpo_kernels.tokens import log1p
from drpo_kernels.triton_support import jit, tl

# a sum in this range has lost nothing in float32
SMALLEST, LARGEST = tl.constexpr(1e-30), tl.constexpr(1e30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@jit
def store_block(row, out, start, vocab, target, target_logit, shift, scale, totals,
                AT_TARGET: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Store a block of E and add it to the lanes' (Σ E, Σ E q), the target's own part left out."""
    lane_sum, lane_moment = totals
    columns = start + tl.arange(0, BLOCK)
    inside = None
    other = None
    if MASKED:
        inside = columns < vocab
        other = float("-inf")
    q = (tl.load(row + columns, mask=inside, other=other).to(tl.float32) - target_logit) * scale + shift
    e = tl.exp2(q)
    if AT_TARGET:
        e = tl.where(columns == target, 0.0, e)
    tl.store(out + columns, e.to(out.dtype.element_ty), mask=inside)
    return lane_sum + e, lane_moment + e * tl.maximum(q, -1.0e20)


@jit
def store_row(row, out, vocab, target, target_logit, shift, scale, BLOCK: tl.constexpr):
    """-> (Σ_{j≠y} E, Σ_{j≠y} E q). Only the target's block compares columns, and only the last one has a mask."""
    totals = (tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32))
    whole = vocab // BLOCK * BLOCK
    mine = tl.minimum(target // BLOCK * BLOCK, whole)
    for start in range(0, mine, BLOCK):
        totals = store_block(row, out, start, vocab, target, target_logit, shift, scale, totals, False, False, BLOCK)
    if mine < whole:
        totals = store_block(row, out, mine, vocab, target, target_logit, shift, scale, totals, True, False, BLOCK)
        for start in range(mine + BLOCK, whole, BLOCK):
            totals = store_block(
                row, out, start, vocab, target, target_logit, shift, scale, totals, False, False, BLOCK
            )
    if whole < vocab:
        totals = store_block(row, out, whole, vocab, target, target_logit, shift, scale, totals, True, True, BLOCK)
    lane_sum, lane_moment = totals
    return tl.sum(lane_sum, 0), tl.sum(lane_moment, 0)


@jit
def largest_logit(row, vocab, BLOCK: tl.constexpr):
    lanes = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        lanes = tl.maximum(lanes, x)
    return tl.max(lanes, 0)


@jit
def one_read_kernel(logits, row_stride, vocab, targets, rows, rows_stride, outcome, outcome_stride, factors, out,
                    out_stride, hyper, OBJECTIVE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """logits [N, V] float32, rows [9, N] (`Row`) -> outcome [5, N], factors [N] float32, out [N, V] bf16."""
    t = tl.program_id(0).to(tl.int64)
    rows += t
    outcome += t
    row = logits + t * row_stride
    out += t * out_stride
    target = tl.load(targets + t).to(tl.int32)
    scale = tl.load(rows + 6 * rows_stride) * LOG2E
    old = tl.load(rows)
    x_y = tl.load(row + target)
    base = x_y
    q_y = tl.where(old == old, tl.maximum(old, -60.0), 0.0) * LOG2E
    others, moment = store_row(row, out, vocab, target, base, q_y, scale, BLOCK)
    total = others + tl.exp2(q_y)
    if (total < SMALLEST) | (total > LARGEST) | (total != total):
        base = largest_logit(row, vocab, BLOCK)
        q_y = (x_y - base) * scale
        others, moment = store_row(row, out, vocab, target, base, 0.0, scale, BLOCK)
        total = others + tl.exp2(q_y)
    e_y = tl.exp2(q_y)
    logp = tl.where(e_y > others, -log1p(others / e_y), q_y * LN2 - tl.log(total))
    entropy = tl.log(total) - (moment + e_y * tl.maximum(q_y, -1.0e20)) * LN2 / total
    old = tl.where(old == old, old, logp)
    coefficient = tl.load(rows + 2 * rows_stride)
    loss, slope = OBJECTIVE(logp, old, tl.load(rows + rows_stride), hyper)
    tl.store(outcome, logp)
    tl.store(outcome + outcome_stride, tl.where(entropy < 0, 0.0, entropy))
    tl.store(outcome + 2 * outcome_stride, x_y * scale * LN2 - logp)
    tl.store(outcome + 3 * outcome_stride, coefficient * loss)
    tl.store(outcome + 4 * outcome_stride, slope)
    tl.store(factors + t, -coefficient * slope * scale / LOG2E / total)
    tl.debug_barrier()  # the target's place was written with its block
    tl.store(out + target, (-others).to(out.dtype.element_ty))


def one_read(batch: RowBatch, out: Tensor, tile: RowTile) -> tuple[Tensor, Tensor]:
    """-> (outcome [len(Outcome), N], factors [N]); `out` [N, V] gets E, so that factors ⊙ E are dlogits."""
    logits, targets, rows = batch.logits, batch.targets, batch.rows
    count, vocab = logits.shape
    outcome, factors = rows.new_empty(len(Outcome), count), rows.new_empty(count)
    one_read_kernel[(count,)](
        logits, logits.stride(0), vocab, targets, rows, rows.stride(0), outcome, outcome.stride(0), factors, out,
        out.stride(0), OBJECTIVE.hyper, OBJECTIVE=OBJECTIVE.twin, BLOCK=tile.block, num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    return outcome, factors


def dlogits(factors: Tensor, exponentials: Tensor) -> Tensor:
    return factors[:, None] * exponentials.to(torch.float32)
