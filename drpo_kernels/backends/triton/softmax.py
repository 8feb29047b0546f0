"""The softmax of one row of logits and its gradient, by one program: what the row kernels are made of.

For a row x [V] of raw logits (fp32, bf16 or fp16; all arithmetic in fp32), with the base logits b and the factor of
`Transform`, and with a reference r of the row that is near its log-sum-exp:
    z_j = factor · b_j    q_j = factor · (b_j - r)    E_j = exp(q_j)    Σ = Σ_j E_j
    logp = q_y - log Σ    q̄ = Σ_j E_j q_j / Σ    H = log Σ - q̄    lse = factor · r + log Σ
    dx_j = dz_j/dx_j · (slope · (onehot_y - p)_j - slope_H · p_j (q_j - q̄) + slope_lse · p_j)
where q_j - q̄ = log p_j + H, which would cancel on a flat row.

A softmax mostly reads a row for its maximum first, because it does not know the scale. Here it does: the rollout gave
the target the probability μ, so that with r = b_y - log μ / factor, Σ is μ / π, near 1, and one read is enough. A row
whose Σ shows that r was wrong (another policy, a banned target) is read twice more, for its largest logit, which is r
then. The sum runs over the tokens other than the target, which gives 1 - p_y = others / Σ and, where the target is
likely, logp = -log1p(others / E_y) without cancellation.

A gradient in slope alone is v · E_j with v = -slope / Σ, and v · -others at the target. Where the products that follow
can take a factor per row, one read writes E and leaves v (`WRITE_FACTORED`); else a second read writes the gradient.
"""

from drpo_kernels.softcap import tanh, tanh_slope_twin
from drpo_kernels.tokens import log1p
from drpo_kernels.triton_support import jit, tl


