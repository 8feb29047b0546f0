"""`sparse_grad` in every kind of call: dtypes, layouts, autograd and objectives."""

import pytest
import torch

import drpo_kernels as dk
import problems
import sparse_cases as sparse
from drpo_kernels import linear_policy_loss

# --- dtypes, layouts, and which gradients are wanted ------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"workspace_bytes": sparse.ROW * 5}], ids=str)
@pytest.mark.parametrize("dtype", sparse.STORED, ids=str)
def test_dtypes(dtype, options, device):
    """The inputs are multiples of 1/16, exact in all dtypes. The loss is multiplied by 2^10, so that no float16
    gradient becomes 0.
    """
    case = sparse.in_dtype(sparse.case_of(10, (4, 10), bias=True, tau=0.01, **options), dtype)
    got = sparse.found(case, device=device, upstream=2.0**10)
    assert 0 < (got.entries > 0).sum() < 40
    sparse.assert_within_bounds(case, got, stored=sparse.STORED[dtype])
    for name, grad in sparse.gradients(case, device=device)[1].items():
        assert grad.dtype == dtype, name


@pytest.mark.parametrize("compute", [sparse.BF16, sparse.FP16])
def test_master_weights_under_autocast(compute, device):
    """The gradients are those at the weight and hidden states that autocast rounds, and are float32."""
    case = sparse.case_of(11, (40,), vocab=40, tau=1e-4)  # tau is below the rounding of bfloat16
    g = problems.generator(0)
    fine = {n: x + 1e-3 * torch.randn(x.shape, generator=g) for n, x in case.problem.leaves().items()}
    rounded = case.with_tensors(**{n: x.to(compute).float() for n, x in fine.items()})
    with torch.autocast(device.type, compute):
        got = sparse.found(case.with_tensors(**fine), device=device)
    assert 0 < (got.entries > 0).sum() < 40
    assert got.out.loss.dtype == sparse.FP32
    want = sparse.exact(rounded)
    # Float32 rounds these logits, which are sums of H = 16 products.
    want = sparse.replace(want, rounding=want.rounding + 16 * sparse.ULP * want.hidden.norm(dim=1) * 8)
    on_cpu = device.type == "cpu"  # there dlogits are float32
    sparse.assert_within_bounds(rounded, got, want, stored=0.0 if on_cpu else sparse.STORED[compute])


def transposed(x):
    return x.T.contiguous().T if x.dim() == 2 else x.transpose(0, 1).contiguous().transpose(0, 1)


def every_other(x):
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("dtype", [sparse.FP32, sparse.BF16])
@pytest.mark.parametrize("name", ["hidden", "weight"])
@pytest.mark.parametrize("layout", [transposed, every_other])
def test_strides(layout, name, dtype, device):
    """The product of strided operands may add in another order. The logits are exact, so the same entries are kept."""
    case = sparse.in_dtype(sparse.case_of(12, (4, 10)), dtype)
    strided = layout(getattr(case.problem, name))
    assert not strided.is_contiguous()
    leaves = {k: (strided if k == name else v).to(device).detach() for k, v in case.problem.leaves().items()}
    leaves = {k: v.requires_grad_() for k, v in leaves.items()}
    out = problems.call(case.problem, dk.DRPO(delta=0.15), "torch", device, leaves, sparse_grad=case.tau)
    out.loss.backward()
    want, grads = sparse.gradients(case, device=device)
    assert 0 < want.metrics["drpo/sparse_share"] < 1
    sparse.assert_same(
        {k: v.grad for k, v in leaves.items()}, grads, 1e-6 if dtype == sparse.FP32 else sparse.STORED[dtype]
    )


