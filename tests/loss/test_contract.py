"""Tests of what the calls promise beyond the numbers: masked rows, autograd, precision modes, determinism, memory."""

import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import nn

import drpo_kernels
import problems
from problems import BACKENDS, SMALL_WORKSPACE, SPECS, assert_agrees, full_problem, grid, random_problem, relative

FP32 = {"grad_bound": 5e-5, "loss_bound": 1e-4}
DRPO = SPECS["drpo-active"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
chunked_backend = pytest.mark.parametrize("backend", ["torch", "triton"])
SHAPE = (4, 4)
every_form = pytest.mark.parametrize("form", ["linear", "logits"])


def in_form(problem, form):
    return problem if form == "linear" else problem.as_logits()


def poisoned(problem):
    """Return the same problem with NaN, infinities or -100 in the masked entries of every per-token tensor."""
    g = torch.Generator().manual_seed(1)

    def spoil(value):
        if not isinstance(value, torch.Tensor) or value.shape[: problem.mask.dim()] != problem.mask.shape:
            return value
        mask = problem.mask.reshape(problem.mask.shape + (1,) * (value.dim() - problem.mask.dim()))
        poison = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(3, value.shape, generator=g)]
        return value.where(mask, poison.to(value.dtype) if value.is_floating_point() else torch.tensor(-100))

    names = ("hidden", "logits", "targets", "old_logprobs", "advantages")
    changed = {name: spoil(getattr(problem, name)) for name in names}
    return problems.replace(problem, **changed, options={k: spoil(v) for k, v in problem.options.items()})


def same_bits(a, b):
    return torch.equal(a.detach().cpu(), b.detach().cpu())


def assert_same(first, second):
    (out, grads), (out2, grads2) = first, second
    for name in ("loss", "logprobs", "entropy", "computed"):
        assert same_bits(getattr(out, name), getattr(out2, name)), name
    for name in grads:
        assert same_bits(grads[name], grads2[name]), f"gradient of {name}"


# ---------------------------------------------------------------------------------------------------------------
# rows that do not count


@pytest.mark.parametrize("name, compact, form, backend", grid(["drpo-active", "gspo"], ["active", "mask", "none"]))
def test_masked_rows_may_carry_anything(name, compact, form, backend, device):
    problem = in_form(full_problem(1, SHAPE), form)
    objective = problems.build(SPECS[name])
    first = problems.run(problem, objective, backend, device, 3.7, compact=compact)
    second = problems.run(poisoned(problem), objective, backend, device, 3.7, compact=compact)
    assert_same(first, second)
    metrics = zip(first[0].metrics.items(), second[0].metrics.values(), strict=True)
    assert all(same_bits(value, other) for (_, value), other in metrics)


@pytest.mark.parametrize("unscored", [math.nan, -math.inf])
@pytest.mark.parametrize("compact, form, backend", grid(["active", "mask", "none"]))
def test_unscored_rows_count_as_masked(compact, form, backend, unscored, device):
    """The rollout engine gives NaN, or the -inf that no sampled token has, for valid rows that it could not score. The
    oracle leaves them out of every count.
    """
    problem = in_form(full_problem(2, SHAPE), form)
    old = problem.old_logprobs.clone()
    old.view(-1)[problem.mask.view(-1).nonzero().view(-1)[::4]] = unscored
    problem = problems.replace(problem, old_logprobs=old)
    for reduction in ("token-mean", "seq-mean-token-mean"):
        changed = problem.with_options(reduction=reduction)
        out, _ = assert_agrees(changed, DRPO, backend, device, **FP32, compact=compact)
        assert all(math.isfinite(v.item()) for v in out.metrics.values()), out.metrics


@pytest.mark.parametrize(
    "name, reduction, compact, form, backend",
    grid(["drpo-active", "gspo"], problems.REDUCTIONS, ["active", "mask", "none"]),
)
def test_no_valid_token(name, reduction, compact, form, backend, device):
    problem = in_form(full_problem(3, SHAPE), form)
    problem = problems.replace(problem, mask=torch.zeros_like(problem.mask))
    problem = poisoned(problem).with_options(reduction=reduction)
    problem = problem.with_options(horizon=8) if reduction.endswith("norm") else problem
    out, grads = problems.run(problem, problems.build(SPECS[name]), backend, device, compact=compact)
    assert out.loss.item() == 0.0
    assert all((g == 0).all() for g in grads.values())
    assert not out.computed.any()


