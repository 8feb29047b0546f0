"""On two processes our trainers give the runs of TRL's own trainers, and the recipe's launch command works."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16' peft")
from transformers import AutoModelForCausalLM

from launcher import launch, torchrun
from snippets import ROOT
from trl_async_runs import assert_same_logs
from trl_runs import WEIGHT_BOUND, close

RECIPES = ROOT / "docs" / "recipes"


def record_of(runs, folder):
    """Run our trainer beside TRL's on two processes, and return the record that they print."""
    status, output = torchrun(2, "trl_worker.py", runs, str(folder))
    assert status == 0, output[-12000:]
    return json.loads(next(line for line in output.splitlines() if line.startswith("RECORD "))[len("RECORD ") :])


def test_two_processes(tmp_path):
    """The run is TRL's on two processes, and the metrics are of both ranks' tokens."""
    record = record_of("synchronous", tmp_path)
    theirs, ours = record["theirs"], record["ours"]
    for name in set(theirs) - {"step_time", "epoch"}:
        assert close(ours[name], theirs[name]), f"{name}: {ours[name]} instead of {theirs[name]}"
    assert record["moved"] > 0 and record["ranks"] == 0
    assert record["weights"] <= WEIGHT_BOUND
    # A step's tokens are those of both micro-batches on both ranks.
    counts = [sum(ranks) for ranks in zip(*record["tokens"], strict=True)]
    assert ours["drpo/tokens"] == [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)]
    # This is a mean over tokens, while TRL logs a mean over micro-batches of their means.
    assert ours["drpo/entropy_mean"] == pytest.approx(theirs["entropy"], rel=0.02)


def test_two_asynchronous_processes(tmp_path):
    """The run is TRL's where the tokens of a step are on two ranks, and the metrics are of both ranks' tokens."""
    record = record_of("asynchronous", tmp_path)
    assert_same_logs(record["ours"], record["theirs"])
    assert record["weights"] <= WEIGHT_BOUND
    assert record["ours"]["drpo/tokens"] == record["theirs"]["batch/trained_tokens_per_step"]


def test_recipe(tmp_path):
    """The launch command of docs/recipes runs on two CPU processes, as written there but for the number of steps."""
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    written = next(part for part in text.split("accelerate launch ")[1:] if "--use_cpu" in part).split("```")[0]
    words = written.replace("\\\n", " ").split()
    words[words.index("--max_steps") + 1] = "3"
    words = [str(RECIPES / word) if (RECIPES / word).exists() else word for word in words]
    status, output = launch("accelerate.commands.launch", *words, "--output_dir", str(tmp_path / "out"))
    assert status == 0, output[-4000:]
    assert "'drpo/weight_mean'" in output and "'train_loss'" in output
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(p.isfinite().all() for p in saved.parameters())
