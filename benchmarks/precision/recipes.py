"""Recipes of the precision study: each computes the DRPO loss of a case and its gradients with one set of numerics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.quantization import dequantized, per_block, per_tensor
from benchmarks.harness.regimes import OBJECTIVE, Result, bf16_dlogits, ours
from benchmarks.harness.workloads import Inputs, capped
from drpo_kernels import PolicyGradient, Tokens
from drpo_kernels.backends import row_ops
from drpo_kernels.backends.quantize import FORMATS, per_row
from drpo_kernels.backends.rows import Field, Outcome, RowBatch, RowKind, Terms, Transform
from drpo_kernels.objectives import Objective

TRL_CHUNK = 32_768  # TRL's vocabulary tile
DW_CHUNKS = 16
NEVER = 1e6  # a clip that no ratio reaches
# Each function rounds to fp8 with scales of this granularity: x [R, C], format, rows of a block -> float32 [R, C].
GRANULARITIES = {
    "tensor": lambda x, form, rows: dequantized(per_tensor(x, form)),
    "row": lambda x, form, rows: dequantized(per_row(x, form)),
    "block": lambda x, form, rows: dequantized(per_block(x, form, rows), rows),
}


@dataclass(frozen=True)
class Recipe:
    """label     what tables call it
    run       computes the result of a case
    operands  the key in OPERANDS of how it rounds hidden and weight before it multiplies them
    objective the loss of a peer that does not know DRPO
    package   what must be installed for it; None for a recipe of this repository
    softcap   False: it does not know a soft-cap
    """

    label: str
    run: Callable[[Inputs], Result]
    operands: str = "bf16"
    objective: Objective = OBJECTIVE
    package: str | None = None
    softcap: bool = True


def quantized(case: Inputs, name: str, granularity: str) -> tuple[Tensor, Tensor]:
    """Return hidden and weight in float32 after rounding to fp8; blocks are 1 x 128 for hidden and 128 x 128 for
    weight.
    """
    quantize = GRANULARITIES[granularity]
    return quantize(case.hidden, FORMATS[name], 1), quantize(case.weight, FORMATS[name], 128)


OPERANDS: dict[str, Callable[[Inputs], tuple[Tensor, Tensor]]] = {
    "bf16": lambda case: (case.hidden, case.weight),
    "fp16": lambda case: (case.hidden.half(), case.weight.half()),
    **{
        f"{name} {granularity}": partial(quantized, name=name, granularity=granularity)
        for name in FORMATS
        for granularity in GRANULARITIES
    },
}


# --- ours -------------------------------------------------------------------------------------------------------------


def float16(case: Inputs) -> Result:
    """Run fp16 under the loss scale at which a GradScaler settles, with the largest gradient just below fp16's largest
    value.
    """
    plain = ours(case)
    largest = max(plain.hidden.abs().max().item(), plain.weight.abs().max().item())
    return ours(case, torch.float16, scale=2.0 ** math.floor(math.log2(2**15 / largest)))


def one_read(case: Inputs) -> Result:
    """Compute as our loss does on a GPU, whose products take bf16 operands: exponentials are rounded to bf16, and so
    are hidden states times the factors of their rows. A CPU rounds neither. Sums are float32.
    """
    hidden, weight = case.hidden.float(), case.weight.float()
    logits, count = case.product(hidden, weight), len(case.targets)
    rows = logits.new_zeros(len(Field), count)
    rows[Field.OLD_LOGPROB], rows[Field.ADVANTAGE], rows[Field.POLICY] = case.old_logprobs, case.advantages, 1 / count
    rows[Field.INV_TEMPERATURE], rows[Field.KIND] = 1 / case.temperature, RowKind.ACTIVE
    exponentials, factors = torch.empty_like(logits, dtype=torch.bfloat16), logits.new_empty(count)
    batch = RowBatch(logits, case.targets, rows, Transform(softcap=case.softcap))
    outcome = row_ops("torch").policy(batch, Terms(OBJECTIVE), exponentials, factors)
    e, v = exponentials.float(), factors[:, None]
    dx, dw = v * (e @ weight), e.T @ (v * hidden).bfloat16().float()
    return Result(outcome[Outcome.LOGPROB], outcome[Outcome.LOSS].sum(), dx.bfloat16(), dw.bfloat16())


def two_reads(case: Inputs, logits: Tensor | None = None) -> Result:
    """Compute as our loss does on a GPU where it reads a row twice: dlogits are rounded to
    bf16, and sums are float32.
    """
    result, dlogits = bf16_dlogits(case, logits)
    dx, dw = dlogits.float() @ case.weight.float(), dlogits.float().T @ case.hidden.float()
    return result._replace(hidden=dx.bfloat16(), weight=dw.bfloat16())


def quantized_head(case: Inputs, name: str, granularity: str) -> Result:
    """Run an fp8 head with other scales than `head_dtype` has. The gradient is straight-through."""
    return two_reads(case, case.product(*quantized(case, name, granularity)))


def accumulated_in_bf16(case: Inputs) -> Result:
    """Run our loss, but let dW be a bf16 tensor to which every chunk of rows adds its part."""
    result, dlogits = bf16_dlogits(case)
    dw = torch.zeros_like(case.weight)
    for d, x in zip(dlogits.chunk(DW_CHUNKS), case.hidden.chunk(DW_CHUNKS), strict=True):
        dw += (d.float().T @ x.float()).bfloat16()
    return result._replace(weight=dw)


# --- peers ------------------------------------------------------------------------------------------------------------


def _differentiated(case: Inputs, logprobs_of: Callable[[Tensor, Tensor], Tensor]) -> Result:
    leaves = [x.detach().requires_grad_() for x in (case.hidden, case.weight)]
    logprobs = logprobs_of(*leaves)
    loss = OBJECTIVE.token_loss(Tokens(logprobs.float(), case.old_logprobs, case.advantages)).mean()
    return Result(logprobs.detach(), loss.detach(), *torch.autograd.grad(loss, leaves))


def eager(case: Inputs, softmax_dtype: torch.dtype) -> Result:
    """Run a model's bf16 logits, which the model soft-caps in bf16, and then log_softmax in this dtype."""

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = capped(torch.nn.functional.linear(hidden, weight, case.bias), case.softcap)
        logits = logits.to(softmax_dtype) / case.temperature
        return logits.log_softmax(-1).gather(-1, case.targets[:, None])[:, 0]

    return _differentiated(case, logprobs)


