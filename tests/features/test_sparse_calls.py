"""`sparse_grad` in every kind of call: dtypes, layouts, autograd, objectives, edges, and what cannot be asked for."""


import pytest
import torch

import drpo_kernels as dk
import problems
import sparse_cases
from drpo_kernels import linear_policy_loss, validation
from drpo_kernels.distributed import VocabShard
from drpo_kernels.options import PolicyOptions
from sparse_cases import (
    BF16,
    COMPACT,
    FP16,
    FP32,
    OBJECTIVES,
    ROW,
    SHARES,
    STORED,
    ULP,
    assert_below,
    assert_exact_but_for_the_least,
    assert_same,
    assert_within_bounds,
    case_of,
    exact,
    found,
    gradients,
    in_dtype,
    one_row,
    replace_objective,
    rows_of,
    visible,
)

# --- dtypes, layouts and who wants which gradient ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"workspace_bytes": ROW * 5}], ids=str)
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_dtypes(dtype, options, device):
    """Sixteenths are exact in all of them. Float16 gradients are of a loss times 2^10, lest the small ones are 0."""
    case = in_dtype(case_of(10, (4, 10), bias=True, tau=0.01, **options), dtype)
    got = found(case, device=device, upstream=2.0**10)
    assert 0 < (got.entries > 0).sum() < 40
    assert_within_bounds(case, got, stored=STORED[dtype])
    for name, grad in gradients(case, device=device)[1].items():
        assert grad.dtype == dtype, name


@pytest.mark.parametrize("compute", [BF16, FP16])
def test_master_weights_under_autocast(compute, device):
    """The gradients are those at the weight and hidden states that autocast rounds, and are float32."""
    case = case_of(11, (40,), vocab=40, tau=1e-4)  # below what bfloat16 rounds
    g = problems.generator(0)
    fine = {n: x + 1e-3 * torch.randn(x.shape, generator=g) for n, x in case.problem.leaves().items()}
    rounded = case.with_tensors(**{n: x.to(compute).float() for n, x in fine.items()})
    with torch.autocast(device.type, compute):
        got = found(case.with_tensors(**fine), device=device)
    assert 0 < (got.entries > 0).sum() < 40
    assert got.out.loss.dtype == FP32
    want = exact(rounded)
    # logits of these are sums that float32 rounds, H = 16 of them
    want = sparse_cases.replace(want, rounding=want.rounding + 16 * ULP * want.hidden.norm(dim=1) * 8)
    on_cpu = device.type == "cpu"  # where dlogits are float32
    assert_within_bounds(rounded, got, want, stored=0.0 if on_cpu else STORED[compute])


def transposed(x):
    return x.T.contiguous().T if x.dim() == 2 else x.transpose(0, 1).contiguous().transpose(0, 1)


def every_other(x):
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", ["hidden", "weight"])
@pytest.mark.parametrize("layout", [transposed, every_other])
def test_strides(layout, name, dtype, device):
    """A product may add in another order; the logits are exact, so the same entries are kept."""
    case = in_dtype(case_of(12, (4, 10)), dtype)
    strided = layout(getattr(case.problem, name))
    assert not strided.is_contiguous()
    leaves = {k: (strided if k == name else v).to(device).detach() for k, v in case.problem.leaves().items()}
    leaves = {k: v.requires_grad_() for k, v in leaves.items()}
    out = problems.call(case.problem, dk.DRPO(delta=0.15), "torch", device, leaves, sparse_grad=case.tau)
    out.loss.backward()
    want, grads = gradients(case, device=device)
    assert 0 < want.metrics["drpo/sparse_share"] < 1
    assert_same({k: v.grad for k, v in leaves.items()}, grads, 1e-6 if dtype == FP32 else STORED[dtype])


