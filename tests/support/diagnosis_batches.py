"""Batches of tokens as a rollout engine and a trainer make them, right or wrong in known ways, for the tests of
`diagnose`.

A row's logits are a head [V, D] with heavy-tailed entries and rare tokens, times a hidden state. As in a language
model, half of the rows leave nearly no choice and the other half does, with a given mean entropy over all. Tokens are
sampled from the engine's distribution.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

WIDTH = 32


@dataclass(frozen=True)
class Batch:
    """The fields are hidden [N, D], head [V, D], and targets, old_logprobs and advantages [N], with float32 for all
    numbers. `temperature` is the trainer's. N is a multiple of `length`, that of its sequences.
    """

    hidden: Tensor
    head: Tensor
    targets: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    length: int
    temperature: float = 1.0
    squash: Callable[[Tensor], Tensor] = torch.Tensor.clone  # applied to the logits

    @property
    def logits(self) -> Tensor:
        return self.squash(self.hidden @ self.head.T)


def mean_entropy(logits: Tensor) -> float:
    return torch.distributions.Categorical(logits=logits).entropy().mean().item()


def sampled(logits: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample from the logits [N, V], and return (targets, log μ), each [N]."""
    logprobs = logits.log_softmax(-1)
    targets = torch.multinomial(logprobs.exp(), 1, generator=g)
    return targets[:, 0], logprobs.gather(-1, targets)[:, 0]


def policy(g: torch.Generator, tokens: int, vocab: int, entropy: float) -> tuple[Tensor, Tensor]:
    """Return (hidden, head) with this mean entropy [nats], found by bisection over the scale of the hidden states."""
    head = torch.randn(vocab, WIDTH, generator=g) * (1 + 0.5 * torch.randn(vocab, 1, generator=g).abs())
    head[:, 0] = -0.5 * torch.arange(1, vocab + 1).log()[torch.randperm(vocab, generator=g)]  # rare tokens
    hidden = torch.randn(tokens, WIDTH, generator=g) / WIDTH**0.5
    hidden[:, 0] = 1.0
    spread = (0.3 * torch.randn(tokens, 1, generator=g)).exp()
    spread = spread * torch.where(torch.rand(tokens, 1, generator=g) < 0.5, 2.5, 1.0)
    low, high = 1e-3, 1e3
    part = slice(0, 128)
    for _ in range(20):
        scale = (low * high) ** 0.5
        found = mean_entropy(scale * (hidden * spread)[part] @ head.T)
        low, high = (scale, high) if found > entropy else (low, scale)
    return scale * hidden * spread, head


