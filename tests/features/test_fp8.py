"""Tests of the fp8 head against an emulation in float64, with the same logits and a straight-through gradient."""

import math

import pytest
import torch

import drpo_kernels as dk
import problems
from drpo_kernels.backends import fp8_head
from drpo_kernels.backends.quantize import per_row
from problems import SMALL_WORKSPACE, SPECS, full_problem, oracle, random_problem, relative, replace

FP8 = {"fp8_e4m3": (torch.float8_e4m3fn, 448.0), "fp8_e5m2": (torch.float8_e5m2, 57344.0)}
# float32 has the contract's bound; 16-bit dlogits cost 0.18 %.
GRADIENTS = {torch.float32: 5e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}
SHAPE = (3, 4)
chunked = pytest.mark.parametrize("backend", ["torch", "triton"])
every_name = pytest.mark.parametrize("name", FP8)


@pytest.fixture(autouse=True)
def exact_products(request, monkeypatch):
    """Make products exact on a GPU too. Tensor cores truncate the sums of fp8 products, and one test has a bound for
    that.
    """
    if "gpu" not in request.keywords:
        monkeypatch.setattr(fp8_head, "scaled_mm_route", lambda device, form: None)


def emulated(x, name):
    """Return (fp8 values in float64, scales) of the rows of x, by the definition."""
    form, largest = FP8[name]
    x = x.detach().float()
    scale = (x.abs().amax(-1, keepdim=True) / largest).clamp(min=2.0**-126)
    return (x / scale).to(form).double(), scale.double()


def straight_through(hidden, weight, name, cast=None):
    """Return logits [N, V] in float64: the quantised product, with the gradient of the plain one."""
    plain = hidden @ weight.T
    operands = [x if cast is None else x.to(cast) for x in (hidden, weight)]
    (values, scale), (weights, scales) = (emulated(x, name) for x in operands)
    return plain + ((values @ weights.T) * scale * scales.T - plain).detach()


def solve(problem, spec, name, upstream=1.0):
    """Return (output, gradients) of the oracle on emulated logits."""
    leaves = {n: x.detach().double().requires_grad_() for n, x in problem.leaves().items()}
    logits = straight_through(leaves["hidden"].flatten(0, -2), leaves["weight"], name)
    logits = logits if "bias" not in leaves else logits + leaves["bias"]
    options = {k: v for k, v in problem.options.items() if k not in ("compact", "workspace_bytes")}
    out = oracle.policy_loss(
        logits.unflatten(0, problem.targets.shape), problem.targets, problem.old_logprobs, problem.advantages,
        problem.mask, spec=spec, **options,
    )  # fmt: skip
    return out, dict(zip(leaves, torch.autograd.grad(out.loss * upstream, list(leaves.values())), strict=True))


def assert_agrees(problem, spec, name, backend, device, **extra):
    want, want_grads = solve(problem, spec, name, 3.7)
    out, grads = problems.run(problem, problems.build(spec), backend, device, 3.7, head_dtype=name, **extra)
    assert abs(out.loss.item() - want.loss.item()) <= 1e-4 * want.scale.item()
    rows = out.computed.cpu()
    for field in ("logprobs", "entropy"):
        error = (getattr(out, field).cpu().double() - getattr(want, field))[rows].abs().max().item()
        assert error <= problems.logprob_bound(problem), field
    for n, grad in grads.items():
        assert grad.dtype == getattr(problem, n).dtype
        # The gradient of a bias sums rounded dlogits of both signs, so rounding weighs more there. The contract does
        # not bound it.
        bound = GRADIENTS[problem.hidden.dtype] * (2 if n == "bias" else 1)
        assert relative(grad, want_grads[n]) <= bound, n
    return out, grads


# --- the option -------------------------------------------------------------------------------------------------------


@chunked
@pytest.mark.parametrize(
    "spec, dtype, name",
    [
        *(("drpo-active", dtype, "fp8_e4m3") for dtype in GRADIENTS),
        ("drpo-active", torch.bfloat16, "fp8_e5m2"),
        ("gspo", torch.float32, "fp8_e4m3"),
    ],
    ids=str,
)
def test_policy_loss(spec, dtype, name, backend, device):
    """Every term and transform runs in chunks, on the fused route and by recomputation for GSPO."""
    problem = full_problem(1, SHAPE, hidden_size=16, dtype=dtype)
    out, _ = assert_agrees(problem, SPECS[spec], name, backend, device, workspace_bytes=SMALL_WORKSPACE)
    plain = problems.call(problem, problems.build(SPECS[spec]), backend, device)
    assert (out.logprobs - plain.logprobs).abs().max() > 1e-3, "the head is not quantised"


