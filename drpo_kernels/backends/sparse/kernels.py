"""Kernels on some of a row's vocabulary entries. For `sparse_grad` (sweep.py) they are the entries of its gradient, and
for `kept_ids` (backends/kept_logits.py) the ids that sampling kept.
"""

from typing import Any, NamedTuple

from drpo_kernels.backends.sparse import contract
from drpo_kernels.backends.triton.kernels import ACTIVE, INV_TEMPERATURE, KIND, row_jit
from drpo_kernels.backends.triton.softmax import Logits, Matrix, load_base, load_softmax, row_of
from drpo_kernels.triton_support import jit, tl

ROUNDING = tl.constexpr(contract.SHARE_ROUNDING)
LEAST_OTHERS = tl.constexpr(contract.LEAST_OTHERS)
TRUSTED_ENTROPY = tl.constexpr(1 - contract.ENTROPY_ROUNDING)
LEVELS = tl.constexpr(contract.LEVELS)
LEVELS_PER_OCTAVE = tl.constexpr(contract.LEVELS_PER_OCTAVE)
STEPS = tl.constexpr(contract.LEVELS.bit_length() - 1)  # halvings that leave one level


class Selected(NamedTuple):
    """The results of `select_kernel`."""

    columns: Any  # int32 [N, CAPACITY]
    shares: Any  # fp32 [N, CAPACITY]
    counts: Any  # int64 [N]
    left_out: Any  # fp32 [N]