def test_one_hidden_state_for_all_rows(device):
    """Expanded, with a stride of 0."""
    case = case_of(13, (12,), vocab=70)
    x = case.problem.hidden[:1].to(device).requires_grad_()
    rest = [t.to(device) for t in (case.problem.weight, case.problem.targets, case.problem.old_logprobs,
                                   case.problem.advantages)]  # fmt: skip
    for tau in (0.0, 0.02):
        dk.linear_policy_loss(x.expand(12, -1), *rest, sparse_grad=tau, backend="torch").loss.backward()
    dense = case.with_tensors(hidden=case.problem.hidden[:1].expand(12, -1).contiguous())
    (_, exactly), (_, sparsely) = (
        gradients(replace_objective(dense, "drpo-default"), device=device, sparse_grad=tau) for tau in (0.0, 0.02)
    )
    want = (exactly["hidden"] + sparsely["hidden"]).sum(0, keepdim=True)
    assert problems.relative(x.grad, want) <= 1e-6


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
@pytest.mark.parametrize("compact", COMPACT)
def test_frozen_inputs_change_nothing_else(compact, wanted, device):
    case = case_of(14, (30,), bias=True, compact=compact, workspace_bytes=ROW * 4)
    case = case.with_tensors(mask=torch.arange(30) % 4 > 0)
    out, grads = gradients(case, wanted, device)
    all_out, everything = gradients(case, device=device)
    assert_same(grads, {name: everything[name] for name in wanted})
    assert out.metrics["drpo/sparse_share"] == all_out.metrics["drpo/sparse_share"] > 0


def test_a_tied_head(device):
    """The embedding's gradient is dW, and dX added at the tokens."""
    case = case_of(15, (40,))
    tokens = torch.randint(130, (40,), generator=problems.generator(1))
    weight = case.problem.weight
    case = case.with_tensors(hidden=0.4 * weight[tokens])
    table = weight.to(device).requires_grad_()
    p = case.problem
    rest = [t.to(device) for t in (p.targets, p.old_logprobs, p.advantages)]
    out = linear_policy_loss(0.4 * table[tokens.to(device)], table, *rest, objective=dk.DRPO(delta=0.15),
                             sparse_grad=case.tau, backend="torch")  # fmt: skip
    out.loss.backward()
    assert 0 < out.metrics["drpo/sparse_share"] < 1
    _, grads = gradients(case, device=device)
    want = grads["weight"].index_add(0, tokens.to(device), 0.4 * grads["hidden"])
    assert problems.relative(table.grad, want) <= 1e-6


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("workspace", [None, ROW * 5])
def test_main_grad(workspace, dtype, device):
    """dW of the loss times loss_scale, added in float32 to what is there; the other gradients are as without it."""
    case = in_dtype(case_of(16, (30,), bias=True, workspace_bytes=workspace), dtype)
    buffer = torch.ones(130, 16, device=device)
    _, grads = gradients(case, device=device, upstream=4.0, main_grad=buffer, loss_scale=4.0)
    _, want = gradients(case, device=device, upstream=4.0)
    rounding = 1e-6 if dtype == FP32 else STORED[dtype]
    assert grads.keys() == {"hidden", "bias"}
    assert_same(grads, {name: want[name] for name in grads}, rounding)
    added = buffer - 1
    assert (added - want["weight"]).norm() <= rounding * want["weight"].norm() + ULP * 2 * added.numel() ** 0.5


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_upstream_gradients_scale(dtype, device):
    case = in_dtype(case_of(17, bias=True), dtype)
    (_, grads), (_, want) = (gradients(case, device=device, upstream=u) for u in (6.4, 3.2))
    assert_same(grads, {name: 2 * grad for name, grad in want.items()}, 1e-6 if dtype == FP32 else STORED[FP16])


def test_accumulation_is_one_batch(device):
    case = case_of(18, (40,), bias=True)
    parts = [rows_of(case, rows, normalizer=40.0) for rows in torch.arange(40).split(13)]
    added = [gradients(part, device=device)[1] for part in parts]
    _, want = gradients(case, device=device)
    joined = {"hidden": torch.cat([grads["hidden"] for grads in added])}
    joined |= {name: sum(grads[name] for grads in added) for name in ("weight", "bias")}
    assert_same(joined, want, 1e-6)