@chunked
@every_name
def test_token_logprobs_recompute_the_same_logits(name, backend, device):
    problem = random_problem(2, SHAPE, hidden_size=16)
    slopes = torch.randn(SHAPE, generator=problems.generator(3)).double()
    exact = [x.double().requires_grad_() for x in (problem.hidden, problem.weight)]
    want = straight_through(exact[0].flatten(0, -2), exact[1], name).log_softmax(-1)
    want = want.gather(-1, problem.targets.view(-1, 1)).view(SHAPE)
    want_grads = torch.autograd.grad((want * slopes).sum(), exact)
    leaves = [x.to(device).requires_grad_() for x in (problem.hidden, problem.weight)]
    logprobs, _ = dk.linear_token_logprobs(
        *leaves, problem.targets.to(device), head_dtype=name, backend=backend, workspace_bytes=SMALL_WORKSPACE
    )
    assert (logprobs.cpu().double() - want).abs().max().item() <= 1e-4
    grads = torch.autograd.grad((logprobs * slopes.to(logprobs)).sum(), leaves)
    assert all(relative(a, b) <= 5e-5 for a, b in zip(grads, want_grads, strict=True))


@chunked
@pytest.mark.parametrize("compact", ["active", "mask", "none"])
def test_masked_rows_and_compaction(compact, backend, device):
    """Each row has its own scale, so that neither masked NaNs nor the rows in its chunk reach it."""
    problem = random_problem(4, SHAPE, hidden_size=16)
    out, grads = assert_agrees(problem, SPECS["drpo-active"], "fp8_e4m3", backend, device, compact=compact)
    spoiled = replace(problem, hidden=problem.hidden.masked_fill(~problem.mask[..., None], math.nan))
    objective = problems.build(SPECS["drpo-active"])
    other, others = problems.run(spoiled, objective, backend, device, 3.7, head_dtype="fp8_e4m3", compact=compact)
    assert torch.equal(out.loss, other.loss)
    assert torch.equal(out.logprobs.nan_to_num(1), other.logprobs.nan_to_num(1)), "NaN where a row was left out"
    assert all(torch.equal(grads[n], others[n]) for n in grads)


@chunked
def test_zero_rows_and_padded_vocabulary(backend, device):
    problem = random_problem(5, SHAPE, hidden_size=16, vocab=40, vocab_size=37)
    hidden, weight = problem.hidden.clone(), problem.weight.clone()
    hidden[0, -1], weight[3], weight[38] = 0, 0, math.nan  # row 38 is padding
    problem = replace(problem, hidden=hidden, weight=weight, mask=torch.ones(SHAPE, dtype=torch.bool))
    clean = replace(problem, weight=weight.nan_to_num(), options=problem.options)
    want, _ = solve(clean, SPECS["ppo"], "fp8_e4m3")
    out = problems.call(problem, dk.PPO(), backend, device, head_dtype="fp8_e4m3", compact="mask")
    assert (out.logprobs.cpu().double() - want.logprobs).abs().max().item() <= 1e-4
    assert out.logprobs[0, -1].item() == pytest.approx(-math.log(37), abs=1e-6)


@every_name
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_is_not_hidden(name, poison, device):
    """A NaN or an infinity in a row of hidden makes that row NaN, and one in the weight makes every row NaN."""
    problem = random_problem(6, SHAPE, hidden_size=16)
    hidden, weight = problem.hidden.clone(), problem.weight.clone()
    hidden[1, 2, 3] = poison
    logprobs, _ = dk.linear_token_logprobs(hidden, weight, problem.targets, head_dtype=name)
    assert logprobs.isnan().nonzero().tolist() == [[1, 2]]
    weight[7, 3] = poison
    assert dk.linear_token_logprobs(hidden, weight, problem.targets, head_dtype=name)[0].isnan().all()


@chunked
def test_autocast_quantises_what_it_rounds(backend, device):
    """Under autocast, fp32 master weights are rounded to bf16 as usual, and then to fp8."""
    problem = random_problem(7, SHAPE, hidden_size=16)
    leaves = [x.to(device).requires_grad_() for x in (problem.hidden, problem.weight)]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logprobs, _ = dk.linear_token_logprobs(*leaves, problem.targets.to(device), head_dtype="fp8_e4m3")
    exact = [x.detach().cpu().double() for x in leaves]
    want = straight_through(exact[0].flatten(0, -2), exact[1], "fp8_e4m3", torch.bfloat16).log_softmax(-1)
    want = want.gather(-1, problem.targets.view(-1, 1)).view(SHAPE)
    assert (logprobs.cpu().double() - want).abs().max().item() <= 1e-4
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(logprobs.sum(), leaves))


def test_with_bf16_logits(device):
    """The scaled product is rounded once, as in an engine whose scaled GEMM returns bf16."""
    problem = random_problem(8, SHAPE, hidden_size=16, dtype=torch.bfloat16)
    logits = straight_through(problem.hidden.double().flatten(0, -2), problem.weight.double(), "fp8_e4m3")
    want = logits.float().bfloat16().double().log_softmax(-1).gather(-1, problem.targets.view(-1, 1)).view(SHAPE)
    arguments = problem.hidden.to(device), problem.weight.to(device), problem.targets.to(device)
    found, _ = dk.linear_token_logprobs(*arguments, head_dtype="fp8_e4m3", logits_dtype=torch.bfloat16)
    assert (found.cpu().double() - want).abs().max().item() <= 1e-5


