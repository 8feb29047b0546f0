"""Row kernels: one program owns one row of logits and knows nothing of the loss beyond the functions handed to it. The
mathematics is that of softmax.py; the packed per-row layouts (indices 0 to 8) are `Row`, `Stat` and `Outcome` of
backends/rows.py.
"""

import inspect

from drpo_kernels.backends.triton.softmax import head_of, reduce_row, write_gradient, write_zeros
from drpo_kernels.kl import clamped, importance_weighted
from drpo_kernels.softcap import tanh_slope_twin
from drpo_kernels.triton_support import jit, tl

# What a kernel is given of a batch beside its logits. Triton would compile a kernel of its own where such a stride is 1
# or a multiple of 16, or such a pointer 16-byte aligned, and another binary may fuse a · b + c · d the other way: a
# row's last bit would depend on how many rows are beside it, and each new count might compile again
VARYING = (
    "targets", "rows", "rows_stride", "statistics", "statistics_stride", "slopes", "slopes_stride", "order", "outcome",
    "outcome_stride", "factors", "count",
)  # fmt: skip


def row_jit(function):
    """`jit` for which the arguments of `VARYING` are values like any other."""
    names = [name for name in VARYING if name in inspect.signature(function).parameters]
    return jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)


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
        logp, entropy, reference, total, others, mean, lse, _ = reduce_row(
            logits + t * row_stride, column_stride, vocab, bias, tl.load(targets + t), 0.0, head, None,
            HAS_BIAS, HAS_SOFTCAP, False, False, BLOCK,
        )  # fmt: skip
        tl.store(statistics, logp)
        tl.store(statistics + statistics_stride, entropy)
        tl.store(statistics + 2 * statistics_stride, reference)
        tl.store(statistics + 3 * statistics_stride, total)
        tl.store(statistics + 4 * statistics_stride, others / total)
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


# what `policy_kernel` writes of a row beside its outcome
WRITE_NOTHING, WRITE_GRADIENT, WRITE_FACTORED = 0, 1, 2


@row_jit
def policy_kernel(
    logits, row_stride, column_stride, vocab, bias, scale, softcap, targets, rows, rows_stride,
    outcome, outcome_stride, out, out_stride, padded, factors, hyper, kl_cap,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_IMPORTANCE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_Z_LOSS: tl.constexpr, FROM_ROLLOUT: tl.constexpr,
    WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole loss of a row in one launch: logits [N, V] -> outcome [5, N] (`Outcome`).

    WRITE_GRADIENT: the gradient, out [N, padded], by a second read. WRITE_FACTORED, by the first read, without an
    entropy bonus or a z-loss and not over the logits: out [N, V] and factors [N] fp32, whose product the gradient is.
    A row that is not ACTIVE gets zeros. Without FROM_ROLLOUT, or with an entropy bonus, the reference is that of
    `statistics_kernel`. OBJECTIVE, KL and KL_IMPORTANCE are those of `row_loss`.
    """
    FACTORED: tl.constexpr = WRITE == 2  # WRITE_FACTORED
    t = tl.program_id(0).to(tl.int64)
    rows += t
    outcome += t
    kind = tl.load(rows + 7 * rows_stride)
    out += t * out_stride
    if kind < 1:
        for field in tl.static_range(5):
            tl.store(outcome + field * outcome_stride, 0.0)
        if FACTORED:
            tl.store(factors + t, 0.0)
        if WRITE:
            write_zeros(out, padded, BLOCK)
    else:
        target = tl.load(targets + t)
        head = head_of(scale, softcap, tl.load(rows + 6 * rows_stride), HAS_SOFTCAP)
        row = logits + t * row_stride
        logp, entropy, reference, total, others, mean, lse, v_y = reduce_row(
            row, column_stride, vocab, bias, target, tl.load(rows), head, out,
            HAS_BIAS, HAS_SOFTCAP, FROM_ROLLOUT and not HAS_ENTROPY, FACTORED, BLOCK,
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
        if FACTORED:
            _, _, chain = head
            slope, _, _ = slopes
            tl.store(factors + t, tl.where(kind < 2, 0.0, -slope * chain / total))
            tl.debug_barrier()  # E is stored
            if kind < 2:
                write_zeros(out, padded, BLOCK)
            else:
                at_target = -others
                if HAS_SOFTCAP:
                    at_target *= tanh_slope_twin(v_y)
                tl.store(out + target, at_target.to(out.dtype.element_ty), mask=(target >= 0) & (target < vocab))
        elif WRITE:
            if kind < 2:
                write_zeros(out, padded, BLOCK)
            else:
                write_gradient(
                    row, column_stride, vocab, bias, target, head,
                    (logp, reference, total, others / total, mean), slopes, out, padded,
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
