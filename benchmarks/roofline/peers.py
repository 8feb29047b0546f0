"""The work of eager PyTorch and of other people's heads, as their sources are written."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.roofline.work import (
    FLOAT32,
    Cost,
    Problem,
    Stage,
    products,
    slices,
    together,
    whole_gradients,
    whole_logits,
)  # fmt: skip

# TRL 1.16: rows and vocabulary of a tile of logits
TRL_ROWS, TRL_COLUMNS = 4096, 32_768
# Liger 0.8.2's chunked GRPO loss takes one sequence at a time, taken to be this long: its rows, and those of a tile
LIGER_SEQUENCE, LIGER_ROWS, LIGER_COLUMNS = 1024, 2048, 4096
# verl 0.9: vocabulary of a slice of dlogits
VERL_COLUMNS = 9504
# cut-cross-entropy: rows and vocabulary of a block
CCE_BLOCK = 128


@dataclass(frozen=True)
class Published:
    """A head whose authors publish how fast it is.

    products  of the head with every row, 2F each, that it takes
    rates     TFLOP/s of these FLOPs at H=4096; None where `of_floor` is known
    of_floor  the time in those of its bare products
    """

    label: str
    chip: str
    products: int
    remark: str
    source: str
    rates: tuple[float, float] | None = None
    of_floor: tuple[float, float] | None = None


LIGER = "https://github.com/linkedin/Liger-Kernel/pull"
PUBLISHED = (
    Published(
        "Liger's scaled cross-entropy for sm_90", "H200", 4, "logits staged in fp16, dW added in bf16", f"{LIGER}/1422",
        rates=(763, 788),
    ),
    Published("Liger's scaled cross-entropy for sm_100", "B200", 4, "", f"{LIGER}/1458", rates=(1465, 1465)),
    Published(
        "quack's scaled exponentials", "H200", 3, "plain cross-entropy", "https://github.com/Dao-AILab/quack",
        of_floor=(0.97, 1.09),
    ),
)  # fmt: skip


def eager(problem: Problem) -> Cost:
    """Logits in the inputs' dtype, `log_softmax` in float32, `gather`, autograd; each operation a kernel of its own."""
    item, narrow = problem.itemsize, problem.itemsize < FLOAT32
    size, wide, row = item * problem.logits, FLOAT32 * problem.logits, FLOAT32 * problem.vocab
    held = size if narrow else 0
    stages = [
        whole_logits(problem, live=size),
        Stage("log_softmax", read=wide, reread=wide, row_bytes=row, written=wide, live=held + 2 * wide),
        Stage("gather backward", written=wide, live=2 * wide),
        Stage("log_softmax backward", read=2 * wide, reread=wide, row_bytes=row, written=wide, live=3 * wide),
        *whole_gradients(problem, size),
    ]
    if narrow:
        stages.insert(1, Stage("cast", read=size, written=wide, live=size + wide))
        stages.insert(5, Stage("cast backward", read=wide, written=size, live=wide + size))
    return Cost(tuple(stages), problem.gradients)


def eager_compiled(problem: Problem) -> Cost:
    """The same if the compiler fuses all it can: a read for the statistics, a read and a write for the gradient."""
    size = problem.itemsize * problem.logits
    stages = [
        whole_logits(problem, live=size),
        Stage("statistics", read=size, live=size),
        Stage("gradient", read=size, written=size, live=2 * size),
        *whole_gradients(problem, size),
    ]
    return Cost(tuple(stages), problem.gradients)


def trl(problem: Problem) -> Cost:
    """TRL's fused head: 8F in tiles of rows and vocabulary, gradients accumulated in float32. Its Triton path."""
    item, width = problem.itemsize, problem.hidden
    rows, columns = slices(problem.tokens, TRL_ROWS), slices(problem.vocab, TRL_COLUMNS)
    size, tile = item * problem.logits, item * max(rows) * TRL_COLUMNS
    live = tile + FLOAT32 * (problem.states + problem.head)
    tiles = [(m, n, width) for m in rows for n in columns]
    hidden = [products("dX", [(m, width, n) for n in columns], item, FLOAT32, live, sums=True) for m in rows]
    weight = [products("dW", [(n, width, m) for m in rows], item, FLOAT32, live, sums=True) for n in columns]
    zeros, sums = FLOAT32 * (problem.states + problem.head), item * (problem.states + problem.head)
    stages = [
        products("logits", tiles, item, item, tile),
        Stage("rows", read=size, live=tile),
        products("logits again", tiles, item, item, live),
        Stage("rows again", read=size, written=size, live=live),
        together(hidden),
        together(weight),
        Stage("zeros and casts", read=zeros * 2, written=zeros + sums, live=live + problem.gradients),
    ]
    return Cost(tuple(stages), problem.gradients)


