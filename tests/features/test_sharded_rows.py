"""Shards of a vocabulary are put together in one process: statistics and gradients of column slices against whole rows.

There is no process group: what the ranks would gather is stacked by hand.
"""

from dataclasses import dataclass

import pytest
import torch

import drpo_kernels as dk
from drpo_kernels.backends import row_ops
from drpo_kernels.backends.rows import Field, RowBatch, RowKind, Slope, Stat, Transform
from drpo_kernels.backends.sharded import ShardedRows, combined
from drpo_kernels.backends.spec import Execution
from drpo_kernels.backends.sweep import Head, LinearSweep, NeedsGrad
from drpo_kernels.distributed import VocabShard
from problems import generator, relative

every_backend = pytest.mark.parametrize("backend", ["torch", "triton"])
VOCAB = 23
PLAIN = Transform()
# even, uneven, single columns, and 20 real entries of which the last rank holds none
SPLITS = [((12, 11), VOCAB), ((1, 20, 2), VOCAB), ((6, 6, 6, 5), VOCAB), ((8, 8, 6, 1), 20), ((20, 3), 20)]


@dataclass(frozen=True)
class Place(VocabShard):
    """This is one rank's view of a split."""

    place: int = 0

    @property
    def rank(self):
        return self.place


def rows_of(count, kinds=None, temperature=1.0, device=None):
    rows = torch.zeros(len(Field), count, device=device)
    rows[Field.INV_TEMPERATURE] = 1 / temperature
    rows[Field.KIND] = RowKind.ACTIVE.value if kinds is None else kinds
    return rows


def shards(logits, sizes, vocab):
    """Return (rank's place, its real columns) of every rank."""
    places = [Place(None, sizes, place=rank) for rank in range(len(sizes))]
    return [(p, logits[:, p.start : p.start + p.real_rows(vocab)].clone()) for p in places]


def together(backend, logits, targets, sizes, vocab, transform=PLAIN, rows=None, slopes=None):
    """Return (statistics [len(Stat), n], gradient [n, vocab]) as the ranks of a group would find them."""
    inner = row_ops(backend)
    rows = rows_of(len(logits), device=logits.device) if rows is None else rows
    parts = [
        ShardedRows(inner, place).contribution(RowBatch(part, targets, rows, transform))
        for place, part in shards(logits, sizes, vocab)
    ]
    owner = Place(None, sizes).owner(targets)
    statistics = combined(torch.stack(parts), owner, transform.factor(rows[Field.INV_TEMPERATURE]))
    statistics[:, rows[Field.KIND] < RowKind.FORWARD] = 0
    gradients = []
    for place, part in shards(logits, sizes, vocab):
        out = torch.full_like(part, 7.0)
        ShardedRows(inner, place).write_gradient(RowBatch(part, targets, rows, transform), statistics, slopes, out)
        gradients.append(out)
    return statistics, torch.cat(gradients, 1)


def alone(backend, logits, targets, vocab, transform=PLAIN, rows=None, slopes=None):
    ops, logits = row_ops(backend), logits[:, :vocab].clone()
    rows = rows_of(len(logits), device=logits.device) if rows is None else rows
    statistics = ops.statistics(RowBatch(logits, targets, rows, transform))
    out = torch.empty_like(logits)
    ops.write_gradient(RowBatch(logits, targets, rows, transform), statistics, slopes, out)
    return statistics, out


def random_rows(seed, device, scale=4.0):
    g = generator(seed)
    logits = scale * torch.randn(8, VOCAB, generator=g)
    targets = torch.tensor([0, 5, 7, 8, 12, 15, 18, 19])  # at least one target in every shard of every split
    return (x.to(device) for x in (logits, targets, torch.randn(len(Slope), 8, generator=g)))


# These statistics do not depend on the reference value, which each backend and each shard chooses for itself.
SETTLED = [Stat.LOGPROB, Stat.ENTROPY, Stat.MISS, Stat.LOGSUMEXP]


