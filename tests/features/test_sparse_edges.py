"""`sparse_grad` at the edges: without rows, masked or banned tokens, rows that are not finite, and refused calls."""

import pytest
import torch

import drpo_kernels as dk
import problems
import sparse_cases as sparse
from drpo_kernels import linear_policy_loss, validation
from drpo_kernels.distributed import VocabShard
from drpo_kernels.options import PolicyOptions

# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", sparse.COMPACT)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_no_rows(shape, compact, device):
    case = sparse.case_of(0, shape, bias=True, compact=compact)
    out, grads = sparse.gradients(case, device=device)
    assert out.loss == 0
    assert grads["hidden"].shape == (*shape, 16) and not grads["weight"].any() and not grads["bias"].any()
    assert [out.metrics[name].item() for name in sparse.SHARES] == [0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vocab", [1, 2, 3, 65, 300])
def test_one_row(vocab, seed, device):
    case = sparse.case_of(seed, (1,), vocab=vocab, bias=True, objective="pg", tau=0.1)
    sparse.assert_within_bounds(case, sparse.found(case, device=device))


def test_one_token(device):
    """With V = 1, p_y is 1 and nothing is left to learn."""
    case = sparse.case_of(0, (5,), vocab=1, bias=True)
    for grad in sparse.gradients(case, device=device)[1].values():
        assert not grad.any()


@pytest.mark.parametrize("compact", sparse.COMPACT)
@pytest.mark.parametrize("what", ["mask", "advantages"])
def test_nothing_to_do(what, compact, device):
    case = sparse.case_of(1, (20,), bias=True, compact=compact)
    nothing = torch.zeros(20, dtype=torch.bool) if what == "mask" else torch.zeros(20)
    out, grads = sparse.gradients(case.with_tensors(**{what: nothing}), device=device)
    assert out.loss == 0 and out.loss.requires_grad
    assert not any(grad.any() for grad in grads.values())
    rows = 20 if what == "advantages" and compact == "none" else 0  # such rows are swept as if they had a gradient
    assert (out.metrics["drpo/sparse_share"] > 0) == (rows > 0)


@pytest.mark.parametrize("workspace", [None, sparse.ROW * 4])
@pytest.mark.parametrize("compact", sparse.COMPACT)
def test_masked_rows_contribute_nothing(compact, workspace, device):
    """The result has the same bits whatever the masked rows carry."""
    case = sparse.case_of(5, (4, 8), bias=True, compact=compact, workspace_bytes=workspace)
    mask = (torch.arange(32) % 3 > 0).view(4, 8)
    p = case.problem
    bad = case.with_tensors(
        mask=mask, hidden=torch.where(mask[..., None], p.hidden, torch.nan), targets=p.targets.where(mask, -100),
        old_logprobs=p.old_logprobs.where(mask, torch.inf), advantages=p.advantages.where(mask, torch.nan),
    )  # fmt: skip
    out, grads = sparse.gradients(bad, device=device)
    want, expected = sparse.gradients(case.with_tensors(mask=mask), device=device)
    sparse.assert_same(grads, expected)
    assert not grads["hidden"][~mask.to(device)].any()
    assert all(torch.equal(out.metrics[name], want.metrics[name]) for name in sparse.SHARES)
    assert 0 < out.metrics["drpo/sparse_share"] < 1


class InfiniteAtCertainty(dk.Objective):
    def token_loss(self, tokens):
        return tokens.advantages * torch.log(-tokens.logprobs)


@pytest.mark.parametrize("compact", sparse.COMPACT)
def test_masked_rows_do_not_reach_a_user_objective(compact, device):
    """A skipped row reports the log-prob 0, at which this objective's slope is not finite."""
    case = sparse.case_of(35, (30,), bias=True, compact=compact)
    mask = torch.arange(30) % 3 > 0
    results = []
    for some in (sparse.rows_of(case, mask), case.with_tensors(mask=mask)):
        leaves = {name: x.to(device).requires_grad_() for name, x in some.problem.leaves().items()}
        out = problems.call(some.problem, InfiniteAtCertainty(), "torch", device, leaves, sparse_grad=case.tau)
        out.loss.backward()
        assert 0 < out.metrics["drpo/sparse_share"] < 1
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    results[1]["hidden"] = results[1]["hidden"][mask.to(device)]
    sparse.assert_same(results[1], results[0], 1e-6)


@pytest.mark.parametrize("compact", ["active", "none"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_dense_and_alone(value, compact, device):
    """As without `sparse_grad`, the row's own dX and all of dW are NaN, and the dX of other rows does not change."""
    case = sparse.case_of(6, (30,), compact=compact, workspace_bytes=sparse.ROW * 7)
    bad = case.problem.hidden.clone()
    bad[4, 3] = value
    row = torch.arange(30) == 4
    assert case.problem.advantages[4] != 0
    broken = case.with_tensors(hidden=bad)
    (out, grads), (_, exactly), (_, well) = (
        sparse.gradients(c, device=device, sparse_grad=tau) for c, tau in ((broken, 0.02), (broken, 0.0), (case, 0.02))
    )
    assert torch.equal(grads["hidden"].isnan(), exactly["hidden"].isnan())
    assert torch.equal(grads["weight"].isnan(), exactly["weight"].isnan())
    assert grads["hidden"][row].isnan().all()
    assert torch.equal(grads["hidden"][~row], well["hidden"][~row])
    got = sparse.found(broken, device=device)
    assert got.entries[4] == 0 and 0 < out.metrics["drpo/sparse_share"] < 1


def test_banned_tokens(device):
    """The bias makes these tokens' logits -inf. They are never kept as entries, whatever else the row has."""
    case = sparse.case_of(7, (40,), vocab=130, bias=True)
    banned = torch.arange(130) % 3 == 1
    p = case.problem
    g = problems.generator(2)
    allowed = (~banned).nonzero()[:, 0]
    targets = allowed[torch.randint(len(allowed), (40,), generator=g)]
    case = case.with_tensors(bias=p.bias.masked_fill(banned, -torch.inf), targets=targets)
    got = sparse.found(case, device=device)
    assert 0 < (got.entries > 0).sum() < 40
    sparse.assert_within_bounds(case, got)
    alone = torch.full((130,), -torch.inf)
    alone[7] = 0.0
    case = case.with_tensors(bias=alone, targets=torch.full((40,), 7))
    for name, grad in sparse.gradients(case, device=device)[1].items():
        assert not grad.any(), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("vocab", [3, 17, 40, 41])
@pytest.mark.parametrize("gap", [30.0, 60.0, 85.0, 88.0, 92.0, 95.0, 103.0, 120.0])
def test_rows_of_hardly_any_doubt(gap, vocab, backend, device):
    """1 - p_y is near e^-gap. Below the normal float32 numbers, where 1e-35 is as good as 0, it finally becomes 0."""
    if backend == "triton":
        pytest.importorskip("triton")
    logits = torch.linspace(-gap - 3, -gap, vocab)
    logits[0] = 0.0
    case = sparse.one_row(logits, tau=0.1)
    want, got = sparse.exact(case), sparse.found(case, backend, device)
    error = (got.hidden - want.dlogits @ want.weight).norm()
    largest = want.slope.abs() * want.miss * want.weight.norm(dim=1).max()
    sparse.assert_below(error, (0.1 + 2 * want.rounding) * largest + 1e-35, "dX")
    assert got.weight.isfinite().all() and got.left_out.isfinite().all()
    assert got.entries[0] == 0 or want.miss > 2.0**-100, "shares of a sum whose terms are no normal numbers"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("target", [-1, 130, 2**40])
def test_a_target_outside_the_vocabulary(target, backend, device):
    """With the checks off, the token's row is dense and NaN, and nothing is read or written out of bounds."""
    if backend == "triton":
        pytest.importorskip("triton")
    case = sparse.case_of(33, (8,), objective="pg")
    assert case.problem.advantages[2] != 0
    targets = case.problem.targets.clone()
    targets[2] = target
    out, grads = sparse.gradients(case.with_tensors(targets=targets), device=device, backend=backend, validate=False)
    _, want = sparse.gradients(case, device=device, backend=backend)
    row = torch.arange(8) == 2
    assert out.loss.isnan() and grads["hidden"][row].isnan().all()
    assert torch.equal(grads["hidden"][~row], want["hidden"][~row])


def test_one_target_in_every_chunk(device):
    """dW sums rows of different chunks, one row from each."""
    case = sparse.case_of(9, (30,), bias=True, workspace_bytes=1)
    case = sparse.visible(case.with_tensors(targets=torch.full((30,), 11)))
    got = sparse.found(case, device=device)
    assert (got.entries > 0).sum() > 5
    sparse.assert_exact_but_for_the_least(case, got, device.type)


def test_a_padded_vocabulary(device):
    """Padding may hold anything, and gets no share of the probability that is left out."""
    case = sparse.case_of(27, (40,), vocab=130, bias=True, vocab_size=123)
    p = case.problem
    padding = torch.arange(130) >= 123
    loud = case.with_tensors(weight=p.weight.masked_fill(padding[:, None], torch.nan),
                              bias=p.bias.masked_fill(padding, torch.nan))  # fmt: skip
    _, grads = sparse.gradients(loud, device=device)
    sparse.assert_same(grads, sparse.gradients(case, device=device)[1])
    assert not grads["weight"][123:].any() and not grads["bias"][123:].any()


# --- calls that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options",
    [
        ("sparse_grad", {"sparse_grad": -0.1}),
        ("sparse_grad", {"sparse_grad": 1.0}),
        ("sparse_grad", {"sparse_grad": float("nan")}),
        ("entropy_coef", {"sparse_grad": 0.1, "entropy_coef": 0.1}),
        ("z_loss_coef", {"sparse_grad": 0.1, "z_loss_coef": 0.1}),
        ("backend", {"sparse_grad": 0.1, "backend": "reference"}),
        ("softcap", {"sparse_grad": 0.1, "softcap": 30.0}),
        ("batch_invariant", {"sparse_grad": 0.1, "batch_invariant": True, "backend": None}),
        ("objective", {"sparse_grad": 0.1, "objective": dk.GSPO()}),
    ],
)
def test_what_cannot_be_asked_for(name, options, device):
    p = sparse.case_of(0, (4, 6)).problem
    arguments = [x.to(device) for x in (p.hidden, p.weight, p.targets, p.old_logprobs, p.advantages)]
    with pytest.raises(ValueError, match=name):
        linear_policy_loss(*arguments, **options)


def test_a_split_vocabulary_cannot_either():
    shard = VocabShard(None, (65, 65))  # one of two shards; no call gets as far as needing its process group
    with pytest.raises(ValueError, match="sparse_grad must be 0 with vocab_shard"):
        validation._check_sparse_grad(PolicyOptions(sparse_grad=0.1, vocab_shard=shard))
    case = sparse.case_of(0)
    whole = sparse.gradients(case, vocab_shard=VocabShard(None, (130,)))[1]  # a head with a single rank is not split
    sparse.assert_same(whole, sparse.gradients(case)[1])


@pytest.mark.parametrize("value", ["0.1", None, torch.tensor(0.1), [0.1]])
def test_what_is_no_number(value):
    p = sparse.case_of(0, (4, 6)).problem
    with pytest.raises(TypeError, match="sparse_grad"):
        linear_policy_loss(p.hidden, p.weight, p.targets, p.old_logprobs, p.advantages, sparse_grad=value)
