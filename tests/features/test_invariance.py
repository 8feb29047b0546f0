"""Tests of determinism and of `batch_invariant`: a row's outputs and dX have the same bits whatever is computed beside
it.
"""

from dataclasses import dataclass

import pytest
import torch

import drpo_kernels as dk
import problems
from drpo_kernels import autograd, backends
from drpo_kernels.backends import planning
from drpo_kernels.backends.devices import PRESETS, DeviceProperties
from drpo_kernels.backends.rows import Transform
from drpo_kernels.backends.spec import Execution, Spec
from problems import SPECS, full_problem, relative

pytest.importorskip("triton")
from drpo_kernels.backends.triton import invariant
from drpo_kernels.backends.triton.tiles import MatmulTile, matmul_tile
from drpo_kernels.triton_support import INTERPRETING

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, HIDDEN, VOCAB = 7, 9, 21
# There are several tiles in every dimension, and the last one is not full. Compiled, tl.dot needs at least 16.
SMALL = MatmulTile(4, 16, 8, 4, 2, group=1) if INTERPRETING else MatmulTile(64, 64, 16, 4, 2)
SMALL_GRADIENT = MatmulTile(16, 8, 2, 4, 2) if INTERPRETING else SMALL  # for dW, in chunks of two rows
# 16-bit inputs have the contract's bound, but the interpreter truncates to bf16 where a GPU rounds: twice the error.
GRADIENTS = {torch.float32: 5e-5, torch.bfloat16: 8e-3 if INTERPRETING else 4e-3, torch.float16: 4e-3}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(invariant, "matmul_tile", lambda *_, accumulates: SMALL_GRADIENT if accumulates else SMALL)


def chosen(problem, rows):
    """Return the problem of the given rows alone, in the given order."""
    count = problem.targets.numel()

    def pick(value):
        per_row = isinstance(value, torch.Tensor) and value.dim() and len(value) == count
        return value[rows] if per_row else value

    names = ("hidden", "targets", "old_logprobs", "advantages", "mask")
    changed = {name: pick(getattr(problem, name)) for name in names}
    return problems.replace(problem, **changed, options={k: pick(v) for k, v in problem.options.items()})


def row_problem(dtype, rows=ROWS, hidden=HIDDEN, vocab=VOCAB, seed=1):
    """Return a problem with every term, every transform and every kind of row. A row's coefficient does not depend on
    other rows.
    """
    problem = full_problem(seed, (rows,), hidden, vocab, dtype, reduction="token-sum")
    mask = torch.ones(rows, dtype=torch.bool)
    mask[1::4] = False
    return problems.replace(problem, mask=mask)


@dataclass(frozen=True)
class Untwinned(dk.Objective):
    """This objective has no Triton twin, and so it runs in PyTorch."""

    def token_loss(self, tokens):
        return -tokens.advantages * tokens.ratio


def reported(problem, route, device, monkeypatch, **options):
    """Return (what each row reports [K, N], dX, gradients of weight and bias) of one call."""
    options = {"backend": "triton", "batch_invariant": True, **options}
    if route == "recompute":
        leaves = {n: x.detach().clone().to(device).requires_grad_() for n, x in problem.leaves().items()}
        keywords = {k: problem.options[k] for k in ("temperature", "softcap", "logit_scale")} | options
        keywords["temperature"] = keywords["temperature"].to(device)
        keywords.pop("compact", None)
        keywords["mask"] = None if options.get("compact") == "none" else problem.mask.to(device)
        targets = problem.targets.to(device)
        logprobs, entropy, logsumexp = dk.linear_token_logprobs(
            leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], return_logsumexp=True, **keywords
        )
        # Slopes are 0 where masked, so that an unmasked call has the same gradients.
        slopes = torch.where(problem.mask, problem.advantages, 0).to(device)
        ((logprobs + 0.3 * entropy + 0.1 * logsumexp) * slopes).sum().backward()
        kept = torch.stack([logprobs, entropy, logsumexp]).detach() * problem.mask.to(device)
        return kept, leaves["hidden"].grad, leaves["weight"].grad, leaves["bias"].grad
    outcomes, total = [], autograd._total
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "_total", lambda outcome: outcomes.append(outcome) or total(outcome))
        objective = dk.DRPO(delta=0.2) if route == "fused" else Untwinned()
        _, grads = problems.run(problem, objective, device=device, **options)
    return outcomes[0], grads["hidden"], grads["weight"], grads["bias"]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rescored_log_probs_have_the_same_bits(dtype, device, monkeypatch):
    """`linear_token_logprobs` and the loss, whose kernel knows more, give the same bits: then π/μ is exactly 1."""
    problem = row_problem(dtype, rows=40, vocab=300)
    problem = problems.replace(problem, options={k: v for k, v in problem.options.items() if k != "entropy_coef"})
    fused, recomputed = (
        reported(problem, route, device, monkeypatch, compact="mask")[0] for route in ("fused", "recompute")
    )
    assert torch.equal(fused[: len(recomputed)] * problem.mask.reshape(-1).to(device), recomputed.flatten(1))