@every_backend
@every_form
@pytest.mark.parametrize("name", ["drpo-active", "dppo-tv", "gspo"])
def test_compaction_changes_nothing(name, form, backend, device):
    """`compact` only says which rows are computed. Each choice may add in another order, hence 1e-6."""
    problem = in_form(random_problem(4, SHAPE), form)
    runs = {
        c: problems.run(problem, problems.build(SPECS[name]), backend, device, compact=c)
        for c in ("active", "mask", "none")
    }
    for compact, (out, grads) in runs.items():
        want, want_grads = runs["mask"]
        assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
        assert all(relative(grads[n], want_grads[n]) <= 1e-6 for n in grads), compact
        if compact != "active":
            assert out.computed.cpu()[problem.mask].all()
    assert same_bits(runs["mask"][0].computed, problem.mask)


@every_backend
@every_form
def test_twice_the_same_bits(form, backend, device):
    problem = in_form(full_problem(5, SHAPE), form)
    runs = [
        problems.run(problem, problems.build(DRPO), backend, device, 3.7, workspace_bytes=SMALL_WORKSPACE)
        for _ in range(2)
    ]
    assert_same(*runs)


# ---------------------------------------------------------------------------------------------------------------
# autograd


@every_backend
@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("weight", "bias"), ("hidden", "weight")], ids=str)
@pytest.mark.parametrize("name", ["drpo-active", "gspo"])
def test_frozen_inputs(name, frozen, backend, device):
    problem = full_problem(6, SHAPE)
    _, want = problems.solve(problem, SPECS[name], 3.7)
    leaves = {n: x.to(device).requires_grad_(n not in frozen) for n, x in problem.leaves().items()}
    (problems.call(problem, problems.build(SPECS[name]), backend, device, leaves).loss * 3.7).backward()
    for n, leaf in leaves.items():
        if n in frozen:
            assert leaf.grad is None
        else:
            assert relative(leaf.grad, want[n]) <= 5e-5, n


@every_backend
@every_form
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["drpo-active", "gspo"])
def test_no_grad(name, mode, form, backend, device):
    problem = in_form(full_problem(7, SHAPE), form)
    want, _ = problems.solve(problem, SPECS[name])
    leaves = {n: x.to(device).requires_grad_() for n, x in problem.leaves().items()}
    with mode():
        out = problems.call(problem, problems.build(SPECS[name]), backend, device, leaves)
    assert not out.loss.requires_grad
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-4)
    assert (out.logprobs.cpu().double() - want.logprobs)[out.computed.cpu()].abs().max().item() <= 1e-4


@every_backend
def test_nothing_requires_grad(backend, device):
    out = problems.call(full_problem(7, SHAPE), problems.build(DRPO), backend, device)
    assert not out.loss.requires_grad


@chunked_backend
@every_form
def test_second_backward_is_an_error(form, backend, device):
    """The first backward hands out the stored gradient, so a second one must not hand out what is left of it."""
    problem = in_form(full_problem(8, SHAPE), form)
    leaves = {n: x.to(device).requires_grad_() for n, x in problem.leaves().items()}
    out = problems.call(problem, problems.build(DRPO), backend, device, leaves)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        out.loss.backward()


@chunked_backend
@every_form
def test_second_derivative_is_an_error(form, backend, device):
    problem = in_form(full_problem(9, SHAPE), form)
    leaves = {n: x.to(device).requires_grad_() for n, x in problem.leaves().items()}
    out = problems.call(problem, problems.build(DRPO), backend, device, leaves)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(out.loss, list(leaves.values()), create_graph=True)


