"""Row kernels: one program owns one row of logits and knows nothing of the loss beyond the functions handed to it.

For a row x [V] of raw logits (fp32, bf16 or fp16; all arithmetic in fp32), with the base logits b and the factor of
`Transform`:
    z_j = factor · b_j    q_j = factor · (b_j - max b)    Σ = Σ_j exp(q_j)
    logp = q_y - log Σ    q̄ = Σ_j exp(q_j) q_j / Σ    H = log Σ - q̄
    lse = factor · max b + log Σ
    dx_j = dz_j/dx_j · (slope · (onehot_y - p)_j - slope_H · p_j (q_j - q̄) + slope_lse · p_j)
where q_j - q̄ = log p_j + H, which would cancel on a flat row.
The sum runs over the tokens other than the target first, which gives 1 - p_y = others / Σ and, where the target is the
maximum, logp = -log1p(others) without cancellation.
The packed per-row layouts (indices 0 to 8 below) are `Row`, `Stat` and `Outcome` of backends/rows.py.
"""

import inspect

from drpo_kernels.kl import clamped, importance_weighted
from drpo_kernels.softcap import tanh, tanh_slope_twin
from drpo_kernels.tokens import log1p
from drpo_kernels.triton_support import jit, tl

# What a kernel is given of a batch beside its logits. Triton would compile a kernel of its own where such a stride is 1
# or a multiple of 16, or such a pointer 16-byte aligned, and another binary may fuse a · b + c · d the other way: a
# row's last bit would depend on how many rows are beside it, and each new count might compile again
VARYING = (
    "targets", "rows", "rows_stride", "statistics", "statistics_stride", "slopes", "slopes_stride", "order", "outcome",
    "outcome_stride", "count",
)  # fmt: skip


def row_jit(function):
    """`jit` for which the arguments of `VARYING` are values like any other."""
    names = [name for name in VARYING if name in inspect.signature(function).parameters]
    return jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)


