"""Recipes of the precision study: each computes the DRPO loss of a case and its gradients with one set of numerics."""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.method import sparsity_of
from benchmarks.harness.quantization import dequantized, per_block, per_tensor
from benchmarks.precision.regimes import OBJECTIVE, Case, Operands, Result
from drpo_kernels import PolicyGradient, Tokens, linear_policy_loss, policy_loss
from drpo_kernels.backends import row_ops
from drpo_kernels.backends.quantize import FORMATS, per_row
from drpo_kernels.backends.rows import Outcome, Row, RowBatch, RowKind, Terms, Transform
from drpo_kernels.objectives import Objective

TRL_CHUNK = 32_768  # TRL's vocabulary tile
DW_CHUNKS = 16
NEVER = 1e6  # a clip that no ratio reaches
# (quantisation of hidden, of weight), each x, format -> float32 [R, C]
GRANULARITIES = {
    "tensor": (lambda x, f: dequantized(per_tensor(x, f)),) * 2,
    "row": (lambda x, f: dequantized(per_row(x, f)),) * 2,
    "block": (lambda x, f: dequantized(per_block(x, f, 1)), lambda x, f: dequantized(per_block(x, f, 128), 128)),
}


@dataclass(frozen=True)
class Recipe:
    """label     for people
    run       case -> Result
    operands  what it multiplies: a key of OPERANDS
    objective of a peer that does not know DRPO
    package   what a peer needs installed
    softcap   whether it knows a soft-cap
    """

    label: str
    run: Callable[[Case], Result]
    operands: str = "bf16"
    objective: Objective = OBJECTIVE
    package: str | None = None
    softcap: bool = True

    def obstacle(self, case: Case) -> str | None:
        """Why it does not run here, or None."""
        if self.package is not None:
            try:
                importlib.metadata.version(self.package)
            except importlib.metadata.PackageNotFoundError:
                return f"{self.package} not installed"
        return "no soft-cap" if case.softcap is not None and not self.softcap else None


# --- operands ---------------------------------------------------------------------------------------------------------


def _same(dtype: torch.dtype, case: Case) -> Operands:
    hidden, weight = (x.to(dtype).double() for x in (case.hidden, case.weight))
    return Operands(hidden, weight, hidden, weight)


def _quantized(name: str, granularity: str, case: Case) -> Operands:
    """Straight-through: quantised for the logits, not for the gradients."""
    pair = zip(GRANULARITIES[granularity], (case.hidden, case.weight), strict=True)
    hidden, weight = (quantize(x, FORMATS[name]).double() for quantize, x in pair)
    return Operands(hidden, weight, case.hidden.double(), case.weight.double())


OPERANDS: Mapping[str, Callable[[Case], Operands]] = {
    "bf16": functools.partial(_same, torch.bfloat16),
    "fp16": functools.partial(_same, torch.float16),
    **{
        f"{name} {granularity}": functools.partial(_quantized, name, granularity)
        for name in FORMATS
        for granularity in GRANULARITIES
    },
}


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(case: Case, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, **options) -> Result:
    """`linear_policy_loss` on inputs of this dtype; gradients of `scale` times the loss, unscaled in float64."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (case.hidden, case.weight)]
    out = linear_policy_loss(
        *leaves, case.targets, case.old_logprobs, case.advantages, objective=OBJECTIVE, **case.transform, **options
    )
    gradients = torch.autograd.grad(out.loss * scale, leaves)
    return Result(out.logprobs, out.loss.detach(), *(g if scale == 1 else g.double() / scale for g in gradients))


def sparse(case: Case, dtype: torch.dtype, tolerance: float) -> tuple[Result, dict[str, float]]:
    """`ours` with sparse gradients, and what its metrics say of them."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (case.hidden, case.weight)]
    out = linear_policy_loss(
        *leaves, case.targets, case.old_logprobs, case.advantages, objective=OBJECTIVE, sparse_grad=tolerance,
        **case.transform,
    )  # fmt: skip
    metrics = {name: value.item() for name, value in sparsity_of(out.metrics).items()}
    return Result(out.logprobs, out.loss.detach(), *torch.autograd.grad(out.loss, leaves)), metrics


def float16(case: Case) -> Result:
    """fp16 under the loss scale at which a GradScaler settles: the largest gradient just below fp16's largest value."""
    largest = max(g.abs().max().item() for g in ours(case)[2:])
    return ours(case, torch.float16, scale=2.0 ** math.floor(math.log2(2**15 / largest)))


def from_logits(case: Case, logits: Tensor) -> tuple[Result, Tensor]:
    """(the result without gradients, dlogits in bf16) from float32 logits [T, V], as our linear path has them."""
    leaf = logits.requires_grad_()
    out = policy_loss(
        leaf, case.targets, case.old_logprobs, case.advantages, objective=OBJECTIVE, temperature=case.temperature,
        softcap=case.softcap,
    )  # fmt: skip
    dlogits = torch.autograd.grad(out.loss, leaf)[0].bfloat16()
    return Result(out.logprobs, out.loss.detach(), None, None), dlogits


