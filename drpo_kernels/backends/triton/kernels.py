"""Row kernels: one program owns one row of logits, or in `losses_kernel` a block of rows without their logits, and
knows nothing of the loss beyond the functions handed to it. `scale_kernel` multiplies a finished gradient. The
mathematics is that of softmax.py; the packed per-row layouts are `Field`, `Stat`, `Outcome` and `Slope` of
backends/rows.py.
"""

import inspect
from typing import Any, NamedTuple

from drpo_kernels.backends import rows as contract
from drpo_kernels.backends.triton.softmax import (
    ENTROPY,
    LOGSUMEXP,
    STATS,
    Logits,
    load_softmax,
    load_target,
    reduce_row,
    row_of,
    write_gradient,
    write_zeros,
)
from drpo_kernels.kl import clamped, importance_weighted
from drpo_kernels.softcap import tanh_slope_twin
from drpo_kernels.triton_support import constants, jit, tl

# What a kernel is given of a batch beside its logits. Triton would compile a kernel of its own where such a stride is 1
# or a multiple of 16, or such a pointer 16-byte aligned, and another binary may fuse a · b + c · d the other way: a
# row's last bit would depend on how many rows are beside it, and each new count might compile again. A NamedTuple may
# hold none of them: Triton specialises the fields of a tuple whatever `do_not_specialize` says
VARYING = (
    "targets", "rows", "rows_stride", "statistics", "statistics_stride", "slopes", "slopes_stride", "order", "outcome",
    "outcome_stride", "factors", "count",
)  # fmt: skip

OLD_LOGPROB, ADVANTAGE, POLICY_COEF, KL_COEF, ENTROPY_COEF, REF_LOGPROB, INV_TEMPERATURE, KIND, Z_LOSS_COEF = constants(
    contract.Field
)
_, FORWARD, ACTIVE = constants(contract.RowKind)
OUTCOMES = tl.constexpr(len(contract.Outcome))
_, OUT_ENTROPY, OUT_LOGSUMEXP, OUT_LOSS, OUT_SLOPE = constants(contract.Outcome)
_, SLOPE_LOGSUMEXP, SLOPE_ENTROPY = constants(contract.Slope)


def row_jit(function):
    """`jit` for which the arguments of `VARYING` are values like any other."""
    names = [name for name in VARYING if name in inspect.signature(function).parameters]
    return jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)


class Output(NamedTuple):
    """Where the gradient of a row's logits goes: [N, padded] of fp32, bf16 or fp16, contiguous along a row."""

    data: Any
    row_stride: Any
    padded: Any  # columns that are written, the vocabulary and zeros behind it


class LossTerms(NamedTuple):
    """What a row's loss is made of (`Terms`). Its functions and flags are compile-time constants: each combination is a
    kernel of its own.
    """

    objective: Any  # twin (logp, old, advantage, hyper) -> (ℓ, dℓ/dlogπ)
    hyper: Any  # its hyper-parameters, a tuple of fp32
    kl: Any  # twin (logp - ref) -> (kl, dkl/dlogπ, their sum), or None
    kl_cap: Any
    kl_importance: Any  # whether the KL is multiplied by the ratio
    entropy_bonus: Any
    z_loss: Any


@row_jit
def statistics_kernel(logits: Logits, targets, rows, rows_stride, statistics, statistics_stride, BLOCK: tl.constexpr):
    """logits [N, V] -> statistics [7, N] fp32 (`Stat`); a SKIPPED row is not read and reports zeros."""
    t = tl.program_id(0).to(tl.int64)
    rows += t
    statistics += t
    if tl.load(rows + rows_stride * KIND) < FORWARD:
        for stat in tl.static_range(STATS):
            tl.store(statistics + stat * statistics_stride, 0.0)
    else:
        row = row_of(logits, t, tl.load(targets + t), tl.load(rows + rows_stride * INV_TEMPERATURE))
        known = reduce_row(logits, row, 0.0, None, False, False, BLOCK)
        for stat in tl.static_range(STATS):
            tl.store(statistics + stat * statistics_stride, known[stat])