def test_one_hidden_state_for_all_rows(device):
    """The hidden state is expanded, with a stride of 0."""
    case = sparse.case_of(13, (12,), vocab=70)
    x = case.problem.hidden[:1].to(device).requires_grad_()
    rest = [t.to(device) for t in (case.problem.weight, case.problem.targets, case.problem.old_logprobs,
                                   case.problem.advantages)]  # fmt: skip
    for tau in (0.0, 0.02):
        dk.linear_policy_loss(x.expand(12, -1), *rest, sparse_grad=tau, backend="torch").loss.backward()
    dense = case.with_tensors(hidden=case.problem.hidden[:1].expand(12, -1).contiguous())
    (_, exactly), (_, sparsely) = (
        sparse.gradients(sparse.Case(dense.problem, "drpo-default", dense.tau), device=device, sparse_grad=tau)
        for tau in (0.0, 0.02)
    )
    want = (exactly["hidden"] + sparsely["hidden"]).sum(0, keepdim=True)
    assert problems.relative(x.grad, want) <= 1e-6


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
@pytest.mark.parametrize("compact", sparse.COMPACT)
def test_frozen_inputs_change_nothing_else(compact, wanted, device):
    case = sparse.case_of(14, (30,), bias=True, compact=compact, workspace_bytes=sparse.ROW * 4)
    case = case.with_tensors(mask=torch.arange(30) % 4 > 0)
    out, grads = sparse.gradients(case, wanted, device)
    all_out, everything = sparse.gradients(case, device=device)
    sparse.assert_same(grads, {name: everything[name] for name in wanted})
    assert out.metrics["drpo/sparse_share"] == all_out.metrics["drpo/sparse_share"] > 0


def test_a_tied_head(device):
    """The gradient of the embedding is dW, with dX added at the tokens."""
    case = sparse.case_of(15, (40,))
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
    _, grads = sparse.gradients(case, device=device)
    want = grads["weight"].index_add(0, tokens.to(device), 0.4 * grads["hidden"])
    assert problems.relative(table.grad, want) <= 1e-6


@pytest.mark.parametrize("dtype", [sparse.FP32, sparse.BF16])
@pytest.mark.parametrize("workspace", [None, sparse.ROW * 5])
def test_main_grad(workspace, dtype, device):
    """dW of the loss times loss_scale is added in float32 to what the buffer holds. The other gradients are as without
    it.
    """
    case = sparse.in_dtype(sparse.case_of(16, (30,), bias=True, workspace_bytes=workspace), dtype)
    buffer = torch.ones(130, 16, device=device)
    _, grads = sparse.gradients(case, device=device, upstream=4.0, main_grad=buffer, loss_scale=4.0)
    _, want = sparse.gradients(case, device=device, upstream=4.0)
    rounding = 1e-6 if dtype == sparse.FP32 else sparse.STORED[dtype]
    assert grads.keys() == {"hidden", "bias"}
    sparse.assert_same(grads, {name: want[name] for name in grads}, rounding)
    added = buffer - 1
    assert (added - want["weight"]).norm() <= rounding * want["weight"].norm() + sparse.ULP * 2 * added.numel() ** 0.5


@pytest.mark.parametrize("dtype", [sparse.FP32, sparse.FP16])
def test_upstream_gradients_scale(dtype, device):
    case = sparse.in_dtype(sparse.case_of(17, bias=True), dtype)
    (_, grads), (_, want) = (sparse.gradients(case, device=device, upstream=u) for u in (6.4, 3.2))
    sparse.assert_same(
        grads,
        {name: 2 * grad for name, grad in want.items()},
        1e-6 if dtype == sparse.FP32 else sparse.STORED[sparse.FP16],
    )


def test_accumulation_is_one_batch(device):
    case = sparse.case_of(18, (40,), bias=True)
    parts = [sparse.rows_of(case, rows, normalizer=40.0) for rows in torch.arange(40).split(13)]
    added = [sparse.gradients(part, device=device)[1] for part in parts]
    _, want = sparse.gradients(case, device=device)
    joined = {"hidden": torch.cat([grads["hidden"] for grads in added])}
    joined |= {name: sum(grads[name] for grads in added) for name in ("weight", "bias")}
    sparse.assert_same(joined, want, 1e-6)