def one_read(case: Case) -> Result:
    """What ours does on a GPU, whose products take bf16 operands: exponentials are rounded to bf16, and so are hidden
    states times the factors of their rows (a CPU rounds neither), sums are float32.
    """
    hidden, weight = case.hidden.float(), case.weight.float()
    logits, count = case.biased(hidden @ weight.T), len(case.targets)
    rows = logits.new_zeros(len(Row), count)
    rows[Row.OLD_LOGPROB], rows[Row.ADVANTAGE], rows[Row.POLICY] = case.old_logprobs, case.advantages, 1 / count
    rows[Row.INV_TEMPERATURE], rows[Row.KIND] = 1 / case.temperature, RowKind.ACTIVE
    exponentials, factors = torch.empty_like(logits, dtype=torch.bfloat16), logits.new_empty(count)
    batch = RowBatch(logits, case.targets, rows, Transform(softcap=case.softcap))
    outcome = row_ops("torch").policy(batch, Terms(OBJECTIVE), exponentials, factors)
    e, v = exponentials.float(), factors[:, None]
    dx, dw = v * (e @ weight), e.T @ (v * hidden).bfloat16().float()
    return Result(outcome[Outcome.LOGPROB], outcome[Outcome.LOSS].sum(), dx.bfloat16(), dw.bfloat16())


def bf16_dlogits(case: Case, products: Tensor | None = None) -> Result:
    """What ours does on a GPU where a row is read twice: dlogits are rounded to bf16, sums are float32. `products` are
    hidden @ weight.T, or others in their place.
    """
    hidden, weight = case.hidden.float(), case.weight.float()
    result, dlogits = from_logits(case, case.biased(hidden @ weight.T if products is None else products))
    dx, dw = dlogits.float() @ weight, dlogits.float().T @ hidden
    return result._replace(hidden=dx.bfloat16(), weight=dw.bfloat16())


def quantized_head(case: Case, name: str, granularity: str) -> Result:
    """An fp8 head with other scales than `head_dtype`'s; the gradient straight-through, in ours' precision."""
    hidden, weight = (
        quantize(x, FORMATS[name])
        for quantize, x in zip(GRANULARITIES[granularity], (case.hidden, case.weight), strict=True)
    )
    return bf16_dlogits(case, hidden @ weight.T)


def accumulated_in_bf16(case: Case) -> Result:
    """Ours, but dW is a bf16 tensor to which every chunk of rows adds its part."""
    result, dlogits = from_logits(case, case.biased(case.hidden.float() @ case.weight.float().T))
    dw = torch.zeros_like(case.weight)
    for d, x in zip(dlogits.chunk(DW_CHUNKS), case.hidden.chunk(DW_CHUNKS), strict=True):
        dw += (d.float().T @ x.float()).bfloat16()
    return result._replace(weight=dw)


# --- peers ------------------------------------------------------------------------------------------------------------


def mean_token_loss(logprobs: Tensor, case: Case) -> Tensor:
    return OBJECTIVE.token_loss(Tokens(logprobs, case.old_logprobs, case.advantages)).mean()


def _differentiated(case: Case, logprobs_of: Callable[[Tensor, Tensor], Tensor]) -> Result:
    leaves = [x.detach().requires_grad_() for x in (case.hidden, case.weight)]
    logprobs = logprobs_of(*leaves)
    loss = mean_token_loss(logprobs.float(), case)
    return Result(logprobs.detach(), loss.detach(), *torch.autograd.grad(loss, leaves))


def eager(case: Case, softmax_dtype: torch.dtype) -> Result:
    """A model's bf16 logits (soft-capped by the model, in bf16), then log_softmax in this dtype."""

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight, case.bias)
        logits = logits if case.softcap is None else case.softcap * torch.tanh(logits / case.softcap)
        logits = logits.to(softmax_dtype) / case.temperature
        return logits.log_softmax(-1).gather(-1, case.targets[:, None])[:, 0]

    return _differentiated(case, logprobs)


def trl_head(case: Case) -> Result:
    """TRL's fused head, called as its GRPO trainer does."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, weight, case.bias, case.targets, case.temperature, TRL_CHUNK, case.softcap, 1.0, ("entropy",)
        )[0]

    return _differentiated(case, logprobs)


def liger(case: Case) -> Result:
    """Liger's chunked GRPO loss, never clipped (so -A r), every token its own sequence; it reports no log-probs."""
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
    short = name.removeprefix("fp8_").upper()
    scales = {"tensor": "per tensor", "row": "per row (`head_dtype`)", "block": "per 128-block"}[granularity]
    run = (
        functools.partial(ours, head_dtype=name)
        if granularity == "row"
        else functools.partial(quantized_head, name=name, granularity=granularity)
    )
    return Recipe(f"fp8 {short} head, scales {scales}", run, f"{name} {granularity}")


RECIPES = {
    "fp32": Recipe("fp32", functools.partial(ours, dtype=torch.float32)),
    "bf16": Recipe("bf16, fp32 logits (default)", ours),
    "bf16-one-read": Recipe("bf16, bf16 exponentials (default on a GPU)", one_read),
    "bf16-dlogits": Recipe("bf16, bf16 dlogits (two reads)", bf16_dlogits),
    "fp16": Recipe("fp16, fp32 logits", float16, "fp16"),
    "bf16-logits": Recipe("bf16 logits (`logits_dtype`)", functools.partial(ours, logits_dtype=torch.bfloat16)),
    "bf16-dw": Recipe(f"bf16, bf16 dlogits and dW, {DW_CHUNKS} chunks", accumulated_in_bf16),
    "eager": Recipe("eager: bf16 logits, fp32 softmax", functools.partial(eager, softmax_dtype=torch.float32)),
    "eager-bf16": Recipe("eager: bf16 logits and softmax", functools.partial(eager, softmax_dtype=torch.bfloat16)),
    "trl": Recipe("TRL's fused head", trl_head, package="trl"),
    "liger": Recipe("Liger's GRPO loss", liger, objective=PolicyGradient(), package="liger_kernel", softcap=False),
    **{f"{name}-{granularity}": _fp8(name, granularity) for name in FORMATS for granularity in GRANULARITIES},
}