@jit
def head_of(scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """-> (scale / softcap inside the tanh, factor = dz/db, dz/dx up to the slope of the tanh)."""
    if HAS_SOFTCAP:
        return scale / softcap, softcap * inv_temperature, scale * inv_temperature
    else:
        return scale, scale * inv_temperature, scale * inv_temperature


@jit
def base_logit(x, bias, cols, inside, inner_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """-> (b, v): b = v = x + bias, or b = tanh(v) with v = inner_scale · (x + bias)."""
    if HAS_BIAS:
        other = None
        if inside is not None:
            other = 0.0
        x += tl.load(bias + cols, mask=inside, other=other).to(tl.float32)
    if HAS_SOFTCAP:
        v = x * inner_scale
        return tanh(v), v
    else:
        return x, x


@jit
def load_base(
    row, column_stride, bias, inner_scale, start, inside,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(b, v) of the columns from `start` on, in fp32, as in `base_logit`. `inside`: which of them are there, b is -inf
    elsewhere; None where all are.
    """
    lanes = tl.arange(0, BLOCK)
    other = None
    if inside is not None:
        other = float("-inf")
    # first a pointer to the block, one for all threads, then each thread's place: the fewest instructions
    start = tl.cast(start, tl.int64)
    x = tl.load(row + start * column_stride + lanes.to(tl.int64) * column_stride, mask=inside, other=other)
    b, v = base_logit(x.to(tl.float32), bias, start + lanes, inside, inner_scale, HAS_BIAS, HAS_SOFTCAP)
    if HAS_SOFTCAP:
        if inside is not None:
            b = tl.where(inside, b, float("-inf"))
    return b, v


@jit
def add_block(
    row, column_stride, vocab, bias, target, inner_scale, factor2, reference, sums, out, start,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, STORE: tl.constexpr, EDGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a block of columns to the (Σ 2^q, Σ 2^q q), q = factor2 · (b - reference), without the target's; with
    STORE, 2^q times the slope of a soft-cap goes to `out`. Only a block at an EDGE may hold the target, whose place
    becomes 0, or columns beyond the vocabulary.
    """
    LOWEST: tl.constexpr = -1.0e20  # a banned token's q is -inf, and 0 · -inf would be NaN
    lane_sum, lane_moment = sums
    lanes = tl.arange(0, BLOCK)
    cols = start + lanes
    inside = None
    if EDGE:
        inside = (cols < vocab) & (cols != target)
    b, v = load_base(row, column_stride, bias, inner_scale, start, inside, HAS_BIAS, HAS_SOFTCAP, BLOCK)
    q = (b - reference) * factor2
    e = tl.exp2(q)
    if STORE:
        stored = e
        if HAS_SOFTCAP:
            stored *= tanh_slope_twin(v)
        if EDGE:
            tl.store(out + cols, stored.to(out.dtype.element_ty), mask=cols < vocab)
        else:
            tl.store(out + start + lanes, stored.to(out.dtype.element_ty))
    return add_pairs(lane_sum, e, BLOCK), add_pairs(lane_moment, e * tl.maximum(q, LOWEST), BLOCK)


@jit
def add_pairs(lanes, values, BLOCK: tl.constexpr):
    """lanes + values, a lane to each element or to each pair: a thread has 16 elements of 16 bits, and no registers for
    as many lanes.
    """
    if lanes.shape[0] < BLOCK:
        values = tl.sum(tl.reshape(values, [BLOCK // 2, 2]), 1)
    return lanes + values


@jit
def sum_others(
    row, column_stride, vocab, bias, target, inner_scale, factor2, reference, out,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One read of the row -> (Σ 2^q, Σ 2^q q) over the tokens other than the target; see `add_block`.

    The target's block comes first and apart, so that no other element is compared with it, and so does the rest of a
    vocabulary that is no multiple of a block: unmasked, loads and stores are 16 bytes wide for any vocabulary.
    """
    LANES: tl.constexpr = BLOCK if row.dtype.element_ty.primitive_bitwidth == 32 else BLOCK // 2
    sums = (tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32))
    whole = vocab // BLOCK * BLOCK
    apart = target // BLOCK * BLOCK
    sums = add_block(
        row, column_stride, vocab, bias, target, inner_scale, factor2, reference, sums, out, apart,
        HAS_BIAS, HAS_SOFTCAP, STORE, True, BLOCK,
    )  # fmt: skip
    if apart < whole:
        if whole < vocab:
            sums = add_block(
                row, column_stride, vocab, bias, target, inner_scale, factor2, reference, sums, out, whole,
                HAS_BIAS, HAS_SOFTCAP, STORE, True, BLOCK,
            )  # fmt: skip
        whole -= BLOCK
    for i in range(0, whole, BLOCK):
        start = tl.where(i < apart, i, i + BLOCK)
        sums = add_block(
            row, column_stride, vocab, bias, target, inner_scale, factor2, reference, sums, out, start,
            HAS_BIAS, HAS_SOFTCAP, STORE, False, BLOCK,
        )  # fmt: skip
    lane_sum, lane_moment = sums
    return tl.sum(lane_sum, 0), tl.sum(lane_moment, 0)


@jit
def largest_of(
    row, column_stride, vocab, bias, inner_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """max b of the row; NaN where one of them is."""
    lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        b, _ = load_base(row, column_stride, bias, inner_scale, start, None, HAS_BIAS, HAS_SOFTCAP, BLOCK)
        lane_max = tl.maximum(lane_max, b, propagate_nan=tl.PropagateNan.ALL)
    if whole < vocab:
        inside = whole + tl.arange(0, BLOCK) < vocab
        b, _ = load_base(row, column_stride, bias, inner_scale, whole, inside, HAS_BIAS, HAS_SOFTCAP, BLOCK)
        lane_max = tl.maximum(lane_max, b, propagate_nan=tl.PropagateNan.ALL)
    poisoned = tl.max((lane_max != lane_max).to(tl.int32), 0)
    return tl.where(poisoned > 0, float("nan"), tl.max(lane_max, 0))


@jit
def reduce_row(
    row, column_stride, vocab, bias, target, old, head, out,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_OLD: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One read of the row -> (logp, H, r, Σ, Σ without the target, q̄, lse, the target's v of `base_logit`); with STORE,
    E goes to `out`, 0 at the target.

    HAS_OLD: `old` is log μ, or NaN where it is not known; else r is the target's logit. log π is off by up to n · 2^-24
    where Σ is 2^n, and so is H = log Σ - q̄, however small it is. For a gradient of H, r is the logit of a token that
    has a good part of the row, the target's or the largest, so that H keeps its digits where one token has it all.
    """
    LARGEST_SUM: tl.constexpr = 256.0 if HAS_OLD else 4.0
    LOWEST: tl.constexpr = -1.0e20
    LN2: tl.constexpr = 0.6931471805599453
    inner_scale, factor, _ = head
    factor2 = factor / LN2
    in_range = (target >= 0) & (target < vocab)  # a bad target reads nothing and turns the row into NaN
    safe = tl.where(in_range, target, 0).to(tl.int32)
    x_y = tl.load(row + safe.to(tl.int64) * column_stride, mask=in_range, other=float("nan")).to(tl.float32)
    b_y, v_y = base_logit(x_y, bias, safe, in_range, inner_scale, HAS_BIAS, HAS_SOFTCAP)
    reference = b_y
    if HAS_OLD:
        reference -= tl.where(old == old, tl.minimum(tl.maximum(old, -27.0), 0.0), 0.0) / factor
    others, moment = sum_others(
        row, column_stride, vocab, bias, safe, inner_scale, factor2, reference, out, HAS_BIAS, HAS_SOFTCAP, STORE, BLOCK
    )  # fmt: skip
    total = others + tl.exp((b_y - reference) * factor)
    # or NaN, from a target that is banned or a logit that is NaN or inf
    if (total > LARGEST_SUM) | (total < 1 / LARGEST_SUM) | (total != total):
        reference = largest_of(row, column_stride, vocab, bias, inner_scale, HAS_BIAS, HAS_SOFTCAP, BLOCK)
        tl.debug_barrier()  # the first E are stored
        others, moment = sum_others(
            row, column_stride, vocab, bias, safe, inner_scale, factor2, reference, out,
            HAS_BIAS, HAS_SOFTCAP, STORE, BLOCK,
        )  # fmt: skip
    q_y = (b_y - reference) * factor  # inf - inf is a NaN, as it must be
    e_y = tl.exp(q_y)
    total = others + e_y
    log_total = tl.where(e_y > others, q_y + log1p(others / e_y), tl.log(total))
    mean = (moment * LN2 + e_y * tl.maximum(q_y, LOWEST)) / total
    entropy = log_total - mean
    entropy = tl.where(entropy < 0, 0.0, entropy)  # rounding may leave -1e-8; a NaN passes
    logp = tl.where(e_y > others, -log1p(others / e_y), q_y - log_total)
    return logp, entropy, reference, total, others, mean, reference * factor + log_total, v_y


@jit
def gradient_at(b, v, per_row, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr):
    """The gradient of tokens other than the target."""
    LOWEST: tl.constexpr = -1.0e20
    LN2: tl.constexpr = 0.6931471805599453
    factor2, reference, inv_total, mean, slope, entropy_slope = per_row
    q = (b - reference) * factor2
    p = tl.exp2(q) * inv_total
    gradient = -slope * p
    if HAS_ENTROPY:
        gradient -= entropy_slope * p * (tl.maximum(q, LOWEST) * LN2 - mean)
    if HAS_SOFTCAP:
        gradient *= tanh_slope_twin(v)
    return gradient


@jit
def write_gradient(
    row, column_stride, vocab, bias, target, head, statistics, slopes, out, padded,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The second read and the only write: out may be the row itself where element sizes agree. `statistics` are
    (logp, reference, Σ, 1 - p_y, q̄), `slopes` those of logp, lse and H (`Slope`). Zeros in [vocab, padded).
    """
    LN2: tl.constexpr = 0.6931471805599453
    inner_scale, factor, chain = head
    logp, reference, total, miss, mean = statistics
    slope, z_slope, entropy_slope = slopes
    slope *= chain
    entropy_slope *= chain
    at_target = slope * miss
    if HAS_Z_LOSS:  # z_slope · p is slope · (onehot - p) with -z_slope, and z_slope more at the target
        z_slope *= chain
        at_target += z_slope * tl.exp(logp)
        slope -= z_slope
    # of a sharded head the target may be elsewhere
    in_range = (target >= 0) & (target < vocab)
    x_y = tl.load(row + tl.where(in_range, target, 0) * column_stride).to(tl.float32)
    b_y, v_y = base_logit(x_y, bias, target, in_range, inner_scale, HAS_BIAS, HAS_SOFTCAP)
    of_entropy = (factor / LN2, reference, 1 / total, mean, 0.0, entropy_slope)
    if HAS_SOFTCAP:
        at_target *= tanh_slope_twin(v_y)
    if HAS_ENTROPY:
        at_target += gradient_at(b_y, v_y, of_entropy, HAS_SOFTCAP, True)
    per_row = (factor / LN2, reference, 1 / total, mean, slope, entropy_slope)
    tl.debug_barrier()  # every thread has read the target's logit, which may be overwritten
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        b, v = load_base(row, column_stride, bias, inner_scale, start, None, HAS_BIAS, HAS_SOFTCAP, BLOCK)
        gradient = gradient_at(b, v, per_row, HAS_SOFTCAP, HAS_ENTROPY)
        tl.store(out + start + tl.arange(0, BLOCK), gradient.to(out.dtype.element_ty))
    for start in range(whole, padded, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        b, v = load_base(row, column_stride, bias, inner_scale, start, cols < vocab, HAS_BIAS, HAS_SOFTCAP, BLOCK)
        gradient = tl.where(cols < vocab, gradient_at(b, v, per_row, HAS_SOFTCAP, HAS_ENTROPY), 0.0)
        tl.store(out + cols, gradient.to(out.dtype.element_ty), mask=cols < padded)
    tl.debug_barrier()
    tl.store(out + target, at_target.to(out.dtype.element_ty), mask=in_range)


@jit
def write_zeros(out, padded, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], out.dtype.element_ty)
    whole = padded // BLOCK * BLOCK  # unmasked, so that stores are 16 bytes wide for any vocabulary
    for start in range(0, whole, BLOCK):
        tl.store(out + start + cols, zeros)
    if whole < padded:
        tl.store(out + whole + cols, zeros, mask=whole + cols < padded)
