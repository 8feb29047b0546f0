"""`python -m benchmarks.smollm.training` trains SmolLM2 itself with several losses, stale and under a mismatch.

The task, the model and what is trained are those of `make demo-llm` (examples/smollm_arithmetic.py). It confirms, with
few seeds and a whole language model, what docs/stability.md measures with many seeds and the head alone.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import set_seed

from benchmarks.harness import cli
from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.quantization import int4
from benchmarks.harness.records import append, read
from drpo_kernels import Objective, linear_policy_loss
from drpo_kernels.demo.rollout import group_advantages
from drpo_kernels.integrations.trl import parse_objective
from examples import smollm_arithmetic as arithmetic
from examples.smollm import load

RESULTS = ROOT / "bench_results" / "smollm" / "training.jsonl"
UPDATES, QUICK_UPDATES, HELD_OUT = 48, 2, 100
CLIP = 1.0  # the norm of the gradient
OBJECTIVES = ("PolicyGradient()", "PPO()", "SPO()", "DRPO(delta=0.2)", "DRPO(delta=0.5)")


class Setting(NamedTuple):
    """`updates` for each rollout batch, each with a minibatch of its own; whether the head that samples has 4 bits."""

    updates: int = 1
    int4: bool = False


SETTINGS = {"16 updates": Setting(updates=16), "4-bit head": Setting(int4=True)}


class Minibatch(NamedTuple):
    """N completions of P prompt tokens and C sampled ones: ids and attention [N, P + C]; the rest [N, C], but [N]
    advantages and rewards.
    """

    ids: Tensor
    attention: Tensor
    targets: Tensor
    old_logprobs: Tensor
    mask: Tensor
    advantages: Tensor
    rewards: Tensor


@contextlib.contextmanager
def sampling_head(model: Any, weight: Tensor | None) -> Iterator[None]:
    """Let the model compute its logits with another weight of the head; its embeddings stay as they are."""
    own = model.lm_head.weight
    if weight is not None:
        model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        model.lm_head.weight = own


@torch.no_grad()
def sample(model: Any, tokenizer: Any, problems: Sequence[arithmetic.Sum], head: Tensor | None) -> Minibatch:
    """Sample a group of completions of each problem at temperature 1, with the log-probs of the head that sampled."""
    end = tokenizer.eos_token_id
    problems = [problem for problem in problems for _ in range(arithmetic.GROUP)]
    inputs = tokenizer([arithmetic.prompt(problem) for problem in problems], return_tensors="pt", padding=True)
    width = inputs["input_ids"].shape[1]
    with sampling_head(model, head):
        out = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, max_new_tokens=arithmetic.NEW_TOKENS, eos_token_id=end, pad_token_id=end,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    targets = out.sequences[:, width:]
    old = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    ended = targets == end
    mask = ended.long().cumsum(1) - ended.long() == 0  # up to and including the first end
    texts = tokenizer.batch_decode(targets, skip_special_tokens=True)
    completions = map(arithmetic.Completion, texts, ended.any(1).tolist())
    answers = map(arithmetic.answer_to, problems)
    rewards = torch.tensor(list(map(arithmetic.reward_of, completions, answers)))
    attention = torch.cat([inputs["attention_mask"], mask.long()], 1)
    return Minibatch(out.sequences, attention, targets, old, mask, group_advantages(rewards, arithmetic.GROUP), rewards)


def train(objective: Objective, setting: Setting, seed: int, updates: int, held_out: int) -> dict[str, Any]:
    """Return the sampled "rewards" of every minibatch, and the held-out shares "before" and "after" (`evaluate`)."""
    set_seed(seed)
    model, tokenizer = load()
    arithmetic.freeze(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arithmetic.LEARNING_RATE, weight_decay=0.0)
    head = int4(model.lm_head.weight.data) if setting.int4 else None
    problems, judged = arithmetic.split()
    evaluated = [arithmetic.evaluate(model, tokenizer, judged[:held_out], bf16=False)]
    rewards, shifts, rollout = [], [], []
    for update in tqdm(range(updates), unit="update", leave=False):
        if not rollout:
            count = min(setting.updates, updates - update)
            drawn = [torch.randperm(len(problems))[: arithmetic.PROMPTS] for _ in range(count)]
            rollout = [sample(model, tokenizer, [problems[i] for i in chosen], head) for chosen in drawn]
        batch = rollout.pop(0)
        hidden = model.model(batch.ids, attention_mask=batch.attention).last_hidden_state
        hidden = hidden[:, -batch.targets.shape[1] - 1 : -1]
        out = linear_policy_loss(
            hidden, model.lm_head.weight, batch.targets, batch.old_logprobs, batch.advantages, batch.mask,
            objective=objective,
        )  # fmt: skip
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        rewards.append(batch.rewards.mean().item())
        shifts.append(out.metrics["drpo/prob_shift_mean"].item())
    evaluated.append(arithmetic.evaluate(model, tokenizer, judged[:held_out], bf16=False))
    before, after = ({k: v for k, v in found.items() if k != "texts"} for found in evaluated)
    return {"rewards": rewards, "shifts": shifts, "before": before, "after": after}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that the file lacks. After an interruption the same command goes on."""
    parser = cli.parser("benchmarks.smollm.training", __doc__)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), metavar="TEXT", help="such as 'PPO()'")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: both")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    cli.add_quick(parser, "two updates")
    cli.add_out(parser, RESULTS)
    options = parser.parse_args(argv)
    path: Path | None = cli.results(options, RESULTS)
    updates, held_out = (QUICK_UPDATES, 4) if options.quick else (UPDATES, HELD_OUT)
    named = {"benchmark": "smollm_training", "updates": updates}
    jobs = [(s, o, seed) for seed in range(options.seeds) for s in options.settings for o in options.objectives]
    done = [(r["setting"], r["objective"], r["seed"]) for r in read(path) if r["updates"] == updates] if path else []
    for setting, text, seed in tqdm([job for job in jobs if job not in done], unit="run"):
        found = train(parse_objective(text), SETTINGS[setting], seed, updates, held_out)
        record = {**named, "setting": setting, "objective": text, "seed": seed, **found}
        if path is None:
            print(record)
        else:
            append(path, record | provenance(cli.command(parser, options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
