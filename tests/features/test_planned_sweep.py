"""Tests of what `LinearSweep` does with a plan: windows of several chunks, the route of a
GPU, and the memory it takes.
"""

import sys

import pytest
import torch

import drpo_kernels as dk
import problems
from drpo_kernels.backends import matmul, planning
from drpo_kernels.backends.planning import NeedsGrad, plan
from drpo_kernels.backends.rows import Field, RowKind, Transform
from drpo_kernels.backends.spec import Execution
from drpo_kernels.backends.sweep import Head, LinearSweep
from drpo_kernels.backends.torch_rows import TorchRows
from launcher import launch
from problems import SPECS, full_problem, random_problem, relative

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FROZEN = NeedsGrad(True, False, False)


@pytest.mark.interpreted  # its tiles have four columns, too few for a tensor core
@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16])
def test_windows_of_several_chunks(logits_dtype, device, monkeypatch):
    """bf16 dlogits lie beside float32 logits or over bf16 ones. With `batch_invariant` the result is that of one
    window, bit for bit.
    """
    pytest.importorskip("triton")

    problem = full_problem(4, (3, 9), dtype=BF16).with_options(logits_dtype=logits_dtype, batch_invariant=True)
    plans, results = [], []

    def recorded(*arguments, **options):
        plans.append(plan(*arguments, **options))
        return plans[-1]

    monkeypatch.setattr(LinearSweep, "make_plan", staticmethod(recorded))
    small_chunks(monkeypatch)
    monkeypatch.setattr("drpo_kernels.backends.triton.invariant.matmul_tile", small_tile)
    for retained, workspace in ((True, None), (True, 37 * 4 * 5), (False, 37 * (4 * 2 + 2 * 4))):
        monkeypatch.setattr(planning, "retain_dlogits", lambda *_, answer=retained: answer)
        results.append(problems.run(problem, dk.DRPO(delta=0.2), "triton", device, workspace_bytes=workspace))
    whole, chunked, windows = plans
    assert len(whole.windows) == len(chunked.windows) == 1 and len(windows.windows) > 1
    if logits_dtype is None:
        assert windows.windows.largest > windows.chunk_rows and chunked.windows.largest > chunked.chunk_rows
    (_, first), *others = results
    for _, found in others:
        assert all(torch.equal(first[name], found[name]) for name in first)


def small_chunks(monkeypatch):
    """Make chunks of two rows, so that larger windows have several chunks."""
    monkeypatch.setattr(planning, "CHUNK_ROWS", 2)
    monkeypatch.setattr(planning, "ROW_MULTIPLE", 1)


def small_tile(*_, accumulates):
    from drpo_kernels.backends.triton.tiles import MatmulTile

    return MatmulTile(16, 16, 4 if accumulates else 16, 4, 2)


@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("given, compute, copied", [(FP32, FP32, 0), (BF16, BF16, 4), (FP32, BF16, 6), (BF16, FP16, 6)])
def test_every_copy_of_the_hidden_rows_is_counted(given, compute, copied, every_row):
    """On a CPU, elements are rounded to autocast's dtype, upcast for the product, and zeroed where a row is SKIPPED."""
    rows = torch.full((len(Field), 4), float(RowKind.ACTIVE))
    head = Head(torch.zeros(7, 3), None, 7, Transform())
    execution = Execution("torch", compute, every_row=every_row)
    sweep = LinearSweep(torch.zeros(4, 3, dtype=given), head, torch.zeros(4).long(), rows, execution, FROZEN)
    assert sweep.plan.storage.copied == copied + 4 * every_row


def test_temporaries_of_narrow_logits_stay_small(monkeypatch):
    """Float32 products are rounded into bf16 logits by blocks of the vocabulary, however many rows there are."""
    sizes = []

    def product(a, b, out, accumulate=False):
        sizes.append(out.numel() * out.itemsize)
        torch.mm(a, b, out=out)

    monkeypatch.setattr(matmul, "product", product)
    monkeypatch.setattr(matmul, "CPU_CAST_BYTES", 4096)
    hidden, weight, out = torch.randn(100, 2), torch.randn(300, 2), torch.empty(100, 300, dtype=BF16)
    matmul.HeadMatmul(weight, FP32).logits(hidden, out)
    # The product of a block may add in another order. Where float32 differs, bf16 rounds to a neighbour.
    torch.testing.assert_close(out, (hidden @ weight.T).bfloat16(), rtol=2**-7, atol=1e-6)
    assert sum(sizes) == 4 * 100 * 300 and max(sizes) <= 4096


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_nothing_is_written_behind_a_single_row(dtype, device):
    """The stride of a single row, unlike that of several rows, promises no room behind it."""
    pytest.importorskip("triton")
    from drpo_kernels.backends.triton.invariant import InvariantMatmul

    memory = torch.full((48,), 7.0, device=device, dtype=dtype)
    out = memory.as_strided((1, 37), (48, 1))
    hidden, weight = torch.randn(1, 12).to(device, dtype), torch.randn(37, 12).to(device, dtype)
    InvariantMatmul(weight, dtype).logits(hidden, out)
    assert relative(out, hidden.double() @ weight.double().T) <= 1e-2
    assert (memory[37:] == 7).all()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("compact", ["active", "mask", "none"])