def trl_head(case: Inputs) -> Result:
    """Run TRL's fused head, called as its GRPO trainer does."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, weight, case.bias, case.targets, case.temperature, TRL_CHUNK, case.softcap, 1.0, ("entropy",)
        )[0]

    return _differentiated(case, logprobs)


def liger(case: Inputs) -> Result:
    """Run Liger's chunked GRPO loss, never clipped (so -A r), with every token its own sequence. It reports no
    log-probs.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    leaves = [x.detach().requires_grad_() for x in (case.hidden, case.weight)]
    loss_of = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo", chunk_size=64, temperature=case.temperature,
        epsilon_low=NEVER, epsilon_high=NEVER,
    )  # fmt: skip
    one = torch.ones_like(case.targets[:, None])
    loss = loss_of(
        leaves[0][:, None], leaves[1], case.targets[:, None], one, case.advantages,
        bias=case.bias, old_per_token_logps=case.old_logprobs[:, None],
    )[0]  # fmt: skip
    return Result(None, loss.detach(), *torch.autograd.grad(loss, leaves))


def _fp8(name: str, granularity: str) -> Recipe:
    scales = {"tensor": "per tensor", "row": "per row (`head_dtype`)", "block": "per 128-block"}[granularity]
    run = partial(quantized_head, name=name, granularity=granularity)
    if granularity == "row":
        run = partial(ours, head_dtype=name)
    label = f"fp8 {name.removeprefix('fp8_').upper()} head, scales {scales}"
    return Recipe(label, run, f"{name} {granularity}")


RECIPES = {
    "fp32": Recipe("fp32", partial(ours, dtype=torch.float32)),
    "bf16": Recipe("bf16, fp32 logits (default)", ours),
    "bf16-one-read": Recipe("bf16, bf16 exponentials (default on a GPU)", one_read),
    "bf16-dlogits": Recipe("bf16, bf16 dlogits (two reads)", two_reads),
    "fp16": Recipe("fp16, fp32 logits", float16, "fp16"),
    "bf16-logits": Recipe("bf16 logits (`logits_dtype`)", partial(ours, logits_dtype=torch.bfloat16)),
    "bf16-dw": Recipe(f"bf16, bf16 dlogits and dW, {DW_CHUNKS} chunks", accumulated_in_bf16),
    "eager": Recipe("eager: bf16 logits, fp32 softmax", partial(eager, softmax_dtype=torch.float32)),
    "eager-bf16": Recipe("eager: bf16 logits and softmax", partial(eager, softmax_dtype=torch.bfloat16)),
    "trl": Recipe("TRL's fused head", trl_head, package="trl"),
    "liger": Recipe("Liger's GRPO loss", liger, objective=PolicyGradient(), package="liger_kernel", softcap=False),
    **{f"{name}-{granularity}": _fp8(name, granularity) for name in FORMATS for granularity in GRANULARITIES},
}
