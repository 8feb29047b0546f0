"""Tests of the roofline model: its work against counts by hand, its memory against what a sweep allocates, its
arithmetic.
"""

import importlib
from dataclasses import replace

import pytest
import torch

from benchmarks.harness.provenance import ROOT
from benchmarks.harness.records import read
from benchmarks.harness.workloads import MODELS
from benchmarks.roofline import __main__ as command
from benchmarks.roofline import charges, predict, tables
from benchmarks.roofline.chips import CHIPS, Figure
from benchmarks.roofline.ours import DTYPES, METHODS, held_bytes, linear, recompute, sweep_plan
from benchmarks.roofline.work import Problem, products
from drpo_kernels.backends import sweep
from drpo_kernels.backends.devices import PRESETS
from drpo_kernels.backends.planning import NeedsGrad
from drpo_kernels.backends.rows import Field, Transform
from drpo_kernels.backends.spec import Execution
from drpo_kernels.backends.sweep import Head, LinearSweep
from drpo_kernels.triton_support import HAS_TRITON
from pages import unpadded

GIB = 1 << 30
RESULTS = ROOT / "bench_results" / "gpu" / "speed.jsonl"
H200 = CHIPS["H200"]
SMALL = Problem(96, 32, 400)
LARGE = Problem(8192, 4096, 151_936)
# T is beyond 2H here, so that there are several windows.
LONG = Problem(16_384, 4096, 151_936, workspace=GIB)
# Each method takes this many F = T·V·H.
F_COUNTS = {
    "gemms_whole": 6, "gemms_frozen": 4, "gemms_recompute": 8, "copy": 0,
    "linear_policy_loss": 6, "linear_policy_loss_bf16_logits": 6,
    "linear_policy_loss_frozen_head": 4, "linear_token_logprobs": 8, "policy_loss": 0, "policy_loss_inplace": 0,
    "eager": 6, "eager_compiled": 6,
}  # fmt: skip


def stage(cost, name):
    (found,) = [each for each in cost.stages if each.name == name]
    return found


@pytest.mark.parametrize("problem", [SMALL, LARGE, LONG, Problem(5000, 3840, 262_208)])
@pytest.mark.parametrize("method", METHODS)
def test_flops_by_hand(method, problem):
    f = problem.tokens * problem.hidden * problem.vocab
    assert METHODS[method].cost(problem).flops == F_COUNTS[method] * f


def test_skipped_rows_cost_no_flops():
    quarter = replace(LARGE, active_share=0.25)
    assert linear(quarter).flops == linear(LARGE).flops / 4
    assert recompute(quarter).flops == recompute(LARGE).flops  # it does not use advantages


def test_bytes_of_the_row_kernel_by_hand():
    count = LARGE.logits

    def per_logit(cost, name="rows"):
        rows = stage(cost, name)
        return rows.read / count, rows.reread / count, rows.written / count

    assert per_logit(linear(LARGE)) == (4, 0, 2)
    assert per_logit(linear(LARGE, one_read=False)) == (4, 4, 2)
    assert per_logit(linear(replace(LARGE, logits_itemsize=2))) == (2, 2, 2)
    assert per_logit(linear(replace(LARGE, itemsize=4))) == (4, 4, 4)
    assert per_logit(recompute(LARGE)) == (4, 0, 0)
    assert per_logit(recompute(LARGE), "rows again") == (4, 0, 2)


def test_a_factor_per_row_by_hand():
    """If rows are read once, the product of dX is float32 and rounded afterwards, and the
    hidden rows of dW are scaled.
    """
    states = LARGE.states
    found, cut = linear(LARGE), sweep_plan(LARGE, LARGE.tokens)
    scaling = stage(found, "scaling")
    assert (scaling.read, scaling.written) == ((4 + 2) * states, (2 + 2) * states)
    assert scaling.kernels == LARGE.tokens // cut.piece_rows + len(cut.windows) == 5
    assert stage(found, "dX").exposed == 2 * states
    still = stage(linear(replace(LARGE, trainable_head=False)), "scaling")
    assert (still.read, still.written) == (4 * states, 2 * states)
    for twice in (linear(LARGE, one_read=False), recompute(LARGE)):
        assert "scaling" not in {each.name for each in twice.stages}
        assert stage(twice, "dX").exposed == 0


def test_kernels_of_the_profiles():
    """docs/gpu.md has 38 kernels and copies with one chunk and 51 with five, from runs that read every logit twice."""
    small, large = Problem(512, 896, 151_936), LARGE
    assert linear(small, one_read=False).kernels == 38
    assert linear(large, one_read=False).kernels == pytest.approx(51, abs=1)