@every_backend
def test_tied_weight(backend, device):
    """The head's weight is also the embedding from which the hidden states were made."""
    problem = random_problem(10, (3, 5), 8, 31)
    tokens = torch.randint(31, (3, 5), generator=problems.generator(0))
    weight = problem.weight.double().requires_grad_()
    want = problems.oracle.policy_loss(
        (torch.tanh(weight[tokens]), weight),
        problem.targets,
        problem.old_logprobs,
        problem.advantages,
        problem.mask,
        spec=DRPO,
    )
    want.loss.backward()
    leaf = problem.weight.to(device).requires_grad_()
    hidden = torch.tanh(nn.functional.embedding(tokens.to(device), leaf))
    out = problems.call(problem, problems.build(DRPO), backend, device, {"hidden": hidden, "weight": leaf})
    out.loss.backward()
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-4)
    assert relative(leaf.grad, weight.grad) <= 5e-5


@pytest.mark.parametrize("reduction, form, backend", grid(problems.REDUCTIONS))
def test_accumulation_equals_one_batch(reduction, form, backend, device):
    """Two halves, each with the global count as its normalizer, sum to the whole. The order of sums costs 1e-5."""
    problem = in_form(full_problem(11, SHAPE), form).with_options(reduction=reduction)
    problem = problem.with_options(horizon=9) if reduction.endswith("norm") else problem
    tokens, sequences = int(problem.mask.sum()), int(problem.mask.any(-1).sum())
    count = {"token-mean": tokens, "token-sum": None}.get(reduction, sequences)
    objective = problems.build(DRPO)
    whole, want = problems.run(problem, objective, backend, device)
    losses, parts = [], []
    for rows in (slice(0, 2), slice(2, 4)):
        tensors = {n: getattr(problem, n)[rows] for n in ("targets", "old_logprobs", "advantages", "mask")}
        if form == "logits":
            tensors["logits"] = problem.logits[rows]
        else:
            tensors["hidden"] = problem.hidden[rows]
        options = {
            k: v[rows] if isinstance(v, torch.Tensor) and v.dim() == 2 else v for k, v in problem.options.items()
        }
        part = problems.replace(problem, **tensors, options=options)
        out, grads = problems.run(part, objective, backend, device, normalizer=count)
        losses.append(out.loss.item())
        parts.append(grads)
    assert sum(losses) == pytest.approx(whole.loss.item(), rel=1e-5)
    for name in want:
        joined = torch.cat([p[name] for p in parts]) if name in ("hidden", "logits") else sum(p[name] for p in parts)
        assert relative(joined, want[name]) <= 1e-5, name


@every_backend
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_gradient(dtype, inplace, backend, device):
    problem = full_problem(12, dtype=dtype).as_logits()
    source = problem.logits.to(device).requires_grad_()
    logits = source * 1.0
    logits.retain_grad()
    before = logits.detach().clone()
    out = problems.call(problem, problems.build(DRPO), backend, device, {"logits": logits}, inplace=inplace)
    (out.loss * 3.7).backward()
    _, want = problems.solve(problem, DRPO, 3.7)
    assert relative(source.grad, want["logits"]) <= (5e-5 if dtype is torch.float32 else 4e-3)
    if not inplace:
        assert torch.equal(before, logits.detach())


@every_backend
def test_in_place_without_a_gradient_writes_nothing(backend, device):
    problem = full_problem(12, SHAPE).as_logits()
    logits = problem.logits.to(device)
    before = logits.clone()
    problems.call(problem, problems.build(DRPO), backend, device, {"logits": logits}, inplace=True)
    with torch.no_grad():
        leaf = {"logits": logits.requires_grad_()}
        problems.call(problem, problems.build(DRPO), backend, device, leaf, inplace=True)
    assert torch.equal(before, logits.detach())


@every_backend
def test_masked_coefficients_may_carry_anything(backend, device):
    problem = full_problem(16, SHAPE)
    g = problems.generator(1)
    triple = tuple(torch.rand(SHAPE, generator=g) for _ in range(3))
    spoiled = tuple(c.where(problem.mask, torch.tensor(math.nan)) for c in triple)
    runs = [
        problems.run(problem.with_options(reduction=given), problems.build(DRPO), backend, device)
        for given in (triple, spoiled)
    ]
    assert_same(*runs)


