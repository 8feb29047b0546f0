"""Everything about a call that is not a tensor, and how it travels into a compiled graph.

The schema of a custom op carries no object, so there a `Spec` is a list of words and a tensor of numbers. Both are made
from the names and types of the fields below: a new field travels without another line.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drpo_kernels.backends.rows import Terms, Transform
from drpo_kernels.collectives import VocabShard
from drpo_kernels.graphs import traced
from drpo_kernels.objective import decode_objective, encode_objective
from drpo_kernels.objectives import PolicyGradient


@dataclass(frozen=True)
class Execution:
    """How to compute. The dtypes, `head_dtype` and `sparse_grad` change what is computed, the other fields do not.

    With a `vocab_shard` the head's weight and bias are this rank's rows of it. The ranks of its group must then call
    with the same inputs, options and required gradients, because every chunk calls collectives.
    """

    backend: str
    compute_dtype: torch.dtype
    every_row: bool = False  # compact="none": SKIPPED rows are swept too, and no count is read back from the device
    logits_dtype: torch.dtype | None = None
    workspace_bytes: int | None = None
    vocab_shard: VocabShard | None = None
    head_dtype: str | None = None
    batch_invariant: bool = False
    sparse_grad: float = 0.0


@dataclass(frozen=True)
class Spec:
    """A call without its tensors. `vocab` counts this rank's real entries; `terms` is None for the log-probs."""

    vocab: int
    transform: Transform
    execution: Execution
    terms: Terms | None = None

    def encode(self) -> tuple[list[str], list[float]]:
        """-> (words, numbers). A number that changes from call to call may be a symbol of the graph.

        Raises RuntimeError for a `vocab_shard`, whose process group cannot travel.
        """
        if self.execution.vocab_shard is not None:
            raise RuntimeError("vocab_shard cannot be used in one graph (fullgraph=True): it holds a process group")
        terms = self.terms or Terms(PolicyGradient())
        parts = {"transform": self.transform, "execution": self.execution, "terms": terms}
        objective, hyper = encode_objective(terms.objective)
        words, numbers = [objective], [float(self.vocab)]
        for part, name, kind in _FIELDS:
            value = getattr(parts[part], name)
            if kind == "number":
                numbers.append(math.nan if value is None else float(value))
            elif kind == "flag":  # this asks a symbol of the graph for its value
                words.append("yes" if value else "no")
            else:
                words.append(str(value))
        return words, numbers + hyper

    @staticmethod
    def decode(words: list[str], numbers: list[float]) -> "Spec":
        """The inverse of `encode`, but for terms that are None, as those of log-probs are: they come back as those of
        the policy gradient, and nothing reads them.
        """
        (objective, *words), (vocab, *numbers) = words, numbers
        parts: dict[str, dict[str, Any]] = {"transform": {}, "execution": {}, "terms": {}}
        for part, name, kind in _FIELDS:
            parts[part][name] = _READ[kind](numbers.pop(0) if kind == "number" else words.pop(0))
        terms = Terms(decode_objective(objective, numbers), **parts["terms"])
        return Spec(int(vocab), Transform(**parts["transform"]), Execution(**parts["execution"]), terms)


# How `decode` reads a field of each kind; "None" and NaN stand for None.
_READ = {
    "number": lambda number: None if math.isnan(number) else number,
    "flag": lambda word: word == "yes",
    "count": lambda word: None if word == "None" else int(word),
    "dtype": lambda word: None if word == "None" else getattr(torch, word.removeprefix("torch.")),
    "word": lambda word: None if word == "None" else word,
}
_KINDS = {float: "number", bool: "flag", int: "count", torch.dtype: "dtype", str: "word"}


def _fields() -> tuple[tuple[str, str, str], ...]:
    """(part of the spec, field, its kind) of every field that travels by itself."""
    parts = {"transform": Transform, "execution": Execution, "terms": Terms}
    return tuple(
        (part, field.name, _KINDS[(typing.get_args(field.type) or (field.type,))[0]])
        for part, cls in parts.items()
        for field in dataclasses.fields(cls)
        if field.name not in ("vocab_shard", "objective")
    )


_FIELDS = _fields()


class OpSpec(NamedTuple):
    """A `Spec` as an op takes it."""

    words: list[str]
    numbers: Tensor  # float64, on the CPU, where reading them waits for nothing


def op_spec(spec: Spec | OpSpec, tensor: Tensor) -> Spec | OpSpec:
    """The spec as an autograd function takes it: an `OpSpec` if `tensor` is traced, because PyTorch 2.8 cannot take a
    graph's symbols out of a `Spec` while it differentiates that function.
    """
    if isinstance(spec, OpSpec) or not traced(tensor):
        return spec
    words, numbers = spec.encode()
    # A float in a schema, or in the list of a tensor, would be a constant, and each new value would compile again.
    one = tensor.new_ones((), dtype=torch.float64, device="cpu")
    return OpSpec(words, torch.stack([one * number for number in numbers]))
