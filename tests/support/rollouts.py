"""Rollouts of a few sequences, with their loss and gradients in float64.

A rollout is a list of sequences, each with hidden states of its own. The expectation is computed sequence by sequence
and token by token: token t is scored by the hidden state at t - 1 of the *same* sequence.

Gradients may differ by 5e-5 of their norm from fp32 inputs and by 0.4 % from bf16, which is the package's promise.
(Where a trainer takes the loss alone, autograd through a [n, 23] log-softmax in fp32 stays within 23·2⁻²⁴, far below.)
The loss may differ by 1e-4 of the sum of its absolute terms: |Δlogprob| <= 1e-4, and a term changes by at most its size
times r·w, which is about 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

V, H, DELTA = 23, 16, 0.2
GRADIENT_BOUND = {torch.float32: 5e-5, torch.bfloat16: 4e-3}
LOSS_BOUND = 1e-4
ELSEWHERE = 37  # number of tokens of other micro-batches and ranks in the global count


@dataclass
class Sequence:
    """A prompt and its response. Everything but `hidden` belongs to the token at its index."""

    hidden: Tensor  # [n, H], a leaf
    tokens: Tensor
    prompt: int
    old: Tensor
    advantages: Tensor
    mask: Tensor
    ref: Tensor
    temperature: float
    group_sum: float = 0.0  # tokens in the loss of this sequence and its siblings, for slime

    def __len__(self):
        return len(self.tokens)


@dataclass
class Rollout:
    sequences: list[Sequence]
    weight: nn.Parameter

    def column(self, name: str) -> list[Tensor]:
        return [getattr(s, name) for s in self.sequences]

    @property
    def count(self) -> int:
        return int(sum(s.mask.sum() for s in self.sequences))

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.column("hidden"), self.weight]

    def layout(self, name: str, length: int | None = None, pad: float = 0, left: int | None = None) -> Tensor:
        """Return [B, length] by token, padded on the right. With `left`, prompts are padded to that length."""
        rows = self.column(name)
        if left is not None:
            rows = [torch.cat([row.new_full((left - s.prompt, *row.shape[1:]), pad), row])
                    for row, s in zip(rows, self.sequences, strict=True)]  # fmt: skip
        length = length or max(map(len, rows))
        return torch.stack([torch.cat([r, r.new_full((length - len(r), *r.shape[1:]), pad)]) for r in rows])

    def packed(self, name: str, padding: int = 0, pad: float = 0) -> Tensor:
        """Return [1, T] by token, with one sequence after the other."""
        row = torch.cat(self.column(name))
        return torch.cat([row, row.new_full((padding, *row.shape[1:]), pad)])[None]

    def responses(self, name: str) -> list[Tensor]:
        return [getattr(s, name)[s.prompt :] for s in self.sequences]


def make_sequence(generator, weight, prompt, response, temperature=1.0, advantage=None, junk=0.0, dtype=torch.float32):
    n = prompt + response
    hidden = torch.randn(n, H, generator=generator).to(dtype)
    tokens = torch.randint(V, (n,), generator=generator)
    logits = (hidden[:-1].double() @ weight.detach().double().T) / temperature
    exact = torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0]
    noise = 0.3 * torch.randn(2, n, generator=generator, dtype=torch.float64)
    old, ref = (torch.cat([exact[:1], exact]) + noise).clamp(max=-1e-3).float()
    advantages = torch.full((n,), advantage) if advantage is not None else torch.randn(n, generator=generator)
    mask = torch.arange(n) >= prompt
    mask[prompt + 1] = response < 4  # a longer response has a token of a tool
    old[~mask] = junk
    return Sequence(hidden.requires_grad_(), tokens, prompt, old, advantages, mask, ref, temperature)


def make_rollout(seed=0, dtype=torch.float32, temperatures=(1.0, 1.0, 1.0, 1.0), junk=0.0) -> Rollout:
    """Return four sequences. The first two are siblings, and the third has A = 0, so that its rows may be dropped."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter((0.5 * torch.randn(V, H, generator=generator)).to(dtype))
    shapes = zip(((3, 5), (1, 3), (2, 4), (4, 6)), temperatures, (None, None, 0.0, -1.5), strict=True)
    sequences = [make_sequence(generator, weight, *shape, temp, adv, junk, dtype) for shape, temp, adv in shapes]
    sums = [float(s.mask.sum()) for s in sequences]
    for s, total in zip(sequences, (sums[0] + sums[1], sums[0] + sums[1], *sums[2:]), strict=True):
        s.group_sum = total
    return Rollout(sequences, weight)


def expected(rollout: Rollout, coefficient, kl_coef: float = 0.0) -> tuple[Tensor, list[Tensor], float]:
    """Return (loss, gradients of the leaves, sum of the absolute terms). Token t of s counts as coefficient(s, t)."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in rollout.leaves]
    weight = leaves[-1]
    loss, scale = torch.zeros((), dtype=torch.float64), 0.0
    for s, hidden in zip(rollout.sequences, leaves[:-1], strict=True):
        for t in range(1, len(s)):
            if not s.mask[t] or s.old[t].isnan():
                continue
            logits = weight @ hidden[t - 1] / s.temperature
            logprob = logits[s.tokens[t]] - logits.logsumexp(0)
            old, advantage = s.old[t].double(), s.advantages[t].double()
            ratio = (logprob - old).exp()
            term = -(ratio * advantage - advantage.abs() * old.exp() * (ratio - 1) ** 2 / (2 * DELTA))
            if kl_coef:
                difference = s.ref[t].double() - logprob
                term = term + kl_coef * (difference.exp() - 1 - difference)
            loss = loss + coefficient(s, t) * term
            scale += abs(coefficient(s, t) * term.item())
    return loss.detach(), list(torch.autograd.grad(loss, leaves)), scale


def assert_agrees(rollout: Rollout, loss: Tensor, coefficient, kl_coef: float = 0.0):
    want_loss, want, scale = expected(rollout, coefficient, kl_coef)
    assert loss.shape == () and abs(loss.item() - want_loss.item()) <= LOSS_BOUND * scale
    gradients = torch.autograd.grad(loss, rollout.leaves)
    bound = GRADIENT_BOUND[rollout.weight.dtype]
    for got, exact in ((torch.cat(gradients[:-1]), torch.cat(want[:-1])), (gradients[-1], want[-1])):
        assert got.dtype == rollout.weight.dtype
        assert exact.norm() > 0 and (got.double() - exact).norm() / exact.norm() <= bound
    for got, s in zip(gradients[:-1], rollout.sequences, strict=True):
        predicts = torch.cat([s.mask[1:] & (s.advantages[1:] != 0), torch.tensor([False])])
        assert (got[~predicts] == 0).all() or kl_coef, "a position outside the loss has a gradient"
        assert (got[-1] == 0).all(), "the last position of a sequence predicts nothing"
        assert (got[predicts] != 0).any(1).all()


def naive_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature=1.0) -> Tensor:
    """Compute log-probs as every trainer does without a fused head, for the ways that replace the loss alone."""
    return torch.log_softmax(hidden @ weight.T / temperature, -1).gather(-1, targets[..., None])[..., 0]