def test_a_product_by_hand():
    found = products("p", [(3, 5, 7), (2, 5, 7)], itemsize=2, out=4, live=9)
    assert found.flops == 2 * (3 + 2) * 5 * 7
    assert found.read == 2 * 7 * ((3 + 5) + (2 + 5))
    assert found.written == 4 * 25
    assert found.exposed == 2 * 25  # beyond one 16-bit write
    summed = products("p", [(3, 5, 7), (3, 5, 4)], itemsize=2, out=4, live=9, sums=True)
    assert summed.read == 2 * (7 + 4) * 8 + 4 * 15
    assert summed.written == 2 * 4 * 15
    assert summed.exposed == 3 * 4 * 15 - 2 * 15


def test_dw_is_read_back_for_every_window_but_the_first():
    windows = len(sweep_plan(LONG, LONG.tokens).windows)
    assert windows > 1
    assert stage(linear(LONG), "dW").exposed == (4 * (2 * windows - 1) - 2) * LONG.head
    assert stage(linear(LARGE), "dW").exposed == 0  # T = 2H, in one window


@pytest.mark.parametrize(
    "problem",
    [
        LARGE,
        LONG,
        replace(LARGE, logits_itemsize=2),
        replace(LARGE, trainable_head=False),
        Problem(65_536, 3840, 262_208, workspace=2 * GIB),
        Problem(2048, 512, 32_768, itemsize=4),
    ],
)
def test_memory_is_what_a_sweep_allocates(problem, monkeypatch):
    """The tensors have no storage, but the size that they would have."""
    monkeypatch.setattr(sweep, "device_properties", lambda _: PRESETS[problem.device])
    dtype, meta = DTYPES[problem.itemsize], torch.device("meta")
    hidden = torch.empty(problem.tokens, problem.hidden, dtype=dtype, device=meta)
    weight = torch.empty(problem.vocab, problem.hidden, dtype=dtype, device=meta)
    targets = torch.empty(problem.tokens, dtype=torch.int64, device=meta)
    rows = torch.empty(len(Field), problem.tokens, device=meta)
    # Every row is computed, because a count of the active ones would need their values.
    logits = DTYPES[problem.logits_itemsize]
    execution = Execution("torch", dtype, every_row=True, logits_dtype=logits, workspace_bytes=problem.workspace)
    head = Head(weight, None, problem.vocab, Transform())
    made = LinearSweep(hidden, head, targets, rows, execution, NeedsGrad(True, problem.trainable_head, False))
    held = [made._logits, made._dlogits, *made._gradients]
    allocated = sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)
    assert held_bytes(problem, sweep_plan(problem, problem.tokens)) == allocated


def test_memory_of_few_active_rows_by_hand():
    """All active rows are in one window, and their hidden states are gathered into a copy."""
    quarter = replace(LARGE, active_share=0.25)
    cut = sweep_plan(quarter, 2048)
    gradients = 2 * (LARGE.states + LARGE.head)
    assert held_bytes(quarter, cut) == cut.buffer_bytes + gradients + 2 * 2048 * 4096


def test_memory_from_logits_and_of_plain_pytorch_by_hand():
    count = LARGE.logits
    assert METHODS["eager"].cost(LARGE).extra == 12 * count  # float32 log-probs, their gradient and that of the logits
    assert METHODS["policy_loss"].cost(LARGE).extra == 2 * count
    assert METHODS["policy_loss_inplace"].cost(LARGE).extra == 0


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_ranges(chip):
    """The least time is at most the most; nothing beats its floor; more work takes longer, and a better chip takes less
    long.
    """
    for model in ("Qwen3-0.6B", "Qwen3-8B", "Gemma-3-12B"):
        problem = Problem(4096, MODELS[model].hidden, MODELS[model].vocab)
        for method in METHODS:
            found = predict.predict(chip, method, problem)
            assert 0 < found.least <= found.most
            assert found.floor is None or found.times_floor[0] >= 1
            for name in ("tokens", "hidden", "vocab"):
                more = predict.predict(chip, method, replace(problem, **{name: 2 * getattr(problem, name)}))
                if name != "hidden" or method not in ("copy", "policy_loss", "policy_loss_inplace"):
                    assert more.least > found.least, (method, name)
            slower = predict.predict(chip.with_efficiency(0.1, 0.1), method, problem)
            assert slower.least > found.least