@row_jit
def gradient_kernel(
    logits: Logits, targets, rows, rows_stride, statistics, statistics_stride, slopes, slopes_stride, out: Output,
    order, HAS_ENTROPY: tl.constexpr, HAS_Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logits [., V], statistics [7, N], slopes [1 to 3, N] -> out [N, padded]; zeros where a row is not ACTIVE.

    With `order` [N] int64, which may be None, the logits of row t are those at order[t], and `out` is not where they
    are.
    """
    t = tl.program_id(0).to(tl.int64)
    place = t
    if order is not None:
        place = tl.load(order + t)
    rows += t
    written = out.data + t * out.row_stride
    if tl.load(rows + rows_stride * KIND) < ACTIVE:
        write_zeros(written, out.padded, BLOCK)
    else:
        row = row_of(logits, place, tl.load(targets + t), tl.load(rows + rows_stride * INV_TEMPERATURE))
        known = load_softmax(statistics + t, statistics_stride)
        z_slope = 0.0
        if HAS_Z_LOSS:
            z_slope = tl.load(slopes + slopes_stride * SLOPE_LOGSUMEXP + t)
        entropy_slope = 0.0
        if HAS_ENTROPY:
            entropy_slope = tl.load(slopes + slopes_stride * SLOPE_ENTROPY + t)
        row_slopes = (tl.load(slopes + t), z_slope, entropy_slope)
        write_gradient(logits, row, known, row_slopes, written, out.padded, HAS_ENTROPY, HAS_Z_LOSS, BLOCK)


@jit
def row_loss(rows, rows_stride, inside, logp, entropy, lse, terms):
    """The loss of one row, or of a block of rows where `inside` is not None -> (loss, its slopes in logp, lse and H,
    dℓ/dlogπ of the policy term alone without its coefficient). `terms` are `LossTerms`.
    """
    other = None
    if inside is not None:
        other = 0.0
    old = tl.load(rows + rows_stride * OLD_LOGPROB, mask=inside, other=other)
    old = tl.where(old != old, logp, old)  # NaN: on-policy
    advantage = tl.load(rows + rows_stride * ADVANTAGE, mask=inside, other=other)
    coefficient = tl.load(rows + rows_stride * POLICY_COEF, mask=inside, other=other)
    policy_loss, policy_slope = terms.objective(logp, old, advantage, terms.hyper)
    # tl.minimum and tl.maximum drop a NaN; a bad row must not look like a good one
    known = (logp == logp) & (advantage == advantage)
    policy_loss = tl.where(known, policy_loss, float("nan"))
    policy_slope = tl.where(known, policy_slope, float("nan"))
    loss = coefficient * policy_loss
    slope = coefficient * policy_slope
    if terms.kl is not None:
        kl_coefficient = tl.load(rows + rows_stride * KL_COEF, mask=inside, other=other)
        reference = tl.load(rows + rows_stride * REF_LOGPROB, mask=inside, other=other)
        d, far = clamped(logp - reference, terms.kl_cap)
        kl, kl_slope, kl_total = terms.kl(d)
        kl_slope = tl.where(far, 0.0, kl_slope)
        kl_total = tl.where(far, kl, kl_total)
        if terms.kl_importance:
            kl, kl_slope = importance_weighted(kl, kl_slope, kl_total, logp, old)
        loss += tl.where(kl_coefficient != 0, kl_coefficient * kl, 0.0)
        slope += tl.where(kl_coefficient != 0, kl_coefficient * kl_slope, 0.0)
    z_slope = 0.0
    if terms.z_loss:
        z_coefficient = tl.load(rows + rows_stride * Z_LOSS_COEF, mask=inside, other=other)
        loss += z_coefficient * lse * lse
        z_slope = 2 * z_coefficient * lse
    entropy_slope = 0.0
    if terms.entropy_bonus:
        entropy_slope = -tl.load(rows + rows_stride * ENTROPY_COEF, mask=inside, other=other)
        loss += entropy_slope * entropy
    return loss, (slope, z_slope, entropy_slope), policy_slope


@jit
def store_outcome(outcome, stride, inside, logp, entropy, lse, loss, policy_slope):
    """Store what one row reports (`Outcome`), or what each row of a block does that is `inside`; None says all are."""
    tl.store(outcome, logp, mask=inside)
    tl.store(outcome + stride * OUT_ENTROPY, entropy, mask=inside)
    tl.store(outcome + stride * OUT_LOGSUMEXP, lse, mask=inside)
    tl.store(outcome + stride * OUT_LOSS, loss, mask=inside)
    tl.store(outcome + stride * OUT_SLOPE, policy_slope, mask=inside)


@row_jit
def losses_kernel(
    statistics, statistics_stride, rows, rows_stride, outcome, outcome_stride, slopes, slopes_stride, count,
    terms: LossTerms, BLOCK: tl.constexpr,
):  # fmt: skip
    """statistics [7, N], rows [9, N] -> outcome [5, N] and slopes [1 to 3, N] of their losses, all fp32; zeros where a
    row is SKIPPED. It is the middle of `policy_kernel`, for calls that need the loss between two kernels.
    """
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < count
    computed = inside & (tl.load(rows + rows_stride * KIND + t, mask=inside, other=0.0) >= FORWARD)
    logp = tl.load(statistics + t, mask=computed, other=0.0)
    entropy = tl.load(statistics + statistics_stride * ENTROPY + t, mask=computed, other=0.0)
    lse = tl.load(statistics + statistics_stride * LOGSUMEXP + t, mask=computed, other=0.0)
    loss, row_slopes, policy_slope = row_loss(rows + t, rows_stride, computed, logp, entropy, lse, terms)
    slope, z_slope, entropy_slope = row_slopes
    loss, policy_slope = tl.where(computed, loss, 0.0), tl.where(computed, policy_slope, 0.0)
    store_outcome(outcome + t, outcome_stride, inside, logp, entropy, lse, loss, policy_slope)
    slopes += t
    tl.store(slopes, tl.where(computed, slope, 0.0), mask=inside)
    if terms.z_loss or terms.entropy_bonus:
        tl.store(slopes + slopes_stride * SLOPE_LOGSUMEXP, tl.where(computed, z_slope, 0.0), mask=inside)
    if terms.entropy_bonus:
        tl.store(slopes + slopes_stride * SLOPE_ENTROPY, tl.where(computed, entropy_slope, 0.0), mask=inside)


@row_jit
def policy_kernel(
    logits: Logits, targets, rows, rows_stride, outcome, outcome_stride, out: Output, factors, terms: LossTerms,
    FROM_ROLLOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole loss of a row in one launch: logits [N, V] -> outcome [5, N] fp32 (`Outcome`).

    With `out`, a second read writes the gradient. With `factors` [N] fp32 as well, the first read does, without an
    entropy bonus or a z-loss and not over the logits: the product of factors and out is the gradient. Either may be
    None. A row that is not ACTIVE gets zeros. Without FROM_ROLLOUT, or with an entropy bonus, the reference is that of
    `statistics_kernel`.
    """
    FACTORED: tl.constexpr = factors is not None
    HAS_OLD: tl.constexpr = FROM_ROLLOUT and not terms.entropy_bonus
    t = tl.program_id(0).to(tl.int64)
    rows += t
    outcome += t
    kind = tl.load(rows + rows_stride * KIND)
    written = None
    padded = 0
    if out is not None:
        written = out.data + t * out.row_stride
        padded = out.padded
    if kind < FORWARD:
        for field in tl.static_range(OUTCOMES):
            tl.store(outcome + field * outcome_stride, 0.0)
        if FACTORED:
            tl.store(factors + t, 0.0)
        if out is not None:
            write_zeros(written, padded, BLOCK)
    else:
        row = row_of(logits, t, tl.load(targets + t), tl.load(rows + rows_stride * INV_TEMPERATURE))
        known = reduce_row(logits, row, tl.load(rows + rows_stride * OLD_LOGPROB), written, HAS_OLD, FACTORED, BLOCK)
        loss, slopes, policy_slope = row_loss(rows, rows_stride, None, known.logp, known.entropy, known.lse, terms)
        store_outcome(outcome, outcome_stride, None, known.logp, known.entropy, known.lse, loss, policy_slope)
        if FACTORED:
            slope, _, _ = slopes
            tl.store(factors + t, tl.where(kind < ACTIVE, 0.0, -slope * row.chain / known.total))
            tl.debug_barrier()  # E is stored
            if kind < ACTIVE:
                write_zeros(written, padded, BLOCK)
            else:
                at_target = -known.others
                if logits.softcap is not None:
                    _, v_y = load_target(logits, row)
                    at_target *= tanh_slope_twin(v_y)
                tl.store(written + row.target, at_target.to(written.dtype.element_ty), mask=row.has_target)
        elif out is not None:
            if kind < ACTIVE:
                write_zeros(written, padded, BLOCK)
            else:
                write_gradient(logits, row, known, slopes, written, padded, terms.entropy_bonus, terms.z_loss, BLOCK)


@jit
def scale_kernel(values, count, factor, BLOCK: tl.constexpr):
    """values [count] *= factor (0-d), in fp32 and rounded once. If the factor is 1, as it mostly is, nothing is read or
    written.
    """
    scale = tl.load(factor).to(tl.float32)
    if scale != 1:  # true for a NaN
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
