"""The plan of a sweep: what it promises of memory, at any size; and what `LinearSweep` makes of it."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import drpo_kernels as dk
import problems
from drpo_kernels.backends import matmul, planning
from drpo_kernels.backends.devices import ARCHITECTURES, GIB, MIB, PRESETS, device_properties
from drpo_kernels.backends.planning import Sizes, Storage, Wanted, WeightGradient, plan
from drpo_kernels.backends.rows import Row, RowKind, Transform
from drpo_kernels.backends.sweep import Execution, Head, LinearSweep
from drpo_kernels.commands import plan as command
from launcher import launch
from problems import SPECS, full_problem, random_problem, relative

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ALL, FROZEN = Wanted(True, True, False), Wanted(True, False, False)
ON_A_GPU = Storage(FP32, BF16, FP32, BF16)
STORED = [
    ON_A_GPU,
    Storage(BF16, BF16, FP32, BF16),  # logits_dtype
    Storage(FP32, BF16, FP32, FP32, copied=4),  # a master weight under autocast
    Storage(FP32, FP16, FP32, FP16),
    Storage(FP32, FP32, FP32, FP32),
    Storage(FP32, FP32, FP32, BF16, copied=4),  # on a CPU
]


def assert_covers(chunks, rows):
    stops = [0, *(chunk.stop for chunk in chunks)]
    assert stops[-1] == rows and [chunk.start for chunk in chunks] == stops[:-1]
    assert all(chunk.stop > chunk.start for chunk in chunks) and len(chunks) == len(stops) - 1


@settings(max_examples=300, deadline=None)
@given(
    active=st.integers(0, 70_000), forward=st.integers(0, 70_000), hidden=st.sampled_from([64, 1024, 4096, 8192]),
    vocab=st.integers(1, 270_000), storage=st.sampled_from(STORED), device=st.sampled_from(sorted(PRESETS)),
    workspace=st.sampled_from([None, 1, 8 * MIB, 300 * MIB, 2 * GIB]), multiple=st.sampled_from([1, 64]),
    wanted=st.sampled_from([ALL, FROZEN]), main_grad=st.booleans(), sparse=st.booleans(),
)  # fmt: skip
def test_promises(active, forward, hidden, vocab, storage, device, workspace, multiple, wanted, main_grad, sparse):
    """Every row once; the workspace, and beyond it the least of what dW may take."""
    main_grad = main_grad and wanted.weight
    made = plan(
        PRESETS[device], Sizes(active, forward, hidden, vocab), storage, wanted,
        workspace=workspace, row_multiple=multiple, main_grad=main_grad, sparse=sparse,
    )  # fmt: skip
    assert_covers(made.windows, active)
    assert_covers(made.forward, forward)
    for window in made.windows:
        chunks = made.chunks(window)
        assert_covers(chunks, window.stop - window.start)
        assert chunks.largest <= made.logits_rows
        assert len(chunks) == 1 or not (made.in_place or storage.dlogits == FP16)  # whose scale is of one chunk
    assert made.retained or made.windows.chunk_rows % multiple == 0 or len(made.windows) <= 1
    least = vocab * (storage.logits.itemsize + storage.dlogits.itemsize) * multiple
    budget = planning.workspace_bytes(PRESETS[device], vocab, storage.logits.itemsize, workspace)
    assert made.buffer_bytes - made.retained_bytes <= max(budget, least, 128 * MIB if device == "cpu" else 0)
    wide = storage.accumulator.itemsize * vocab * hidden
    beyond = made.retained_bytes + made.accumulator_bytes
    accumulates = wanted.weight and not main_grad and storage.weight != storage.accumulator
    assert beyond <= (wide if accumulates else 0)


@pytest.mark.parametrize("device", ["cpu", "h100", "mi300x"])
@pytest.mark.parametrize("storage", STORED)
def test_sparse_gradients_are_planned_for_dense_rows(storage, device):
    """As many rows as without at a time, with dW as a sum, for no window of dense rows is known to be the only one.
    On a GPU they are moved together beside the logits, whose programs run in no order.
    """
    sizes = Sizes(4096, 0, 4096, 151_936)
    made, without = (plan(PRESETS[device], sizes, storage, ALL, sparse=sparse) for sparse in (True, False))
    assert not made.retained and made.weight_gradient in (WeightGradient.OWN_SUM, WeightGradient.WIDE_SUM)
    assert made.in_place == (without.in_place and device == "cpu")
    assert made.buffer_bytes <= planning.workspace_bytes(PRESETS[device], 151_936, storage.logits.itemsize, None)


@pytest.mark.parametrize(
    "vocab, on_cpu, on_a_gpu", [(1, 16, 16), (1087, 16, 16), (1088, 17, 16), (32_000, 500, 125), (151_936, 1024, 593)]
)
def test_entries_of_a_sparse_row(vocab, on_cpu, on_a_gpu):
    """By what an entry costs beside a column; 16 at least, for small vocabularies to have sparse rows; 1024 at most."""
    assert planning.entry_limit(vocab, "cpu") == on_cpu
    assert planning.entry_limit(vocab, "cuda") == planning.entry_limit(vocab, "mps") == on_a_gpu


@pytest.mark.parametrize("device", ["a100", "h100", "h200", "b200", "mi300x"])
@pytest.mark.parametrize("tokens", [2048, 8192, 65_536])
def test_the_plan_of_qwen3_8b(tokens, device):
    """1 GiB by default, whatever T; dlogits are kept where that is no more than a float32 dW, and then no sum is."""
    sizes, wide = Sizes(tokens, 0, 4096, 151_936), 4 * 151_936 * 4096
    made = plan(PRESETS[device], sizes, ON_A_GPU, ALL)
    assert made.retained is (tokens <= 8192)
    assert made.weight_gradient is (WeightGradient.PRODUCT if made.retained else WeightGradient.WIDE_SUM)
    assert made.buffer_bytes + made.accumulator_bytes <= GIB + max(made.retained_bytes, wide)
    added = plan(PRESETS[device], sizes, ON_A_GPU, ALL, main_grad=True)
    for lean in (added, plan(PRESETS[device], sizes, ON_A_GPU, FROZEN)):
        assert lean.buffer_bytes + lean.accumulator_bytes <= GIB
        assert lean.windows.largest >= 2048 and len(lean.windows) == -(-tokens // lean.windows.largest)


def test_a_larger_workspace_reads_the_weight_gradient_less_often():
    sizes = Sizes(65_536, 0, 4096, 151_936)
    passes = [len(plan(PRESETS["h200"], sizes, ON_A_GPU, ALL, workspace=n * GIB).windows) for n in (1, 2, 4)]
    assert passes == sorted(passes, reverse=True) and passes[-1] <= passes[0] / 3


def test_dlogits_of_another_dtype_are_never_written_over_logits():
    for storage in STORED:
        assert plan(PRESETS["h100"], Sizes(64, 0, 8, 99), storage, FROZEN).in_place is (
            storage.logits == storage.dlogits
        )


def test_what_a_cpu_takes_is_what_it_took():
    """64 MiB of float32 logits, more only to hold 256 rows, and dlogits in their place."""
    cpu = device_properties(torch.device("cpu"))
    small = plan(cpu, Sizes(2048, 0, 512, 32_768), STORED[4], ALL)
    assert (small.windows.chunk_rows, small.buffer_bytes) == (512, 64 * MIB)
    large = plan(cpu, Sizes(2048, 0, 512, 131_072), STORED[4], ALL)
    assert (large.windows.chunk_rows, large.buffer_bytes) == (256, 128 * MIB)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), ("2.32 GiB", "T <= 2H", "one product", "1 of 8192 rows")),
        (("--frozen-head",), ("not wanted", "would race", "one product for dX\n")),
        (("--dtype", "float16"), ("float32 until the backward", "an accumulator")),
        (("--main-grad",), ("added to main_grad", "4 of 2048 rows")),
        (("--bf16-logits",), ("over the logits",)),
        (("--sparse-grad",), ("entries", "3355443 of sparse rows", "a sum over windows")),
        (("--sparse-grad", "0.003", "--device", "cpu"), ("entries", "scratch")),
        (("--device", "cpu", "--workspace-gib", "0.5"), ("float32", "accumulator")),
    ],
)
def test_command(arguments, said, capsys):
    sizes = ("--tokens", "8192", "--hidden", "4096", "--vocab", "151936", "--device", "h200")
    assert command.main((*sizes, *arguments)) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in said), printed
    assert all(len(line) <= 120 for line in printed.splitlines()), printed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "case, sizes, dtype",
    [
        ("planned", (2048, 512, 32_768), FP32),
        ("planned-bf16", (2048, 512, 32_768), BF16),
        ("planned-small", (65_536, 64, 1024), FP32),
        ("policy", (16_384, 64, 20_000), FP32),
    ],
)
def test_a_cpu_takes_what_is_planned(case, sizes, dtype):
    """Gradients added; what the allocator keeps differs by a tenth from run to run, and is given as much again."""
    status, output = launch("memory_probe", case)
    assert status == 0, output
    tokens, hidden, vocab = sizes
    arguments = ("--tokens", tokens, "--hidden", hidden, "--vocab", vocab, "--dtype", str(dtype).split(".")[1])
    made = command.plan_for(PRESETS["cpu"], command._parse([*map(str, arguments), "--device", "cpu"]))
    predicted = (made.total_bytes + (tokens + vocab) * hidden * dtype.itemsize) / MIB
    assert float(output.split()[-1]) == pytest.approx(predicted, rel=0.2)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--sparse-grad", "1"), "argument --sparse-grad: must be in [0, 1), got 1"),
        (("--tokens", "0"), "argument --tokens: must be at least 1, got 0"),
        (("--vocab", "-3"), "argument --vocab: must be at least 1, got -3"),
        (("--workspace-gib", "nan"), "argument --workspace-gib: must be positive and finite, got nan"),
        (("--workspace-gib", "0"), "argument --workspace-gib: must be positive and finite, got 0"),
    ],
)
def test_wrong_arguments_of_the_command(arguments, said, capsys):
    with pytest.raises(SystemExit):
        command.main(("--tokens", "8", "--hidden", "8", "--vocab", "8", *arguments))
    assert said in capsys.readouterr().err


# --- the sweep obeys --------------------------------------------------------------------------------------------------


@pytest.mark.interpreted  # tiles of four columns, which no tensor core takes
@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16])
def test_windows_of_several_chunks(logits_dtype, device, monkeypatch):
    """bf16 dlogits beside float32 logits, and over bf16 ones: as in one window, bit for bit with `batch_invariant`."""
    pytest.importorskip("triton")
    from drpo_kernels.backends import sweep

    problem = full_problem(4, (3, 9), dtype=BF16).with_options(logits_dtype=logits_dtype, batch_invariant=True)
    plans, results = [], []

    def recorded(*arguments, **options):
        plans.append(plan(*arguments, **options))
        return plans[-1]

    monkeypatch.setattr(sweep, "plan", recorded)
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
    """Of two rows, where a window is larger."""
    monkeypatch.setattr(planning, "CHUNK_ROWS", 2)
    monkeypatch.setattr(planning, "ROW_MULTIPLE", 1)


def small_tile(*_, accumulates):
    from drpo_kernels.backends.triton.tiles import MatmulTile

    return MatmulTile(16, 16, 4 if accumulates else 16, 4, 2)


@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("given, compute, copied", [(FP32, FP32, 0), (BF16, BF16, 4), (FP32, BF16, 6), (BF16, FP16, 6)])
def test_every_copy_of_the_hidden_rows_is_counted(given, compute, copied, every_row):
    """On a CPU, per element: rounded to autocast's dtype, upcast for the product, zeroed where a row is SKIPPED."""
    rows = torch.full((len(Row), 4), float(RowKind.ACTIVE))
    head = Head(torch.zeros(7, 3), None, 7, Transform())
    execution = Execution("torch", compute, every_row=every_row)
    sweep = LinearSweep(torch.zeros(4, 3, dtype=given), head, torch.zeros(4).long(), rows, execution, FROZEN)
    assert sweep.plan.storage.copied == copied + 4 * every_row