def verl(problem: Problem) -> Cost:
    """verl's Triton head: 8F; no logits leave the forward, dlogits do for a slice of the vocabulary at a time."""
    item, tokens, width = problem.itemsize, problem.tokens, problem.hidden
    columns = slices(problem.vocab, VERL_COLUMNS)
    live = item * tokens * VERL_COLUMNS + problem.gradients
    states = item * problem.states * (len(columns) - 1)
    stages = [
        whole_logits(problem, "logits and statistics", keep=False),
        products("dlogits", [(tokens, n, width) for n in columns], item, item, live),
        products("dX", [(tokens, width, n) for n in columns], item, item, live + item * problem.states),
        Stage("sums of dX", read=2 * states, written=states, live=live + item * problem.states),
        products("dW", [(n, width, tokens) for n in columns], item, item, live),
    ]
    return Cost(tuple(stages), problem.gradients)


def bound_8f(problem: Problem) -> Cost:
    """The least that any fused 8F head takes, such as Liger's Hopper kernels: its products, and dlogits once."""
    forward = whole_logits(problem, "logits and statistics", keep=False)
    dlogits = whole_logits(problem, "dlogits", live=problem.gradients)
    return Cost((forward, dlogits, *whole_gradients(problem, 0)), problem.gradients)


def cce_exact(problem: Problem) -> Cost:
    """cut-cross-entropy without its filter: 8F in one kernel each way, every block adding to dX and dW under locks."""
    item, live = problem.itemsize, problem.gradients
    blocks = problem.states * -(-problem.vocab // CCE_BLOCK) + problem.head * -(-problem.tokens // CCE_BLOCK)
    forward, again = whole_logits(problem, "logits and statistics", keep=False), whole_logits(problem, keep=False)
    backward = replace(again, name="all in one kernel", flops=3 * again.flops, exposed=2 * item * blocks, live=live)
    return Cost((forward, backward), problem.gradients)


def liger_grpo(problem: Problem) -> Cost:
    """Liger's chunked GRPO loss: 2F + 2F in 16 bits and 4F in float32, operands cast up, with eager PyTorch between."""
    item, width, head = problem.itemsize, problem.hidden, problem.head
    columns = slices(problem.vocab, LIGER_COLUMNS)
    sequences = slices(problem.tokens, LIGER_SEQUENCE)
    rows = [size for sequence in sequences for size in slices(sequence, LIGER_ROWS)]
    tiles = [(m, n, width) for m in rows for n in columns]
    tile = max(rows) * LIGER_COLUMNS
    live = problem.gradients + FLOAT32 * (head + max(sequences) * width) + item * head + 4 * FLOAT32 * tile
    hidden = [products("dX", [(m, width, n) for n in columns], FLOAT32, FLOAT32, live) for m in rows]
    weight = [products("dW", [(n, width, m) for n in columns], FLOAT32, FLOAT32, live) for m in rows]
    # float(), mul_, amax, subtract, exp, sum; and float(), mul_, subtract, exp, two products with a scalar
    forward, backward = 38 * problem.logits, 46 * problem.logits
    # of each sequence: the weight cast up; a float32 dW zeroed, added to, cast; the sum over sequences
    per_sequence = head * ((item + FLOAT32) + (FLOAT32 + 3 * FLOAT32 + FLOAT32 + item) + 3 * item)
    additions = per_sequence * len(sequences) + 3 * FLOAT32 * problem.states * len(columns)
    return Cost(
        (
            products("logits", tiles, item, item, live),
            Stage("rows", read=forward / 2, written=forward / 2, live=live),
            products("logits again", tiles, item, item, live),
            Stage("rows again", read=backward / 2, written=backward / 2, live=live),
            together(hidden),
            together(weight),
            Stage("additions and casts", read=additions / 2, written=additions / 2, live=live),
        ),
        problem.gradients,
    )
