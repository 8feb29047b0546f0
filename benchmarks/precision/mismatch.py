"""Rollout engines against trainers with the same weights: how far the ratio is from 1 before any update.

`measure_engines` compares whole models, from the recording of SmolLM2 (see `benchmarks.smollm.engines`).

`measure_mismatch` compares heads. Its engine is emulated: it multiplies fp8 operands with a scale per row, 128 channels
at a time, and adds these products in float32, an order of additions that no trainer here shares. Its logits are float32
or, as in most engines, bf16.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness.recording import Recording
from benchmarks.harness.records import Record
from benchmarks.harness.workloads import Inputs
from drpo_kernels import linear_token_logprobs
from drpo_kernels.backends.quantize import FORMATS, per_row

FORMAT = "fp8_e4m3"
SPLIT = 128
# Each pair says whether the engine quantises hidden states, and whether it quantises the weight.
QUANTIZED = {"nothing": (False, False), "weight": (False, True), "hidden": (True, False), "both": (True, True)}
LOGITS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Ranges of μ, and the least number of tokens that are described.
EDGES, LEAST = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 0.7, 0.9, 0.99, 2.0), 200
BOUND = 0.2  # PPO's usual bound on |r - 1|, and DPPO's and DRPO's on |π - μ|
TRAINERS = {
    "bf16": {},
    "bf16, bf16 logits": {"logits_dtype": torch.bfloat16},
    "fp8 head": {"head_dtype": FORMAT},
    "fp8 head, bf16 logits": {"head_dtype": FORMAT, "logits_dtype": torch.bfloat16},
}


def engine_logprobs(case: Inputs, quantized: str, logits: str) -> Tensor:
    """Return log μ [T] of the targets in the emulated engine."""
    operands = zip((case.hidden, case.weight), QUANTIZED[quantized], strict=True)
    (hidden, row), (weight, channel) = (
        per_row(x, FORMATS[FORMAT]) if quantize else (x, x.new_ones(1, 1, dtype=torch.float32))
        for x, quantize in operands
    )
    pairs = zip(hidden.float().split(SPLIT, 1), weight.float().split(SPLIT, 1), strict=True)
    total = sum(x @ w.T for x, w in pairs)
    return case.logprobs(case.biased(total * row * channel.T).to(LOGITS[logits]).float())


def trainer_logprobs(case: Inputs, trainer: str) -> Tensor:
    """Return log π [T] of the same weights in our head."""
    options = case.transform | TRAINERS[trainer]
    return linear_token_logprobs(case.hidden, case.weight, case.targets, **options)[0]


def measure_mismatch(case: Inputs) -> Iterator[Record]:
    """Yield a record per engine. For every trainer it holds max, p99 and mean of |r - 1| over
    tokens, and max |π - μ|.
    """
    trainers = {name: trainer_logprobs(case, name).double() for name in TRAINERS}
    for quantized in QUANTIZED:
        for logits in LOGITS:
            old = engine_logprobs(case, quantized, logits).double()
            found = {}
            for name, logp in trainers.items():
                ratio = torch.expm1((logp - old).clamp(-20.0, 20.0)).abs()
                shift = (logp.exp() - old.exp()).abs()
                values = ratio.max().item(), percentile_99(ratio), ratio.mean().item(), shift.max().item()
                found[name] = [three_digits(value) for value in values]
            yield {"kind": "mismatch", "engine": quantized, "engine_logits": logits, "ratio": found}


def measure_engines(recording: Recording) -> Iterator[Record]:
    """Yield a record per engine. "all" has the facts of all tokens that the engine has drawn, and "bins" those of the
    tokens with a probability μ in each range of `EDGES`, with its ends as "from" and "to".
    """
    for engine, (old, new) in recording.drawn.items():
        old, new = (x.flatten().double() for x in (old, new))
        probs = old.exp()
        bins = []
        for low, high in itertools.pairwise(EDGES):
            inside = (low <= probs) & (probs < high)
            if inside.sum() >= LEAST:
                bins.append({"from": low, "to": high, **_facts(old[inside], new[inside])})
        yield {"kind": "engine", "engine": engine, "all": _facts(old, new), "bins": bins}


def _facts(old: Tensor, new: Tensor) -> Record:
    """Return the number of tokens, [median, p99, max] over them of |log r|, |r - 1| and |π - μ|, and the shares of
    tokens whose |r - 1| and |π - μ| exceed `BOUND`.
    """
    quantities = {
        "log_ratio": (new - old).abs(),
        "ratio": torch.expm1(new - old).abs(),
        "prob_shift": (new.exp() - old.exp()).abs(),
    }
    summaries = {
        name: [three_digits(x) for x in (value.median().item(), percentile_99(value), value.max().item())]
        for name, value in quantities.items()
    }
    beyond = {name: three_digits((quantities[name] > BOUND).double().mean().item()) for name in ("ratio", "prob_shift")}
    return {"tokens": len(old), **summaries, "beyond": beyond}


def percentile_99(values: Tensor) -> float:
    """Return the smallest value that 99 % of the values do not exceed. `torch.quantile` takes 16 million at most."""
    return values.flatten().kthvalue((99 * values.numel() + 99) // 100).values.item()


def three_digits(value: float) -> float:
    return float(f"{value:.3g}")