def test_a_second_backward_is_refused_as_without(device):
    said = []
    for tau in (0.0, 0.02):
        case = sparse.case_of(19, tau=tau)
        leaves = {k: v.to(device).requires_grad_() for k, v in case.problem.leaves().items()}
        out = problems.call(case.problem, dk.DRPO(), "torch", device, leaves, sparse_grad=tau)
        out.loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward") as raised:
            out.loss.backward()
        said.append(str(raised.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("options", [{}, {"compact": "none", "workspace_bytes": sparse.ROW * 5}], ids=str)
def test_in_one_graph(options, device):
    case = sparse.case_of(20, (4, 6), **options)
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
    case = sparse.case_of(21)
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
    p = sparse.case_of(22).problem
    x = p.hidden.to(device).requires_grad_()
    rest = [t.to(device) for t in (p.weight, p.targets, p.old_logprobs, p.advantages)]
    out = getattr(dk, name)(x, *rest, sparse_grad=0.02, backend="torch")
    assert out.metrics["drpo/sparse_share"] > 0


@pytest.mark.parametrize("name", ["policy_loss", "drpo_loss", "linear_token_logprobs"])
def test_and_those_that_do_not(name):
    p = sparse.case_of(22).problem
    tensors = {
        "linear_token_logprobs": (p.hidden, p.weight, p.targets),
    }.get(name, (p.hidden @ p.weight.T, p.targets, p.old_logprobs, p.advantages))
    with pytest.raises(TypeError, match="sparse_grad"):
        getattr(dk, name)(*tensors, sparse_grad=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"head_dtype": "fp8_e4m3"},
        {"logits_dtype": sparse.BF16},
        {"logits_dtype": sparse.BF16, "workspace_bytes": 6 * 130 * 7},
    ],
    ids=str,
)
def test_rounded_logits(options, device):
    """The gradients are within the bound of those that the exact path has with the same logits.

    The slopes and 1 - p_y of rounded logits may exceed the oracle's by a half: logits that are off by up to 0.2 change
    them by up to e^0.4.
    """
    case = sparse.case_of(23, (40,), objective="pg")
    want = sparse.exact(case)
    (out, grads), (_, dense) = (
        sparse.gradients(case, device=device, sparse_grad=tau, **options) for tau in (0.02, 0.0)
    )
    assert 0 < out.metrics["drpo/sparse_share"] < 1
    bound = 1.5 * 0.02 * want.slope.abs() * want.miss
    furthest = (want.weight - want.weight.mean(0)).norm(dim=1).max()
    error = {name: (grads[name] - dense[name]).cpu().double() for name in grads}
    sparse.assert_below(error["hidden"].norm(dim=1), bound * furthest + 1e-6 * dense["hidden"].norm(dim=1).cpu(), "dX")
    slack = 1e-6 * dense["weight"].norm().cpu()
    sparse.assert_below(error["weight"].norm(), (bound * want.hidden.norm(dim=1)).sum() + slack, "dW")


# --- objectives, and options of the loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [{}, {"kl_coef": 0.2, "kl_estimator": "k3", "kl_importance": True}], ids=["", "kl"])
@pytest.mark.parametrize("objective", sparse.OBJECTIVES)
def test_objectives(objective, kl, device):
    g, shape = problems.generator(5), (4, 10)
    case = sparse.case_of(
        24, shape, vocab=200, objective=objective, bias=True, token_weights=0.5 + torch.rand(shape, generator=g),
        temperature=0.7 + torch.rand(shape, generator=g), reduction="seq-mean-token-mean",
        workspace_bytes=4 * 200 * 9, **kl,
    )  # fmt: skip
    case = sparse.visible(case.with_tensors(mask=torch.rand(shape, generator=g) < 0.85))
    got = sparse.found(case, device=device, upstream=3.7)
    sparse.assert_within_bounds(case, got)
    sparse.assert_exact_but_for_the_least(case, got, device.type)


def test_on_policy(device):
    case = sparse.visible(sparse.case_of(25, (40,)).with_tensors(old_logprobs=None))
    sparse.assert_exact_but_for_the_least(case, sparse.found(case, device=device), device.type)


def test_unscorable_tokens_are_as_masked(device):
    case = sparse.case_of(26, (30,))
    missing = torch.arange(30) % 5 == 2
    old = case.problem.old_logprobs
    masked = case.with_tensors(mask=~missing)
    unscored = case.with_tensors(old_logprobs=old.masked_fill(missing, torch.nan))
    sparse.assert_same(sparse.gradients(unscored, device=device)[1], sparse.gradients(masked, device=device)[1])