# --- the kernel -------------------------------------------------------------------------------------------------------


def assert_products(matmul, hidden, weight, device):
    """Compare all four products with float64. The bound, |error| <= depth · 2^-23 · Σ |a||b|, holds for any order of
    additions.
    """
    rows, vocab, compute = len(hidden), len(weight), matmul.compute_dtype
    g = problems.generator(3)
    hidden, weight = hidden.to(compute), weight.to(compute)  # the kernel rounds its operands like this
    buffer = torch.randn(rows, -(-vocab // 16) * 16 + 16, generator=g).to(device, matmul.operand_dtype)
    dlogits = buffer[:, :vocab]
    empty = torch.full_like(buffer, torch.nan, dtype=torch.float32)
    gradient = torch.full((vocab, hidden.shape[1]), torch.nan, device=device)
    bias = torch.full((vocab,), torch.nan, device=device)
    logits, dx = matmul.logits(hidden, empty[:, :vocab]), torch.full(hidden.shape, torch.nan, device=device)
    matmul.hidden_gradient(dlogits, dx)
    matmul.add_weight_gradient(dlogits, hidden, gradient, first=True, unscale=None)
    matmul.add_bias_gradient(dlogits, bias, first=True, unscale=None)
    products = [(logits, hidden, weight.T), (dx, dlogits, weight), (gradient, dlogits.T, hidden)]
    products.append((bias[None], torch.ones(1, rows, device=device), dlogits))
    for got, a, b in products:
        bound = a.shape[1] * 2.0**-23 * (a.double().abs() @ b.double().abs())
        assert ((got.double() - a.double() @ b.double()).abs() <= bound).all()
    assert empty[:, -16:].isnan().all(), "written beyond the padding of a row"


@every_dtype
@pytest.mark.parametrize("rows, layout", [(1, "contiguous"), (ROWS, "strided")])
def test_products(rows, layout, dtype, device, small_tiles):
    g = problems.generator(2)
    hidden, weight = torch.randn(rows, HIDDEN, generator=g), torch.randn(VOCAB, HIDDEN, generator=g)
    hidden, weight = (x.to(device, dtype) for x in (hidden, weight))
    if layout == "strided":
        hidden, weight = hidden.T.contiguous().T, torch.cat([weight, weight], 1)[:, 1 : HIDDEN + 1]
    assert_products(invariant.InvariantMatmul(weight, dtype), hidden, weight, device)


@every_dtype
def test_products_in_the_chosen_tiles(dtype, device):
    g = problems.generator(2)
    hidden, weight = torch.randn(ROWS, 70, generator=g), torch.randn(139, 70, generator=g)
    hidden, weight = hidden.to(device, dtype), weight.to(device)  # a master weight is rounded on its way to the product
    assert_products(invariant.InvariantMatmul(weight, dtype), hidden, weight, device)


def test_narrow_logits_are_rounded_once(device, small_tiles):
    g = problems.generator(2)
    hidden, weight = (torch.randn(n, HIDDEN, generator=g).to(device) for n in (ROWS, VOCAB))
    matmul = invariant.InvariantMatmul(weight, torch.float32)
    wide, narrow = (torch.empty(ROWS, 48, dtype=d, device=device)[:, :VOCAB] for d in (torch.float32, torch.bfloat16))
    matmul.logits(hidden, wide), matmul.logits(hidden, narrow)
    assert ((narrow.double() - wide.double()).abs() <= 2.0**-7 * wide.double().abs()).all()


@pytest.mark.parametrize("device", [*PRESETS.values(), DeviceProperties("sm_89", "cuda", shared_memory_bytes=101_376)])
@pytest.mark.parametrize("itemsize, stored", [(2, 2), (2, 4), (4, 4)])
@pytest.mark.parametrize("accumulates", [False, True])
def test_tiles_fit(accumulates, itemsize, stored, device):
    tile = matmul_tile(itemsize, stored, device, accumulates)
    used = tile.num_stages * tile.depth * (tile.rows * itemsize + tile.columns * stored)
    assert used <= device.shared_memory_bytes
    assert planning.ROW_MULTIPLE % tile.depth == 0


# --- the option -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, name", [*((d, "drpo-active") for d in DTYPES), (torch.float32, "gspo")], ids=str)
def test_agrees_with_the_oracle(dtype, name, device):
    problem = full_problem(2, (2, 3), hidden_size=19, dtype=dtype, vocab_size=33)
    options = {"batch_invariant": True, "grad_bound": GRADIENTS[dtype]}
    problems.assert_agrees(problem, SPECS[name], "triton", device, **options)


@pytest.mark.parametrize(
    "route, dtype", [*((r, d) for r in ("fused", "recompute") for d in DTYPES), ("untwinned", torch.float32)], ids=str
)
def test_rows_do_not_depend_on_the_batch(route, dtype, device, monkeypatch, small_tiles):
    problem = row_problem(dtype)
    rows, dx, *_ = reported(problem, route, device, monkeypatch)
    assert dx[problem.mask.to(device)].abs().amax(1).gt(0).any()
    g = problems.generator(5)
    for count, options in ((1, {}), (5, {"compact": "none"}), (ROWS, {"compact": "mask", "workspace_bytes": 1})):
        pick = torch.randperm(ROWS, generator=g)[:count]
        found, found_dx, *_ = reported(chosen(problem, pick), route, device, monkeypatch, **options)
        assert torch.equal(found, rows[:, pick.to(device)]) and torch.equal(found_dx, dx[pick.to(device)]), options


@pytest.mark.parametrize("dtype, retain", [*((d, False) for d in DTYPES), (torch.bfloat16, True)], ids=str)
def test_weight_gradient_does_not_depend_on_the_chunks(retain, dtype, device, monkeypatch, small_tiles):
    """The weight's gradient also does not depend on whether bf16 dlogits are kept for one product, or on rows without a
    gradient.
    """
    problem = row_problem(dtype).with_options(kl_coef=0.0, entropy_coef=0.0)
    scored = problem.advantages != 0
    assert not scored[problem.mask].all()
    whole = reported(problem, "fused", device, monkeypatch, compact="mask")
    monkeypatch.setattr(planning, "retain_dlogits", lambda *_: retain)
    found = reported(problem, "fused", device, monkeypatch, compact="active", workspace_bytes=1)
    assert torch.equal(found[0][:, scored], whole[0][:, scored]) and same(found[1:], whole[1:])


@pytest.mark.parametrize("compact", ["active", "none"])
def test_masked_rows_may_carry_anything(compact, device, monkeypatch, small_tiles):
    problem = row_problem(torch.bfloat16)
    spoiled = problems.replace(problem, hidden=problem.hidden.masked_fill(~problem.mask[:, None], torch.nan))
    first, second = (reported(p, "fused", device, monkeypatch, compact=compact) for p in (problem, spoiled))
    assert same(first, second)


def test_autocast_with_master_weights(device):
    problem = problems.random_problem(3, (6,), hidden_size=17)
    rounded = problems.replace(problem, hidden=problem.hidden.bfloat16(), weight=problem.weight.bfloat16())
    options = {"batch_invariant": True}
    want, _ = problems.run(rounded, dk.PPO(), "triton", device, **options)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, grads = problems.run(problem, dk.PPO(), "triton", device, **options)
    bound = problems.logprob_bound(rounded)  # another tile adds in another order
    assert (out.logprobs - want.logprobs).abs().max().item() <= bound
    _, exact = problems.solve(rounded, ("PPO", {"clip_low": 0.2, "clip_high": 0.2}))
    for name, grad in grads.items():
        assert grad.dtype == torch.float32 and relative(grad, exact[name]) <= GRADIENTS[torch.bfloat16], name


def test_travels_through_a_graph():
    execution = Execution("triton", torch.bfloat16, batch_invariant=True)
    assert Spec.decode(*Spec(7, Transform(), execution).encode()).execution == execution


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"batch_invariant": 1}, TypeError, "batch_invariant must be True or False, got 1"),
        ({"backend": "torch"}, ValueError, "backend must be None or 'triton' with batch_invariant, got 'torch'"),
        ({"backend": "reference"}, ValueError, "backend must be .* got 'reference'"),
        ({"head_dtype": "fp8_e4m3"}, ValueError, "head_dtype must be None with batch_invariant, got 'fp8_e4m3'"),
        ({"dtype": torch.float64}, ValueError, "batch_invariant must be False for float64 inputs"),
    ],
)
def test_refusals(change, error, message, device):
    dtype = change.pop("dtype", torch.float32)
    hidden, weight = (torch.zeros(n, 4, dtype=dtype, device=device) for n in (2, 5))
    targets = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(error, match=message):
        dk.linear_token_logprobs(hidden, weight, targets, **{"batch_invariant": True} | change)


