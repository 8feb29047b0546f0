"""The work of eager PyTorch and of other people's heads, as their sources are written."""

from __future__ import annotations

from dataclasses import replace

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
)

# rows and columns of a tile of logits in TRL 1.16
TRL_ROWS, TRL_COLUMNS = 4096, 32_768
# Liger 0.8.2's chunked GRPO loss takes one sequence at a time. Assumed length of a sequence; rows and columns of a tile
LIGER_SEQUENCE, LIGER_ROWS, LIGER_COLUMNS = 1024, 2048, 4096
# rows, and columns, of a block in cut-cross-entropy
CCE_BLOCK = 128


def eager(problem: Problem) -> Cost:
    """Logits in the inputs' dtype, `log_softmax` in float32, `gather` and autograd, a kernel for each operation."""
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
    """Eager code under a compiler that fuses all it can: one read for the statistics, and one read and write after."""
    size = problem.itemsize * problem.logits
    stages = [
        whole_logits(problem, live=size),
        Stage("statistics", read=size, live=size),
        Stage("gradient", read=size, written=size, live=2 * size),
        *whole_gradients(problem, size),
    ]
    return Cost(tuple(stages), problem.gradients)


def trl(problem: Problem) -> Cost:
    """TRL's fused head on a GPU takes 8F in tiles of rows and vocabulary and adds its gradients in float32."""
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


def cce_exact(problem: Problem) -> Cost:
    """cut-cross-entropy without its filter takes 8F in one kernel each way; blocks add to dX and dW under locks."""
    item, live = problem.itemsize, problem.gradients
    blocks = problem.states * -(-problem.vocab // CCE_BLOCK) + problem.head * -(-problem.tokens // CCE_BLOCK)
    forward, again = whole_logits(problem, "logits and statistics", keep=False), whole_logits(problem, keep=False)
    backward = replace(again, name="all in one kernel", flops=3 * again.flops, exposed=2 * item * blocks, live=live)
    return Cost((forward, backward), problem.gradients)


def liger_grpo(problem: Problem) -> Cost:
    """Liger's chunked GRPO loss takes 4F in 16 bits and, with operands cast up, 4F in float32, in eager PyTorch."""
    item, width, head = problem.itemsize, problem.hidden, problem.head
    columns = slices(problem.vocab, LIGER_COLUMNS)
    sequences = slices(problem.tokens, LIGER_SEQUENCE)
    rows = [size for sequence in sequences for size in slices(sequence, LIGER_ROWS)]
    tiles = [(m, n, width) for m in rows for n in columns]
    tile = max(rows) * LIGER_COLUMNS
    live = problem.gradients + FLOAT32 * (head + max(sequences) * width) + item * head + 4 * FLOAT32 * tile
    hidden = [products("dX", [(m, width, n) for n in columns], FLOAT32, FLOAT32, live) for m in rows]
    weight = [products("dW", [(n, width, m) for n in columns], FLOAT32, FLOAT32, live) for m in rows]
    # bytes per logit: float(), mul_, amax, subtract, exp, sum; then float(), mul_, subtract, exp, two products
    forward, backward = 38 * problem.logits, 46 * problem.logits
    # For each sequence the weight is cast up, a float32 dW is zeroed, added to and cast, and added to the total.
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