def test_temporaries_of_narrow_logits_stay_small(monkeypatch):
    """Float32 products rounded into bf16 logits, by blocks of the vocabulary, however many rows there are."""
    sizes = []

    def product(a, b, out, accumulate=False):
        sizes.append(out.numel() * out.itemsize)
        torch.mm(a, b, out=out)

    monkeypatch.setattr(matmul, "product", product)
    monkeypatch.setattr(matmul, "CPU_CAST_BYTES", 4096)
    hidden, weight, out = torch.randn(100, 2), torch.randn(300, 2), torch.empty(100, 300, dtype=BF16)
    matmul.HeadMatmul(weight, FP32).logits(hidden, out)
    # a block's product may add in another order: where float32 differs, bf16 rounds to a neighbour
    torch.testing.assert_close(out, (hidden @ weight.T).bfloat16(), rtol=2**-7, atol=1e-6)
    assert sum(sizes) == 4 * 100 * 300 and max(sizes) <= 4096


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_nothing_is_written_behind_a_single_row(dtype, device):
    """Whose stride, unlike that of several rows, promises no room there."""
    pytest.importorskip("triton")
    from drpo_kernels.backends.triton.invariant import InvariantMatmul

    memory = torch.full((48,), 7.0, device=device, dtype=dtype)
    out = memory.as_strided((1, 37), (48, 1))
    hidden, weight = torch.randn(1, 12).to(device, dtype), torch.randn(37, 12).to(device, dtype)
    InvariantMatmul(weight, dtype).logits(hidden, out)
    assert relative(out, hidden.double() @ weight.double().T) <= 1e-2
    assert (memory[37:] == 7).all()


