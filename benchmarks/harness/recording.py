"""A recording of a real language model: what SmolLM2-135M computed while it sampled its own answers at temperature 1.

`python -m benchmarks.smollm` makes the file. It holds what a head is given, but not the head: that is downloaded with
the model (`examples.smollm.load_head`).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.provenance import ROOT

RECORDING = ROOT / "bench_results" / "smollm" / "recording.npz"
TOPICS = ("sums", "code", "prose", "chat")  # what the model was asked for
# The rollout engines, from the most precise: what each computes with. The head is in bf16 in all of them.
ENGINES = {"bf16": "bf16", "fp8": "fp8 weights and activations", "int4": "int4 weights, bf16 activations"}


class Recording(NamedTuple):
    """The first tokens of answers that the model sampled in float32: T tokens, a quarter of each topic.

    hidden        [T, 576] float16, what the head is given
    targets       [T] int64, the tokens
    topics        [T] int64, places in `TOPICS`
    logprobs      {"fp32": the model's, then those of each of `ENGINES`: log-probs of the targets [T] float32}
    drawn         {engine: (log μ, log π)}, [T, K] float32 each: the log-probs, by the engine and by the float32 model,
                  of K tokens that the engine samples after each context
    """

    hidden: Tensor
    targets: Tensor
    topics: Tensor
    logprobs: dict[str, Tensor]
    drawn: dict[str, tuple[Tensor, Tensor]]


@functools.cache
def recorded(path: Path = RECORDING) -> Recording:
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    names = ("fp32", *ENGINES)
    drawn = {name: (arrays[f"drawn_by_{name}"], arrays[f"drawn_by_{name}_in_fp32"]) for name in ENGINES}
    targets, topics = arrays["targets"].long(), arrays["topics"].long()
    return Recording(arrays["hidden"], targets, topics, {name: arrays[f"logprobs_{name}"] for name in names}, drawn)


def recorded_rows(count: int, topic: str | None = None) -> Tensor:
    """Return the places of `count` tokens, spread evenly over the recording or over one of `TOPICS`.

    Raises ValueError where there are fewer.
    """
    topics = recorded().topics
    places = torch.arange(len(topics)) if topic is None else (topics == TOPICS.index(topic)).nonzero()[:, 0]
    if count > len(places):
        raise ValueError(f"the recording has {len(places)} tokens{f' of {topic}' if topic else ''}, not {count}")
    return places[torch.arange(count) * len(places) // count]


def write(recording: Recording, path: Path) -> None:
    """Write the file; `recorded` reads it."""
    arrays = {
        "hidden": recording.hidden,
        "targets": recording.targets.to(torch.uint16),
        "topics": recording.topics.to(torch.uint8),
        **{f"logprobs_{name}": logprobs for name, logprobs in recording.logprobs.items()},
    }
    for name, (old, new) in recording.drawn.items():
        arrays |= {f"drawn_by_{name}": old, f"drawn_by_{name}_in_fp32": new}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in arrays.items()})
