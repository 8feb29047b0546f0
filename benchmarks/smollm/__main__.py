"""`python -m benchmarks.smollm` records what SmolLM2-135M computes while it answers, for all studies of real inputs.

The float32 model samples answers at temperature 1 without any filter. Then it and every rollout engine of `engines`
score these answers; each engine also samples tokens of its own after every context. docs/benchmarks.md says more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import cli
from benchmarks.harness.progress import Progress
from benchmarks.harness.provenance import provenance
from benchmarks.harness.recording import ENGINES, RECORDING, TOPICS, Recording, write
from benchmarks.harness.records import write as write_records
from benchmarks.smollm.engines import engine
from benchmarks.smollm.prompts import PROMPTS
from examples.smollm import PACKAGE, load

ROWS, LENGTH, DRAWS = 640, 48, 12  # tokens of a topic, the most tokens of an answer, draws after each context
TOP = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # the whole softmax


def answers(model: Any, tokenizer: Any, topic: str) -> Iterator[tuple[Tensor, int]]:
    """Yield (the tokens of a prompt and its sampled answer [L], the number of tokens of the prompt)."""
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[topic]]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    ids = model.generate(**batch, **TOP, max_new_tokens=LENGTH, pad_token_id=tokenizer.pad_token_id)
    width = batch.input_ids.shape[1]
    for row, mask in zip(ids, batch.attention_mask, strict=True):
        answer = row[width:]
        ends = (answer == tokenizer.eos_token_id).nonzero()
        length = ends[0, 0].item() + 1 if len(ends) else len(answer)
        prompt = row[:width][mask.bool()]
        yield torch.cat([prompt, answer[:length]]), len(prompt)


def enough(found: Iterable[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
    """Return the first answers that have `ROWS` tokens together, or all of them."""
    chosen, count = [], 0
    for ids, start in found:
        if count >= ROWS:
            break
        chosen.append((ids, start))
        count += len(ids) - start
    return chosen


def hidden_states(model: Any, found: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Return the hidden states that predict the answers' tokens, [T, 576], one answer at a time."""
    parts = [model.model(ids[None]).last_hidden_state[0, start - 1 : -1] for ids, start in found]
    return torch.cat(parts)


def log_softmax(model: Any, hidden: Tensor) -> Tensor:
    """Return the log-probs of the whole vocabulary as float32; the logits are in the model's own dtype."""
    return model.lm_head(hidden).float().log_softmax(-1)


@torch.no_grad()
def record(seed: int = 0) -> Recording:
    torch.manual_seed(seed)
    model, tokenizer = load()
    progress = Progress(len(TOPICS) * (2 + len(ENGINES)))
    sampled, targets = {}, {}
    for topic in TOPICS:
        progress.say(f"sampling {topic}")
        sampled[topic] = enough(answers(model, tokenizer, topic))
        targets[topic] = torch.cat([ids[start:] for ids, start in sampled[topic]])[:ROWS]
        progress.advance()
    parts: dict[str, list[Tensor]] = {"hidden": [], "fp32": []}
    for topic in TOPICS:
        progress.say(f"float32, {topic}")
        hidden = hidden_states(model, sampled[topic])[:ROWS]
        parts["hidden"].append(hidden)
        parts["fp32"].append(log_softmax(model, hidden).gather(1, targets[topic][:, None])[:, 0])
        progress.advance()
    for name in ENGINES:
        quantized = engine(name, model)
        for topic, own in zip(TOPICS, parts["hidden"], strict=True):
            progress.say(f"{ENGINES[name]}, {topic}")
            logp = log_softmax(quantized, hidden_states(quantized, sampled[topic])[:ROWS])
            drawn = torch.multinomial(logp.exp(), DRAWS, replacement=True)
            found = {name: logp.gather(1, targets[topic][:, None])[:, 0], f"{name} old": logp.gather(1, drawn)}
            found[f"{name} new"] = log_softmax(model, own).gather(1, drawn)
            for key, value in found.items():
                parts.setdefault(key, []).append(value)
            progress.advance()
    progress.close()
    whole = {key: torch.cat(value) for key, value in parts.items()}
    return Recording(
        whole["hidden"].half(),
        torch.cat(list(targets.values())),
        torch.arange(len(TOPICS)).repeat_interleave(torch.tensor([len(targets[topic]) for topic in TOPICS])),
        {name: whole[name] for name in ("fp32", *ENGINES)},
        {name: (whole[f"{name} old"], whole[f"{name} new"]) for name in ENGINES},
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("benchmarks.smollm", __doc__)
    cli.add_out(parser, RECORDING, "the recording")
    options = parser.parse_args(argv)
    out = options.out or RECORDING
    source = provenance(cli.command(parser, options))
    recording = record()
    write(recording, out)
    origin = {"benchmark": "smollm", "model": PACKAGE, "tokens": len(recording.targets), "draws": DRAWS, **source}
    write_records(out.with_suffix(".jsonl"), [origin])
    return 0


if __name__ == "__main__":
    sys.exit(main())