def test_time_of_a_stage_by_hand():
    chip = H200.with_efficiency(0.5, 0.5)
    rows = stage(linear(LARGE), "rows")
    found, launches = predict.stage_time(chip, rows), 5 * 2e-6
    assert found.least == found.most == pytest.approx(6 * LARGE.logits / 2.4e12 + launches)
    assert found.bound == "memory"
    # the 132 rows of 608 kB that are read at once exceed the cache
    twice = stage(linear(LARGE, one_read=False), "rows")
    assert predict.stage_time(chip, twice).least == pytest.approx(10 * LARGE.logits / 2.4e12 + launches)
    narrow = stage(linear(replace(LARGE, logits_itemsize=2)), "rows")
    found, launches = predict.stage_time(chip, replace(narrow, instructions=0)), narrow.kernels * 2e-6
    assert found.least == pytest.approx(4 * LARGE.logits / 2.4e12 + launches)
    assert found.most == pytest.approx(6 * LARGE.logits / 2.4e12 + launches)
    product = predict.stage_time(chip, stage(linear(LARGE), "logits"))
    assert product.least == pytest.approx(2 * LARGE.logits * LARGE.hidden / 494.5e12 + 5 * 2e-6)
    assert product.bound == "arithmetic"
    small = predict.stage_time(chip, stage(linear(LARGE), "small kernels"))
    assert small.least == small.most == pytest.approx((33 + 5) * 2e-6 + 10e-6)
    assert small.bound == "launches"


def test_instructions_by_hand():
    """67 TFLOP/s are two operations for each of 132 x 128 lanes at 1.98 GHz, and as many instructions as lanes are
    issued.
    """
    assert H200.clock == pytest.approx(1.983e9, rel=1e-3)
    rows = stage(linear(replace(LARGE, logits_itemsize=2)), "rows")
    assert rows.instructions == pytest.approx(17.5 * LARGE.logits)
    rows = replace(rows, launches=0, instructions=31.5 * LARGE.logits)
    found = predict.stage_time(H200, rows)
    assert found.least == pytest.approx(31.5 * LARGE.logits / (67e12 / 2))
    assert found.most == pytest.approx(found.least / charges.ISSUE_SHARE)
    assert found.bound == "instructions"


@pytest.mark.skipif(not HAS_TRITON, reason="the bounds are on Triton's binaries")
def test_the_instructions_are_the_bounds_of_the_binaries():
    from drpo_kernels.aot.cases import BOUNDS

    assert BOUNDS["policy["].writing == charges.ONE_READ
    assert charges.TWO_READS[4] == (BOUNDS["statistics[fp32]"].reading, BOUNDS["gradient[fp32>bf16, "].writing)
    found = BOUNDS["policy[drpo bf16>bf16]"]
    assert charges.TWO_READS[2] == (found.reading, found.writing)


def test_the_clock_of_an_older_chip():
    # The A100 issues as many instructions, but half of them are not float32 operations.
    assert CHIPS["A100"].clock == pytest.approx(1.41e9, rel=1e-3)


def test_the_share_of_the_instructions_is_the_measured_one():
    count = 1664 * 151_936
    seconds = 31.5 * count / (charges.ISSUED * 132 * H200.clock)
    assert pytest.approx(seconds / 0.492e-3, abs=0.005) == charges.ISSUE_SHARE


def test_waves_by_hand():
    # There are 13 x 16 tiles, in two waves of 132.
    assert predict.occupied(H200, [(1664, 4096)]) == pytest.approx(208 / 264)
    assert predict.occupied(H200, [(1664, 4096), (128, 256)]) == pytest.approx(209 / 396)
    assert predict.occupied(H200, []) == 1  # a stage without products


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_figure_has_a_source(chip):
    for name in ("matrix", "vector", "bandwidth", "capacity", "cache", "processors"):
        figure = getattr(chip, name)
        assert figure.value > 0
        assert figure.source.startswith("https://") or figure.source.startswith("`l2_bytes` of drpo_kernels")
    for assumption in (chip.matmul_efficiency, chip.memory_efficiency):
        assert 0 < assumption.value < 1
        assert assumption.source
    assert f"| {chip.name} |" in unpadded(tables.chips())
    # The numbers are FLOP per multiprocessor and clock, and the clock in GHz: half of what sparsity would give.
    per_clock, clock = {
        "A100": (2048, 1.41), "H100": (4096, 1.83), "H200": (4096, 1.83), "B200": (8192, 1.86), "MI300X": (2048, 2.1),
    }[chip.name]  # fmt: skip
    assert chip.matrix.value == pytest.approx(chip.processors.value * per_clock * clock * 1e9, rel=0.01)
    assert chip.processors.value == PRESETS[chip.preset].multiprocessors
    # All dies of an MI300X share one more cache behind their own.
    assert chip.name == "MI300X" or chip.cache.value == PRESETS[chip.preset].l2_bytes


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01])
def test_an_efficiency_is_a_share(share):
    with pytest.raises(ValueError, match="share"):
        H200.with_efficiency(share, None)
    with pytest.raises(ValueError, match="share"):
        H200.with_efficiency(None, share)