def engine(
    seed: int,
    tokens: int,
    vocab: int,
    entropy: float,
    change: Callable[[Tensor, torch.Generator], Tensor] = lambda z, g: z,
    temperature: float = 1.0,
) -> tuple[Batch, torch.Generator]:
    """Return a batch that an engine sampled. Its logits are the trainer's after `change`, divided by `temperature`."""
    g = torch.Generator().manual_seed(seed)
    hidden, head = policy(g, tokens, vocab, entropy)
    targets, old = sampled(change(hidden @ head.T, g) / temperature, g)
    length = 16 if tokens < 1000 else 64
    advantages = torch.randn(tokens // length, generator=g).repeat_interleave(length)
    return Batch(hidden, head, targets, old, advantages, length), g


# --- healthy ---------------------------------------------------------------------------------------------------------


def rounded(z: Tensor, g: torch.Generator) -> Tensor:
    """Return the logits of an engine that holds them in bf16, where the largest is near 24."""
    return (z - z.amax(-1, keepdim=True) + 24).bfloat16().float()


def noisy(size: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Return a change that adds noise of this standard deviation to every logit, as fp8 products do."""
    return lambda z, g: z + size * torch.randn(z.shape, generator=g)


def correlated(size: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Return a change whose noise is correlated over the logits of a row: a quantised cache moves a row as a whole."""

    def change(z: Tensor, g: torch.Generator) -> Tensor:
        return z + size * torch.randn(len(z), WIDTH, generator=g) @ torch.randn(WIDTH, z.shape[1], generator=g) / 6

    return change


def rerouted(z: Tensor, g: torch.Generator) -> Tensor:
    """Change the logits of 1 % of the rows by several nats, as if another expert were chosen, and those of the others a
    little.
    """
    size = torch.where(torch.rand(len(z), 1, generator=g) < 0.01, 2.0, 0.03)
    return z + size * torch.randn(z.shape, generator=g)


def learnt(batch: Batch, g: torch.Generator, spread: float, steps: int = 16, heat: float = 1.03) -> Batch:
    """Return the batch with the trainer after policy-gradient steps on halves of its tokens, and `heat` times as sure.
    In one step, Δ has the standard deviation `spread` on tokens that were not certain.
    """
    head = batch.head.clone()
    for _ in range(steps):
        half = torch.rand(len(batch.targets), generator=g) < 0.5
        hidden, targets = batch.hidden[half], batch.targets[half]
        pull = -(hidden @ head.T).softmax(-1)
        pull[torch.arange(len(targets)), targets] += 1
        step = (pull * batch.advantages[half, None]).T @ hidden / len(targets)
        head = head + step * (0.02 * batch.head.norm() / step.norm().clamp(min=1e-9))
    low, high = 0.0, 64.0
    for _ in range(16):
        size = (low + high) / 2
        now = replace(batch, head=heat * (batch.head + size * (head - batch.head)))
        logp = now.logits.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
        log_ratio = (logp - batch.old_logprobs)[batch.old_logprobs < -0.05]
        low, high = (low, size) if log_ratio.square().mean().sqrt() > spread else (size, high)
    return now


def stale(seed: int, *size, spread: float = 0.2, **options) -> Batch:
    return learnt(*engine(seed, *size), spread, **options)


def unrewarded(seed: int, *size) -> Batch:
    """Return a batch after eight steps on answers of which none was good: every sampled token is a little less likely
    than before.
    """
    batch, g = engine(seed, *size)
    return learnt(replace(batch, advantages=-batch.advantages.abs()), g, 0.1, steps=8, heat=1.0)


def with_noise(change: Callable) -> Callable[..., Batch]:
    return lambda *size: engine(*size, change)[0]


HEALTHY: dict[str, Callable[..., Batch]] = {
    "exact": lambda *size: engine(*size)[0],
    "bf16 engine": with_noise(rounded),
    "fp8 engine": with_noise(noisy(0.1)),
    "int8 cache": with_noise(correlated(0.1)),
    "another expert": with_noise(rerouted),
    "staleness 16": stale,
    "on-policy": lambda *size: replace(engine(*size)[0], old_logprobs=None),
    "bf16 log-probs": lambda *size: old_as(lambda old: old.bfloat16().float())(*size),
}


# --- wrong -----------------------------------------------------------------------------------------------------------


def scored(batch: Batch, targets: Tensor | None = None) -> Tensor:
    """Return the trainer's own log-probs [N]."""
    targets = batch.targets if targets is None else targets
    return (batch.logits / batch.temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def heated(temperature: float) -> Callable[..., Batch]:
    return lambda *size: engine(*size, noisy(0.03), temperature)[0]


def raw(temperature: float) -> Callable[..., Batch]:
    """Make batches whose trainer divides by the sampling temperature, while the engine's log-probs do not."""

    def make(*size) -> Batch:
        batch, _ = engine(*size, temperature=temperature)
        return replace(batch, old_logprobs=scored(batch), temperature=temperature)

    return make


def filtered(top_p: float = 1.0, top_k: int = 10**9) -> Callable[..., Batch]:
    def change(z: Tensor, g: torch.Generator) -> Tensor:
        z = noisy(0.03)(z, g)
        ranked, order = z.softmax(-1).sort(-1, descending=True)
        gone = (ranked.cumsum(-1) - ranked >= top_p) | (torch.arange(z.shape[1]) >= top_k)
        return z.masked_fill(gone.gather(-1, order.argsort(-1)), -torch.inf)

    return with_noise(change)


def another_model(size: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Return a change with noise in proportion to the logits' own spread, as from weights of another training step."""
    return lambda z, g: z + size * z.std(-1, keepdim=True) * torch.randn(z.shape, generator=g)


def old_as(change: Callable[[Tensor], Tensor], noise: float = 0.03) -> Callable[..., Batch]:
    """Make batches whose old log-probs, as [sequences, length], went through `change`."""

    def make(*size) -> Batch:
        batch, _ = engine(*size, noisy(noise))
        old = batch.old_logprobs.view(-1, batch.length).clone()
        return replace(batch, old_logprobs=change(old).reshape(-1))

    return make


def squashed(squash: Callable[[Tensor], Tensor]) -> Callable[..., Batch]:
    return lambda *size: replace(engine(*size, noisy(0.03))[0], squash=squash)


def unlikely(*size) -> Batch:
    """Return a batch with an old log-prob of -40 here and there."""
    batch, _ = engine(*size)
    batch.old_logprobs[::50] = -40.0
    return batch


def unaligned(shift: int, repeats: float = 0.0) -> Callable[..., Batch]:
    """Make batches whose targets and log-probs are shifted along the batch. A share `repeats` of the tokens repeats the
    one before.
    """

    def make(*size) -> Batch:
        batch, g = engine(*size)
        rows = torch.arange(len(batch.targets))
        rows = torch.where(torch.rand(len(rows), generator=g) < repeats, (rows - 1).clamp(min=0), rows)
        batch = replace(
            batch, hidden=batch.hidden[rows], targets=batch.targets[rows], old_logprobs=batch.old_logprobs[rows]
        )
        return replace(batch, targets=batch.targets.roll(shift), old_logprobs=batch.old_logprobs.roll(shift))

    return make


def with_prompt(fill: float) -> Callable[..., Batch]:
    """Make batches in which the first half of each sequence is text that nobody sampled, but that is in the mask."""

    def make(*size) -> Batch:
        batch, g = engine(*size)
        prompt = torch.arange(len(batch.targets)) % batch.length < batch.length // 2
        text = torch.randint(len(batch.head), batch.targets.shape, generator=g)
        old = batch.old_logprobs.masked_fill(prompt, fill)
        return replace(batch, targets=torch.where(prompt, text, batch.targets), old_logprobs=old)

    return make


CAUSES: dict[str, tuple[str, Callable[..., Batch]]] = {
    **{f"temperature {t}": ("the engine sampled at", heated(t)) for t in (0.5, 0.6, 0.7, 0.8, 1.2, 1.3, 1.5)},
    **{f"raw log-probs at {t}": ("Temperatures differ", raw(t)) for t in (0.6, 0.7, 1.3)},
    "base 2": ("base 2", old_as(lambda old: old / math.log(2))),
    "base 10": ("base 10", old_as(lambda old: old / math.log(10))),
    "one late": ("shifted by one", old_as(lambda old: old.roll(1, -1))),
    "one early": ("shifted by one", old_as(lambda old: old.roll(-1, -1))),
    "other sequences": ("belong to other tokens", old_as(lambda old: old.roll(1, 0))),
    "targets one late": ("not aligned", unaligned(1)),
    "targets one early": ("not aligned", unaligned(-1)),
    "targets one late, of a text that repeats itself": ("not aligned", unaligned(1, repeats=0.3)),
    "zeros": ("placeholders", old_as(torch.zeros_like)),
    "zeros on a prompt": ("placeholders", with_prompt(0.0)),
    "NaN on a prompt": ("the mask may cover tokens", with_prompt(math.nan)),
    "sentinels": ("None of the", old_as(lambda old: torch.full_like(old, -9999.0))),
    "probabilities": ("are these probabilities", old_as(torch.exp)),
    "negated": ("or negated", old_as(torch.neg)),
    "sequence means": ("same as the token's before", old_as(lambda old: old.mean(1, True).expand_as(old))),
    "a constant": ("same as the token's before", old_as(lambda old: torch.full_like(old, -1.0))),
    "running sums": ("running sums", old_as(lambda old: old.cumsum(1))),
    "top-p 0.9": ("kept as kept_ids=", filtered(top_p=0.9)),
    "top-p 0.8": ("kept as kept_ids=", filtered(top_p=0.8)),
    "overtrained": ("far from its samples", lambda *size: stale(*size, spread=4.0, heat=1.0)),
    "another checkpoint": ("other weights", with_noise(another_model(0.5))),
    "a few at -40": ("largest ratio", unlikely),
    "softmax": ("The logits are probably probabilities", squashed(lambda z: z.softmax(-1))),
    "log-softmax": ("log-probs already", squashed(lambda z: z.log_softmax(-1))),
    "no advantage": ("All advantages are 0", lambda *size: replace(b := engine(*size)[0], advantages=0 * b.advantages)),
}