def test_without_triton_it_is_an_error(monkeypatch):
    """Without Triton `batch_invariant` is an error, because there is no silent fallback."""
    monkeypatch.setattr(backends, "INTERPRETING", False)
    hidden, weight, targets = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"batch_invariant=True .* on the CPU and TRITON_INTERPRET=1 was not set"):
        dk.linear_token_logprobs(hidden, weight, targets, batch_invariant=True)
    with pytest.raises(TypeError, match="'batch_invariant': the logits exist already"):
        dk.token_logprobs(hidden, targets, batch_invariant=True)


# --- determinism without the option -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["drpo-active", "gspo"])
def test_two_runs_are_bitwise_equal(name, backend, device):
    """This holds under deterministic algorithms too, which fill what `torch.empty` returns with NaN."""
    problem = problems.packed(full_problem(4, (2, 3), dtype=torch.bfloat16)).with_options(
        reduction="seq-mean-token-mean", workspace_bytes=problems.SMALL_WORKSPACE
    )
    first, grads = problems.run(problem, problems.build(SPECS[name]), backend, device)
    torch.use_deterministic_algorithms(True)
    try:
        second, again = problems.run(problem, problems.build(SPECS[name]), backend, device)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first.loss, second.loss) and torch.equal(first.logprobs, second.logprobs)
    assert all(torch.equal(grads[n], again[n]) for n in grads)
    assert all(torch.equal(value, second.metrics[key]) for key, value in first.metrics.items())


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("route", ["fused", "recompute"])
@pytest.mark.parametrize("hidden, vocab", [(1024, 32_003), (896, 151_936)])
def test_real_shapes(hidden, vocab, route, dtype, device, monkeypatch):
    """With the chosen tiles, compiled, a row has the same bits alone, permuted, compacted and chunked, and dW the same
    bits in any chunks.
    """
    rows = 517
    with device:
        problem = row_problem(dtype, rows, hidden, vocab)
    whole, dx, dw, db = reported(problem, route, device, monkeypatch)
    chunked = reported(problem, route, device, monkeypatch, workspace_bytes=128 * 4 * vocab)
    assert same(chunked, (whole, dx, dw, db))
    g = problems.generator(5)
    for count, options in ((1, {}), (16, {}), (130, {"compact": "none"}), (rows, {"compact": "mask"})):
        pick = torch.randperm(rows, generator=g)[:count]
        found, found_dx, *_ = reported(chosen(problem, pick), route, device, monkeypatch, **options)
        pick = pick.to(device)
        assert torch.equal(found, whole[:, pick]) and torch.equal(found_dx, dx[pick]), (count, options)


@pytest.mark.gpu
@every_dtype
def test_real_products(dtype, device):
    g = problems.generator(2)
    hidden, weight = (torch.randn(n, 1000, generator=g).to(device, dtype) for n in (333, 5003))
    assert_products(invariant.InvariantMatmul(weight, dtype), hidden, weight, device)
