"""The work of this package's own paths, cut up by its own planning, of plain PyTorch, and of the floors of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.roofline.charges import ONE_READ, SMALL_KERNELS, SMALL_KERNELS_OF_A_CHUNK, TWO_READS
from benchmarks.roofline.work import FLOAT32, Cost, Problem, Stage, products, slices, whole_gradients, whole_logits
from drpo_kernels.backends.devices import PRESETS
from drpo_kernels.backends.planning import NeedsGrad, Sizes, Storage, SweepPlan, WeightGradient, plan

DTYPES = {2: torch.bfloat16, 4: torch.float32}


def sweep_plan(problem: Problem, active: int, forward: int = 0) -> SweepPlan:
    """Return how the package cuts up `active` rows with a gradient and `forward` rows without one."""
    operand = DTYPES[problem.itemsize]
    gathers = 0 < active < problem.tokens
    return plan(
        PRESETS[problem.device],
        Sizes(active, forward, problem.hidden, problem.vocab),
        Storage(
            DTYPES[problem.logits_itemsize], operand, torch.float32, operand, copied=problem.itemsize if gathers else 0
        ),
        NeedsGrad(hidden=active > 0, weight=active > 0 and problem.trainable_head, bias=False),
        workspace=problem.workspace,
    )


def _accumulator(problem: Problem, cut: SweepPlan) -> int:
    """Return the bytes of the buffer in which dW is summed or written; 0 with a frozen head."""
    if cut.weight_gradient is WeightGradient.NONE:
        return 0
    wide = cut.weight_gradient is WeightGradient.WIDE_SUM
    return (FLOAT32 if wide else problem.itemsize) * problem.head


def held_bytes(problem: Problem, cut: SweepPlan) -> int:
    """Return the bytes held while rows with a gradient are swept: logits, dlogits, dX, dW or its sum, copies of hidden
    rows.
    """
    copies = cut.storage.copied * cut.windows.largest * problem.hidden
    return cut.buffer_bytes + problem.itemsize * problem.states + _accumulator(problem, cut) + copies


def _gradient_stages(problem: Problem, cut: SweepPlan, scales: bool = False) -> list[Stage]:
    """dX and dW take a product each for every window. With `scales` a row's factor multiplies its dX in float32 and its
    hidden row for dW. These copies lie where the logits were if there is one window.
    """
    item, width, vocab = problem.itemsize, problem.hidden, problem.vocab
    windows = [window.stop - window.start for window in cut.windows]
    gathers, live = cut.storage.copied > 0, held_bytes(problem, cut)
    cuts = gathers or scales
    pieces = [piece for rows in windows for piece in slices(rows, cut.piece_rows)] if cuts else windows
    out, operands = FLOAT32 if scales else item, item if problem.trainable_head else 0
    if scales:
        logits = cut.logits_rows * vocab * problem.logits_itemsize if len(windows) == 1 else 0
        live = max(live, live - logits + width * (out * max(pieces) + operands * cut.windows.largest))
    stages = [products("dX", [(rows, width, vocab) for rows in pieces], item, out, live)]
    if scales:
        states, count = cut.sizes.active * width, len(pieces) + (len(windows) if operands else 0)
        read, written = (out + operands) * states, (item + operands) * states
        stages.append(Stage("scaling", read=read, written=written, live=live, launches=count))
    if gathers:
        moved = item * cut.sizes.active * width
        stages.append(Stage("scatter", read=moved, written=moved, live=live))
    if problem.trainable_head:
        sums = _accumulator(problem, cut)
        shapes = [(vocab, width, rows) for rows in windows]
        stages.append(products("dW", shapes, item, sums // problem.head, live, sums=True))
        if cut.weight_gradient is WeightGradient.WIDE_SUM:
            cast = item * (problem.states + problem.head)
            stages.append(Stage("cast of dW", read=sums, written=item * problem.head, live=sums + cast))
    return stages


def _chunks(cut: SweepPlan) -> list[int]:
    return [chunk.stop - chunk.start for window in cut.windows for chunk in cut.chunks(window)]


def _small_kernels(chunks: Sequence[int]) -> int:
    return SMALL_KERNELS + SMALL_KERNELS_OF_A_CHUNK * len(chunks)


def _logits(name: str, problem: Problem, chunks: Sequence[int], live: int) -> Stage:
    shapes = [(rows, problem.vocab, problem.hidden) for rows in chunks]
    return products(name, shapes, problem.itemsize, problem.logits_itemsize, live)


def linear(problem: Problem, one_read: bool = True) -> Cost:
    """`linear_policy_loss` takes 6F of the active rows, or 4F with a frozen head. Its row kernel reads float32 logits
    once if the gradients have 16 bits and there is no entropy bonus, z-loss or `sparse_grad` (`one_read`).
    """
    rows, item, wide = problem.active, problem.itemsize, problem.logits_itemsize
    cut = sweep_plan(problem, rows)
    live, count, chunks = held_bytes(problem, cut), rows * problem.vocab, _chunks(cut)
    one_read = one_read and item < FLOAT32 == wide
    stages = [
        Stage("small kernels", live=live, launches=_small_kernels(chunks), waits=1),
        _logits("logits", problem, chunks, live),
        Stage(
            "rows",
            read=wide * count,
            reread=0 if one_read else wide * count,
            row_bytes=wide * problem.vocab,
            written=item * count,
            live=live,
            instructions=count * (ONE_READ if one_read else sum(TWO_READS[wide])),
            launches=len(chunks),
        ),
        *_gradient_stages(problem, cut, scales=one_read),
    ]
    if rows < problem.tokens:  # The active rows are copied for the logits and again for dW, and dX is zeroed.
        moved = item * rows * problem.hidden * (2 if problem.trainable_head else 1)
        stages.insert(0, Stage("gather", read=moved, written=moved + item * problem.states, live=live))
    return Cost(tuple(stages), problem.gradients)


def recompute(problem: Problem) -> Cost:
    """`linear_token_logprobs` takes 2F in the forward and 6F in the backward of all rows."""
    forward, cut = sweep_plan(problem, 0, problem.tokens), sweep_plan(problem, problem.tokens)
    live, moved = held_bytes(problem, cut), problem.logits_itemsize * problem.logits
    chunks, again = [chunk.stop - chunk.start for chunk in forward.forward], _chunks(cut)
    first, second = (problem.logits * each for each in TWO_READS[problem.logits_itemsize])
    written, early = problem.itemsize * problem.logits, forward.buffer_bytes
    stages = [
        Stage("small kernels", live=early, launches=_small_kernels(chunks + again), waits=2),
        _logits("logits", problem, chunks, early),
        Stage("rows", read=moved, live=early, instructions=first, launches=len(chunks)),
        _logits("logits again", problem, again, live),
        Stage("rows again", read=moved, written=written, live=live, instructions=second, launches=len(again)),
        *_gradient_stages(problem, cut),
    ]
    return Cost(tuple(stages), problem.gradients)


def ready(problem: Problem, in_place: bool = False) -> Cost:
    """`policy_loss` starts from logits of the inputs' dtype, and has a gradient of the same dtype."""
    size = problem.itemsize * problem.logits
    live = 0 if in_place else size
    rows = Stage(
        "rows",
        read=size,
        reread=size,
        row_bytes=problem.itemsize * problem.vocab,
        written=size,
        live=live,
        instructions=problem.logits * sum(TWO_READS[problem.itemsize]),
    )
    return Cost((Stage("small kernels", live=live, launches=_small_kernels([problem.tokens])), rows), live)


