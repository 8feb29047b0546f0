"""SmolLM2's next-token decisions as a contextual bandit: recorded contexts, the real head, a small adapter, a rule.

The policy is the softmax of the real head over V = 49,152 tokens. Of the model's body only the hidden states h after N
recorded contexts are needed. Training changes h' = h + c Q R Qᵀ h, where the columns of Q [576, K] are the K leading
directions of the hidden states, and R [K, K], which starts at 0, is the adapter (as in LoRA-XS, arXiv 2405.17604). The
logits are therefore W h, computed once, and a product of R with fixed matrices.
"""

from __future__ import annotations

import functools
import itertools
import math
import string
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.quantization import bf16, fp8, int4
from benchmarks.harness.recording import recorded
from benchmarks.stability.settings import HALF, PLAUSIBLE, RARE
from examples.smollm import load_head, load_tokenizer

# c, at which a usual gradient has a norm of 0.2, so that clipping at 1 stops outliers only.
SCALE = 1 / 8
ROWS = 32  # contexts whose logits are computed together, so that they stay in the processor's cache


class Head(NamedTuple):
    """The head as the trainer or a rollout engine computes it: W h [N, V] of every context, and c s W Q [V, K].

    s is the root mean square of |h|, by which the features are divided.
    """

    base: Tensor
    directions: Tensor
    bf16: bool  # whether logits are rounded to bf16

    def logits(self, rows: Tensor, features: Tensor, adapter: Tensor) -> Tensor:
        """Return the logits [n, V] after the contexts `rows` [n]."""
        logits = self.base[rows].addmm_(features[rows] @ adapter, self.directions.T)
        return bf16(logits) if self.bf16 else logits


class Bandit:
    """All contexts and tokens, for adapters of one width K.

    features     [N, K] Qᵀ h, scaled so that those of all 576 directions would have mean square 1 together
    rules        three letters each, of which a plausible token must have one; the untrained policy earns about half
    """

    def __init__(self, width: int) -> None:
        self.hidden = recorded().hidden.float()
        self.directions = torch.linalg.svd(self.hidden, full_matrices=False).Vh[:width].T.contiguous()
        self.scale = self.hidden.square().sum(1).mean().sqrt()
        self.features = self.hidden @ self.directions / self.scale
        self.exact = self.head("float32")
        self.normalizers = torch.cat([rows.logsumexp(1) for rows in self.exact.base.split(ROWS)])
        names = [
            name.lower() for name in load_tokenizer().batch_decode(torch.arange(self.exact.base.shape[1])[:, None])
        ]
        self.letters = {letter: torch.tensor([letter in name for name in names]) for letter in string.ascii_lowercase}
        self.rules = self._rules()

    @functools.cache  # noqa: B019 (there is one bandit in a process)
    def head(self, engine: str) -> Head:
        """Return the head in "float32", or as an engine has it: "bf16", "fp8" (weights and hidden states in E4M3, a
        scale per row) or "int4" (bf16 hidden states). Engines round their logits to bf16.
        """
        lower, lower_hidden = {
            "float32": (torch.clone, torch.clone), "bf16": (bf16, bf16), "fp8": (fp8, fp8), "int4": (int4, bf16),
        }[engine]  # fmt: skip
        weight, hidden = lower(load_head()), lower_hidden(self.hidden)
        base = torch.cat([rows @ weight.T for rows in hidden.split(ROWS)])
        return Head(base, SCALE * self.scale * (weight @ self.directions), engine != "float32")

    def untrained(self, rows: Tensor) -> Tensor:
        """Return the log-probs [n, V] of the policy before training."""
        return self.exact.base[rows] - self.normalizers[rows, None]

    def rewards(self, rule: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return 1 for each token [n, G] after the contexts [n] that keeps the rule and is plausible, else 0."""
        before = self.exact.base[rows[:, None], tokens] - self.normalizers[rows, None]
        return (rule[tokens] & (before >= math.log(PLAUSIBLE))).float()

    def rule(self, letters: str) -> Tensor:
        """Return which tokens [V] have one of the letters."""
        return torch.stack([self.letters[letter] for letter in letters]).any(0)

    def _rules(self) -> list[str]:
        earned = torch.zeros(self.exact.base.shape[1])
        for rows in torch.arange(len(self.hidden)).split(ROWS):
            logp = self.untrained(rows)
            earned += torch.where(logp >= math.log(PLAUSIBLE), logp.exp(), 0).sum(0) / len(self.hidden)
        letters = map("".join, itertools.combinations(string.ascii_lowercase, 3))
        return [three for three in letters if HALF[0] <= earned[self.rule(three)].sum() <= HALF[1]]


@functools.cache
def bandit(width: int) -> Bandit:
    """Return the bandit, which takes 0.5 GB and some seconds for each head that is used, once in a process."""
    return Bandit(width)


class HeldOut:
    """Contexts that are never trained on. What a policy earns there is a sum over its probabilities, not a sample."""

    def __init__(self, world: Bandit, rule: Tensor, rows: Tensor) -> None:
        self.world, self.rows = world, rows
        before = world.untrained(rows)
        self.places, self.tokens = (before >= math.log(PLAUSIBLE)).nonzero(as_tuple=True)
        self.good = rule[self.tokens]
        self.rare = before[self.places, self.tokens] < math.log(RARE)

    def evaluate(self, adapter: Tensor) -> dict[str, float]:
        """Return the expected "reward", the part of it that is earned by tokens that were "rare" before training, and
        the probability of "implausible" tokens.
        """
        parts = []
        for rows in self.rows.split(ROWS):
            logits = self.world.exact.logits(rows, self.world.features, adapter)
            inside = self.places // ROWS == len(parts)
            places = self.places[inside] % ROWS
            parts.append((logits[places, self.tokens[inside]] - logits.logsumexp(1)[places]).exp())
        p = torch.cat(parts) / len(self.rows)
        reward, rare = p[self.good].sum().item(), p[self.good & self.rare].sum().item()
        return {"reward": reward, "rare": rare, "implausible": 1 - p.sum().item()}
