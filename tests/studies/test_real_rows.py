"""Tests of the recording of SmolLM2, of the inputs that studies take from it, and of the engines that it compares."""

import pytest
import torch

from benchmarks import report
from benchmarks.harness import quantization, recording, regimes
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.records import read
from benchmarks.harness.workloads import KINDS, Inputs, Shape, make_inputs
from benchmarks.precision import engine_plots, mismatch
from benchmarks.precision import tables as precision_tables
from benchmarks.smollm import __main__ as recorder
from benchmarks.smollm import engines
from benchmarks.smollm.prompts import PROMPTS
from benchmarks.sparsity import __main__ as sparsity
from benchmarks.sparsity import tables as sparsity_tables
from drpo_kernels import linear_policy_loss
from examples import smollm
from pages import unpadded

needs_head = pytest.mark.skipif(not (smollm.CACHE / "head.pt").exists(), reason="run `make smollm` first")
HALF = 2.0**-11  # the relative error of rounding to float16


@pytest.fixture(scope="module")
def recorded():
    return recording.recorded()


def test_the_recording_is_small():
    folder = recording.RECORDING.parent
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 << 20


def test_the_recording_is_whole(recorded):
    count = len(recorded.targets)
    assert recorded.hidden.shape == (count, smollm.HIDDEN) and recorded.hidden.isfinite().all()
    assert recorded.targets.min() >= 0 and recorded.targets.max() < smollm.VOCAB
    assert recorded.topics.bincount().tolist() == [count // 4] * 4 and set(recording.TOPICS) == set(PROMPTS)
    assert all(len(logprobs) == count and (logprobs <= 0).all() for logprobs in recorded.logprobs.values())
    assert set(recorded.drawn) == set(recording.ENGINES)


@needs_head
def test_log_probs_are_those_of_the_hidden_states(recorded):
    """The model's log-probs were computed before its hidden states were rounded to float16, which moves a logit by at
    most 2^-11 of its sum of absolute products.
    """
    inputs = make_inputs("real", Shape(256, smollm.HIDDEN, smollm.VOCAB))
    found = inputs.logprobs(inputs.hidden.double() @ inputs.weight.double().T)
    moved = (inputs.hidden.double().abs() @ inputs.weight.double().abs().T).amax(1) * HALF
    error = (found - recorded.logprobs["fp32"][recording.recorded_rows(256)]).abs()
    assert (error <= 2 * moved + 1e-4).all()
    assert error.mean() < 0.01


@pytest.mark.parametrize("name", recording.ENGINES)
def test_draws_are_those_of_the_engine(recorded, name):
    """Paired with another context's, the probabilities of the drawn tokens would be 0.3 apart or more."""
    old, new = (x.double() for x in recorded.drawn[name])
    apart = (new.exp() - old.exp()).abs().mean()
    assert 1e-4 < apart < 0.2
    assert (new.roll(1, 0).exp() - old.exp()).abs().mean() > 0.2  # what mispaired draws would look like
    ratio = (new - old).exp()
    assert (ratio.mean() - 1).abs() <= 5 * ratio.std() / ratio.numel() ** 0.5  # the engine sampled these tokens


def test_rows_are_spread_over_the_recording(recorded):
    assert recording.recorded_rows(4).tolist() == [0, 640, 1280, 1920]
    assert recorded.topics[recording.recorded_rows(256)].bincount().tolist() == [64] * 4


def test_the_engines_are_further_off_the_fewer_bits_they_have(recorded):
    gaps = [(recorded.logprobs[name] - recorded.logprobs["fp32"]).abs().mean().item() for name in recording.ENGINES]
    assert gaps == sorted(gaps)


@needs_head
def test_inputs_are_recorded_rows(recorded):
    inputs = make_inputs("real_code", Shape(7, smollm.HIDDEN, smollm.VOCAB), dtype=torch.bfloat16)
    rows = recording.recorded_rows(7, "code")
    assert (recorded.topics[rows] == recording.TOPICS.index("code")).all() and len(rows.unique()) == 7
    assert torch.equal(inputs.targets, recorded.targets[rows])
    assert torch.equal(inputs.hidden, recorded.hidden[rows].bfloat16())
    assert torch.equal(inputs.old_logprobs, recorded.logprobs["fp8"][rows])
    assert inputs.weight.dtype == torch.bfloat16 and inputs.entropies.shape == (7,)
    assert [name for name in KINDS if name.startswith("real_")] == [f"real_{topic}" for topic in recording.TOPICS]


@needs_head
@pytest.mark.parametrize(
    "shape, options, message",
    [
        (Shape(7, 64, smollm.VOCAB), {}, "got V=49152, H=64"),
        (Shape(7, smollm.HIDDEN, smollm.VOCAB), {"softcap": 30.0}, "softcap=30.0"),
        (Shape(10_000, smollm.HIDDEN, smollm.VOCAB), {}, "not 10000"),
    ],
)
def test_inputs_that_were_not_recorded(shape, options, message):
    with pytest.raises(ValueError, match=message):
        make_inputs("real", shape, **options)


@needs_head
def test_the_contract_s_bars_are_met_on_real_rows():
    """These are the bars of the default path in the records of the precision study."""
    records = read(ROOT / "bench_results" / "smollm" / "precision.jsonl")
    bars = precision_tables.of_kind(records, "bar")
    assert len(bars) == 8 and all(bar["met"] for bar in bars)
    case = regimes.REGIMES["real"].case(Shape(16, smollm.HIDDEN, smollm.VOCAB))
    exact = regimes.exact_result(case)
    error = (regimes.ours(case).logprobs.double() - exact.result.logprobs).abs().max()
    assert error <= 3 * (smollm.HIDDEN + 10) * 2**-24 * exact.largest_sum


@needs_head
def test_hidden_states_are_those_that_sampled_the_targets():
    """Over tokens that π samples the mean of log π is minus the mean entropy; another row's hidden states, or the next
    ones, would give log-probs of -8 and less.
    """
    inputs = make_inputs("real", Shape(512, smollm.HIDDEN, smollm.VOCAB))
    surplus = inputs.logprobs(inputs.hidden @ inputs.weight.T) + inputs.entropies
    assert surplus.mean().abs() <= 5 * surplus.std() / 512**0.5


# --- engines ----------------------------------------------------------------------------------------------------------


def test_int4_has_sixteen_values_a_group():
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    before, after = (w.unflatten(1, (-1, quantization.GROUP)) for w in (weight, quantization.int4(weight)))
    steps = (before.amax(-1) - before.amin(-1)) / 15
    assert all(len(group.unique()) <= 16 for row in after for group in row)
    assert ((after - before).abs().amax(-1) <= steps / 2 * (1 + 1e-5)).all()


def test_fp8_rounds_within_its_mantissa():
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)) * 10
    error = (quantization.fp8(x) - x).abs()
    smallest = x.abs().amax(-1, keepdim=True) / 448 * 2.0**-6  # below it numbers are subnormal
    assert (error <= torch.maximum(x.abs(), smallest) * 2.0**-4).all() and error.max() > 0


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("name", recording.ENGINES)
def test_an_engine_leaves_the_model_alone(name):
    model = tiny_llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made, ids = engines.engine(name, model), torch.arange(8)[None]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert torch.equal(made.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert torch.equal(made.lm_head.weight, model.lm_head.weight.bfloat16())  # the head is not quantised
    changed = not torch.equal(
        made.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight.bfloat16()
    )
    assert changed == (name != "bf16")
    with torch.no_grad():
        gap = (made(ids).logits.float() - model(ids).logits).abs().max()
    assert 0 < gap < 0.2


# --- entries ----------------------------------------------------------------------------------------------------------


def test_entries_needed():
    """The target has half of the probability, and 0.4, 0.3, 0.2 and 0.1 are the shares of the other half."""
    shares = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    inputs = Inputs(torch.ones(1, 1), shares.log()[:, None], torch.tensor([0]), *torch.zeros(2, 1))
    needed = [sparsity.entries_needed(inputs, tolerance).item() for tolerance in (0.0, 0.09, 0.11, 0.31, 0.61)]
    assert needed == [4, 4, 3, 2, 1]


@needs_head
def test_as_many_rows_are_sparse_as_need_few_entries():
    """The package keeps whole levels of probability, so that a row may have a few entries more than it needs."""
    inputs = make_inputs("real", Shape(64, smollm.HIDDEN, smollm.VOCAB))
    leaves = [x.requires_grad_() for x in (inputs.hidden, inputs.weight)]
    out = linear_policy_loss(*leaves, inputs.targets, inputs.old_logprobs, inputs.advantages, sparse_grad=0.01)
    needed = sparsity.entries_needed(inputs, 0.01)
    limit = sparsity_tables.entry_limit(smollm.VOCAB, "cpu")
    few, at_most = (needed <= limit * 0.8).double().mean(), (needed <= limit).double().mean()
    assert few <= out.metrics["drpo/sparse_share"].item() <= at_most


# --- the recorder -----------------------------------------------------------------------------------------------------


def test_the_recorder_pairs_hidden_states_with_the_tokens_they_predict():
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    found = [(torch.randint(64, (9,), generator=generator), 4), (torch.randint(64, (6,), generator=generator), 2)]
    with torch.no_grad():
        logp = recorder.log_softmax(model, recorder.hidden_states(model, found))
        whole = [model(ids[None]).logits[0].log_softmax(-1) for ids, _ in found]
    targets = torch.cat([ids[start:] for ids, start in found])
    wanted = [
        whole[i][place - 1, ids[place]] for i, (ids, start) in enumerate(found) for place in range(start, len(ids))
    ]
    assert len(logp) == len(targets) == 5 + 4
    torch.testing.assert_close(logp.gather(1, targets[:, None])[:, 0], torch.stack(wanted))


def test_the_recorder_takes_no_more_answers_than_it_needs(monkeypatch):
    monkeypatch.setattr(recorder, "ROWS", 7)
    answers = [(torch.zeros(10), 6), (torch.zeros(5), 2), (torch.zeros(9), 1)]
    assert [len(ids) for ids, _ in recorder.enough(iter(answers))] == [10, 5]


# --- tables and pictures ----------------------------------------------------------------------------------------------


COUNT = 20_000


def made_up_recording():
    """Return a recording of tokens of all probabilities, whose log-probs are all as far from the trainer's."""
    old = torch.linspace(-9.0, -0.01, COUNT)[:, None]
    drawn = {name: (old, old + off * torch.tensor([1.0, -1.0]).repeat(COUNT // 2)[:, None]) for name, off in
             zip(recording.ENGINES, (0.001, 0.01, 0.1), strict=True)}  # fmt: skip
    return recording.recorded()._replace(drawn=drawn)


def test_engines_by_probability():
    records = [record | {"regime": "real"} for record in mismatch.measure_engines(made_up_recording())]
    assert [record["engine"] for record in records] == list(recording.ENGINES)
    for record, off in zip(records, (0.001, 0.01, 0.1), strict=True):
        assert record["all"]["tokens"] == COUNT == sum(b["tokens"] for b in record["bins"]) + few(record)
        assert record["all"]["log_ratio"] == pytest.approx([off] * 3, rel=1e-2)
        assert record["bins"][0]["ratio"][2] == pytest.approx(torch.expm1(torch.tensor(off)).item(), rel=1e-2)
        rarest = record["bins"][0]
        assert rarest["prob_shift"][2] <= rarest["to"] * torch.expm1(torch.tensor(off)).item() * 1.01
        shifts = [b["prob_shift"][0] for b in record["bins"]]
        assert shifts == sorted(shifts)  # |π - μ| grows with μ where |r - 1| is the same for all


def few(record):
    """Return the number of tokens that lie in ranges with fewer than `LEAST`."""
    old = made_up_recording().drawn[record["engine"]][0].exp()
    inside = [((b["from"] <= old) & (old < b["to"])).sum().item() for b in record["bins"]]
    return COUNT - sum(inside)


def test_the_pages_show_the_records():
    for name in (
        "precision-real",
        "precision-engines",
        "sparse-verdict",
        "sparse-real",
        "sparse-tails",
        "real-speed",
        "cpu",
        "demo-llm",
        "demo-groups",
    ):
        block = report.BLOCKS[name]
        text = block.render(read(ROOT / "bench_results" / block.results))
        assert text in (ROOT / block.page).read_text(encoding="utf-8"), block.name


def test_the_first_line_of_the_page_is_the_verdict():
    lines = (ROOT / "docs" / "sparse.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and lines[2] == report.BLOCKS["sparse-verdict"].markers[0]


@pytest.mark.parametrize("spent, word", [(0.7, "pays"), (1.1, "does not pay")])
def test_verdict(spent, word):
    def timed(kind, method, seconds, share):
        metrics = {"drpo/sparse_share": share}
        shape = {"tokens": 4, "hidden": 2, "vocab": 8}
        return {
            "part": "real", "inputs": kind, "method": method, "median_s": seconds, "metrics": metrics, "shape": shape,
            "active_share": 1.0, "dtype": "float32", "workload": "SmolLM2-135M", "takes": "hidden",
            "floor_median_s": 1.0, "held_to": "gemms_whole", "command": "", "date": "", "device": {"cores": 2},
            "entropy_nats": 2.04,
        }  # fmt: skip

    records = []
    for kind, factor in (("real", spent), ("real_sums", 0.5), ("real_prose", 1.2)):
        records.append(timed(kind, sparsity_tables.DENSE, 1.0, 0.0))
        records.append(timed(kind, sparsity_tables.SPARSE, factor, 0.25))
        records.append(timed(kind, sparsity_tables.TIGHT, 1.3, 0.125))
    text = unpadded(sparsity_tables.render_verdict(records))
    assert f"a sparse gradient {word} on a CPU" in text and "2 CPU cores, a mean entropy of 2.0 nat" in text
    assert (
        f"at τ = 0.01 25% of the rows are sparse, and a call takes {spent:.2f}× the dense path's time (sums 0.50×, "
        in text
    )
    assert "a call takes 1.30× the dense path's time (sums 1.30×, prose 1.30×)" in text


def test_picture(tmp_path):
    source = {"kind": "run", "device": {"cpu": "any"}, "commit": "0" * 40, "dirty": False, "date": "2026-01-01"}
    records = list(mismatch.measure_engines(made_up_recording()))
    figure = engine_plots.engines_figure(records)
    for axes, quantity in zip(figure.axes, engine_plots.PANELS, strict=True):
        drawn = [line.get_ydata() for line in axes.get_lines()]
        wanted = [[b[quantity][place] for b in record["bins"]] for record in records for place in (1, 0)]
        assert [list(line) for line in drawn] == wanted
    engine_plots.draw([source, *records], tmp_path, "precision")
    assert (tmp_path / "engines.png").read_bytes().startswith(b"\x89PNG")


def test_rare_and_likely_tokens():
    record = next(mismatch.measure_engines(made_up_recording()))
    record["bins"] = [
        b | {"beyond": {"ratio": 0.5 if b["to"] <= 0.1 else 0.0, "prob_shift": 0.25 if b["from"] >= 0.7 else 0.0}}
        for b in record["bins"]
    ]
    text = precision_tables._rare_and_likely(record)
    assert "|r - 1| exceeds 0.2 on 50% of the tokens of μ under 0.1 and on 0 of those over 0.7" in text
    assert text.endswith("|π - μ| on 0 and 25%.")
