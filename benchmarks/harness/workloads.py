"""Shapes, and inputs: random ones and ones that look like a trained model's, made once from a seed, and real ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.mixes import MIXES, entropy_of, hidden_states, least
from benchmarks.harness.recording import TOPICS, recorded, recorded_rows
from examples.smollm import HIDDEN, VOCAB, load_head

# The kinds of inputs, with the names that tables give them.
KINDS = {
    "random": "random inputs",
    "trained": "trained-looking inputs",
    **{name: mix.label for name, mix in MIXES.items()},
    "real": "SmolLM2's own tokens",
    **{f"real_{topic}": f"SmolLM2's own tokens, {topic}" for topic in TOPICS},
}
# The mean entropy of a trained model on its own samples, where most tokens are certain and a few are not.
TRAINED_ENTROPY = 0.5
# number of rows on which the trained-looking inputs are calibrated
SAMPLE = 256
# How far a hidden state is pulled to its target's row: the least, and the range above it. A soft-cap squeezes the
# target's logit more than the others', and with the weaker pull no scale of the hidden states reaches TRAINED_ENTROPY.
PULL, CAPPED_PULL = (2.0, 8.0), (6.0, 14.0)
# number of logits held at a time while inputs are made
BLOCK = 1 << 26


@dataclass(frozen=True)
class Model:
    """A language-model head: hidden size H, vocabulary V, final logit soft-cap."""

    hidden: int
    vocab: int
    softcap: float | None = None


MODELS = {
    "cpu_small": Model(16, 512),
    "cpu": Model(512, 32_768),
    "SmolLM2-135M": Model(HIDDEN, VOCAB),
    "Qwen2.5-0.5B": Model(896, 151_936),
    "Qwen2.5-1.5B": Model(1536, 151_936),
    "Qwen3-0.6B": Model(1024, 151_936),
    "Qwen3-4B": Model(2560, 151_936),
    "Qwen3-30B-A3B": Model(2048, 151_936),
    "Qwen3-8B": Model(4096, 151_936),
    "Llama-3-8B": Model(4096, 128_256),
    "Gemma-3-12B": Model(3840, 262_208, softcap=30.0),
}


@dataclass(frozen=True)
class Shape:
    """tokens T, hidden size H, vocabulary V."""

    tokens: int
    hidden: int
    vocab: int


@dataclass(frozen=True)
class Workload:
    """What inputs are made for: a name of `MODELS`, T, one of `KINDS`, and "float32" or "bfloat16"."""

    model: str
    tokens: int
    kind: str
    dtype: str

    @property
    def shape(self) -> Shape:
        return Shape(self.tokens, MODELS[self.model].hidden, MODELS[self.model].vocab)

    @property
    def fields(self) -> dict[str, object]:
        """The fields by which a record names the workload."""
        shape = dataclasses.asdict(self.shape)
        return {"workload": self.model, "inputs": self.kind, "shape": shape, "dtype": self.dtype}

    def inputs(self, device: torch.device) -> Inputs:
        softcap, dtype = MODELS[self.model].softcap, getattr(torch, self.dtype)
        return make_inputs(self.kind, self.shape, softcap=softcap, dtype=dtype, device=device)


@dataclass(frozen=True)
class Inputs:
    """hidden [T, H], weight [V, H], targets [T] int64, old_logprobs [T] and advantages [T] float32, all on one device

    entropies of the distributions, [T] float32 in nats; None where nobody asks for them
    softcap, temperature, bias [V]   how hidden @ weight.T becomes z = softcap(hidden @ weight.T + bias) / temperature
    logits    [T, V] in the dtype of `hidden`, soft-capped, for what starts from logits; None until `with_logits`
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    entropies: Tensor | None = None
    softcap: float | None = None
    temperature: float = 1.0
    bias: Tensor | None = None
    logits: Tensor | None = None

    @property
    def transform(self) -> dict:
        """How hidden @ weight.T becomes z, as keywords of the linear functions."""
        return {"temperature": self.temperature, "softcap": self.softcap, "bias": self.bias}

    def product(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return hidden @ weight.T + bias, in the dtype of the operands."""
        return self.biased(hidden @ weight.T)

    def biased(self, logits: Tensor) -> Tensor:
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def scaled(self, logits: Tensor) -> Tensor:
        """Return z = softcap(logits) / temperature, in the dtype of the logits."""
        return capped(logits, self.softcap) / self.temperature

    def logprobs(self, logits: Tensor) -> Tensor:
        """Return log π [T] of the targets."""
        return self.scaled(logits).log_softmax(-1).gather(-1, self.targets[:, None])[:, 0]

    @property
    def entropy(self) -> float:
        """The mean entropy, in nats."""
        return self.entropies.mean().item()

    def with_active_share(self, share: float) -> Inputs:
        """Return the inputs with A = 0 in all rows but a share of them, scattered as the completions of a batch are."""
        count = self.advantages.numel()
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
        advantages = self.advantages.clone()
        advantages[order[round(share * count) :].to(advantages.device)] = 0
        return dataclasses.replace(self, advantages=advantages)

    def with_logits(self) -> Inputs:
        logits = self.hidden.new_empty(self.hidden.shape[0], self.weight.shape[0])
        for rows, block in logit_blocks(self.hidden, self.weight, self.softcap):
            logits[rows] = block
        return dataclasses.replace(self, logits=logits)


def make_inputs(
    kind: str,
    shape: Shape,
    seed: int = 0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Return inputs of one of `KINDS`, drawn in float32 by the device's own generator, with hidden and weight rounded
    to `dtype`.

    The behaviour policy is the current one with noise of 0.2 nat, and that of real inputs is an fp8 engine's. Raises
    ValueError for real inputs of another H, V or soft-cap than SmolLM2's, or of more tokens than were recorded.
    """
    generator = torch.Generator(device).manual_seed(seed)
    if kind.startswith("real"):
        return _real(kind, shape, generator, softcap, dtype)
    weight = torch.randn(shape.vocab, shape.hidden, generator=generator, device=device).div_(shape.hidden**0.5)
    hidden = torch.randn(shape.tokens, shape.hidden, generator=generator, device=device)
    if kind == "random":
        targets = torch.randint(shape.vocab, (shape.tokens,), generator=generator, device=device)
    else:
        targets = zipf(shape, generator)
        if kind == "trained":
            hidden = peaked(hidden, weight, targets, generator, softcap=softcap)
        elif softcap is not None:
            raise ValueError(f"softcap={softcap}: the rows of kind={kind!r} are made without one")
        else:
            nats = MIXES[kind].entropies(shape.tokens, generator)
            hidden = hidden_states(hidden, weight, targets, nats, MIXES[kind].spread)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    logprobs, entropies = _logprobs_and_entropy(hidden, weight, targets, softcap)
    noise = 0.2 * torch.randn(shape.tokens, generator=generator, device=device)
    advantages = torch.randn(shape.tokens, generator=generator, device=device)
    old_logprobs = (logprobs + noise).clamp(max=0)
    return Inputs(hidden, weight, targets, old_logprobs, advantages, entropies, softcap)


def _real(kind: str, shape: Shape, generator: torch.Generator, softcap: float | None, dtype: torch.dtype) -> Inputs:
    recording, head = recorded(), load_head()
    if (shape.vocab, shape.hidden) != head.shape or softcap is not None:
        wanted = "V={} and H={} and no soft-cap".format(*head.shape)
        raise ValueError(f"kind={kind!r} has {wanted}, got V={shape.vocab}, H={shape.hidden}, softcap={softcap}")
    rows = recorded_rows(shape.tokens, kind.removeprefix("real").removeprefix("_") or None)
    device = generator.device
    hidden, weight = (x.to(device, dtype) for x in (recording.hidden[rows], head))
    targets, old_logprobs = (x[rows].to(device) for x in (recording.targets, recording.logprobs["fp8"]))
    _, entropies = _logprobs_and_entropy(hidden, weight, targets, None)
    advantages = torch.randn(shape.tokens, generator=generator, device=device)
    return Inputs(hidden, weight, targets, old_logprobs, advantages, entropies)


def zipf_weights(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return Mandelbrot's fit to natural language, p ∝ 1 / (rank + 2.7), as [count] numbers that are not normalised."""
    return 1 / (torch.arange(1, count + 1, device=device) + 2.7)


def zipf(shape: Shape, generator: torch.Generator) -> Tensor:
    """Draw token ranks by Zipf's law."""
    weights = zipf_weights(shape.vocab, generator.device)
    return torch.multinomial(weights, shape.tokens, replacement=True, generator=generator)


def peaked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    generator: torch.Generator,
    nats: float = TRAINED_ENTROPY,
    softcap: float | None = None,
) -> Tensor:
    """Return hidden states pulled towards their targets' rows to different degrees, scaled to a
    mean entropy of `nats`.
    """
    low, spread = PULL if softcap is None else CAPPED_PULL
    pull = low + spread * torch.rand(hidden.shape[0], 1, generator=generator, device=hidden.device)
    hidden = hidden + pull * weight[targets]
    logits = hidden[:SAMPLE] @ weight.T

    def flat(scale: Tensor) -> Tensor:
        return entropy_of(capped(scale * logits, softcap)).mean() > nats

    # The entropy falls as the scale rises, until a soft-cap flattens everything, so we go up to the first scale that is
    # large enough.
    high = hidden.new_tensor(0.5)
    while flat(high):
        high = 1.25 * high
        if high > 100:
            raise ValueError(f"no scale of the hidden states gives an entropy of nats={nats} with softcap={softcap}")
    return least(torch.zeros_like(high), high, flat) * hidden


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logit_blocks(hidden: Tensor, weight: Tensor, softcap: float | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their float32 logits) in plain PyTorch, a few rows at a time."""
    wide, step = weight.float().T, max(BLOCK // weight.shape[0], 1)
    for rows in (slice(start, start + step) for start in range(0, hidden.shape[0], step)):
        yield rows, capped(hidden[rows].float() @ wide, softcap)


def _logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return log π of the targets and the entropy, [T] float32."""
    results = []
    for rows, logits in logit_blocks(hidden, weight, softcap):
        logprobs = torch.log_softmax(logits, -1).gather(-1, targets[rows, None])[:, 0]
        results.append(torch.stack([logprobs, entropy_of(logits)]))
    logprobs, entropy = torch.cat(results, 1)
    return logprobs, entropy