# ---------------------------------------------------------------------------------------------------------------
# precision modes


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["drpo-active", "gspo"])
@pytest.mark.parametrize("head", ["policy", "logprobs"])
def test_autocast_with_master_weights(head, name, dtype, backend, device):
    """An fp32 weight with fp32 or bf16 hidden states runs under autocast: operands are rounded to bf16, logits and
    statistics are fp32, and the gradients are those of the masters.
    """
    problem = random_problem(13, SHAPE, hidden_size=16, vocab=67)
    problem = problems.replace(problem, hidden=problem.hidden.to(dtype))
    rounded = problems.replace(problem, hidden=problem.hidden.bfloat16(), weight=problem.weight.bfloat16())
    want, want_grads = problems.solve(rounded, SPECS[name])
    leaves = {n: x.to(device).requires_grad_() for n, x in problem.leaves().items()}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        if head == "policy":
            out = problems.call(problem, problems.build(SPECS[name]), backend, device, leaves)
            logprobs, loss = out.logprobs, out.loss
            assert loss.item() == pytest.approx(want.loss.item(), rel=1e-3)
        else:
            targets = problem.targets.to(device)
            logprobs, _ = drpo_kernels.linear_token_logprobs(
                leaves["hidden"], leaves["weight"], targets, backend=backend
            )
    rows = problem.mask & (want.logprobs != 0)
    rows = rows & out.computed.cpu() if head == "policy" else rows
    bound = problems.logprob_bound(rounded)
    assert (logprobs.detach().cpu().double() - want.logprobs)[rows].abs().max().item() <= bound
    if head == "policy":
        loss.backward()
        for n, leaf in leaves.items():
            assert leaf.grad.dtype == leaf.dtype
            assert relative(leaf.grad, want_grads[n]) <= 4e-3, n


@chunked_backend
@pytest.mark.parametrize("name", ["drpo-active", "gspo"])
def test_reduced_precision_settings_do_not_reach_the_products(name, backend, device):
    """Products of fp32 inputs are fp32 even if the process allows TF32 or bf16 for them, and its setting stays."""
    before = torch.get_float32_matmul_precision()
    problem = random_problem(15, SHAPE, hidden_size=128, vocab=256)
    try:
        torch.set_float32_matmul_precision("medium")
        assert_agrees(problem, SPECS[name], backend, device, **FP32)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@every_backend
@every_form
@pytest.mark.parametrize("name", ["drpo-active", "gspo"])
def test_gradient_scaler(name, form, backend, device):
    """In fp16, with a coefficient of 1e-6 and p near 1/V, gradients of 1e-8 are 0 unless they are scaled before they
    are rounded.
    """
    problem = in_form(random_problem(14, SHAPE, hidden_size=16, vocab=251, dtype=torch.float16), form)
    problem = problem.with_options(normalizer=1_000_000)
    scale = 65536.0
    _, want = problems.solve(problem, SPECS[name], scale)
    _, got = problems.run(problem, problems.build(SPECS[name]), backend, device, scale)
    for n in got:
        assert relative(got[n], want[n]) <= 4e-3, n


# ---------------------------------------------------------------------------------------------------------------
# memory, in a process of its own

MEMORY_PROBE = pathlib.Path(__file__).parents[1] / "support" / "memory_probe.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case, limit_mib", [("policy", 256), ("logprobs", 256), ("gspo", 256), ("frozen-bf16", 96)])
def test_peak_memory(case, limit_mib):
    """policy (T=16,384 H=64 V=20,000), logprobs and gspo (T=4,096) never hold the logits, which would take 1.2 and 0.31
    GiB.
    frozen-bf16 has 64 rows, a frozen head of 128 MiB and a workspace of 16 MiB, so no copy of the weight fits.
    """
    root = MEMORY_PROBE.parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, str(MEMORY_PROBE), case], capture_output=True, text=True, env=env, cwd=root, timeout=300
    )
    assert result.returncode == 0, result.stderr
    extra = float(result.stdout.split()[-1])
    assert extra <= limit_mib, f"{case}: {extra:.0f} MiB extra"
