"""An fp8 rollout engine against a trainer with the same weights: how far the ratio is from 1 before any update.

The engine is emulated: operands in fp8 with a scale per row, products of 128 channels at a time added in float32 (an
order of additions that no trainer here shares), logits rounded to float32 or, as engines do, to bf16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.precision.regimes import Case
from drpo_kernels import linear_token_logprobs
from drpo_kernels.backends.quantize import FORMATS, Quantized, per_row
from drpo_kernels.tokens import log_ratio_limit

FORMAT = "fp8_e4m3"
SPLIT = 128
# what the engine quantises
QUANTIZED = {"nothing": (False, False), "weight": (False, True), "hidden": (True, False), "both": (True, True)}
LOGITS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRAINERS = {
    "bf16": {},
    "bf16, bf16 logits": {"logits_dtype": torch.bfloat16},
    "fp8 head": {"head_dtype": FORMAT},
    "fp8 head, bf16 logits": {"head_dtype": FORMAT, "logits_dtype": torch.bfloat16},
}


def engine_logprobs(case: Case, quantized: str, logits: str) -> Tensor:
    """log μ [T] of the targets in the emulated engine."""
    operands = [_operand(x, flag) for x, flag in zip((case.hidden, case.weight), QUANTIZED[quantized], strict=True)]
    (hidden, row), (weight, channel) = operands
    total = hidden.new_zeros(hidden.shape[0], weight.shape[0])
    for start in range(0, hidden.shape[1], SPLIT):
        total += hidden[:, start : start + SPLIT] @ weight[:, start : start + SPLIT].T
    rounded = case.biased(total * row * channel.T).to(LOGITS[logits]).float()
    return case.scaled(rounded).log_softmax(-1).gather(1, case.targets[:, None])[:, 0]


def _operand(x: Tensor, quantize: bool) -> tuple[Tensor, Tensor]:
    """(values in float32, scales [R, 1])."""
    found = per_row(x, FORMATS[FORMAT]) if quantize else Quantized(x, torch.ones(1, 1, device=x.device))
    return found.values.float(), found.scales


def trainer_logprobs(case: Case, trainer: str) -> Tensor:
    """log π [T] of the same weights in our head."""
    options = case.transform | TRAINERS[trainer]
    return linear_token_logprobs(case.hidden, case.weight, case.targets, **options)[0]


def measure_mismatch(case: Case) -> Iterator[dict]:
    """A record per engine: of |r - 1| over the tokens for every trainer, the max, p99 and mean; and max |π - μ|."""
    trainers = {name: trainer_logprobs(case, name).double() for name in TRAINERS}
    for quantized in QUANTIZED:
        for logits in LOGITS:
            old = engine_logprobs(case, quantized, logits).double()
            found = {}
            for name, logp in trainers.items():
                ratio = torch.expm1((logp - old).clamp(-log_ratio_limit(), log_ratio_limit())).abs()
                shift = (logp.exp() - old.exp()).abs()
                found[name] = [ratio.max().item(), quantile(ratio), ratio.mean().item(), shift.max().item()]
            yield {"kind": "mismatch", "engine": quantized, "engine_logits": logits, "ratio": found}


def quantile(values: Tensor, share: float = 0.99) -> float:
    """The smallest value that this share of them do not exceed."""
    flat = values.flatten()
    return flat.kthvalue(max(-(-int(flat.numel() * share * 1000) // 1000), 1)).values.item()
