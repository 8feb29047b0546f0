"""Tests of the plan of a sweep: what it promises of memory at any size, and what `LinearSweep` makes of it."""

import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_kernels.backends import planning
from drpo_kernels.backends.devices import ARCHITECTURES, GIB, MIB, PRESETS, device_properties
from drpo_kernels.backends.planning import NeedsGrad, Sizes, Storage, WeightGradient
from drpo_kernels.backends.rows import Field, Transform
from drpo_kernels.backends.sparse.contract import entry_limit
from drpo_kernels.backends.sparse.plan import sparse_plan
from drpo_kernels.backends.spec import Execution
from drpo_kernels.backends.sweep import Head, LinearSweep
from drpo_kernels.commands import plan as command
from launcher import launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def plan(*sizes, sparse=False, **options):
    return (sparse_plan if sparse else planning.plan)(*sizes, **options)


ALL, FROZEN = NeedsGrad(True, True, False), NeedsGrad(True, False, False)
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
    """Every row is there once. The plan takes no more than the workspace and the least that dW may take."""
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
        # float16 dlogits have one scale per chunk
        assert len(chunks) == 1 or not (made.in_place or storage.dlogits == FP16)
    assert made.retained or made.windows.chunk_rows % multiple == 0 or len(made.windows) <= 1
    least = vocab * (storage.logits.itemsize + storage.dlogits.itemsize) * multiple
    budget = planning.workspace_bytes(PRESETS[device], vocab, storage.logits.itemsize, workspace)
    room = max(budget, least, 128 * MIB if device == "cpu" else 0)
    wide = storage.accumulator.itemsize * vocab * hidden
    assert made.buffer_bytes <= room + (wide if made.retained else 0)
    accumulates = wanted.weight and not main_grad and storage.weight != storage.accumulator
    assert made.accumulator_bytes <= (wide if accumulates else 0)
    assert not made.retained or (accumulates and made.weight_gradient is WeightGradient.PRODUCT)