def test_row_tiles_give_every_thread_32_bytes():
    pytest.importorskip("triton")
    from drpo_kernels.backends.triton.aot import ROW_DEVICES
    from drpo_kernels.backends.triton.tiles import row_tile

    for name, device in ARCHITECTURES.items():
        (compiled,) = (found for vendor, found in ROW_DEVICES.items() if name.startswith(vendor))
        for itemsize in (2, 4):
            tile = row_tile(151_936, itemsize, device)
            assert tile.block * itemsize == 32 * tile.num_warps * device.warp_size
            assert tile == row_tile(151_936, itemsize, compiled), "compiled ahead of time with another tile"
            assert row_tile(1, itemsize, device).num_warps == 1


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("compact", ["active", "mask", "none"])
@pytest.mark.parametrize("retained, workspace", [(True, None), (True, 800), (False, None), (False, 37 * 4 * 4)])
def test_the_way_of_a_gpu(retained, workspace, compact, dtype, device, monkeypatch, tensor_cores):
    """Windows of several chunks, dlogits beside or in place of logits, retained or not, dX in pieces: one oracle."""
    monkeypatch.setattr(planning, "retain_dlogits", lambda *_: retained)
    small_chunks(monkeypatch)
    monkeypatch.setattr(planning, "COPY_BYTES", 4 * 12 * 5)
    problem = random_problem(6, dtype=dtype, bias=True, compact=compact)
    options = {"workspace_bytes": workspace, "grad_bound": 4e-3}
    problems.assert_agrees(problem, SPECS["drpo-active"], "torch", device, **options)
    if dtype == BF16:  # bf16 logits are worth less: the contract is for float32 ones
        narrow = options | {"logits_dtype": BF16, "grad_bound": 4e-2, "loss_bound": 4e-2}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(problems, "logprob_bound", lambda _: 4e-2)
            problems.assert_agrees(problem, SPECS["drpo-active"], "torch", device, **narrow)


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
    """main-grad-bf16: a head of 128 MiB, a workspace of 16: neither an accumulator (256) nor a gradient (128) fits.
    strided: hidden[:, :-1] of 128 MiB, a workspace of 16: it is never copied whole.
    sparse: entries are added whenever they fill a quarter of the workspace of 64 MiB, and never take hundreds."""
    status, output = launch("memory_probe", case)
    assert status == 0, output
    assert float(output.split()[-1]) <= limit_mib
