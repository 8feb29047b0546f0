"""SmolLM2-135M-Instruct learns to answer sums with just the number: GRPO with the DRPO loss, through TRL's trainer.

    make demo-llm                                       about 7 minutes on two CPU cores; uses the GPU if there is one
    python -m examples.smollm_arithmetic --quick        about a minute: everything runs, not much is learned
    python -m examples.smollm_arithmetic --help         the options

To train a model of your own on a task of your own, copy this file into the same folder and replace the constants, the
section "the task", `freeze` and `load`. Tables, pictures and the comparison with other losses are in smollm_report.py.
"""
# ruff: noqa: E402 (what the extra `llm` installs is looked for before it is imported)

from __future__ import annotations

import argparse
import os
import random
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("accelerate", "datasets", "gguf", "matplotlib", "rich", "tqdm", "transformers", "trl")

if missing := [name for name in PACKAGES if find_spec(name) is None]:
    print(f"error: this example needs {', '.join(missing)}: pip install '.[llm]'", file=sys.stderr)
    raise SystemExit(2)
if not __package__:  # `python examples/smollm_arithmetic.py` looks for imports in examples/
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # one GPU: transformers' trainer would split a batch over several
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]

import torch
from datasets import Dataset
from rich.console import Console
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed

from drpo_kernels import Objective
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer, parse_objective
from examples import smollm_report as report
from examples.smollm import load

LARGEST, HELD_OUT = 20, 100  # operands are 1 to 20; 100 of the 400 sums are never trained on
PROMPTS, GROUP, NEW_TOKENS = 8, 8, 6  # a rollout: 8 sums, 8 completions each, of at most 6 tokens
UPDATES = 2  # optimizer steps on each rollout; in the second the policy π has moved away from the sampler μ
LAYERS = 10  # the last ones, which are trained
LEARNING_RATE = 2e-5
STEPS, QUICK_STEPS, QUICK_HELD_OUT = 20, 2, 20
LEAST_GAIN = 0.15  # of the greedy accuracy on held-out sums

NEXT = """
Next: --objective "PPO()" trains with GRPO's usual loss on the same sums. For a
task and a model of your own, copy examples/smollm_arithmetic.py, which says
what to replace. docs/integrations/trl.md has all options."""

NAME, TASK = "SmolLM2-135M-Instruct", "answer sums like 7 + 12 with just the number"
Sum = tuple[int, int]


class Completion(NamedTuple):
    text: str
    ended: bool  # with the end token, within NEW_TOKENS tokens


# --- the task: prompts, held-out sums, the reward ---------------------------------------------------------------------


def prompt(problem: Sum) -> str:
    """The model's chat format, with the answer begun: this small a model would otherwise talk about the sum."""
    left, right = problem
    return f"<|im_start|>user\nWhat is {left} + {right}?<|im_end|>\n<|im_start|>assistant\n{shown(problem)}"


def shown(problem: Sum) -> str:
    """The end of the prompt, which stands beside the completions in the table of transcripts."""
    left, right = problem
    return f"{left} + {right} ="


def answer_to(problem: Sum) -> int:
    return sum(problem)


def split() -> tuple[list[Sum], list[Sum]]:
    """Return (sums to train on, held-out sums). The split does not depend on the seed, so that runs compare."""
    sums = [(left, right) for left in range(1, LARGEST + 1) for right in range(1, LARGEST + 1)]
    random.Random(0).shuffle(sums)
    return sums[HELD_OUT:], sums[:HELD_OUT]


def reward_of(completion: Completion, answer: int) -> float:
    """1 if the completion is exactly the number and has ended, else 0."""
    return float(completion.ended and completion.text.strip() == str(answer))


def begins_right(completion: Completion, answer: int) -> bool:
    """Whether the right number comes first, whatever follows. It is reported beside the reward and not trained on."""
    first = re.match(r"\d+", completion.text.strip())
    return first is not None and first[0] == str(answer)


