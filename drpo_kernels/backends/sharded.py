"""Row operations on a head whose vocabulary is split over the ranks of a group. They wrap those of a backend.

Every rank computes the statistics of its own columns, and one small all-gather per chunk brings them together. Every
rank combines them in rank order, so that the statistics and the loss are bitwise the same on all ranks. Except for
rounding they are those of a single process.
"""

import torch
from torch import Tensor

from drpo_kernels.backends.rows import Field, RowBatch, RowKind, RowOps, Stat, Terms
from drpo_kernels.collectives import VocabShard, gather

# The statistics of a shard without a token: it holds no real entry of a padded vocabulary, or all of them are banned.
NOTHING = {
    Stat.LOGPROB: -torch.inf, Stat.ENTROPY: 0.0, Stat.REFERENCE: -torch.inf, Stat.SUM: 0.0, Stat.MISS: 1.0,
    Stat.MEAN: 0.0,
}  # fmt: skip


class ShardedRows:
    """`RowOps` over this rank's columns [n, V/n] with statistics and target ids of the whole vocabulary."""

    def __init__(self, inner: RowOps, shard: VocabShard):
        self.inner, self.shard = inner, shard

    def statistics(self, batch: RowBatch) -> Tensor:
        contributions = gather(self.contribution(batch), self.shard.group)
        factor = batch.transform.factor(batch.rows[Field.INV_TEMPERATURE])
        statistics = combined(contributions, self.shard.owner(batch.targets), factor)
        return statistics.masked_fill_(batch.rows[Field.KIND] < RowKind.FORWARD, 0)

    def contribution(self, batch: RowBatch) -> Tensor:
        """The statistics of this rank's columns alone, [6, n] without LOGSUMEXP. LOGPROB and MISS are NaN where the
        target is no real entry of this shard, so that a target which is a real entry of no shard makes its row NaN.
        """
        vocab, local = batch.logits.shape[1], batch.targets - self.shard.start
        here = (local >= 0) & (local < vocab)
        if vocab:
            statistics = self.inner.statistics(batch._replace(targets=torch.where(here, local, 0)))
        else:
            statistics = batch.rows.new_full((len(Stat), batch.rows.shape[1]), -torch.inf)
        empty = statistics[Stat.REFERENCE] == -torch.inf
        for stat, value in NOTHING.items():
            statistics[stat].masked_fill_(empty, value)
        for stat in (Stat.LOGPROB, Stat.MISS):
            statistics[stat].masked_fill_(~here, torch.nan)
        return statistics[: Stat.LOGSUMEXP].contiguous()

    def write_gradient(self, batch: RowBatch, statistics: Tensor, slopes: Tensor, out: Tensor) -> None:
        if batch.logits.shape[1]:
            local = batch._replace(targets=batch.targets - self.shard.start, sharded=True)
            self.inner.write_gradient(local, statistics, slopes, out)

    def losses(self, statistics: Tensor, rows: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
        return self.inner.losses(statistics, rows, terms)

    def fuses(self, terms: Terms) -> bool:
        return False  # the loss needs every rank's statistics first

    def factors(self, terms: Terms, logits: torch.dtype, dlogits: torch.dtype) -> bool:
        return False

    def policy(self, batch: RowBatch, terms: Terms, out: Tensor | None, factors: Tensor | None = None) -> Tensor:
        raise NotImplementedError("no terms are fused where a head is split")

    def scale(self, values: Tensor, factor: Tensor) -> None:
        self.inner.scale(values, factor)


def combined(contributions: Tensor, owner: Tensor, factor: Tensor) -> Tensor:
    """Every rank's `contribution` [ranks, 6, n] -> the statistics of the whole rows, [len(Stat), n].

    With the references m_r, S_r, H_r, q̄_r of the ranks r, m = max m_r and M_r = S_r · exp(factor · (m_r - m)):
        SUM = Σ_r M_r    share_r = M_r / SUM    ENTROPY = Σ_r share_r · (H_r - log share_r)
        LOGPROB = logp_owner + log share_owner    MISS = (miss_owner · M_owner + Σ_{r ≠ owner} M_r) / SUM
        MEAN = Σ_r share_r · (q̄_r + factor · (m_r - m))    LOGSUMEXP = factor · m + log SUM
    A share above 1/2 has log share = -log1p(Σ_{others} M / M). All terms of a sum have one sign, so nothing cancels.
    """
    references, local_sum = contributions[:, Stat.REFERENCE], contributions[:, Stat.SUM]
    reference = references.amax(0)
    shift = factor * (references - reference)  # if all ranks are empty: -inf + inf = NaN, as in one process
    mass = local_sum * shift.exp()
    total = mass.sum(0)
    itself = torch.eye(mass.shape[0], dtype=torch.bool, device=mass.device)[:, :, None]
    others = mass[None].expand(mass.shape[0], *mass.shape).masked_fill(itself, 0).sum(1)
    share = mass / total
    # A small share is computed as a logarithm, because it may underflow where its logarithm does not.
    log_share = torch.where(mass > others, -(others / mass).log1p(), shift + local_sum.log() - total.log())
    entropy, mean = (
        (share * term).masked_fill(share == 0, 0).sum(0)
        for term in (contributions[:, Stat.ENTROPY] - log_share, contributions[:, Stat.MEAN] + shift)
    )

    def of_owner(values: Tensor) -> Tensor:
        return values.gather(0, owner[None])[0]

    logprob = of_owner(contributions[:, Stat.LOGPROB] + log_share)
    miss = of_owner(contributions[:, Stat.MISS] * mass + others) / total
    statistics = torch.stack([logprob, entropy, reference, total, miss, mean, factor * reference + total.log()])
    return statistics.masked_fill(logprob.isnan(), torch.nan)