@every_backend
@pytest.mark.parametrize("sizes, vocab", SPLITS)
@pytest.mark.parametrize("used", [1, 2, 3])  # number of slopes
@pytest.mark.parametrize("transform", [PLAIN, Transform(1.3, 4.0)], ids=["plain", "softcap"])
def test_shards_make_whole_rows(used, transform, sizes, vocab, backend, device):
    """The two differ by rounding only: sums are in another order, and each is off by a few ulp."""
    logits, targets, slopes = random_rows(1, device)
    slopes = slopes[:used]
    kinds, temperature = torch.tensor([2, 2, 0, 2, 1, 2, 2, 2]), torch.linspace(0.5, 2, 8)
    rows = rows_of(8, kinds.to(device), temperature.to(device), device)
    arguments = {"transform": transform, "rows": rows, "slopes": slopes}
    want, gradient = alone(backend, logits, targets, vocab, **arguments)
    got, found = together(backend, logits, targets, sizes, vocab, **arguments)
    assert (got - want)[SETTLED].abs().max().item() <= 4e-6
    assert relative(found, gradient) <= 1e-6
    assert (found[[2, 4]] == 0).all(), "rows without a gradient"


@every_backend
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_far_from_zero(offset, backend, device):
    """All logits are at ±1e4, and one shard is 2e4 from the others. Its share underflows, but not its log-probs."""
    logits, targets, slopes = random_rows(2, device)
    logits += offset
    want, gradient = alone(backend, logits, targets, VOCAB, slopes=slopes)
    got, found = together(backend, logits, targets, (6, 6, 6, 5), VOCAB, slopes=slopes)
    ulp = torch.zeros(len(Stat), 1, device=device)
    ulp[Stat.LOGSUMEXP] = 2.0**-10  # a log-sum-exp near 1e4 is rounded to this
    assert ((got - want).abs() <= 4e-6 + ulp)[SETTLED].all()
    assert relative(found, gradient) <= 1e-6
    logits[:, 6:12] -= 2 * offset
    want, gradient = alone(backend, logits, targets, VOCAB, slopes=slopes)
    got, found = together(backend, logits, targets, (6, 6, 6, 5), VOCAB, slopes=slopes)
    assert ((got - want).abs() <= 4e-6 + 2.0**-22 * want.abs())[SETTLED].all()
    assert relative(found, gradient) <= 1e-6


@every_backend
def test_certain_tokens(backend, device):
    """Where p_y is within 1e-7 of 1, 1 - p_y, log p_y and the gradient keep their digits, whichever shard holds the
    other probabilities.
    """
    targets = torch.tensor([2, 2, 14, 14])
    logits = torch.full((4, VOCAB), -3.0)
    logits[range(4), targets] = torch.tensor([16.0, 17.5, 16.0, 22.0])
    logits[1, 15] = 1.0  # the other shard holds most of 1 - p_y in row 1
    slopes = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 0.2, -0.1, 0.0], [0.0, 0.1, 0.0, -0.3]])
    logits, targets, slopes = (x.to(device) for x in (logits, targets, slopes))
    exact = logits.double()
    miss = (exact.softmax(1)).scatter(1, targets[:, None], 0).sum(1)
    got, found = together(backend, logits, targets, (12, 11), VOCAB, slopes=slopes)
    assert relative(got[Stat.MISS], miss) <= 2e-6
    assert relative(got[Stat.LOGPROB], torch.log1p(-miss)) <= 2e-6
    logp = exact.log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    assert ((got[Stat.ENTROPY] - entropy).abs() <= 2e-6 * entropy).all(), "cancellation in the entropy"
    wide = exact.requires_grad_()
    logp = wide.log_softmax(1)
    value = slopes[0] * logp.gather(1, targets[:, None])[:, 0] - slopes[2] * (logp.exp() * logp).sum(1)
    value = value + slopes[1] * wide.logsumexp(1)
    (gradient,) = torch.autograd.grad(value.sum(), wide)
    for row in range(4):
        assert relative(found[row], gradient[row]) <= 1e-5


@every_backend
def test_banned_shards(backend, device):
    """A shard whose logits are all -inf contributes nothing. A banned target has log p = -inf, and a row of banned
    tokens is NaN.
    """
    logits, targets, _ = random_rows(3, device)
    slopes = torch.ones(1, 8, device=device)
    logits[:, 6:12] = -torch.inf  # this bans the targets of rows 2 and 3
    want, gradient = alone(backend, logits, targets, VOCAB, slopes=slopes)
    got, found = together(backend, logits, targets, (6, 6, 6, 5), VOCAB, slopes=slopes)
    assert got[Stat.LOGPROB].isneginf().tolist() == targets.ge(6).logical_and(targets.lt(12)).tolist()
    assert torch.equal(got[Stat.LOGPROB].isneginf(), want[Stat.LOGPROB].isneginf())
    assert (got - want)[SETTLED[1:]].abs().max().item() <= 4e-6
    assert relative(found, gradient) <= 1e-6
    logits[1] = -torch.inf
    got, _ = together(backend, logits, targets, (6, 6, 6, 5), VOCAB, slopes=slopes)
    assert got[Stat.LOGPROB].isnan().nonzero().tolist() == [[1]]