@pytest.mark.parametrize("objective", [dk.DRPO(delta=0.2), None], ids=["policy", "logprobs"])
def test_in_one_graph(objective):
    problem = random_problem(9, SHAPE, hidden_size=16)
    rest = problem.old_logprobs, problem.advantages, problem.mask

    def loss(hidden, weight):
        if objective is None:
            return dk.linear_token_logprobs(hidden, weight, problem.targets, head_dtype="fp8_e4m3")[0].sum()
        arguments = (hidden, weight, problem.targets, *rest)
        return dk.linear_policy_loss(*arguments, objective=objective, head_dtype="fp8_e4m3").loss

    results = []
    for function in (loss, torch.compile(loss, backend="eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
        value = function(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "message, change",
    [
        ("head_dtype must be one of 'fp8_e4m3', 'fp8_e5m2', got 'fp8'", {"head_dtype": "fp8"}),
        ("head_dtype must be one of", {"head_dtype": torch.float8_e4m3fn}),
        ("head_dtype must be None for float64 inputs", {"dtype": torch.float64}),
        ("backend must be None, 'triton' or 'torch' with head_dtype", {"backend": "reference"}),
    ],
)
def test_refused(message, change):
    problem = random_problem(10, SHAPE, dtype=change.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=message):
        dk.linear_token_logprobs(problem.hidden, problem.weight, problem.targets, **{"head_dtype": "fp8_e4m3"} | change)
    with pytest.raises(TypeError, match="unexpected keyword argument 'head_dtype'"):
        dk.token_logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), head_dtype="fp8_e4m3")


# --- the emulated product and the hardware's ------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["rowwise", "unit"])
@pytest.mark.parametrize("columns", [48, 37])
def test_scaled_mm_routes_compute_the_same(route, columns, monkeypatch):
    """torch._scaled_mm, which the CPU build has too, gets operands that it accepts. V need not be a multiple of 16."""
    g = problems.generator(11)
    a, b = (per_row(torch.randn(n, 32, generator=g), torch.float8_e4m3fn) for n in (5, columns))
    want = (a.values.double() @ b.values.double().T) * a.scales.double() * b.scales.double().T
    out = torch.empty(5, columns + 3)[:, :columns]
    for choice in (route, None):
        monkeypatch.setattr(fp8_head, "scaled_mm_route", lambda device, form, choice=choice: choice)
        try:
            fp8_head.quantized_product(a, b, out.fill_(math.nan))
        except RuntimeError as error:
            if "only supports per-tensor scaling for CPU" in str(error):
                pytest.skip("on a CPU this PyTorch takes one scale for a whole tensor")
            raise
        assert relative(out, want) <= 1e-6


@pytest.mark.gpu
@every_name
def test_on_a_gpu_as_on_a_cpu(name, device):
    """The two agree up to the accumulation of the tensor cores: on sm_90 a sum of 32 products keeps 13 bits below the
    largest one. An emulation of that moves a log-prob here by 2e-3 to 5e-3 (root mean square), while the quantisation
    moves it by 0.37.
    """
    problem = random_problem(12, (8, 16), hidden_size=256, vocab=1000, dtype=torch.bfloat16)
    runs = [
        dk.linear_token_logprobs(*(x.to(d) for x in (problem.hidden, problem.weight, problem.targets)), head_dtype=name)
        for d in (device, "cpu")
    ]
    assert (runs[0][0].cpu() - runs[1][0]).square().mean().sqrt().item() <= 1e-2


# --- quantisation ----------------------------------------------------------------------------------------------------


@every_name
def test_scales_and_rounding(name):
    form, largest = FP8[name]
    x = torch.tensor([[0.0, 1.0, -2.0, 1.0625], [0.0, 0.0, 0.0, 0.0], [1e-38, -1e-40, 0.0, 0.0]])
    found = per_row(x, form)
    assert found.scales[0].item() == pytest.approx(2 / largest)
    assert found.values[0, 2].item() == -largest and found.values[2, 0].float() > 0
    assert (found.values[1].float() == 0).all() and found.values.float().isfinite().all()
    step = {"fp8_e4m3": 2**-4, "fp8_e5m2": 2**-3}[name]  # half the relative gap to the next value
    g = problems.generator(13)
    y = torch.randn(16, 64, generator=g).bfloat16()
    rounded = per_row(y, form)
    error = (rounded.values.float() * rounded.scales - y.float()).abs()
    assert (error <= step * y.float().abs() + 1e-3).all() and error.max() > 0
    ties = torch.tensor([[largest, 17.0, 19.0, 18.0]])  # the row's scale is 1
    assert per_row(ties, form).values[0, 1:].tolist() == ([16, 20, 18] if name == "fp8_e4m3" else [16, 20, 16])


def test_a_shard_quantises_its_rows_as_the_whole_head_does():
    weight = torch.randn(10, 16, generator=problems.generator(15))
    whole, part = (per_row(w, torch.float8_e4m3fn) for w in (weight, weight[4:]))
    assert torch.equal(whole.values[4:].float(), part.values.float()) and torch.equal(whole.scales[4:], part.scales)