def test_a_second_backward_is_refused_as_without(device):
    said = []
    for tau in (0.0, 0.02):
        case = case_of(19, tau=tau)
        leaves = {k: v.to(device).requires_grad_() for k, v in case.problem.leaves().items()}
        out = problems.call(case.problem, dk.DRPO(), "torch", device, leaves, sparse_grad=tau)
        out.loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward") as raised:
            out.loss.backward()
        said.append(str(raised.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("options", [{}, {"compact": "none", "workspace_bytes": ROW * 5}], ids=str)
def test_in_one_graph(options, device):
    case = case_of(20, (4, 6), **options)
    leaves = {name: value.to(device).requires_grad_() for name, value in case.problem.leaves().items()}

    def loss(hidden, weight):
        tensors = {"hidden": hidden, "weight": weight}
        out = problems.call(case.problem, dk.DRPO(delta=0.2), "torch", device, tensors, sparse_grad=0.02)
        return out.loss, out.metrics["drpo/sparse_share"]

    seen = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value, share = function(*leaves.values())
        seen.append((value, share, *torch.autograd.grad(value, list(leaves.values()))))
    assert all(map(torch.equal, *seen)) and 0 < seen[0][1] < 1


def test_main_grad_in_one_graph(device):
    case = case_of(21)
    hidden = case.problem.hidden.to(device).requires_grad_()
    weight = case.problem.weight.to(device).requires_grad_()

    def loss(buffer):
        leaves = {"hidden": hidden, "weight": weight}
        options = {"sparse_grad": 0.02, "main_grad": buffer, "loss_scale": 2.0}
        return 2.0 * problems.call(case.problem, dk.DRPO(delta=0.2), "torch", device, leaves, **options).loss

    buffers = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        buffers.append(torch.ones(130, 16, device=device))
        function(buffers[-1]).backward()
    assert torch.equal(*buffers) and weight.grad is None and (buffers[0] != 1).any()


@pytest.mark.parametrize("name", ["linear_policy_loss", "linear_drpo_loss"])
def test_the_functions_that_take_it(name, device):
    p = case_of(22).problem
    x = p.hidden.to(device).requires_grad_()
    rest = [t.to(device) for t in (p.weight, p.targets, p.old_logprobs, p.advantages)]
    out = getattr(dk, name)(x, *rest, sparse_grad=0.02, backend="torch")
    assert out.metrics["drpo/sparse_share"] > 0


@pytest.mark.parametrize("name", ["policy_loss", "drpo_loss", "linear_token_logprobs"])
def test_and_those_that_do_not(name):
    p = case_of(22).problem
    tensors = {
        "linear_token_logprobs": (p.hidden, p.weight, p.targets),
    }.get(name, (p.hidden @ p.weight.T, p.targets, p.old_logprobs, p.advantages))
    with pytest.raises(TypeError, match="sparse_grad"):
        getattr(dk, name)(*tensors, sparse_grad=0.02)


@pytest.mark.parametrize(
    "options",
    [{"head_dtype": "fp8_e4m3"}, {"logits_dtype": BF16}, {"logits_dtype": BF16, "workspace_bytes": 6 * 130 * 7}],
    ids=str,
)
def test_rounded_logits(options, device):
    """Within the bound of the gradients that the exact path has with the same logits.

    Those are not the oracle's, whose slopes and 1 - p_y these may exceed by a half: e^0.4, from logits off by 0.2.
    """
    case = case_of(23, (40,), objective="pg")
    want = exact(case)
    (out, grads), (_, dense) = (gradients(case, device=device, sparse_grad=tau, **options) for tau in (0.02, 0.0))
    assert 0 < out.metrics["drpo/sparse_share"] < 1
    bound = 1.5 * 0.02 * want.slope.abs() * want.miss
    furthest = (want.weight - want.weight.mean(0)).norm(dim=1).max()
    error = {name: (grads[name] - dense[name]).cpu().double() for name in grads}
    assert_below(error["hidden"].norm(dim=1), bound * furthest + 1e-6 * dense["hidden"].norm(dim=1).cpu(), "dX")
    slack = 1e-6 * dense["weight"].norm().cpu()
    assert_below(error["weight"].norm(), (bound * want.hidden.norm(dim=1)).sum() + slack, "dW")


# --- objectives and what stands beside them ---------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [{}, {"kl_coef": 0.2, "kl_estimator": "k3", "kl_importance": True}], ids=["", "kl"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(objective, kl, device):
    g, shape = problems.generator(5), (4, 10)
    case = case_of(
        24, shape, vocab=200, objective=objective, bias=True, token_weights=0.5 + torch.rand(shape, generator=g),
        temperature=0.7 + torch.rand(shape, generator=g), reduction="seq-mean-token-mean",
        workspace_bytes=4 * 200 * 9, **kl,
    )  # fmt: skip
    case = visible(case.with_tensors(mask=torch.rand(shape, generator=g) < 0.85))
    got = found(case, device=device, upstream=3.7)
    assert_within_bounds(case, got)
    assert_exact_but_for_the_least(case, got, device.type)


def test_on_policy(device):
    case = visible(case_of(25, (40,)).with_tensors(old_logprobs=None))
    assert_exact_but_for_the_least(case, found(case, device=device), device.type)


def test_unscorable_tokens_are_as_masked(device):
    case = case_of(26, (30,))
    missing = torch.arange(30) % 5 == 2
    old = case.problem.old_logprobs
    masked = case.with_tensors(mask=~missing)
    unscored = case.with_tensors(old_logprobs=old.masked_fill(missing, torch.nan))
    assert_same(gradients(unscored, device=device)[1], gradients(masked, device=device)[1])


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_no_rows(shape, compact, device):
    case = case_of(0, shape, bias=True, compact=compact)
    out, grads = gradients(case, device=device)
    assert out.loss == 0
    assert grads["hidden"].shape == (*shape, 16) and not grads["weight"].any() and not grads["bias"].any()
    assert [out.metrics[name].item() for name in SHARES] == [0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vocab", [1, 2, 3, 65, 300])
def test_one_row(vocab, seed, device):
    case = case_of(seed, (1,), vocab=vocab, bias=True, objective="pg", tau=0.1)
    assert_within_bounds(case, found(case, device=device))


def test_one_token(device):
    """V = 1: p_y is 1, and nothing is left to learn."""
    case = case_of(0, (5,), vocab=1, bias=True)
    for grad in gradients(case, device=device)[1].values():
        assert not grad.any()


@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("what", ["mask", "advantages"])
def test_nothing_to_do(what, compact, device):
    case = case_of(1, (20,), bias=True, compact=compact)
    nothing = torch.zeros(20, dtype=torch.bool) if what == "mask" else torch.zeros(20)
    out, grads = gradients(case.with_tensors(**{what: nothing}), device=device)
    assert out.loss == 0 and out.loss.requires_grad
    assert not any(grad.any() for grad in grads.values())
    rows = 20 if what == "advantages" and compact == "none" else 0  # which are swept as if they had a gradient
    assert (out.metrics["drpo/sparse_share"] > 0) == (rows > 0)


@pytest.mark.parametrize("workspace", [None, ROW * 4])
@pytest.mark.parametrize("compact", COMPACT)
def test_masked_rows_contribute_nothing(compact, workspace, device):
    """Bitwise, whatever they carry."""
    case = case_of(5, (4, 8), bias=True, compact=compact, workspace_bytes=workspace)
    mask = (torch.arange(32) % 3 > 0).view(4, 8)
    p = case.problem
    bad = case.with_tensors(
        mask=mask, hidden=torch.where(mask[..., None], p.hidden, torch.nan), targets=p.targets.where(mask, -100),
        old_logprobs=p.old_logprobs.where(mask, torch.inf), advantages=p.advantages.where(mask, torch.nan),
    )  # fmt: skip
    out, grads = gradients(bad, device=device)
    want, expected = gradients(case.with_tensors(mask=mask), device=device)
    assert_same(grads, expected)
    assert not grads["hidden"][~mask.to(device)].any()
    assert all(torch.equal(out.metrics[name], want.metrics[name]) for name in SHARES)
    assert 0 < out.metrics["drpo/sparse_share"] < 1


class InfiniteAtCertainty(dk.Objective):
    def token_loss(self, tokens):
        return tokens.advantages * torch.log(-tokens.logprobs)


@pytest.mark.parametrize("compact", COMPACT)
def test_masked_rows_do_not_reach_a_user_objective(compact, device):
    """A skipped row reports logprob 0, where this one's slope is not finite."""
    case = case_of(35, (30,), bias=True, compact=compact)
    mask = torch.arange(30) % 3 > 0
    results = []
    for some in (rows_of(case, mask), case.with_tensors(mask=mask)):
        leaves = {name: x.to(device).requires_grad_() for name, x in some.problem.leaves().items()}
        out = problems.call(some.problem, InfiniteAtCertainty(), "torch", device, leaves, sparse_grad=case.tau)
        out.loss.backward()
        assert 0 < out.metrics["drpo/sparse_share"] < 1
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    results[1]["hidden"] = results[1]["hidden"][mask.to(device)]
    assert_same(results[1], results[0], 1e-6)


@pytest.mark.parametrize("compact", ["active", "none"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_dense_and_alone(value, compact, device):
    """As without `sparse_grad`: its own dX and all of dW are NaN, the other rows' dX are what they were."""
    case = case_of(6, (30,), compact=compact, workspace_bytes=ROW * 7)
    bad = case.problem.hidden.clone()
    bad[4, 3] = value
    row = torch.arange(30) == 4
    assert case.problem.advantages[4] != 0
    broken = case.with_tensors(hidden=bad)
    (out, grads), (_, exactly), (_, well) = (
        gradients(c, device=device, sparse_grad=tau) for c, tau in ((broken, 0.02), (broken, 0.0), (case, 0.02))
    )
    assert torch.equal(grads["hidden"].isnan(), exactly["hidden"].isnan())
    assert torch.equal(grads["weight"].isnan(), exactly["weight"].isnan())
    assert grads["hidden"][row].isnan().all()
    assert torch.equal(grads["hidden"][~row], well["hidden"][~row])
    got = found(broken, device=device)
    assert got.entries[4] == 0 and 0 < out.metrics["drpo/sparse_share"] < 1


def test_banned_tokens(device):
    """-inf by the bias: never an entry of their own, whatever else the row has."""
    case = case_of(7, (40,), vocab=130, bias=True)
    banned = torch.arange(130) % 3 == 1
    p = case.problem
    g = problems.generator(2)
    allowed = (~banned).nonzero()[:, 0]
    targets = allowed[torch.randint(len(allowed), (40,), generator=g)]
    # the row's other tokens are all banned but one, or all: p_y = 1
    case = case.with_tensors(bias=p.bias.masked_fill(banned, -torch.inf), targets=targets)
    got = found(case, device=device)
    assert 0 < (got.entries > 0).sum() < 40
    assert_within_bounds(case, got)
    alone = torch.full((130,), -torch.inf)
    alone[7] = 0.0
    case = case.with_tensors(bias=alone, targets=torch.full((40,), 7))
    for name, grad in gradients(case, device=device)[1].items():
        assert not grad.any(), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("vocab", [3, 17, 40, 41])
@pytest.mark.parametrize("gap", [30.0, 60.0, 85.0, 88.0, 92.0, 95.0, 103.0, 120.0])
def test_rows_of_hardly_any_doubt(gap, vocab, backend, device):
    """1 - p_y near e^-gap, until it is no normal float32, where 1e-35 is as good as 0, or is 0."""
    if backend == "triton":
        pytest.importorskip("triton")
    logits = torch.linspace(-gap - 3, -gap, vocab)
    logits[0] = 0.0
    case = one_row(logits, tau=0.1)
    want, got = exact(case), found(case, backend, device)
    error = (got.hidden - want.dlogits @ want.weight).norm()
    largest = want.slope.abs() * want.miss * want.weight.norm(dim=1).max()
    assert_below(error, (0.1 + 2 * want.rounding) * largest + 1e-35, "dX")
    assert got.weight.isfinite().all() and got.left_out.isfinite().all()
    assert got.entries[0] == 0 or want.miss > 2.0**-100, "shares of a sum whose terms are no normal numbers"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("target", [-1, 130, 2**40])
def test_a_target_outside_the_vocabulary(target, backend, device):
    """Unchecked it is a row of NaN, dense, that reads and writes nowhere else."""
    if backend == "triton":
        pytest.importorskip("triton")
    case = case_of(33, (8,), objective="pg")
    assert case.problem.advantages[2] != 0
    targets = case.problem.targets.clone()
    targets[2] = target
    out, grads = gradients(case.with_tensors(targets=targets), device=device, backend=backend, validate=False)
    _, want = gradients(case, device=device, backend=backend)
    row = torch.arange(8) == 2
    assert out.loss.isnan() and grads["hidden"][row].isnan().all()
    assert torch.equal(grads["hidden"][~row], want["hidden"][~row])


def test_one_target_in_every_chunk(device):
    """Sums of dW over rows of different chunks, a row each."""
    case = case_of(9, (30,), bias=True, workspace_bytes=1)
    case = visible(case.with_tensors(targets=torch.full((30,), 11)))
    got = found(case, device=device)
    assert (got.entries > 0).sum() > 5
    assert_exact_but_for_the_least(case, got, device.type)


def test_a_padded_vocabulary(device):
    """Padding may hold anything and gets no share of what is left out."""
    case = case_of(27, (40,), vocab=130, bias=True, vocab_size=123)
    p = case.problem
    padding = torch.arange(130) >= 123
    loud = case.with_tensors(weight=p.weight.masked_fill(padding[:, None], torch.nan),
                              bias=p.bias.masked_fill(padding, torch.nan))  # fmt: skip
    _, grads = gradients(loud, device=device)
    assert_same(grads, gradients(case, device=device)[1])
    assert not grads["weight"][123:].any() and not grads["bias"][123:].any()


# --- what cannot be asked for -----------------------------------------------------------------------------------------


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
    p = case_of(0, (4, 6)).problem
    arguments = [x.to(device) for x in (p.hidden, p.weight, p.targets, p.old_logprobs, p.advantages)]
    with pytest.raises(ValueError, match=name):
        linear_policy_loss(*arguments, **options)


def test_a_split_vocabulary_cannot_either():
    shard = VocabShard(None, (65, 65))  # of two ranks, whose process group no call gets to need
    with pytest.raises(ValueError, match="sparse_grad must be 0 with vocab_shard"):
        validation._check_sparse_grad(PolicyOptions(sparse_grad=0.1, vocab_shard=shard))
    case = case_of(0)
    whole = gradients(case, vocab_shard=VocabShard(None, (130,)))[1]  # of one rank is not split
    assert_same(whole, gradients(case)[1])


@pytest.mark.parametrize("value", ["0.1", None, torch.tensor(0.1), [0.1]])
def test_what_is_no_number(value):
    p = case_of(0, (4, 6)).problem
    with pytest.raises(TypeError, match="sparse_grad"):
        linear_policy_loss(p.hidden, p.weight, p.targets, p.old_logprobs, p.advantages, sparse_grad=value)
