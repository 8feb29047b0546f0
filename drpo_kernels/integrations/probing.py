"""Find out what a causal language model does between its head and its logits, by running it on a probe.

A probe takes the head's place in the model's forward. It keeps the hidden states and returns known numbers; what comes
out in place of the logits shows the transform.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# The probe returns these in place of logits. The first shows the scale, the second the limit of a soft-cap, and the
# others check both.
VALUES = (1.0, 1e6, 0.0, -1.0, 0.1, -0.1, 5.0, -5.0, 20.0, -40.0)


class HeadTransform(NamedTuple):
    """What a model does to the output of its head: softcap(logit_scale · x), of which it keeps `vocab_size` entries."""

    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = self.logit_scale * x
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)

    def keywords(self) -> dict[str, Any]:
        """Keywords for the function of the fused head. vocab_size is left out if it is None."""
        return {name: value for name, value in self._asdict().items() if name != "vocab_size" or value is not None}


class Probe(nn.Module):
    """Stands in for the head during a fused forward: it keeps the hidden states and returns `probe_values`.

    They are [1, .., width] with the width of the vocabulary, so that they show what a model does to single entries.
    """

    def __init__(self, head: nn.Module, width: int):
        super().__init__()
        self.hidden: Tensor | None = None
        self.calls, self.width = 0, width
        self._in_place_of = (head,)  # a tuple, so that the head does not become a submodule

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._in_place_of[0], name)  # Mamba, for example, reads weight.dtype of its head

    def forward(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        self.calls += 1
        return probe_values(self.width).view(*(1,) * (hidden.dim() - 1), -1)


def probe_values(width: int) -> Tensor:
    """[width] float64 on the CPU, so that reading the transformed values waits for no device."""
    return torch.tensor(VALUES, dtype=torch.float64).repeat(-(-width // len(VALUES)))[:width]


@contextlib.contextmanager
def standing_in(model: nn.Module, head: nn.Module, probe: Probe) -> Iterator[None]:
    """Put the probe in the head's place everywhere in the model, and restore the head at the end and after an error."""
    places = [(parent, name) for parent in model.modules() for name, m in parent._modules.items() if m is head]
    try:
        for parent, name in places:
            parent._modules[name] = probe
        yield
    finally:
        for parent, name in places:
            parent._modules[name] = head


def transform_of(model: nn.Module, logits: Tensor, width: int) -> HeadTransform:
    """The transform that turned the probe into these logits."""
    y = logits.detach().reshape(-1).to(device="cpu", dtype=torch.float64)
    first = y[: len(VALUES)]
    # The values repeat over the vocabulary. If every repetition came out alike, the first one is enough to look at.
    alike = torch.allclose(y, first.repeat(-(-y.numel() // len(VALUES)))[: y.numel()], rtol=1e-6, atol=1e-9)
    if alike and 2 <= y.numel() <= width and not logits.requires_grad:
        x, (unit, limit) = probe_values(first.numel()), first[:2].tolist()
        candidates = [HeadTransform(unit)]
        if 0 < unit < limit:
            candidates.append(HeadTransform(limit * math.atanh(unit / limit), limit))
        for transform in candidates:
            if transform.logit_scale > 0 and torch.allclose(transform(x), first, rtol=1e-6, atol=1e-9):
                return transform._replace(vocab_size=y.numel() if y.numel() < width else None)
    raise ValueError(
        f"{type(model).__name__} cannot have a fused head: what its forward does to the logits is not a constant scale "
        f"and a soft-cap, the same for all tokens and positions (of {width} entries came {y.numel()}"
        f"{' that require a gradient' if logits.requires_grad else ''}, and {list(VALUES)} became {first.tolist()}); "
        "use its own logits with policy_loss"
    )