def copy(problem: Problem) -> Cost:
    """The floor of `policy_loss` is one read and one write of the logits."""
    size = problem.itemsize * problem.logits
    return Cost((Stage("copy", read=size, written=size, live=size),), size)


def whole_products(problem: Problem, forwards: int = 1) -> Cost:
    """The floor of the methods that take hidden states is bare, unchunked products with results
    in the inputs' dtype.
    """
    size = problem.itemsize * problem.logits
    forward = [whole_logits(problem, "logits" if i == 0 else "logits again", size) for i in range(forwards)]
    return Cost((*forward, *whole_gradients(problem, size)), problem.gradients)


def frozen(problem: Problem) -> Problem:
    return replace(problem, trainable_head=False)


def eager(problem: Problem) -> Cost:
    """Eager code has logits in the inputs' dtype, `log_softmax` in float32, `gather` and autograd, with a kernel for
    each operation.
    """
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
    """A compiler fuses all it can of the eager code: one read for the statistics, and one read and write after."""
    size = problem.itemsize * problem.logits
    stages = [
        whole_logits(problem, live=size),
        Stage("statistics", read=size, live=size),
        Stage("gradient", read=size, written=size, live=2 * size),
        *whole_gradients(problem, size),
    ]
    return Cost(tuple(stages), problem.gradients)


@dataclass(frozen=True)
class Method:
    """The label in tables, the work on a problem, and the floor whose work it cannot avoid (None for a floor)."""

    label: str
    cost: Callable[[Problem], Cost]
    held_to: str | None = "gemms_whole"


# The names are those under which `benchmarks.harness` measures. Other people's heads are measured and not predicted.
METHODS = {
    "gemms_whole": Method("three bare products (6F)", whole_products, held_to=None),
    "gemms_frozen": Method("two bare products (4F)", lambda p: whole_products(frozen(p)), held_to=None),
    "gemms_recompute": Method("four bare products (8F)", lambda p: whole_products(p, 2), held_to=None),
    "copy": Method("a copy of the logits", copy, held_to=None),
    "linear_policy_loss": Method("`linear_policy_loss`", linear),
    "linear_policy_loss_bf16_logits": Method(
        "`linear_policy_loss`, bf16 logits", lambda p: linear(replace(p, logits_itemsize=p.itemsize))
    ),
    "linear_policy_loss_frozen_head": Method(
        "`linear_policy_loss`, frozen head", lambda p: linear(frozen(p)), held_to="gemms_frozen"
    ),
    "linear_token_logprobs": Method("`linear_token_logprobs`", recompute, held_to="gemms_recompute"),
    "policy_loss": Method("`policy_loss` from logits", ready, held_to="copy"),
    "policy_loss_inplace": Method("`policy_loss`, in place", lambda p: ready(p, in_place=True), held_to="copy"),
    "eager": Method("eager PyTorch", eager),
    "eager_compiled": Method("`torch.compile`, all fused", eager_compiled),
}
