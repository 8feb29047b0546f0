"""DRPOTrainer says what its metrics show once in training and once in evaluation, but not
what holds by construction.
"""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16' peft")
from transformers import TrainerCallback

import tiny_trl
from drpo_kernels.integrations import trl_objective
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer

NO_ADVANTAGE = "All advantages are 0"


class Counter(TrainerCallback):
    step = 0

    def on_step_end(self, args, state, control, **_):
        self.step = state.global_step


@pytest.mark.parametrize(
    "evaluated, breaks, training, evaluation",
    [(None, 1, 1, 0), (1, 1, 1, 0), (4, 1, 1, 1), (4, 0, 1, 1), (1, 9, 0, 0), (4, 9, 0, 0)],
)
def test_advantages_that_vanish(evaluated, breaks, training, evaluation, tmp_path, caplog):
    """`evaluated` is the number of completions per prompt in evaluation; a single one has no advantage. After `breaks`
    steps all rewards are equal.
    """
    counter = Counter()

    def reward(completions, **_):
        return tiny_trl.letter_share(completions) if counter.step < breaks else [0.0] * len(completions)

    options, data = {}, {}
    if evaluated is not None:
        options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
        options["num_generations_eval"], data["eval_dataset"] = evaluated, tiny_trl.dataset(4)
    args = tiny_trl.arguments(DRPOConfig, tmp_path, max_steps=4, **options)
    trainer = tiny_trl.trainer(
        DRPOTrainer, args, tiny_trl.model(), reward_funcs=reward, callbacks=[counter], **data
    )  # fmt: skip
    trainer.train()
    said = [record.getMessage() for record in caplog.records if NO_ADVANTAGE in record.getMessage()]
    assert len([sentence for sentence in said if sentence.startswith(NO_ADVANTAGE)]) == training
    assert len([sentence for sentence in said if sentence.startswith("In evaluation: ")]) == evaluation


def test_evidence_is_not_logged(tmp_path, monkeypatch):
    """Metrics that only `diagnose` needs go to it and not into the log."""
    given = []
    monkeypatch.setattr(trl_objective, "diagnose", lambda values, seen: given.append(values) or [])
    logs = tiny_trl.run(
        tiny_trl.trainer(DRPOTrainer, tiny_trl.arguments(DRPOConfig, tmp_path, max_steps=1), tiny_trl.model())
    )
    assert given[0]["drpo/evidence/misfit"] >= 0
    assert "drpo/weight_mean" in logs and not any("evidence" in name for name in logs)
