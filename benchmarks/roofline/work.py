"""A problem, and the work of a method on it: stages of FLOPs, bytes and live memory.

F = T·V·H, so a product of the head with every row takes 2F. The operands of a product are counted once per launch,
because what its tiles read again overlaps with the arithmetic. Vectors of T or V elements are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FLOAT32 = 4


@dataclass(frozen=True)
class Problem:
    """The sizes T, H and V, and what a method is told.

    itemsize        bytes of an element of the hidden states and the weight
    logits_itemsize bytes of a logit in our methods
    workspace       bytes, or None for the default of this kind of device
    active_share    share of the rows that have an advantage; only `linear_policy_loss` skips the others
    trainable_head  False where dW is not wanted
    device          a name in `devices.PRESETS`, for the planning
    """

    tokens: int
    hidden: int
    vocab: int
    itemsize: int = 2
    logits_itemsize: int = FLOAT32
    workspace: int | None = None
    active_share: float = 1.0
    trainable_head: bool = True
    device: str = "h200"

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.active_share <= 1:
            raise ValueError(f"active_share must be in (0, 1], got {self.active_share}")

    @property
    def active(self) -> int:
        return round(self.active_share * self.tokens)

    @property
    def logits(self) -> int:
        return self.tokens * self.vocab

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def states(self) -> int:
        return self.tokens * self.hidden

    @property
    def gradients(self) -> int:
        """Bytes of dX and, where it is wanted, dW."""
        return self.itemsize * (self.states + (self.head if self.trainable_head else 0))


@dataclass(frozen=True)
class Stage:
    """Kernels of one kind, one after another.

    itemsize       bytes of an element of the products' operands
    read, written  bytes from and to memory
    reread         bytes that are read a second time, from the cache if it keeps a row of `row_bytes` per processor
    exposed        the bytes of both that a product's epilogue moves beyond one write of its result in the
                   operands' dtype; the arithmetic may hide all of it or none
    results        (rows, columns) of each product, for the share of processors that its tiles occupy
    instructions   the number that all threads execute together, where it is known
    launches       the number of kernels; None for one kernel, or one for each product
    waits          how often the device waits for the host
    live           bytes allocated beyond the inputs while it runs, gradients included
    """

    name: str
    flops: float = 0.0
    itemsize: int = 2
    read: float = 0.0
    written: float = 0.0
    reread: float = 0.0
    row_bytes: float = 0.0
    exposed: float = 0.0
    results: tuple[tuple[int, int], ...] = ()
    live: int = 0
    instructions: float = 0.0
    launches: int | None = None
    waits: int = 0

    @property
    def kernels(self) -> int:
        return max(len(self.results), 1) if self.launches is None else self.launches


@dataclass(frozen=True)
class Cost:
    """The stages of a method. Of the `extra` bytes at their peak, `gradients` are handed back to the caller."""

    stages: tuple[Stage, ...]
    gradients: int

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.stages)

    @property
    def moved(self) -> float:
        """The bytes moved, including the second reads of rows."""
        return sum(stage.read + stage.reread + stage.written for stage in self.stages)

    @property
    def kernels(self) -> int:
        return sum(stage.kernels for stage in self.stages)

    @property
    def extra(self) -> int:
        return max(stage.live for stage in self.stages)


def products(
    name: str, shapes: Sequence[tuple[int, int, int]], itemsize: int, out: int, live: int, sums: bool = False
) -> Stage:
    """Return the stage of products [m, k] @ [k, n], given as (m, n, k), with operands of `itemsize` and results of
    `out` bytes.

    sums  all products add to one result, which each but the first reads back
    """
    results = [m * n for m, n, _ in shapes]
    again, written = out * sum(results[1:]) if sums else 0, out * sum(results)
    plain = itemsize * (results[0] if sums else sum(results))
    return Stage(
        name,
        flops=2.0 * sum(m * n * k for m, n, k in shapes),
        itemsize=itemsize,
        read=itemsize * sum(k * (m + n) for m, n, k in shapes) + again,
        written=written,
        exposed=max(written + again - plain, 0),
        results=tuple((m, n) for m, n, _ in shapes),
        live=live,
    )


def slices(count: int, size: int) -> list[int]:
    return [min(size, count - start) for start in range(0, count, size)]


def whole_logits(problem: Problem, name: str = "logits", live: int = 0) -> Stage:
    """Return the stage that computes the logits of all rows in one product."""
    shape = [(problem.tokens, problem.vocab, problem.hidden)]
    return products(name, shape, problem.itemsize, problem.itemsize, live)


def whole_gradients(problem: Problem, dlogits: int) -> list[Stage]:
    """Return the stages of dX and dW, one product each in the inputs' dtype, from `dlogits` bytes that are held for
    them.
    """
    item, live = problem.itemsize, dlogits + problem.gradients
    tokens, width, vocab = problem.tokens, problem.hidden, problem.vocab
    stages = [products("dX", [(tokens, width, vocab)], item, item, live)]
    if problem.trainable_head:
        stages.append(products("dW", [(vocab, width, tokens)], item, item, live))
    return stages