@jit
def head_of(scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """-> (scale / softcap inside the tanh, factor = dz/db, dz/dx up to the slope of the tanh)."""
    if HAS_SOFTCAP:
        return scale / softcap, softcap * inv_temperature, scale * inv_temperature
    else:
        return scale, scale * inv_temperature, scale * inv_temperature


@jit
def base_logit(x, bias, cols, inside, other, inner_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """-> (b, v): b = v = x + bias, or b = tanh(v) with v = inner_scale · (x + bias)."""
    if HAS_BIAS:
        x += tl.load(bias + cols, mask=inside, other=other).to(tl.float32)
    if HAS_SOFTCAP:
        v = x * inner_scale
        return tanh(v), v
    else:
        return x, x


@jit
def load_base(
    row, column_stride, vocab, bias, inner_scale, cols,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(b, v) of a block of columns, in fp32, as in `base_logit`; MASKED where some lie beyond the vocabulary."""
    inside = None
    other = None
    if MASKED:
        inside = cols < vocab
        other = 0.0
    x = tl.load(row + cols.to(tl.int64) * column_stride, mask=inside, other=other).to(tl.float32)
    return base_logit(x, bias, cols, inside, other, inner_scale, HAS_BIAS, HAS_SOFTCAP)


@jit
def reduce_block(
    row, column_stride, vocab, bias, target, inner_scale, factor2, lanes, start, LOWEST: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a block of columns to the lanes' (max b, Σ 2^q, Σ 2^q q)."""
    lane_max, lane_sum, lane_moment = lanes
    cols = start + tl.arange(0, BLOCK)
    b, _ = load_base(row, column_stride, vocab, bias, inner_scale, cols, HAS_BIAS, HAS_SOFTCAP, MASKED)
    left_out = (b < LOWEST) | (cols == target)  # a NaN passes
    if MASKED:
        left_out |= cols >= vocab
    b = tl.where(left_out, LOWEST, b)
    step = (b - lane_max) * factor2
    decay = tl.exp2(-tl.abs(step))
    rises = step > 0
    lane_moment = tl.where(rises, (lane_moment - lane_sum * step) * decay, lane_moment + decay * step)
    lane_sum = tl.where(rises, lane_sum * decay + 1, lane_sum + decay)
    return tl.where(rises, b, lane_max), lane_sum, lane_moment


@jit
def reduce_row(
    row, column_stride, vocab, bias, target, head,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One read of the row -> (logp, H, max b, Σ, 1 - p_y, q̄, lse). A maximum per lane: one exp per element and no
    barrier.
    """
    LOWEST: tl.constexpr = -1.0e20  # finite: a lane that has seen only banned logits stays free of inf - inf
    LN2: tl.constexpr = 0.6931471805599453
    inner_scale, factor, _ = head
    factor2 = factor / LN2
    lane_max = tl.full([BLOCK], LOWEST, tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    lane_moment = tl.zeros([BLOCK], tl.float32)  # Σ 2^q q with q = factor2 · (b - lane_max)
    whole = vocab // BLOCK * BLOCK  # unmasked, so that loads are 16 bytes wide for any vocabulary
    lanes = (lane_max, lane_sum, lane_moment)
    for start in range(0, whole, BLOCK):
        lanes = reduce_block(
            row, column_stride, vocab, bias, target, inner_scale, factor2, lanes, start, LOWEST,
            HAS_BIAS, HAS_SOFTCAP, False, BLOCK,
        )  # fmt: skip
    if whole < vocab:
        lanes = reduce_block(
            row, column_stride, vocab, bias, target, inner_scale, factor2, lanes, whole, LOWEST,
            HAS_BIAS, HAS_SOFTCAP, True, BLOCK,
        )  # fmt: skip
    lane_max, lane_sum, lane_moment = lanes

    in_range = (target >= 0) & (target < vocab)  # a bad target reads nothing and turns the row into NaN
    x_y = tl.load(row + target * column_stride, mask=in_range, other=float("nan")).to(tl.float32)
    b_y, _ = base_logit(x_y, bias, target, in_range, 0.0, inner_scale, HAS_BIAS, HAS_SOFTCAP)
    largest = tl.maximum(tl.max(lane_max, 0), b_y)
    row_max = tl.where(largest > LOWEST, largest, float("nan"))  # every token banned
    shift = (lane_max - row_max) * factor2
    fade = tl.exp2(shift)
    others = tl.sum(lane_sum * fade, 0)
    q_y = (b_y - row_max) * factor
    e_y = tl.exp(q_y)
    total = others + e_y
    log_total = tl.where(q_y == 0, log1p(others), tl.log(total))
    moment = tl.sum((lane_moment + lane_sum * shift) * fade, 0) * LN2 + e_y * tl.maximum(q_y, LOWEST)
    mean = moment / total
    entropy = log_total - mean
    entropy = tl.where(entropy < 0, 0.0, entropy)  # rounding may leave -1e-8; a NaN passes
    # without a NaN among them, -inf: another shard of the vocabulary may hold the row's tokens
    banned = (largest <= LOWEST) & (b_y == b_y) & (tl.sum(lane_sum, 0) >= 0)
    row_max = tl.where(banned, float("-inf"), row_max)
    return q_y - log_total, entropy, row_max, total, others / total, mean, row_max * factor + log_total


@jit
def write_block(
    row, column_stride, vocab, bias, target, per_row, out, padded, start, LOWEST: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of columns; zeros in [vocab, padded)."""
    LN2: tl.constexpr = 0.6931471805599453
    inner_scale, factor2, row_max, inv_total, mean, slope, entropy_slope, at_target = per_row
    cols = start + tl.arange(0, BLOCK)
    b, v = load_base(row, column_stride, vocab, bias, inner_scale, cols, HAS_BIAS, HAS_SOFTCAP, MASKED)
    q = (b - row_max) * factor2
    p = tl.exp2(q) * inv_total
    gradient = tl.where(cols == target, at_target, -slope * p)
    if HAS_ENTROPY:
        gradient -= entropy_slope * p * (tl.maximum(q, LOWEST) * LN2 - mean)
    if HAS_SOFTCAP:
        gradient *= tanh_slope_twin(v)
    if MASKED:
        gradient = tl.where(cols < vocab, gradient, 0.0)
        tl.store(out + cols, gradient.to(out.dtype.element_ty), mask=cols < padded)
    else:
        tl.store(out + cols, gradient.to(out.dtype.element_ty))


@jit
def write_gradient(
    row, column_stride, vocab, bias, target, head, statistics, slopes, out, padded,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The second read and the only write: out may be the row itself where element sizes agree. `statistics` are
    (logp, max b, Σ, 1 - p_y, q̄), `slopes` those of logp, lse and H (`Slope`).
    """
    LOWEST: tl.constexpr = -1.0e20
    LN2: tl.constexpr = 0.6931471805599453
    inner_scale, factor, chain = head
    logp, row_max, total, miss, mean = statistics
    slope, z_slope, entropy_slope = slopes
    slope *= chain
    at_target = slope * miss
    if HAS_Z_LOSS:  # z_slope · p is slope · (onehot - p) with -z_slope, and z_slope more at the target
        z_slope *= chain
        at_target += z_slope * tl.exp(logp)
        slope -= z_slope
    per_row = (inner_scale, factor / LN2, row_max, 1 / total, mean, slope, entropy_slope * chain, at_target)
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        write_block(
            row, column_stride, vocab, bias, target, per_row, out, padded, start, LOWEST,
            HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY, False, BLOCK,
        )  # fmt: skip
    for start in range(whole, padded, BLOCK):
        write_block(
            row, column_stride, vocab, bias, target, per_row, out, padded, start, LOWEST,
            HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY, True, BLOCK,
        )  # fmt: skip


@jit
def write_zeros(out, padded, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], out.dtype.element_ty)
    whole = padded // BLOCK * BLOCK  # unmasked, so that stores are 16 bytes wide for any vocabulary
    for start in range(0, whole, BLOCK):
        tl.store(out + start + cols, zeros)
    if whole < padded:
        tl.store(out + whole + cols, zeros, mask=whole + cols < padded)


@row_jit
def statistics_kernel(
    logits, row_stride, column_stride, vocab, bias, scale, softcap, targets, rows, rows_stride,
    statistics, statistics_stride,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logits [N, V] -> statistics [7, N] fp32 (`Stat`); a SKIPPED row is not read and reports zeros."""
    t = tl.program_id(0).to(tl.int64)
    rows += t
    statistics += t
    if tl.load(rows + 7 * rows_stride) < 1:
        for field in tl.static_range(7):
            tl.store(statistics + field * statistics_stride, 0.0)
    else:
        head = head_of(scale, softcap, tl.load(rows + 6 * rows_stride), HAS_SOFTCAP)
        logp, entropy, row_max, total, miss, mean, lse = reduce_row(
            logits + t * row_stride, column_stride, vocab, bias, tl.load(targets + t), head,
            HAS_BIAS, HAS_SOFTCAP, BLOCK,
        )  # fmt: skip
        tl.store(statistics, logp)
        tl.store(statistics + statistics_stride, entropy)
        tl.store(statistics + 2 * statistics_stride, row_max)
        tl.store(statistics + 3 * statistics_stride, total)
        tl.store(statistics + 4 * statistics_stride, miss)
        tl.store(statistics + 5 * statistics_stride, mean)
        tl.store(statistics + 6 * statistics_stride, lse)


@row_jit
def gradient_kernel(
    logits, row_stride, column_stride, vocab, bias, scale, softcap, targets, rows, rows_stride,
    statistics, statistics_stride, slopes, slopes_stride, out, out_stride, padded, order,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_Z_LOSS: tl.constexpr,
    HAS_ORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logits [., V], statistics [7, N], slopes [1 to 3, N] -> out [N, padded]; zeros where a row is not ACTIVE.

    With `order` [N] int64 the logits of row t are those at order[t], and `out` is not where they are.
    """
    t = tl.program_id(0).to(tl.int64)
    source = t
    if HAS_ORDER:
        source = tl.load(order + t)
    rows += t
    if tl.load(rows + 7 * rows_stride) < 2:
        write_zeros(out + t * out_stride, padded, BLOCK)
    else:
        statistics += t
        known = (
            tl.load(statistics), tl.load(statistics + 2 * statistics_stride),
            tl.load(statistics + 3 * statistics_stride), tl.load(statistics + 4 * statistics_stride),
            tl.load(statistics + 5 * statistics_stride),
        )  # fmt: skip
        z_slope = 0.0
        if HAS_Z_LOSS:
            z_slope = tl.load(slopes + slopes_stride + t)
        entropy_slope = 0.0
        if HAS_ENTROPY:
            entropy_slope = tl.load(slopes + 2 * slopes_stride + t)
        head = head_of(scale, softcap, tl.load(rows + 6 * rows_stride), HAS_SOFTCAP)
        write_gradient(
            logits + source * row_stride, column_stride, vocab, bias, tl.load(targets + t), head, known,
            (tl.load(slopes + t), z_slope, entropy_slope), out + t * out_stride, padded,
            HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY, HAS_Z_LOSS, BLOCK,
        )  # fmt: skip


@jit
def row_loss(
    rows, rows_stride, inside, logp, entropy, lse, hyper, kl_cap,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_IMPORTANCE: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
):  # fmt: skip
    """The loss of one row, or of a block of rows where `inside` is not None -> (loss, its slopes in logp, lse and H,
    dℓ/dlogπ of the policy term alone without its coefficient).

    OBJECTIVE (logp, old, adv, hyper) -> (ℓ, dℓ/dlogπ) and KL (logp - ref) -> (kl, dkl/dlogπ, their sum) are the twins;
    KL may be None, and KL_IMPORTANCE multiplies it by the ratio.
    """
    other = None
    if inside is not None:
        other = 0.0
    old = tl.load(rows, mask=inside, other=other)
    old = tl.where(old != old, logp, old)  # NaN: on-policy
    advantage = tl.load(rows + rows_stride, mask=inside, other=other)
    coefficient = tl.load(rows + 2 * rows_stride, mask=inside, other=other)
    policy_loss, policy_slope = OBJECTIVE(logp, old, advantage, hyper)
    # tl.minimum and tl.maximum drop a NaN; a bad row must not look like a good one
    known = (logp == logp) & (advantage == advantage)
    policy_loss = tl.where(known, policy_loss, float("nan"))
    policy_slope = tl.where(known, policy_slope, float("nan"))
    loss = coefficient * policy_loss
    slope = coefficient * policy_slope
    if KL is not None:
        kl_coefficient = tl.load(rows + 3 * rows_stride, mask=inside, other=other)
        d, far = clamped(logp - tl.load(rows + 5 * rows_stride, mask=inside, other=other), kl_cap)
        kl, kl_slope, kl_total = KL(d)
        kl_slope = tl.where(far, 0.0, kl_slope)
        kl_total = tl.where(far, kl, kl_total)
        if KL_IMPORTANCE:
            kl, kl_slope = importance_weighted(kl, kl_slope, kl_total, logp, old)
        loss += tl.where(kl_coefficient != 0, kl_coefficient * kl, 0.0)
        slope += tl.where(kl_coefficient != 0, kl_coefficient * kl_slope, 0.0)
    z_slope = 0.0
    if HAS_Z_LOSS:
        z_coefficient = tl.load(rows + 8 * rows_stride, mask=inside, other=other)
        loss += z_coefficient * lse * lse
        z_slope = 2 * z_coefficient * lse
    entropy_slope = 0.0
    if HAS_ENTROPY:
        entropy_slope = -tl.load(rows + 4 * rows_stride, mask=inside, other=other)
        loss += entropy_slope * entropy
    return loss, (slope, z_slope, entropy_slope), policy_slope


@row_jit
def losses_kernel(
    statistics, statistics_stride, rows, rows_stride, outcome, outcome_stride, slopes, slopes_stride, count, hyper,
    kl_cap, OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_IMPORTANCE: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """statistics [7, N], rows [9, N] -> outcome [5, N] and slopes [1 to 3, N] of their losses, zeros where a row is
    SKIPPED: the middle of `policy_kernel`, for those that need it between two kernels.
    """
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < count
    computed = inside & (tl.load(rows + 7 * rows_stride + t, mask=inside, other=0.0) >= 1)
    logp = tl.load(statistics + t, mask=computed, other=0.0)
    entropy = tl.load(statistics + statistics_stride + t, mask=computed, other=0.0)
    lse = tl.load(statistics + 6 * statistics_stride + t, mask=computed, other=0.0)
    loss, row_slopes, policy_slope = row_loss(
        rows + t, rows_stride, computed, logp, entropy, lse, hyper, kl_cap,
        OBJECTIVE, KL, KL_IMPORTANCE, HAS_ENTROPY, HAS_Z_LOSS,
    )  # fmt: skip
    slope, z_slope, entropy_slope = row_slopes
    tl.store(outcome + t, logp, mask=inside)
    tl.store(outcome + outcome_stride + t, entropy, mask=inside)
    tl.store(outcome + 2 * outcome_stride + t, lse, mask=inside)
    tl.store(outcome + 3 * outcome_stride + t, tl.where(computed, loss, 0.0), mask=inside)
    tl.store(outcome + 4 * outcome_stride + t, tl.where(computed, policy_slope, 0.0), mask=inside)
    tl.store(slopes + t, tl.where(computed, slope, 0.0), mask=inside)
    if HAS_Z_LOSS or HAS_ENTROPY:
        tl.store(slopes + slopes_stride + t, tl.where(computed, z_slope, 0.0), mask=inside)
    if HAS_ENTROPY:
        tl.store(slopes + 2 * slopes_stride + t, tl.where(computed, entropy_slope, 0.0), mask=inside)


@row_jit
def policy_kernel(
    logits, row_stride, column_stride, vocab, bias, scale, softcap, targets, rows, rows_stride,
    outcome, outcome_stride, out, out_stride, padded, hyper, kl_cap,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_IMPORTANCE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_Z_LOSS: tl.constexpr, WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole loss of a row in one launch: logits [N, V] -> outcome [5, N] (`Outcome`), with WRITE out [N, padded].

    OBJECTIVE, KL and KL_IMPORTANCE are those of `row_loss`.
    """
    t = tl.program_id(0).to(tl.int64)
    rows += t
    outcome += t
    kind = tl.load(rows + 7 * rows_stride)
    if kind < 1:
        for field in tl.static_range(5):
            tl.store(outcome + field * outcome_stride, 0.0)
        if WRITE:
            write_zeros(out + t * out_stride, padded, BLOCK)
    else:
        target = tl.load(targets + t)
        head = head_of(scale, softcap, tl.load(rows + 6 * rows_stride), HAS_SOFTCAP)
        logp, entropy, row_max, total, miss, mean, lse = reduce_row(
            logits + t * row_stride, column_stride, vocab, bias, target, head, HAS_BIAS, HAS_SOFTCAP, BLOCK
        )  # fmt: skip
        loss, slopes, policy_slope = row_loss(
            rows, rows_stride, None, logp, entropy, lse, hyper, kl_cap,
            OBJECTIVE, KL, KL_IMPORTANCE, HAS_ENTROPY, HAS_Z_LOSS,
        )  # fmt: skip
        tl.store(outcome, logp)
        tl.store(outcome + outcome_stride, entropy)
        tl.store(outcome + 2 * outcome_stride, lse)
        tl.store(outcome + 3 * outcome_stride, loss)
        tl.store(outcome + 4 * outcome_stride, policy_slope)
        if WRITE:
            if kind < 2:
                write_zeros(out + t * out_stride, padded, BLOCK)
            else:
                write_gradient(
                    logits + t * row_stride, column_stride, vocab, bias, target, head,
                    (logp, row_max, total, miss, mean), slopes, out + t * out_stride, padded,
                    HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY, HAS_Z_LOSS, BLOCK,
                )  # fmt: skip


@jit
def scale_kernel(values, count, factor, BLOCK: tl.constexpr):
    """values [count] *= factor (0-d), in fp32 and rounded once. By 1, what a loss mostly is, nothing is moved."""
    scale = tl.load(factor).to(tl.float32)
    if scale != 1:  # a NaN is not
        lanes = tl.arange(0, BLOCK)
        start = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        whole = count - BLOCK + 1
        for first in range(start, whole, step):
            block = values + first + lanes
            tl.store(block, (tl.load(block).to(tl.float32) * scale).to(values.dtype.element_ty))
        rest = count // BLOCK * BLOCK
        if (rest < count) & (start == 0):
            block = values + rest + lanes
            inside = rest + lanes < count
            scaled = tl.load(block, mask=inside).to(tl.float32) * scale
            tl.store(block, scaled.to(values.dtype.element_ty), mask=inside)