@jit
def select_block(
    logits, row, weighing, columns, shares, start, state, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Append a block's candidates, which have share >= floor, to those found -> (found, share of all other entries)."""
    reference, inv_others, floor = weighing
    found, outside = state
    cols = start + tl.arange(0, BLOCK)
    inside = None
    if MASKED:
        inside = cols < logits.vocab
    b, _ = load_base(logits, row, start, inside, BLOCK)
    share = tl.exp2((b - reference) * row.factor2) * inv_others
    share = tl.where(cols == row.target.to(tl.int32), 0.0, share)
    candidate = share >= floor
    outside += tl.sum(tl.where(candidate, 0.0, share), 0)
    count = tl.sum(candidate.to(tl.int32), 0)
    if count > 0:
        place = found + tl.cumsum(candidate.to(tl.int32), 0) - 1
        fits = candidate & (place < CAPACITY)
        tl.store(columns + place, cols, mask=fits)
        tl.store(shares + place, share, mask=fits)
    return found + count, outside


@row_jit
def select_kernel(
    logits: Logits, targets, rows, rows_stride, statistics, statistics_stride, tolerance, limit, most_entropy,
    out: Selected, BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """logits [N, V], statistics [7, N] -> `Selected`, all computed in fp32.

    A row's first entry is the target, with a share of -1. The largest other entries follow by ascending column, with
    their shares of 1 - p_y: as few, by whole levels, as leave out at most `tolerance` of it. left_out is the share of
    all others. counts is -1 where more than `limit` are needed, and 0 where the row is not ACTIVE. The row is read
    once. The read stops when the row is seen to be dense, and does not begin if the statistics show it.
    """
    t = tl.program_id(0).to(tl.int64)
    rows += t
    columns = out.columns + t * CAPACITY
    shares = out.shares + t * CAPACITY
    active = tl.load(rows + rows_stride * KIND) >= ACTIVE
    tl.store(out.left_out + t, 0.0)
    tl.store(out.counts + t, tl.where(active, -1, 0))
    if active:
        row = row_of(logits, t, tl.load(targets + t), tl.load(rows + rows_stride * INV_TEMPERATURE))
        known = load_softmax(statistics + t, statistics_stride)
        miss = known.miss
        floor = tolerance / (2 * limit)
        weighing = (known.reference, 1 / tl.maximum(known.others, LEAST_OTHERS), floor)
        # H(p_y). For a small miss its term of 1 - miss, which would be rounded, is replaced by its upper bound miss.
        hit = tl.maximum(1 - miss, LEAST_OTHERS)
        of_target = tl.where(miss < 0.01, miss, -hit * tl.log(hit)) - miss * tl.log(tl.maximum(miss, LEAST_OTHERS))
        may_be = known.entropy * TRUSTED_ENTROPY <= of_target + miss * most_entropy
        may_be &= known.others >= LEAST_OTHERS
        budget = tl.where(may_be, tolerance - ROUNDING, -1.0)  # a NaN among the statistics makes a comparison False
        found = 0
        outside = 0.0
        start = 0
        whole = logits.vocab // BLOCK * BLOCK
        while (start < whole) & (found <= CAPACITY) & (outside <= budget):
            found, outside = select_block(
                logits, row, weighing, columns, shares, start, (found, outside), False, BLOCK, CAPACITY
            )
            start += BLOCK
        if (whole < logits.vocab) & (found <= CAPACITY) & (outside <= budget):
            found, outside = select_block(
                logits, row, weighing, columns, shares, whole, (found, outside), True, BLOCK, CAPACITY
            )
        if (found <= CAPACITY) & (outside <= budget):
            trim(
                columns, shares, row.target, found, outside, budget, floor, limit, out.counts + t, out.left_out + t,
                CAPACITY,
            )  # fmt: skip


@jit
def trim(
    columns, shares, target, found, outside, budget, floor, limit, counts, left_out, CAPACITY: tl.constexpr
):  # fmt: skip
    """Leave out the smallest candidates, level by level, while the sum of what is left out stays within the budget."""
    lanes = tl.arange(0, CAPACITY)
    tl.debug_barrier()  # other threads of the program wrote the shares
    share = tl.load(shares + lanes, mask=lanes < found, other=0.0)
    low = 0
    high = LEVELS - 1
    for _ in range(STEPS):
        middle = (low + high + 1) // 2
        below = share < floor * tl.exp2(middle.to(tl.float32) / LEVELS_PER_OCTAVE)
        fits = outside + tl.sum(tl.where(below, share, 0.0), 0) <= budget
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle - 1)
    # To a checker `low` is a number, but the loop has made it a tensor.
    least = floor * tl.exp2(low.to(tl.float32) / LEVELS_PER_OCTAVE)  # type: ignore[attr-defined]
    kept = (share >= least) & (lanes < found)
    count = tl.sum(kept.to(tl.int32), 0)
    if count <= limit:
        column = tl.load(columns + lanes, mask=kept, other=0)
        tl.debug_barrier()  # other threads have read the places that are written now
        place = tl.cumsum(kept.to(tl.int32), 0)  # the target has place 0
        tl.store(columns + place, column, mask=kept)
        tl.store(shares + place, share, mask=kept)
        tl.store(columns, target.to(tl.int32))
        tl.store(shares, -1.0)
        tl.store(counts, count.to(tl.int64) + 1)
        tl.store(left_out, outside + tl.sum(tl.where(kept, 0.0, share), 0) + ROUNDING)


@jit(do_not_specialize_on_alignment=["index", "factors", "offsets", "places"])
def gathered_sums_kernel(
    table: Matrix, index, factors, offsets, places, out, out_stride, width, base, base_factors,
    ROUNDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[places[g]] += Σ_i factors[i] · table[index[i]] over offsets[g] <= i < offsets[g + 1]. With a base [width]
    fp32 it is out[places[g]] = base_factors[g] · base + that sum.

    table [., width] has any float dtype and strides, and is rounded to ROUNDED; factors are fp32. Sums are fp32, take
    ROWS terms at a time in their order, and are rounded once to out's dtype. A program computes COLUMNS columns of one.
    """
    g = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    out += tl.load(places + g) * out_stride + column
    if base is not None:
        total = tl.load(base_factors + g) * tl.load(base + column, mask=inside, other=0.0)
    else:
        total = tl.load(out, mask=inside, other=0.0).to(tl.float32)
    stop = tl.load(offsets + g + 1)
    for start in range(tl.load(offsets + g), stop, ROWS):
        term = start + tl.arange(0, ROWS)
        there = term < stop
        row = tl.load(index + term, mask=there, other=0).to(tl.int64)
        factor = tl.load(factors + term, mask=there, other=0.0)
        place = table.data + row[:, None] * table.row_stride + column[None, :].to(tl.int64) * table.column_stride
        entries = tl.load(place, mask=there[:, None] & inside[None, :], other=0.0).to(ROUNDED).to(tl.float32)
        total += tl.sum(factor[:, None] * entries, 0)
    tl.store(out, total.to(out.dtype.element_ty), mask=inside)


@jit(do_not_specialize_on_alignment=["left_index", "right_index"])
def gathered_dots_kernel(
    left: Matrix, left_index, right: Matrix, right_index, out, width, ROUNDED: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[i] = Σ_h left[left_index[i], h] · right[right_index[i], h], fp32 [M].

    left and right [., width] have any float dtype and strides, and are rounded to ROUNDED. Products and sums are fp32.
    One program computes one result.
    """
    i = tl.program_id(0).to(tl.int64)
    x_row = left.data + tl.load(left_index + i) * left.row_stride
    y_row = right.data + tl.load(right_index + i) * right.row_stride
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS).to(tl.int64)
        inside = column < width
        x = tl.load(x_row + column * left.column_stride, mask=inside, other=0.0).to(ROUNDED).to(tl.float32)
        y = tl.load(y_row + column * right.column_stride, mask=inside, other=0.0).to(ROUNDED).to(tl.float32)
        total += x * y
    tl.store(out + i, tl.sum(total, 0))