@every_backend
@pytest.mark.parametrize("sizes", [(6, 6, 6, 5), (1, 20, 2)])
def test_a_nan_in_any_shard_is_never_a_number(sizes, backend, device):
    """The rows hold a NaN logit, a whole shard of NaN, or a target outside the vocabulary."""
    logits, targets, _ = random_rows(4, device)
    vocab, slopes = 22, torch.ones(1, 8, device=device)
    logits[0, 21] = torch.nan
    logits[1, :6] = torch.nan
    logits[2, 0] = torch.nan  # this fills a shard of one column
    targets[3], targets[4], targets[5] = -100, 22, 10**6
    got, found = together(backend, logits, targets, sizes, vocab, slopes=slopes)
    assert got[Stat.LOGPROB].isnan().nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert found[6:].isfinite().all()


@pytest.mark.parametrize("retain", [True, False])
def test_every_rank_plans_the_same_chunks(retain):
    """A rank that cut its rows by its own share of the vocabulary would wait for the others for ever."""
    sizes, hidden_size = (3, 40, 17), 4
    targets = torch.zeros(50, dtype=torch.int64)
    rows = rows_of(50, torch.tensor([2, 1] * 25))
    plans = set()
    for rank, size in enumerate(sizes):
        place = Place(None, sizes, place=rank)
        head = Head(torch.zeros(size, hidden_size), None, place.real_rows(43), Transform())
        execution = Execution("torch", torch.float32, workspace_bytes=2048, vocab_shard=place)
        needs_grad = NeedsGrad(True, retain, False)
        sweep = LinearSweep(torch.zeros(50, hidden_size), head, targets, rows, execution, needs_grad)
        plans.add(sweep.plan)
    assert len(plans) == 1
    assert len(plans.pop().windows) > 1


def test_a_group_of_one_is_no_split():
    """Without a process group the shard is the head itself, bitwise, and takes the fused route."""
    g = generator(5)
    weight, hidden, targets = torch.randn(9, 4, generator=g), torch.randn(6, 4, generator=g), torch.arange(6)
    rest = targets, torch.full((6,), -2.0), torch.randn(6, generator=g)
    results = []
    for shard in (None, VocabShard.gather(weight)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = dk.linear_policy_loss(*leaves, *rest, vocab_shard=shard).loss
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(map(torch.equal, *results))


def test_errors():
    weight, hidden, targets = torch.randn(9, 4), torch.randn(6, 4), torch.arange(6)
    rest = targets, torch.zeros(6), torch.zeros(6)

    def call(shard, weight=weight, **options):
        return dk.linear_policy_loss(hidden, weight, *rest, vocab_shard=shard, **options)

    with pytest.raises(TypeError, match=r"vocab_shard must be a drpo_kernels.distributed.VocabShard, got tuple"):
        call((9,))
    with pytest.raises(ValueError, match=r"weight must be the 8 rows that vocab_shard.sizes \(8,\) gives rank 0"):
        call(VocabShard(None, (8,)))
    with pytest.raises(ValueError, match=r"vocab_shard.sizes must name the 1 ranks of its group, got \(9, 9\)"):
        call(VocabShard(None, (9, 9)))
    with pytest.raises(ValueError, match=r"backend must be None, 'triton' or 'torch' with vocab_shard"):
        call(VocabShard(None, (9,)), backend="reference")
    with pytest.raises(ValueError, match=r"vocab_size must be in \[1, 9\], got 10"):
        call(VocabShard(None, (9,)), vocab_size=10)
    for bad, error in (((), ValueError), ((3, 0), ValueError), ([3, 4], TypeError), ((3, 4.0), TypeError)):
        with pytest.raises(error, match="VocabShard: sizes must"):
            VocabShard(None, bad)
    with pytest.raises(ValueError, match="weight must be"):
        VocabShard.gather(torch.zeros(3))
    for function in (dk.policy_loss, dk.drpo_loss):
        with pytest.raises(TypeError, match="vocab_shard"):
            function(hidden @ weight.T, *rest, vocab_shard=VocabShard(None, (9,)))
    with pytest.raises(TypeError, match="vocab_shard"):
        dk.token_logprobs(hidden @ weight.T, targets, vocab_shard=VocabShard(None, (9,)))