@pytest.mark.parametrize("retained, workspace", [(True, None), (True, 800), (False, None), (False, 37 * 4 * 4)])
def test_the_way_of_a_gpu(retained, workspace, compact, dtype, device, monkeypatch, tensor_cores):
    """The route of a GPU has windows of several chunks, dlogits beside or in place of logits, retained or not, and dX
    in pieces.
    """
    monkeypatch.setattr(planning, "retain_dlogits", lambda *_: retained)
    small_chunks(monkeypatch)
    monkeypatch.setattr(planning, "COPY_BYTES", 4 * 12 * 5)
    problem = random_problem(6, dtype=dtype, bias=True, compact=compact)
    # There are three roundings to bf16: of dlogits, of the gradient, and of 3.7 times it.
    options = {"workspace_bytes": workspace, "grad_bound": 3 * 2.0**-9 if dtype == BF16 else 4e-3}
    problems.assert_agrees(problem, SPECS["drpo-active"], "torch", device, **options)
    if dtype == BF16:  # the contract is for float32 logits; bf16 ones are less exact
        narrow = options | {"logits_dtype": BF16, "grad_bound": 4e-2, "loss_bound": 4e-2}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(problems, "logprob_bound", lambda _: 4e-2)
            problems.assert_agrees(problem, SPECS["drpo-active"], "torch", device, **narrow)


@pytest.mark.parametrize("compact", ["active", "none"])
def test_factors_the_way_of_a_gpu(compact, device, monkeypatch, tensor_cores):
    """dX, dW and db are those of dlogits that are factors times exponentials, up to rounding. For dW the factors scale
    the hidden states, but the caller's own hidden states do not change.
    """
    kept, policy = [], TorchRows.policy

    def keep(self, batch, terms, out, factors=None):
        outcome = policy(self, batch, terms, out, factors)
        kept.append(factors[:, None].double() * out.double())
        return outcome

    monkeypatch.setattr(TorchRows, "policy", keep)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16().to(device).requires_grad_() for n in (24, 50))
    bias = torch.randn(50, generator=generator).to(device).requires_grad_()
    before, targets = hidden.detach().clone(), torch.randint(50, (24,), generator=generator).to(device)
    old, advantages = torch.full((24,), -4.0, device=device), torch.ones(24, device=device)
    dk.linear_policy_loss(
        hidden, weight, targets, old, advantages, bias=bias, backend="torch", compact=compact
    ).loss.backward()
    assert torch.equal(hidden, before)
    (dlogits,) = kept
    assert relative(bias.grad, dlogits.sum(0)) <= 1e-4  # db is float32, so both parts of the factors show
    assert relative(hidden.grad, dlogits @ weight.double()) <= 2.0**-8
    assert relative(weight.grad, dlogits.T @ hidden.double()) <= 2.0**-7


@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=str)
def test_a_call_leaves_its_inputs_as_they_were(dtype, device):
    problem = random_problem(6, dtype=dtype)
    leaves = {name: value.clone().to(device).requires_grad_() for name, value in problem.leaves().items()}
    problems.call(problem, dk.DRPO(delta=0.15), "torch", device, leaves).loss.backward()
    full = problems.replace(problem, mask=torch.ones_like(problem.mask), advantages=torch.ones_like(problem.advantages))
    problems.call(full, dk.DRPO(delta=0.15), "torch", device, leaves).loss.backward()
    assert all(torch.equal(leaf.cpu(), getattr(problem, name)) for name, leaf in leaves.items())


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_main_grad_the_way_of_a_gpu(dtype, device, monkeypatch, tensor_cores):
    small_chunks(monkeypatch)
    problem = random_problem(6, dtype=dtype, workspace_bytes=37 * 4 * 4)
    _, want = problems.solve(problem, SPECS["drpo-active"], 8.0)
    leaves = {name: value.clone().to(device).requires_grad_() for name, value in problem.leaves().items()}
    buffer = torch.zeros(leaves["weight"].shape, device=device)
    extra = {"main_grad": buffer, "loss_scale": 8.0}
    (8.0 * problems.call(problem, dk.DRPO(delta=0.15), "torch", device, leaves, **extra).loss).backward()
    assert relative(buffer, want["weight"]) <= 4e-3
    assert relative(leaves["hidden"].grad, want["hidden"]) <= 4e-3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case, limit_mib", [("main-grad-bf16", 96), ("strided", 96), ("sparse", 160)])
def test_peak_memory(case, limit_mib):
    """The three cases:

    main-grad-bf16: the head has 128 MiB and the workspace 16 MiB, so neither a float32 accumulator (256 MiB) nor a
    gradient (128 MiB) fits.
    strided: hidden[:, :-1] has 128 MiB and the workspace 16 MiB, so it is never copied whole.
    sparse: entries are added whenever they fill a quarter of the workspace of 64 MiB, and never take hundreds of MiB.
    """
    status, output = launch("memory_probe", case)
    assert status == 0, output
    assert float(output.split()[-1]) <= limit_mib
