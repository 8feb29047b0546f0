"""The choice of entries that the PyTorch backend keeps for `sparse_grad`: see `EntryOps.select`."""

import math

import torch
from torch import Tensor

from drpo_kernels.backends.rows import Stat
from drpo_kernels.backends.sparse.contract import (
    ENTROPY_ROUNDING,
    LEVELS,
    LEVELS_PER_OCTAVE,
    SHARE_ROUNDING,
    most_entropy,
)

# The columns of a block. Its maximum is taken before any of them is looked at.
BLOCK = 64
# Shares of 1 - p_y are summed as whole numbers of 1 / UNIT.
UNIT = 1 << 40


def too_flat(statistics: Tensor, vocab: int, tolerance: float, limit: int) -> Tensor:
    """Rows whose entropy shows that any `limit` entries leave out more than `tolerance`, [N] bool."""
    miss, most = statistics[Stat.MISS], most_entropy(vocab, tolerance, limit)
    of_target = -torch.special.xlogy(miss, miss) - torch.special.xlog1py(1 - miss, -miss)
    return statistics[Stat.ENTROPY] * (1 - ENTROPY_ROUNDING) > of_target + miss * most


def above(e: Tensor, others: Tensor, tolerance: float, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, value) of the candidates among the entries e [n, V], ordered by row. Of entries that are smaller,
    `limit` weigh less than half of what may be left out of the sum `others`.

    A block of columns is only looked into if its maximum is a candidate. A row that is seen to need more than `limit`
    entries is given up: none of the entries in its blocks is returned.
    """
    count, vocab = e.shape
    floor = (others * (tolerance / (2 * limit)))[:, None]
    whole = vocab // BLOCK * BLOCK
    blocks = e[:, :whole].unflatten(1, (-1, BLOCK)) if whole else e.new_empty(count, 0, BLOCK)
    highest = blocks.amax(2) if whole else e.new_empty(count, 0)
    hit = highest >= floor
    unsure = (hit.sum(1) > min(limit, hit.shape[1]) // 4).nonzero()[:, 0]
    if len(unsure):
        some = slice(None) if 2 * len(unsure) > count else unsure
        given_up = hopeless(e[some], highest[some], limit) > (tolerance + SHARE_ROUNDING) * others[some]
        hit[some] &= ~given_up[:, None]
    row, block = hit.nonzero(as_tuple=True)
    values = blocks[row, block]
    place, within = (values >= floor[row]).nonzero(as_tuple=True)
    rows, columns = row[place], block[place] * BLOCK + within
    found = values[place, within]
    if whole < vocab:
        rest = e[:, whole:]
        rest_rows, rest_columns = (rest >= floor).nonzero(as_tuple=True)
        pairs = ((rows, rest_rows), (columns, whole + rest_columns), (found, rest[rest_rows, rest_columns]))
        joined = [torch.cat(pair) for pair in pairs]
        order = joined[0].argsort(stable=True)
        rows, columns, found = (tensor[order] for tensor in joined)
    return rows, columns, found


def hopeless(e: Tensor, highest: Tensor, limit: int) -> Tensor:
    """A lower bound on what any `limit` entries leave out of Σ e, [n]. For every x, Σ min(e, x) - limit · x is one.

    The best x is the `limit`-th largest entry. If large entries were spread evenly, a share exp(-BLOCK · limit / V) of
    the blocks would have none as large, so x is the maximum of a block that this share of the blocks is below.
    """
    below = int(highest.shape[1] * math.exp(-BLOCK * limit / e.shape[1]))
    x = highest.kthvalue(below + 1, dim=1, keepdim=True).values
    return torch.minimum(e, x).sum(1) - limit * x[:, 0]


def trimmed(rows: Tensor, shares: Tensor, count: int, tolerance: float, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates [M] with their shares of 1 - p_y -> (those to keep [M], how many of each row [count], the share of all
    others [count]). A row's smallest candidates are left out while the budget lasts, all of a level or none.
    """
    floor = math.log2(tolerance / (2 * limit))
    level = shares.log2().sub_(floor).mul_(LEVELS_PER_OCTAVE).clamp_(0, LEVELS - 1).to(torch.int64)
    # Sums of whole numbers are the same in any order.
    units = (shares * UNIT).ceil_().to(torch.int64)
    mass = units.new_zeros(count * LEVELS).index_add_(0, rows * LEVELS + level, units).view(count, LEVELS)
    outside = (UNIT - mass.sum(1)).clamp_(min=0) + int(SHARE_ROUNDING * UNIT)  # no candidates
    with_level = outside[:, None] + mass.cumsum(1)
    cut = (with_level[:, :-1] <= int(tolerance * UNIT)).sum(1)
    left_out = torch.cat([outside[:, None], with_level], 1).gather(1, cut[:, None])[:, 0]
    kept = level >= cut[rows]
    return kept, torch.bincount(rows[kept], minlength=count), left_out.to(shares.dtype).div_(UNIT)
