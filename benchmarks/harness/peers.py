"""Other people's heads, each called as its own documentation or trainer calls it; see `method` for what an adapter is.

A peer that returns log-probs computes the same DRPO loss, by the objective's formula in PyTorch. A peer whose loss is
built in cannot: it is given advantages of 1 and no old log-probs, which makes its gradient that of -mean(log π).
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from benchmarks.harness.method import (
    LOGITS,
    Method,
    Result,
    Step,
    Unsupported,
    differentiated,
    mean_token_loss,
    without_softcap,
)
from benchmarks.harness.workloads import Inputs

# vocabulary tile of TRL
TRL_CHUNK = 32_768
# Rows of a sequence for losses that want sequences, because Liger's chunked loss takes one at a time.
SEQUENCE = 1024
# most programs along the second axis of a CUDA grid
GRID_LIMIT = 65_535


def trl(inputs: Inputs) -> Step:
    """Run TRL's fused head (8F), with the entropy that its GRPO trainer asks for."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        arguments = (hidden, weight, None, inputs.targets, 1.0, TRL_CHUNK, inputs.softcap, 1.0, ("entropy",))
        return mean_token_loss(ChunkedLogProbFunction.apply(*arguments)[0], inputs)

    return differentiated(inputs, loss)


def liger_scaled(inputs: Inputs) -> Step:
    """Run the PyTorch path of Liger's fused scaled cross-entropy (8F), which is verl's chunked
    head, with its entropy.
    """
    # It is imported by its own name, because on sm_90 the public one chooses the kernels below.
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import _FusedLinearPPOFallbackFunction as Function

    without_softcap(inputs)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        nll, _ = Function.apply(hidden, weight, inputs.targets, 1.0, -100, True)
        return mean_token_loss(-nll, inputs)

    return differentiated(inputs, loss)


def liger_scaled_sm90(inputs: Inputs) -> Step:
    """Run the Hopper kernels of Liger's fused scaled cross-entropy (8F), without the entropy, which costs it more."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    without_softcap(inputs)
    if torch.cuda.get_device_capability(inputs.hidden.device) != (9, 0):
        raise Unsupported("needs sm_90")
    if importlib.util.find_spec("cutlass") is None:
        raise Unsupported("nvidia-cutlass-dsl not installed")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return mean_token_loss(-Function.apply(hidden, weight, inputs.targets), inputs)

    return differentiated(inputs, loss)


def liger_grpo(inputs: Inputs) -> Step:
    """Run Liger's chunked GRPO loss, where advantages are per sequence and the formula is its own."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    without_softcap(inputs)
    length = math.gcd(inputs.targets.numel(), SEQUENCE)
    targets = inputs.targets.view(-1, length)
    mask, advantages = torch.ones_like(targets), inputs.advantages.new_ones(targets.shape[0])
    # By default it compiles the formula, which on a CPU would need a C++ compiler.
    head = LigerFusedLinearGRPOLoss(beta=0.0, compiled=targets.is_cuda, use_ref_model=False, loss_type="bnpo")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return head(hidden.view(*targets.shape, -1), weight, targets, mask, advantages)[0]

    return differentiated(inputs, loss)


def liger_triton_grpo(inputs: Inputs) -> Step:
    """Run Liger's Triton GRPO kernels from logits: one sequence, with a row behind its end that they leave out."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    count, vocab = inputs.logits.shape
    if count > GRID_LIMIT:
        raise Unsupported(f"at most {GRID_LIMIT} rows in a sequence")
    logits = inputs.logits.new_zeros(1, count + 1, vocab)
    logits[0, :count] = inputs.logits
    advantages, targets = inputs.advantages.new_ones(1), inputs.targets[None]
    options = {"temperature": 1.0, "beta": 0.0, "loss_type": "bnpo", "reduce": True}

    def step() -> Result:
        leaf = logits.detach().requires_grad_()
        # The default is to work in place, but the next sample needs the logits.
        loss, _ = triton_grpo_loss(leaf, None, None, targets, advantages, inplace=False, **options)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return Result(loss.detach(), logits=gradient[0, :count])

    return step


def cce(inputs: Inputs) -> Step:
    """Run cut-cross-entropy as it comes, so that blocks of small probabilities get no gradient. On a CPU this is its
    own PyTorch path.
    """
    if not inputs.hidden.is_cuda:
        return _cut_cross_entropy(inputs, impl="torch_compile")
    if inputs.hidden.dtype == torch.float32:
        raise Unsupported("16-bit hidden states only")
    return _cut_cross_entropy(inputs, impl="cce")


def cce_exact(inputs: Inputs) -> Step:
    """Run cut-cross-entropy without its filter."""
    return _cut_cross_entropy(inputs, impl="cce", filter_eps=None)


def _cut_cross_entropy(inputs: Inputs, **options) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        nll = linear_cross_entropy(hidden, weight, inputs.targets, softcap=inputs.softcap, reduction="none", **options)
        return mean_token_loss(-nll, inputs)

    return differentiated(inputs, loss)


def torch_linear(inputs: Inputs) -> Step:
    """Run PyTorch's own `linear_cross_entropy`, chunked as its options choose."""
    without_softcap(inputs)
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unsupported(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return mean_token_loss(-function(hidden, weight, inputs.targets, reduction="none", options=options), inputs)

    return differentiated(inputs, loss)


PEERS = {
    "trl": Method(trl, "TRL's fused head", package="trl", rounds="bf16 logits"),
    "liger_scaled": Method(
        liger_scaled, "Liger's fused scaled CE, PyTorch", package="liger_kernel", rounds="bf16 logits"
    ),
    "liger_scaled_sm90": Method(
        liger_scaled_sm90, "Liger's fused scaled CE, Hopper kernels", package="liger_kernel", gpu=True,
        rounds="fp16 logits", dtypes=("bfloat16",),
    ),
    "liger_grpo": Method(
        liger_grpo, "Liger's chunked GRPO loss", package="liger_kernel", same_loss=False, rounds="bf16 logits"
    ),
    "liger_triton_grpo": Method(
        liger_triton_grpo, "Liger's Triton GRPO loss", LOGITS, package="liger_kernel", gpu=True, same_loss=False,
        held_to="copy",
    ),
    "cce": Method(cce, "cut-cross-entropy", package="cut_cross_entropy", rounds="gradient filter"),
    "cce_exact": Method(
        cce_exact, "cut-cross-entropy, exact", package="cut_cross_entropy", gpu=True,
        rounds="bf16 sums of dX and dW", dtypes=("bfloat16",),
    ),
    "torch_linear": Method(torch_linear, "PyTorch's `linear_cross_entropy`", rounds="bf16 log-probs"),
}  # fmt: skip
