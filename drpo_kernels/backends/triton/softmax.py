"""The softmax of one row of logits and its gradient, by one program: what the row kernels are made of.

For a row x [V] of raw logits (fp32, bf16 or fp16; all arithmetic in fp32), with the base logits b and the factor of
`Transform`, and with a reference r, here a base logit and not the ratio: near lse / factor if the rollout gives it,
else that of the target or the row's largest:
    z_j = factor · b_j    q_j = factor · (b_j - r)    E_j = exp(q_j)    Σ = Σ_j E_j
    logp = q_y - log Σ    q̄ = Σ_j E_j q_j / Σ    H = log Σ - q̄    lse = factor · r + log Σ
    dx_j = dz_j/dx_j · (slope · (onehot_y - p)_j - slope_H · p_j (q_j - q̄) + slope_lse · p_j)
where q_j - q̄ = log p_j + H, which would cancel on a flat row.

A softmax mostly reads a row for its maximum first, because it does not know the scale. Here it does: the rollout gave
the target the probability μ, so that with r = b_y - log μ / factor, Σ is μ / π, near 1, and one read is enough. A row
whose Σ shows that r was wrong (another policy, a banned target) is read twice more, for its largest logit, which is r
then. The sum runs over the tokens other than the target, which gives 1 - p_y = others / Σ and, where the target is
likely, logp = -log1p(others / E_y) without cancellation.

A gradient in slope alone is v · E_j with v = -slope / Σ · dz/dx, and v · -others at the target. Where the products that
follow can take a factor per row, one read writes E and leaves v (`RowOps.factors`); else a second read writes the
gradient.
"""

from typing import Any, NamedTuple

from drpo_kernels.backends.rows import Stat
from drpo_kernels.softcap import tanh, tanh_slope_twin
from drpo_kernels.tokens import log1p
from drpo_kernels.triton_support import constants, jit, tl

STATS = tl.constexpr(len(Stat))
LOGPROB, ENTROPY, REFERENCE, SUM, MISS, MEAN, LOGSUMEXP = constants(Stat)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e20)  # the least q in a product: a banned token's is -inf, and 0 · -inf would be NaN


class Matrix(NamedTuple):
    """A matrix of any strides."""

    data: Any  # pointer
    row_stride: Any
    column_stride: Any


class Logits(NamedTuple):
    """Rows of raw logits and the transform after them: the first argument of every row kernel.

    An absent bias or soft-cap is None, for which Triton compiles a kernel of its own.
    """

    data: Any  # pointer to [., vocab] of fp32, bf16 or fp16, with any strides
    row_stride: Any
    column_stride: Any
    vocab: Any
    bias: Any  # pointer to [vocab]
    scale: Any
    softcap: Any


class LogitRow(NamedTuple):
    """One row of `Logits`, without their fields: up to Triton 3.6 a function cannot return a NamedTuple with a None."""

    x: Any  # pointer to the row's first logit
    target: Any  # int64; 0 where the target is outside the vocabulary
    has_target: Any  # whether the target is inside the vocabulary
    inner_scale: Any  # scale / softcap, the factor inside the tanh
    factor: Any  # dz/db
    factor2: Any  # the same for powers of 2: factor / ln 2
    chain: Any  # dz/dx, up to the slope of the tanh


class Softmax(NamedTuple):
    """What one read of a row gives, in the order of `Stat`; the symbols are those of this module's formulas."""

    logp: Any
    entropy: Any
    reference: Any  # r
    total: Any  # Σ
    miss: Any  # 1 - p_y
    mean: Any  # q̄
    lse: Any
    others: Any  # Σ without the target's term


@jit
def row_of(logits, place, target, inv_temperature):
    """The `LogitRow` at `place` among the rows of `logits`, with its target and 1 / temperature."""
    inner_scale = logits.scale
    chain = logits.scale * inv_temperature
    factor = chain
    if logits.softcap is not None:
        inner_scale = logits.scale / logits.softcap
        factor = logits.softcap * inv_temperature
    has_target = (target >= 0) & (target < logits.vocab)
    target = tl.where(has_target, target, 0)
    x = logits.data + place * logits.row_stride
    return LogitRow(x, target, has_target, inner_scale, factor, factor / LN2, chain)


@jit
def base_logit(logits, row, x, cols, inside):
    """Raw logits x -> (b, v): b = v = x + bias, or with a soft-cap b = tanh(v) and v = inner_scale · (x + bias)."""
    if logits.bias is not None:
        other = None
        if inside is not None:
            other = 0.0
        x += tl.load(logits.bias + cols, mask=inside, other=other).to(tl.float32)
    if logits.softcap is not None:
        v = x * row.inner_scale
        return tanh(v), v
    else:
        return x, x