def test_problems_that_are_none():
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        Problem(0, 4, 4)
    with pytest.raises(ValueError, match="active_share"):
        Problem(4, 4, 4, active_share=0)


def test_figures_are_what_they_say():
    assert tables._figure(Figure(4.8e12, "https://a"), 1e12, {"https://b": 1}) == "4.8 [2]"


# --- beside measurements ----------------------------------------------------------------------------------------------


def record(method, seconds, **changes):
    return {
        "part": "ours", "workload": "Qwen3-8B", "inputs": "trained", "dtype": "bfloat16", "method": method,
        "active_share": 1.0, "takes": "hidden", "median_s": seconds, "peak_extra_bytes": None,
        "shape": {"tokens": 8192, "hidden": 4096, "vocab": 151_936}, "device": {"gpu": "NVIDIA H200"}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, chip",
    [("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"), ("AMD Instinct MI300X", "MI300X"),
     ("NVIDIA GH200 480GB", None), ("NVIDIA GB200", None), ("NVIDIA H100 PCIe", None), ("NVIDIA L40S", None)],
)  # fmt: skip
def test_chip_by_the_name_of_a_device(name, chip):
    found = predict.chip_of({"device": {"gpu": name}})
    assert (found and found.name) == chip
    assert predict.chip_of({"device": {"cpu": "AMD EPYC"}}) is None


def test_a_comparison_by_hand():
    least = predict.predict(H200, "linear_policy_loss", LARGE).least
    peak = round(1.1 * METHODS["linear_policy_loss"].cost(LARGE).extra)
    records = [
        record("linear_policy_loss", 1.25 * least, peak_extra_bytes=peak),
        record("linear_policy_loss", 9.0, part="sparse"),  # the part `ours` takes precedence
        record("linear_policy_loss", 9.0, inputs="random"),
        record("no_method", 9.0),
        record("eager", None),
    ]
    (found,) = predict.compared(records)
    assert found.ratio == pytest.approx(1.25) and not found.within
    assert found.peak_off == pytest.approx(0.1)
    (exact,) = predict.compared([record("linear_policy_loss", least)])
    assert exact.within and exact.peak_off is None
    first, memory = tables.conclusions([found])
    assert "0 lie in the predicted range; half take at most 1.25×" in first
    assert memory.startswith("Of 1 peaks of memory, 0 are within 2%") and memory.endswith("10% off.")


def test_beside_the_measured_gpu():
    """The model's time is a lower bound up to 2 %, and its memory is right for our own methods."""
    rows = predict.compared(read(RESULTS))
    assert len(rows) > 40
    for row in rows:
        assert row.ratio > 0.98
        if row.prediction.method.startswith("linear_") and row.peak_off is not None:
            assert abs(row.peak_off) < 0.09


def test_the_page_names_predictions_and_assumptions():
    text = tables.render(read(RESULTS))
    assert "## Predicted times\n\nPREDICTED milliseconds" in text
    for part in ("**assumptions**", "**Assumptions** too", CHIPS["H200"].product.source, "Measured on NVIDIA H200"):
        assert part in text
    assert "Not measured yet." in tables.render([])


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plots = importlib.import_module("benchmarks.roofline.plots")
    plots.draw(read(RESULTS), tmp_path, "speed")
    assert [path.name for path in tmp_path.iterdir()] == ["roofline.png"]


def test_command(capsys):
    assert command.main(["--chip", "H200", "--tokens", "2048", "--method", "linear_policy_loss", "copy"]) == 0
    text = capsys.readouterr().out
    assert "PREDICTED, not measured: Qwen3-8B, T=2048 H=4096 V=151936, bf16" in text
    assert "| a copy of the logits" in text and "eager PyTorch" not in text
    method = ["--method", "linear_token_logprobs"]
    assert command.main(["--chip", "B200", "--stages", *method, "--matmul-efficiency", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "B200, assuming 50% of the published FLOP/s" in text and "| logits again" in text
