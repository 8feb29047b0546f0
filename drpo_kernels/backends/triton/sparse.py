"""Kernels of `sparse_grad`: the entries of a row's gradient, and sums of gathered rows. See backends/sparse.py."""

from drpo_kernels.backends.triton.kernels import head_of, load_base
from drpo_kernels.triton_support import jit, tl

# of a share of 1 - p_y that was added up in fp32
ROUNDING = tl.constexpr(4.0e-6)
# halvings of the range, 2K, in which a row's threshold lies
STEPS = tl.constexpr(16)


@jit
def select_block(
    row, column_stride, vocab, bias, target, per_row, columns, probs, start, state,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Append a block's candidates, p >= floor, behind those found; -> (found, mass of the rest)."""
    inner_scale, factor2, row_max, inv_others, floor = per_row
    found, outside = state
    cols = start + tl.arange(0, BLOCK)
    b = load_base(row, column_stride, vocab, bias, inner_scale, cols, HAS_BIAS, HAS_SOFTCAP, MASKED)
    share = tl.exp2((b - row_max) * factor2) * inv_others
    share = tl.where(cols == target, 0.0, share)
    if MASKED:
        share = tl.where(cols < vocab, share, 0.0)
    candidate = share >= floor
    outside += tl.sum(tl.where(candidate, 0.0, share), 0)
    count = tl.sum(candidate.to(tl.int32), 0)
    if count > 0:
        place = found + tl.cumsum(candidate.to(tl.int32), 0) - 1
        fits = candidate & (place < CAPACITY)
        tl.store(columns + place, cols, mask=fits)
        tl.store(probs + place, share, mask=fits)
    return found + count, outside


@jit
def select_kernel(
    logits, row_stride, column_stride, vocab, bias, scale, softcap, targets, rows, rows_stride,
    statistics, statistics_stride, tolerance, limit, columns, probs, counts, left_out,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """logits [N, V], statistics [5, N] -> columns [N, CAPACITY] int32, probs fp32, counts [N] int32, left_out [N].

    The fewest entries other than the target that leave out at most tolerance · (1 - p_y), in ascending order of their
    columns, with p_v / (1 - p_y) as `probs`; left_out is the share of the rest. A row of more than `limit`, or not
    ACTIVE, has a count of -1. One read of the row, given up as soon as it is seen to be dense; fp32.
    """
    t = tl.program_id(0).to(tl.int64)
    rows += t
    statistics += t
    columns += t * CAPACITY
    probs += t * CAPACITY
    tl.store(counts + t, -1)
    tl.store(left_out + t, 0.0)
    if tl.load(rows + 7 * rows_stride) >= 2:
        inner_scale, factor, _ = head_of(scale, softcap, tl.load(rows + 6 * rows_stride), HAS_SOFTCAP)
        row_max = tl.load(statistics + 2 * statistics_stride)
        others = tl.load(statistics + 3 * statistics_stride) * tl.load(statistics + 4 * statistics_stride)
        floor = tolerance / (2 * limit)
        per_row = (inner_scale, factor / 0.6931471805599453, row_max, 1 / others, floor)
        row = logits + t * row_stride
        target = tl.load(targets + t)
        budget = tolerance - ROUNDING
        found = 0
        outside = 0.0
        start = 0
        whole = vocab // BLOCK * BLOCK
        while (start < whole) & (found <= CAPACITY) & (outside <= budget):
            found, outside = select_block(
                row, column_stride, vocab, bias, target, per_row, columns, probs, start, (found, outside),
                HAS_BIAS, HAS_SOFTCAP, False, BLOCK, CAPACITY,
            )  # fmt: skip
            start += BLOCK
        if (whole < vocab) & (found <= CAPACITY) & (outside <= budget):
            found, outside = select_block(
                row, column_stride, vocab, bias, target, per_row, columns, probs, whole, (found, outside),
                HAS_BIAS, HAS_SOFTCAP, True, BLOCK, CAPACITY,
            )  # fmt: skip
        if (found <= CAPACITY) & (outside <= budget):
            trim(columns, probs, found, outside, budget, floor, limit, counts + t, left_out + t, CAPACITY)


@jit
def trim(columns, probs, found, outside, budget, floor, limit, counts, left_out, CAPACITY: tl.constexpr):
    """Leave out the smallest candidates while all that is left out stays within the budget; by bisection."""
    lanes = tl.arange(0, CAPACITY)
    tl.debug_barrier()  # other threads of the program wrote them
    share = tl.load(probs + lanes, mask=lanes < found, other=0.0)
    column = tl.load(columns + lanes, mask=lanes < found, other=0)
    tl.debug_barrier()
    low = tl.log2(floor)
    high = tl.log2(budget) + 1  # no entry of the whole budget is ever left out with another
    for _ in range(STEPS):
        middle = (low + high) / 2
        fits = outside + tl.sum(tl.where(share < tl.exp2(middle), share, 0.0), 0) <= budget
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    kept = (share >= tl.exp2(low)) & (lanes < found)
    count = tl.sum(kept.to(tl.int32), 0)
    if count <= limit:
        place = tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(columns + place, column, mask=kept)
        tl.store(probs + place, share, mask=kept)
        tl.store(counts, count)
        tl.store(left_out, outside + tl.sum(tl.where(kept, 0.0, share), 0))