# --- evaluation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def complete(model: Any, tokenizer: Any, problems: Sequence[Sum], bf16: bool, sample: bool) -> list[Completion]:
    """One completion of each problem: sampled from the unfiltered softmax at temperature 1, or the likeliest tokens."""
    end = tokenizer.eos_token_id
    inputs = tokenizer([prompt(problem) for problem in problems], return_tensors="pt", padding=True)
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    training = model.training
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        ids = model.generate(**inputs, **sampling, max_new_tokens=NEW_TOKENS, eos_token_id=end, pad_token_id=end)
    model.train(training)
    ids = ids[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [Completion(text, bool((row == end).any())) for text, row in zip(texts, ids, strict=True)]


def evaluate(model: Any, tokenizer: Any, problems: Sequence[Sum], bf16: bool) -> dict[str, Any]:
    """Shares of the problems: "exact" and "lenient" of greedy completions, which are in "texts"; "reward" sampled."""
    answers = [answer_to(problem) for problem in problems]
    greedy = complete(model, tokenizer, problems, bf16, sample=False)
    sampled = complete(model, tokenizer, problems, bf16, sample=True)

    def share(rule: Any, completions: list[Completion]) -> float:
        return sum(map(rule, completions, answers)) / len(answers)

    return {
        "exact": share(reward_of, greedy),
        "lenient": share(begins_right, greedy),
        "reward": share(reward_of, sampled),
        "texts": [completion.text + ("" if completion.ended else " ...") for completion in greedy],
    }


# --- training ---------------------------------------------------------------------------------------------------------


def freeze(model: Any) -> str:
    """Leave only the last layers and the final norm trainable, and say so.

    A third of the layers is enough here, and their backward takes a third of the time. The embeddings, which are the
    head too, stay frozen: a gradient and AdamW's two moments would be three more copies of the largest matrix.
    """
    layers = model.model.layers[-LAYERS:]
    model.requires_grad_(False)
    for module in (*layers, model.model.norm):
        module.requires_grad_(True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return (
        f"Trained: the last {len(layers)} of {len(model.model.layers)} layers and the final norm, {trained:,} of\n"
        f"{model.num_parameters():,} parameters, for a short backward. The embeddings,\n"
        "which are the head too, stay frozen."
    )


class Trainer(DRPOTrainer):
    """`DRPOTrainer` that keeps the last batch with a gradient, for the comparison in smollm_report.py."""

    last_batch: dict[str, Any] | None = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.last_batch is None or inputs["advantages"].any():  # a batch without advantages has no gradient
            self.last_batch = inputs
        return super().compute_loss(model, inputs, *args, **kwargs)


class Progress(TrainerCallback):
    """One progress bar, and a list of what TRL logged: a dictionary per optimizer step."""

    def __init__(self, steps: int):
        self.bar = tqdm(total=steps, desc="GRPO", unit="update")
        self.history: list[dict[str, float]] = []
        self.reward = 0.0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" not in logs:  # the summary at the end
            return
        self.history.append({"step": state.global_step, **logs})
        if "reward" in logs:  # the first update of a rollout; the running reward is over about five rollouts
            self.reward += (logs["reward"] - self.reward) * (1.0 if len(self.history) == 1 else 0.2)
        self.bar.set_postfix_str(f"running reward {self.reward:.2f}, entropy {logs['entropy']:.2f}")
        self.bar.update()

    def on_train_end(self, *args, **kwargs):
        self.bar.close()


def make_trainer(model: Any, tokenizer: Any, problems: Sequence[Sum], options: argparse.Namespace) -> Trainer:
    """TRL's GRPO with this package's loss. Every option but `objective` is TRL's own."""
    config = DRPOConfig(
        output_dir=str(options.out), objective=options.objective, seed=options.seed,
        max_steps=options.steps * UPDATES, num_iterations=UPDATES, steps_per_generation=1,
        per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP, max_completion_length=NEW_TOKENS,
        temperature=1.0, top_k=0, top_p=1.0,  # unfiltered: only then is π/μ a ratio of like things
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", beta=0.0, loss_type="dapo",
        use_cpu=options.device == "cpu", bf16=options.bf16, gradient_checkpointing=False,
        logging_steps=1, disable_tqdm=True, report_to="none", save_strategy="no",
    )  # fmt: skip
    end = tokenizer.eos_token_id

    def reward(completions: list[str], completion_ids: list[list[int]], answer: list[int], **_) -> list[float]:
        found = [Completion(text, ids[-1] == end) for text, ids in zip(completions, completion_ids, strict=True)]
        return [reward_of(*pair) for pair in zip(found, answer, strict=True)]

    data = Dataset.from_list([{"prompt": prompt(problem), "answer": answer_to(problem)} for problem in problems])
    trainer = Trainer(model, reward, config, data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)  # it prints a dictionary per step
    return trainer


def run(options: argparse.Namespace) -> int:
    """Evaluate, train, evaluate, compare, and write the record and the picture -> exit status."""
    console, clock = Console(), report.Clock()
    dtype = "bfloat16 autocast" if options.bf16 else "float32"
    problems, held_out = split()
    held_out = held_out[:QUICK_HELD_OUT] if options.quick else held_out
    duration = f". Two cores take {0.8 + 0.3 * options.steps:.0f} min" if options.device == "cpu" else ""
    console.print(
        f"{NAME} learns to {TASK}.\n"
        f"GRPO with {options.objective}: {options.steps} rollouts of {PROMPTS} prompts x {GROUP} completions,\n"
        f"{UPDATES} updates on each. {len(held_out)} problems are held out for evaluation.\n"
        f"On {report.device_name(options.device)}, in {dtype}{duration}.",
        highlight=False,
    )
    set_seed(options.seed)
    try:
        # Of your own: a float32 model with .model and .lm_head, and a tokenizer with padding_side="left" and the
        # eos_token that ends an answer.
        model, tokenizer = load()
    except (OSError, RuntimeError) as error:  # pip could not download it, or there is no place for it
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(freeze(model), highlight=False)
    trainer = make_trainer(model, tokenizer, problems, options)
    clock.lap("load")
    before = evaluate(model, tokenizer, held_out, options.bf16)
    clock.lap("evaluate before")
    trainer.add_callback(progress := Progress(options.steps * UPDATES))
    with logging_redirect_tqdm():  # what `diagnose` says of a batch goes above the bar
        trainer.train()
    clock.lap("train")
    after = evaluate(model, tokenizer, held_out, options.bf16)
    clock.lap("evaluate after")
    console.print(report.accuracy_table(before, after, len(held_out)))
    console.print(report.transcripts([shown(problem) for problem in held_out], before, after))

    title = f"{NAME}, {options.objective}, seed {options.seed}"
    report.plot_run(progress.history, UPDATES, before, after, title, options.out / "run.png")
    header = report.header(options.command, options.device, {
        "model": NAME, "objective": str(options.objective), "seed": options.seed,
        "steps": options.steps, "updates": UPDATES, "prompts": PROMPTS, "group": GROUP, "new_tokens": NEW_TOKENS,
        "learning_rate": LEARNING_RATE, "layers": LAYERS, "dtype": dtype,
    })  # fmt: skip
    results = {"before": report.numbers(before), "after": report.numbers(after), "seconds": clock.seconds}
    report.write_history(options.out / "history.jsonl", header, progress.history, results)

    batch = report.batch_of(model, trainer.last_batch, options.objective)
    compared = report.compare_losses(batch, options.bf16, repeats=1 if options.quick else 5)
    console.print(report.comparison_table(batch, compared))
    clock.lap("compare")
    results["losses"] = [found._asdict() for found in compared]
    report.write_history(options.out / "history.jsonl", header, progress.history, results)
    console.print(f"{clock.total():.0f} s in all. Written into {options.out}: run.png and history.jsonl.")
    console.print(NEXT, highlight=False)
    return verdict(after["exact"] - before["exact"], compared, options.quick)


def verdict(gain: float, compared: Sequence[report.Compared], quick: bool) -> int:
    """0 if the held-out accuracy rose and the losses agree; else 1, with the reasons on stderr."""
    head = {True: "a trained head", False: "a frozen head"}
    failures = [
        f"with {head[found.trained_head]}, {found.name} has another gradient than linear_policy_loss"
        for found in compared
        if not found.agrees
    ]
    if quick:
        print("--quick is too short to learn much: no gain was asked for.")
    elif gain < LEAST_GAIN:
        failures.append(
            f"the greedy accuracy on held-out sums changed by {100 * gain:+.0f} points; at least "
            f"{100 * LEAST_GAIN:+.0f} was expected"
        )
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    report.be_quiet()
    return run(options)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{Path(__file__).stem}", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--steps", type=_at_least(1), help=f"rollouts, of {UPDATES} updates each (default: {STEPS})")
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, help="of the problems' order and the sampling (default: 0)"
    )
    parser.add_argument("--objective", type=_objective, default="DRPO(delta=0.2)", metavar="TEXT",
                        help="the policy loss, such as 'PPO()' (default: DRPO(delta=0.2))")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one, else cpu")
    parser.add_argument("--out", type=Path, default=Path("demo_llm_out"), help="folder (default: demo_llm_out)")
    parser.add_argument("--quick", action="store_true", help="about a minute: too short to learn, no gain is asked for")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu on this machine: PyTorch finds no CUDA device")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out must be a folder, got the file {options.out}")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    options.bf16 = fast_bf16(options.device)
    words = ["--steps", str(options.steps), "--seed", str(options.seed), "--objective", str(options.objective)]
    options.command = f"{parser.prog} {shlex.join(words + ['--quick'] * options.quick)}"
    return options


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return number


def _objective(text: str) -> Objective:
    try:
        return parse_objective(text)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def fast_bf16(device: str) -> bool:
    """Whether bf16 autocast is worth it: on a GPU that has it, and on a CPU with instructions for its products."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


if __name__ == "__main__":
    sys.exit(main())
