"""The contract between the sweeps and a backend's row operations: the inputs and the results of a row.

They travel in three packed tensors (`Field`, `Stat`, `Outcome`), so that a kernel takes three pointers, not twenty.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from drpo_kernels.objective import Objective


class Field(IntEnum):
    """The inputs of a row, packed [len(Field), N] in the statistics dtype."""

    OLD_LOGPROB = 0  # NaN means on-policy: the row's own detached log-prob is taken
    ADVANTAGE = 1
    POLICY = 2  # coefficient of the policy term, token weight included
    KL = 3  # coefficient of the KL term, kl_coef included
    ENTROPY = 4  # coefficient of the entropy bonus, entropy_coef included
    REF_LOGPROB = 5
    INV_TEMPERATURE = 6
    KIND = 7  # a RowKind
    Z_LOSS = 8  # coefficient of the z-loss, z_loss_coef included


FIELDS = tuple(Field)  # a graph of PyTorch 2.11 cannot iterate over an enumeration


class RowKind(IntEnum):
    SKIPPED = 0  # the row reports zeros, and its gradient is zero
    FORWARD = 1  # the row is computed, and its gradient is zero
    ACTIVE = 2  # the row is computed and has a gradient


class Stat(IntEnum):
    """The statistics of a row, packed [len(Stat), N]. `Transform` defines z and the base logits b."""

    LOGPROB = 0
    ENTROPY = 1
    REFERENCE = 2  # r, a base logit near the row's largest; q = factor · (b - r)
    SUM = 3  # Σ exp(q)
    MISS = 4  # 1 - p_y, summed over the other tokens and so exact when p_y is close to 1
    MEAN = 5  # Σ p q, so that log p + H = q - MEAN, which keeps its digits on a flat row
    LOGSUMEXP = 6  # log Σ exp(z)


class Outcome(IntEnum):
    """The results that the policy loss reports of a row, packed [len(Outcome), N]."""

    LOGPROB = 0
    ENTROPY = 1
    LOGSUMEXP = 2
    LOSS = 3  # the row's share of the total loss, coefficients included
    SLOPE = 4  # dℓ/dlogπ of the policy term alone, without its coefficient


class Slope(IntEnum):
    """The statistics whose slopes make up a row's gradient. Slopes are packed [1 to 3, N]: the first, two or all."""

    LOGPROB = 0
    LOGSUMEXP = 1  # its slope costs nothing per element
    ENTROPY = 2


@dataclass(frozen=True)
class Transform:
    """How raw logits x become z = factor · b.

    Without a softcap the base logits are b = x + bias and the factor is logit_scale / temperature; with one,
    b = tanh(logit_scale · (x + bias) / softcap) and the factor is softcap / temperature.
    """

    logit_scale: float = 1.0
    softcap: float | None = None

    def factor(self, inv_temperature: Tensor) -> Tensor:
        """dz/db > 0, shaped like `inv_temperature`."""
        return (self.logit_scale if self.softcap is None else self.softcap) * inv_temperature


@dataclass(frozen=True)
class Terms:
    """The terms of the loss, without their coefficients."""

    objective: Objective
    kl_estimator: str | None = None
    kl_importance: bool = False
    entropy_bonus: bool = False
    z_loss: bool = False
    kl_cap: float = math.inf


class RowBatch(NamedTuple):
    """Rows whose logits are ready, with their inputs."""

    logits: Tensor  # [N, V]; [..., V] with any strides where a function says so
    targets: Tensor  # [N] int64
    rows: Tensor  # [len(Field), N]
    transform: Transform
    bias: Tensor | None = None  # [V]
    sharded: bool = False  # True: a target outside [0, V) is valid and belongs to another shard
    order: Tensor | None = None  # [N] int64, ascending: row t has the logits at order[t]; None: it has those at t


class RowOps(Protocol):
    """The row operations of a backend. Statistics are float32, or float64 for float64 logits.

    Gradients are written to `out` [N, >= V], which may be `logits` itself. They are 0 in columns beyond V and in rows
    that are not ACTIVE.
    """

    def statistics(self, batch: RowBatch) -> Tensor:
        """Compute the statistics -> [len(Stat), N]. They are 0 where the row is SKIPPED."""
        ...

    def write_gradient(self, batch: RowBatch, statistics: Tensor, slopes: Tensor, out: Tensor) -> None:
        """out = d/dx Σ (slopes[0] · logprob + slopes[1] · logsumexp + slopes[2] · entropy); slopes as in `Slope`."""
        ...

    def losses(self, statistics: Tensor, rows: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
        """Compute the loss from statistics [len(Stat), N] -> (outcome [len(Outcome), N], slopes [1 to 3, N])."""
        ...

    def fuses(self, terms: Terms) -> bool:
        """Whether `policy` exists for these terms."""
        ...

    def factors(self, terms: Terms, logits: torch.dtype, dlogits: torch.dtype) -> bool:
        """Whether `policy` exists and takes `factors` for these terms, with logits and `out` of these dtypes. It then
        reads a row once. It cannot with an entropy bonus or a z-loss, whose gradient is no multiple of p.
        """
        ...

    def policy(self, batch: RowBatch, terms: Terms, out: Tensor | None, factors: Tensor | None = None) -> Tensor:
        """Compute statistics, loss and, with `out`, the gradient in one launch -> [len(Outcome), N].

        With `factors` [N] the gradient is factors ⊙ out, and `out` is [N, V]. It gets exp(q), and -Σ_{j≠y} exp(q_j) at
        the target, each times the slope of the tanh if there is a soft-cap. A row's factor is -slope / SUM ·
        logit_scale / temperature, or 0 where the row is not ACTIVE.
        """
        ...

    def scale(self, values: Tensor, factor: Tensor) -> None:
        """values *= factor, in place, of any shape and contiguous; factor is 0-d, and each product is rounded once."""
        ...


def float16_scale(slopes: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, 1 / scale), 0-d powers of two. The scale brings the largest possible |dlogits| to about 2^14.

    Without it float16 dlogits of c·p ~ 1e-9 would flush to zero, and a GradScaler acts too late to prevent that.
    """
    # |dlogits| <= |slope| + |logsumexp slope| + |entropy slope| · max p|log p + H|, that maximum below max(H, 1/e) < 16
    # for any vocabulary under e^16
    bound = slopes[0].abs()
    for weight, slope in zip((1, 16), slopes[1:], strict=False):
        bound = bound + weight * slope.abs()
    bound = torch.cat([bound, bound.new_full((1,), 2.0**-100)]).amax().clamp(max=2.0**100)
    scale = torch.exp2(14 - bound.log2().ceil())
    return scale, 1 / scale