@pytest.mark.parametrize("device", ["cpu", "h100", "mi300x"])
@pytest.mark.parametrize("storage", STORED)
def test_sparse_gradients_are_planned_for_dense_rows(storage, device):
    """As many rows are computed at a time as without `sparse_grad`. dW is accumulated, because a window of dense rows
    may not be the only one. On a GPU dense rows are packed beside the logits, because programs run in no fixed order.
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
    """The limit follows from the cost of an entry relative to that of a column. It is at least 16, so that small
    vocabularies have sparse rows, and at most 1024.
    """
    assert entry_limit(vocab, "cpu") == on_cpu
    assert entry_limit(vocab, "cuda") == entry_limit(vocab, "mps") == on_a_gpu


@pytest.mark.parametrize("device", ["a100", "h100", "h200", "b200", "mi300x"])
@pytest.mark.parametrize("tokens", [2048, 8192, 65_536])
def test_the_plan_of_qwen3_8b(tokens, device):
    """The default workspace is 1 GiB, whatever T. dlogits are kept where a float32 dW would take as much memory, and
    then no sum is kept.
    """
    sizes, wide = Sizes(tokens, 0, 4096, 151_936), 4 * 151_936 * 4096
    made = plan(PRESETS[device], sizes, ON_A_GPU, ALL)
    assert made.retained is (tokens <= 8192)
    assert made.weight_gradient is (WeightGradient.PRODUCT if made.retained else WeightGradient.WIDE_SUM)
    assert made.buffer_bytes + made.accumulator_bytes <= GIB + max(made.retained_bytes, wide)
    added = plan(PRESETS[device], sizes, ON_A_GPU, ALL, main_grad=True)
    for lean in (added, plan(PRESETS[device], sizes, ON_A_GPU, FROZEN)):
        assert lean.buffer_bytes + lean.accumulator_bytes <= GIB
        assert lean.windows.largest >= 1664 and len(lean.windows) == -(-tokens // lean.windows.largest)


def test_a_larger_workspace_reads_the_weight_gradient_less_often():
    sizes = Sizes(65_536, 0, 4096, 151_936)
    passes = [len(plan(PRESETS["h200"], sizes, ON_A_GPU, ALL, workspace=n * GIB).windows) for n in (1, 2, 4)]
    assert passes == sorted(passes, reverse=True) and passes[-1] <= passes[0] / 3


# A shape is (T, H, V, workspace in MiB). For each kind of plan, BYTES holds the bytes per entry of the vocabulary of
# the plan with the fewest windows that fit, or with all bf16 dlogits where T <= 2H.
SHAPES = [
    (512, 896, 151_936, 1024), (2048, 896, 151_936, 1024), (4096, 1536, 151_936, 1024), (8192, 2048, 151_936, 1024),
    (8192, 4096, 151_936, 1024), (9216, 4096, 151_936, 1024), (16_384, 4096, 151_936, 1024),
    (16_384, 4096, 32_000, 256), (16_384, 8192, 128_256, 512), (65_536, 3840, 262_208, 4096),
    (8192, 1536, 151_936, 2048),
]  # fmt: skip
BYTES = {
    "trained": [3072, 6144, 12_288, 14_336, 23_040, 23_040, 23_296, 24_576, 36_864, 31_488, 17_920],
    "bf16 logits": [1024, 4096, 10_240, 13_824, 16_384, 22_528, 23_040, 24_576, 32_768, 29_952, 14_336],
    "invariant": [3072, 6144, 12_288, 14_336, 23_040, 23_040, 23_296, 24_576, 36_864, 31_488, 17_920],
    "frozen": [3072, 6144, 6144, 6144, 6144, 6656, 6912, 8192, 4096, 16_128, 11_776],
    "main_grad": [3072, 6144, 6144, 6144, 6144, 6656, 6912, 8192, 4096, 16_128, 11_776],
    "master weight": [3072, 6144, 6144, 6144, 6144, 6656, 6912, 8022, 4096, 16_128, 11_776],
    "float16": [6656, 9728, 12_288, 15_218, 23_410, 23_296, 23_410, 24_580, 36_866, 31_488, 18_432],
    "float32": [2048, 4096, 5632, 6656, 6656, 6144, 6656, 8192, 4096, 15_872, 11_264],
    "sparse": [6656, 7680, 12_032, 15_104, 23_296, 22_528, 23_296, 24_122, 36_378, 31_488, 17_408],
    "cpu": [5632, 7680, 11_776, 14_848, 23_040, 22_528, 23_040, 24_576, 36_864, 31_232, 17_408],
}
KINDS = {
    "bf16 logits": {"storage": STORED[1]}, "invariant": {"row_multiple": 64}, "frozen": {"needs_grad": FROZEN},
    "main_grad": {"main_grad": True}, "master weight": {"storage": STORED[2]}, "float16": {"storage": STORED[3]},
    "float32": {"storage": STORED[4]}, "sparse": {"sparse": True}, "cpu": {"storage": STORED[5]},
}  # fmt: skip
UNCOUNTED = replace(PRESETS["h200"], multiprocessors=0)


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("shape, index", [(shape, index) for index, shape in enumerate(SHAPES)])
def test_bytes(kind, shape, index):
    """A plan never takes more than the one with the fewest windows. It takes the same where nothing is gained: for a
    head that is not bf16 or has no gradient of its own, or for an unknown number of multiprocessors. All rows are in
    one window wherever the rule below says so.
    """
    tokens, hidden, vocab, mib = shape
    options = {"storage": ON_A_GPU, "needs_grad": ALL, "workspace": mib * MIB, **KINDS.get(kind, {})}

    def made(device):
        return plan(device, Sizes(tokens, 0, hidden, vocab), **options)

    devices = ["cpu"] if kind == "cpu" else ["a100", "h200", "b200", "mi300x"]
    found = {name: made(PRESETS[name]) for name in devices} | {"": made(PRESETS["cpu"] if kind == "cpu" else UNCOUNTED)}
    before = BYTES[kind][index]
    taken = {name: (each.buffer_bytes + each.accumulator_bytes) / vocab for name, each in found.items()}
    assert max(taken.values()) <= before, taken
    assert kind == "cpu" or taken["mi300x"] == taken[""]  # AMD's products are cut into other tiles
    if kind not in ("trained", "bf16 logits", "invariant"):
        assert taken[""] == before and not any(each.retained for each in found.values())
    if kind in ("float32", "sparse", "cpu"):
        assert set(taken.values()) == {before}
    if kind in ("trained", "invariant"):  # the rule counts 512 rows of logits, or 256 if windows need less
        rule = (2 * tokens + 4 * 512) * vocab <= mib * MIB + 4 * vocab * hidden
        one = tokens <= 2 * hidden or (rule and 2 * tokens + 4 * 256 <= before)
        assert all((len(each.windows) == 1) == one for each in found.values())
        assert taken[""] == before or (one and tokens > 2 * hidden)


def test_one_window_with_less_memory_than_two():
    made = plan(PRESETS["h200"], Sizes(4096, 0, 1536, 151_936), ON_A_GPU, ALL)
    assert (len(made.windows), made.chunk_rows, made.total_bytes) == (1, 512, (2 * 4096 + 4 * 512) * 151_936)


def test_chunks_do_not_grow_where_windows_shrink():
    """Windows of 640 rows in chunks of 384 take less than windows of 512 in one chunk each."""
    made = plan(PRESETS["h200"], Sizes(2560, 0, 8448, 151_936), ON_A_GPU, FROZEN, workspace=3328 * 151_936)
    assert (made.fitting, made.windows.chunk_rows, made.chunk_rows) == (640, 512, 256)


@pytest.mark.parametrize("device, tokens, window, piece", [
    ("h200", 16_384, 2048, 2048), ("b200", 16_384, 2304, 1152), ("h200", 9216, 9216, 2048),
    ("mi300x", 9216, 9216, 2048), ("h200", 100, 100, 2048),
])  # fmt: skip
def test_pieces_of_dx_in_whole_waves(device, tokens, window, piece):
    """2048 rows of 4096 features fit, and 256 rows left over would need a wave of their own."""
    made = plan(PRESETS[device], Sizes(tokens, 0, 4096, 151_936), ON_A_GPU, ALL)
    assert (made.windows.largest, made.piece_rows) == (window, piece)


@pytest.mark.parametrize(
    "fitting, hidden, processors, best, share",
    [
        (2432, 4096, 132, 2048, 0.97), (2048, 4096, 132, 2048, 0.97), (2432, 4096, 148, 2304, 0.97),
        (2432, 8192, 132, 2432, 0.92),  # 2048 rows would fill 97 % but need one more window
    ],
)  # fmt: skip
def test_windows_in_whole_waves_by_hand(fitting, hidden, processors, best, share):
    """The product has a tile for every 128 rows and 256 features of its 16,384 rows."""
    assert planning.whole_waves(16_384, fitting, hidden, processors) == best
    full = best // 128 * (hidden // 256)
    assert full / (-(-full // processors) * processors) == pytest.approx(share, abs=0.005)


@given(
    rows=st.integers(2, 20_000), fitting=st.integers(1, 5000), hidden=st.sampled_from([64, 896, 1536, 4096, 8192]),
    processors=st.sampled_from([1, 108, 132, 148]),
)  # fmt: skip
def test_windows_in_whole_waves(rows, fitting, hidden, processors):
    """The choice has the least time of a loop over windows, tile by tile, and is not larger than what fits."""

    def time(size):
        total = 0.0
        for start in range(0, rows, size):
            tiles = math.ceil(min(size, rows - start) / 128) * math.ceil(hidden / 256)
            total += (tiles / processors + math.ceil(tiles / processors)) / 2 + hidden / 7400
        return total

    best = planning.whole_waves(rows, fitting, hidden, processors)
    assert best <= fitting and (best == fitting or best % 128 == 0)
    assert time(best) <= min(map(time, {fitting, *range(128, fitting + 1, 128)})) * (1 + 1e-9)


@settings(max_examples=200)
@given(
    active=st.integers(1, 70_000), forward=st.sampled_from([0, 300, 9000]), hidden=st.sampled_from([896, 1536, 4096]),
    vocab=st.sampled_from([32_000, 151_936]), storage=st.sampled_from(STORED), device=st.sampled_from(sorted(PRESETS)),
    workspace=st.sampled_from([MIB, 300 * MIB, GIB]), wanted=st.sampled_from([ALL, FROZEN]), main_grad=st.booleans(),
    multiple=st.sampled_from([1, 64]),
)  # fmt: skip
def test_neither_choice_takes_memory(
    active, forward, hidden, vocab, storage, device, workspace, wanted, main_grad, multiple
):
    """With one window or whole waves a plan takes no more memory than without."""
    sizes, main_grad = Sizes(active, forward, hidden, vocab), main_grad and wanted.weight
    options = {"workspace": workspace, "row_multiple": multiple, "main_grad": main_grad}
    made = plan(PRESETS[device], sizes, storage, wanted, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_in_one_window", lambda *_: None)
        without = plan(replace(PRESETS[device], multiprocessors=0), sizes, storage, wanted, **options)
    assert made.total_bytes <= without.total_bytes
    if made.fitting:
        assert PRESETS[device].warp_size == 32 and multiple == 1 and storage.dlogits.itemsize == 2
        assert made.chunk_rows <= without.chunk_rows and len(made.windows) >= len(without.windows) > 1


def test_ranks_on_other_gpus_cut_alike(monkeypatch):
    """The ranks must agree, because every window of a head that is split over ranks is a collective."""
    from drpo_kernels.backends import sweep
    from drpo_kernels.collectives import VocabShard

    shard, meta = VocabShard(None, (151_936, 151_936)), torch.device("meta")
    hidden, weight = (torch.empty(n, 4096, dtype=BF16, device=meta) for n in (16_384, 151_936))
    rows, targets = torch.empty(len(Field), 16_384, device=meta), torch.empty(16_384, dtype=torch.int64, device=meta)
    plans = {}
    for name, split in itertools.product(("h200", "b200"), (shard, None)):
        monkeypatch.setattr(sweep, "device_properties", lambda _, name=name: PRESETS[name])
        execution = Execution("torch", BF16, every_row=True, workspace_bytes=GIB, vocab_shard=split)
        head = Head(weight, None, 151_936, Transform())
        plans[name, split] = LinearSweep(hidden, head, targets, rows, execution, ALL).plan.windows
    assert plans["h200", shard] == plans["b200", shard]
    assert plans["h200", None] != plans["b200", None]


def test_dlogits_of_another_dtype_are_never_written_over_logits():
    for storage in STORED:
        assert plan(PRESETS["h100"], Sizes(64, 0, 8, 99), storage, FROZEN).in_place is (
            storage.logits == storage.dlogits
        )


def test_what_a_cpu_takes_is_what_it_took():
    """A CPU takes 64 MiB of float32 logits, more only to hold 256 rows, and puts dlogits in their place."""
    cpu = device_properties(torch.device("cpu"))
    small = plan(cpu, Sizes(2048, 0, 512, 32_768), STORED[4], ALL)
    assert (small.windows.chunk_rows, small.buffer_bytes) == (512, 64 * MIB)
    large = plan(cpu, Sizes(2048, 0, 512, 131_072), STORED[4], ALL)
    assert (large.windows.chunk_rows, large.buffer_bytes) == (256, 128 * MIB)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), ("2.32 GiB", "no more than the workspace and a float32 dW", "1 of 8192 rows")),
        (("--tokens", "9216"), ("2.90 GiB", "no more than the workspace and a float32 dW", "1 of 9216 rows")),
        (("--tokens", "16384"), ("8 of 2048 rows", "fill 97% of 132 processors, 78% with windows of 2432 rows")),
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
    """The test adds the gradients to the plan. What the allocator keeps varies by a tenth from run to run, and twice
    that is allowed.
    """
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


def test_row_tiles_give_every_thread_32_bytes():
    pytest.importorskip("triton")
    from drpo_kernels.aot.cases import ROW_DEVICES
    from drpo_kernels.backends.triton.tiles import row_tile

    for name, device in ARCHITECTURES.items():
        (compiled,) = (found for vendor, found in ROW_DEVICES.items() if name.startswith(vendor))
        for itemsize in (2, 4):
            tile = row_tile(151_936, itemsize, device)
            assert tile.num_warps * device.warp_size == (512 if name in ("sm_90", "sm_100") else 256)
            assert tile.block * itemsize == 32 * tile.num_warps * device.warp_size
            assert tile == row_tile(151_936, itemsize, compiled), "compiled ahead of time with another tile"
            assert row_tile(1, itemsize, device).num_warps == 1