@jit
def load_base(logits, row, start, inside, BLOCK: tl.constexpr):
    """(b, v) of the BLOCK columns from `start` on, in fp32, as in `base_logit`.

    b is -inf in columns that are not `inside`; None says that all are.
    """
    lanes = tl.arange(0, BLOCK)
    other = None
    if inside is not None:
        other = float("-inf")
    # first a pointer to the block, one for all threads, then each thread's place: the fewest instructions
    start = tl.cast(start, tl.int64)
    place = row.x + start * logits.column_stride + lanes.to(tl.int64) * logits.column_stride
    x = tl.load(place, mask=inside, other=other).to(tl.float32)
    b, v = base_logit(logits, row, x, start + lanes, inside)
    if logits.softcap is not None:
        if inside is not None:
            b = tl.where(inside, b, float("-inf"))
    return b, v


@jit
def load_target(logits, row):
    """(b, v) of the target, as in `base_logit`; of the first token where the target is outside the vocabulary."""
    x = tl.load(row.x + row.target * logits.column_stride).to(tl.float32)
    return base_logit(logits, row, x, row.target, None)


@jit
def add_block(logits, row, reference, sums, out, start, STORE: tl.constexpr, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """Add a block of columns to the sums (Σ 2^q, Σ 2^q q) with q = factor2 · (b - reference), without the target's.

    With STORE, 2^q times the slope of a soft-cap goes to `out`. Only a block at an EDGE may hold the target, whose
    place becomes 0, or columns beyond the vocabulary.
    """
    lane_sum, lane_moment = sums
    lanes = tl.arange(0, BLOCK)
    cols = start + lanes
    inside = None
    if EDGE:
        inside = (cols < logits.vocab) & (cols != row.target.to(tl.int32))
    b, v = load_base(logits, row, start, inside, BLOCK)
    q = (b - reference) * row.factor2
    e = tl.exp2(q)
    if STORE:
        stored = e
        if logits.softcap is not None:
            stored *= tanh_slope_twin(v)
        if EDGE:
            tl.store(out + cols, stored.to(out.dtype.element_ty), mask=cols < logits.vocab)
        else:
            tl.store(out + start + lanes, stored.to(out.dtype.element_ty))
    return add_pairs(lane_sum, e, BLOCK), add_pairs(lane_moment, e * tl.maximum(q, LOWEST), BLOCK)


@jit
def add_pairs(lanes, values, BLOCK: tl.constexpr):
    """lanes + values [BLOCK], with a lane to each element or, of half as many lanes, to each pair of elements.

    A thread has 16 elements of 16 bits, and no registers for as many lanes.
    """
    if lanes.shape[0] < BLOCK:
        values = tl.sum(tl.reshape(values, [BLOCK // 2, 2]), 1)
    return lanes + values


@jit
def sum_others(logits, row, reference, out, STORE: tl.constexpr, BLOCK: tl.constexpr):
    """One read of the row -> (Σ 2^q, Σ 2^q q) over the tokens other than the target; see `add_block`.

    The target's block comes first and apart, so that no other element is compared with it, and so does the rest of a
    vocabulary that is no multiple of a block: unmasked, loads and stores are 16 bytes wide for any vocabulary.
    """
    LANES: tl.constexpr = BLOCK if row.x.dtype.element_ty.primitive_bitwidth == 32 else BLOCK // 2
    sums = (tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32))
    whole = logits.vocab // BLOCK * BLOCK
    apart = row.target.to(tl.int32) // BLOCK * BLOCK
    sums = add_block(logits, row, reference, sums, out, apart, STORE, True, BLOCK)
    if apart < whole:
        if whole < logits.vocab:
            sums = add_block(logits, row, reference, sums, out, whole, STORE, True, BLOCK)
        whole -= BLOCK
    for i in range(0, whole, BLOCK):
        start = tl.where(i < apart, i, i + BLOCK)
        sums = add_block(logits, row, reference, sums, out, start, STORE, False, BLOCK)
    lane_sum, lane_moment = sums
    return tl.sum(lane_sum, 0), tl.sum(lane_moment, 0)


@jit
def largest_of(logits, row, BLOCK: tl.constexpr):
    """max b of the row; NaN where one of them is."""
    lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
    whole = logits.vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        b, _ = load_base(logits, row, start, None, BLOCK)
        lane_max = tl.maximum(lane_max, b, propagate_nan=tl.PropagateNan.ALL)
    if whole < logits.vocab:
        b, _ = load_base(logits, row, whole, whole + tl.arange(0, BLOCK) < logits.vocab, BLOCK)
        lane_max = tl.maximum(lane_max, b, propagate_nan=tl.PropagateNan.ALL)
    poisoned = tl.max((lane_max != lane_max).to(tl.int32), 0)
    return tl.where(poisoned > 0, float("nan"), tl.max(lane_max, 0))


@jit
def reduce_row(logits, row, old, out, HAS_OLD: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr):
    """The `Softmax` of a row, from one read of it; with STORE, E goes to `out`, 0 at the target.

    With HAS_OLD, `old` is log μ, or NaN where it is not known; else r is the target's logit. log π is off by up to
    n · 2^-24 where Σ is 2^n, and so is H = log Σ - q̄, however small it is. For a gradient of H, r is the logit of a
    token that has a good part of the row, the target's or the largest, so that H keeps its digits where one token has
    it all.
    """
    LARGEST_SUM: tl.constexpr = 256.0 if HAS_OLD else 4.0
    b_y, _ = load_target(logits, row)
    b_y = tl.where(row.has_target, b_y, float("nan"))  # which turns the whole row into NaN
    reference = b_y
    if HAS_OLD:
        reference -= tl.where(old == old, tl.minimum(tl.maximum(old, -27.0), 0.0), 0.0) / row.factor
    others, moment = sum_others(logits, row, reference, out, STORE, BLOCK)
    total = others + tl.exp((b_y - reference) * row.factor)
    # or NaN, from a target that is banned or a logit that is NaN or inf
    if (total > LARGEST_SUM) | (total < 1 / LARGEST_SUM) | (total != total):
        reference = largest_of(logits, row, BLOCK)
        tl.debug_barrier()  # the first E are stored
        others, moment = sum_others(logits, row, reference, out, STORE, BLOCK)
    q_y = (b_y - reference) * row.factor  # inf - inf is a NaN, as it must be
    e_y = tl.exp(q_y)
    total = others + e_y
    log_total = tl.where(e_y > others, q_y + log1p(others / e_y), tl.log(total))
    mean = (moment * LN2 + e_y * tl.maximum(q_y, LOWEST)) / total
    entropy = log_total - mean
    entropy = tl.where(entropy < 0, 0.0, entropy)  # rounding may leave -1e-8; a NaN passes
    logp = tl.where(e_y > others, -log1p(others / e_y), q_y - log_total)
    lse = reference * row.factor + log_total
    return Softmax(logp, entropy, reference, total, others / total, mean, lse, others)


@jit
def load_softmax(statistics, stride):
    """The `Softmax` of a row from its packed statistics (`Stat`), [7, N]; what is not used is not loaded."""
    total = tl.load(statistics + stride * SUM)
    miss = tl.load(statistics + stride * MISS)
    return Softmax(
        tl.load(statistics + stride * LOGPROB), tl.load(statistics + stride * ENTROPY),
        tl.load(statistics + stride * REFERENCE), total, miss, tl.load(statistics + stride * MEAN),
        tl.load(statistics + stride * LOGSUMEXP), total * miss,
    )  # fmt: skip


@jit
def gradient_at(logits, row, b, v, known, inv_total, slope, entropy_slope, HAS_ENTROPY: tl.constexpr):
    """The gradient of tokens other than the target, whose base logits are (b, v)."""
    q = (b - known.reference) * row.factor2
    p = tl.exp2(q) * inv_total
    gradient = -slope * p
    if HAS_ENTROPY:
        gradient -= entropy_slope * p * (tl.maximum(q, LOWEST) * LN2 - known.mean)
    if logits.softcap is not None:
        gradient *= tanh_slope_twin(v)
    return gradient


@jit
def write_gradient(
    logits, row, known, slopes, out, padded, HAS_ENTROPY: tl.constexpr, HAS_Z_LOSS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The second read of the row and the only write: `out` may be the row itself where element sizes agree.

    `known` is the row's `Softmax`, and `slopes` are those of logp, lse and H (`Slope`). Columns [vocab, padded) get
    zeros.
    """
    slope, z_slope, entropy_slope = slopes
    inv_total = 1 / known.total
    slope *= row.chain
    entropy_slope *= row.chain
    at_target = slope * known.miss
    if HAS_Z_LOSS:  # z_slope · p is slope · (onehot - p) with -z_slope, and z_slope more at the target
        z_slope *= row.chain
        at_target += z_slope * tl.exp(known.logp)
        slope -= z_slope
    b_y, v_y = load_target(logits, row)
    if logits.softcap is not None:
        at_target *= tanh_slope_twin(v_y)
    if HAS_ENTROPY:
        at_target += gradient_at(logits, row, b_y, v_y, known, inv_total, 0.0, entropy_slope, True)
    tl.debug_barrier()  # every thread has read the target's logit, which may be overwritten
    whole = logits.vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        b, v = load_base(logits, row, start, None, BLOCK)
        gradient = gradient_at(logits, row, b, v, known, inv_total, slope, entropy_slope, HAS_ENTROPY)
        tl.store(out + start + tl.arange(0, BLOCK), gradient.to(out.dtype.element_ty))
    for start in range(whole, padded, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < logits.vocab
        b, v = load_base(logits, row, start, inside, BLOCK)
        gradient = gradient_at(logits, row, b, v, known, inv_total, slope, entropy_slope, HAS_ENTROPY)
        gradient = tl.where(inside, gradient, 0.0)
        tl.store(out + cols, gradient.to(out.dtype.element_ty), mask=cols < padded)
    tl.debug_barrier()
    # the target of a row of a sharded head may be in another shard
    tl.store(out + row.target, at_target.to(out.dtype.element_ty), mask=row.has_target)


@jit
def write_zeros(out, padded, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], out.dtype.element_ty)
    whole = padded // BLOCK * BLOCK  # unmasked, so that stores are 16 bytes wide for any vocabulary
    for start in range(0, whole, BLOCK):
        tl.store(out + start + cols, zeros)
    if whole < padded:
        tl.store(out + whole + cols, zeros, mask=whole + cols < padded)
