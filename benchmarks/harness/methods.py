"""The methods that are compared: bare floors, eager PyTorch, ours, and the peers of peers.py."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.method import (
    FROZEN_HEAD,
    HEAD,
    LOGITS,
    OBJECTIVE,
    Method,
    Result,
    Step,
    Unsupported,
    differentiated,
    mean_token_loss,
    sparsity_of,
    without_softcap,
)
from benchmarks.harness.peers import PEERS
from benchmarks.harness.workloads import Inputs, capped
from drpo_kernels import PolicyLossOutput, linear_policy_loss, linear_token_logprobs, policy_loss

# docs/sparse.md says why: the first is within 2× of what rounding dlogits to bf16 costs, and the second below it.
SPARSE_GRAD, TIGHT_SPARSE_GRAD = 0.01, 0.003
# bytes of the logits of a chunk of the chunked floor
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


def whole_gemms(inputs: Inputs, forwards: int = 1, weight_gradient: bool = True) -> Step:
    """Run the bare, unchunked products with outputs in the inputs' dtype: logits (`forwards` times), dX and dW."""
    hidden, weight = inputs.hidden, inputs.weight

    def step() -> None:
        for _ in range(forwards):
            logits = torch.mm(hidden, weight.T)
        torch.mm(logits, weight)
        if weight_gradient:
            torch.mm(logits.T, hidden)

    return step


def chunked_gemms(inputs: Inputs) -> Step:
    """Run the three products in chunks of rows, into buffers that exist already."""
    hidden, weight = inputs.hidden, inputs.weight
    (count, width), vocab = hidden.shape, weight.shape[0]
    size = max(CHUNK_BYTES[hidden.device.type] // (4 * vocab), 1)
    logits = hidden.new_empty(min(size, count), vocab)
    hidden_gradient, weight_gradient = hidden.new_empty(count, width), weight.new_empty(vocab, width)

    def step() -> None:
        for start in range(0, count, size):
            rows = hidden[start : start + size]
            part = logits[: len(rows)]
            torch.mm(rows, weight.T, out=part)
            torch.mm(part, weight, out=hidden_gradient[start : start + size])
            torch.addmm(weight_gradient, part.T, rows, beta=int(start > 0), out=weight_gradient)

    return step


def copied_logits(inputs: Inputs) -> Step:
    """Read and write the logits once."""
    out = torch.empty_like(inputs.logits)

    def step() -> None:
        out.copy_(inputs.logits)

    return step


def _eager_loss(logits: Tensor, inputs: Inputs) -> Tensor:
    logprobs = torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, inputs.targets[:, None])[:, 0]
    return mean_token_loss(logprobs, inputs)


def eager(inputs: Inputs, wrap: Callable = lambda loss: loss) -> Step:
    """Run eager PyTorch: all the logits, `log_softmax` in float32, `gather`, the objective's formula, and autograd."""

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return _eager_loss(capped(hidden @ weight.T, inputs.softcap), inputs)

    return differentiated(inputs, wrap(loss))


def eager_from_logits(inputs: Inputs) -> Step:
    return differentiated(inputs, lambda logits: _eager_loss(logits, inputs), wrt=LOGITS)


def compiled(inputs: Inputs) -> Step:
    """Run `eager` under `torch.compile`. A break in its graph, or more recompilations than
    PyTorch allows, is an error.
    """
    if inputs.hidden.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Unsupported("torch.compile needs a C++ compiler")
    return eager(inputs, wrap=partial(torch.compile, fullgraph=True, dynamic=False))


def fused(inputs: Inputs, wrt: tuple[str, ...] = HEAD, **options) -> Step:
    """Run our loss, which takes 6F (4F with a frozen head), because the gradient is formed in the forward."""

    def loss(hidden: Tensor, weight: Tensor = inputs.weight) -> Tensor:
        return _output(inputs, hidden, weight, **options).loss

    return differentiated(inputs, loss, wrt)


def sparse(inputs: Inputs, tolerance: float) -> Step:
    """Run our loss with gradients of the fewest tokens, 2F for most rows of a decided policy, and report what it left
    out.
    """
    without_softcap(inputs)

    def step() -> Result:
        leaves = [x.detach().requires_grad_() for x in (inputs.hidden, inputs.weight)]
        out = _output(inputs, *leaves, sparse_grad=tolerance)
        gradients = torch.autograd.grad(out.loss, leaves)
        return Result(out.loss.detach(), *gradients, metrics=sparsity_of(out.metrics))

    return step


def _output(inputs: Inputs, hidden: Tensor, weight: Tensor, **options) -> PolicyLossOutput:
    return linear_policy_loss(
        hidden, weight, inputs.targets, inputs.old_logprobs, inputs.advantages,
        objective=OBJECTIVE, softcap=inputs.softcap, **options,
    )  # fmt: skip


def main_grad(inputs: Inputs) -> Step:
    """Run our loss with the weight's gradient added, step after step, to the trainer's own float32 buffer."""
    buffer = torch.zeros_like(inputs.weight, dtype=torch.float32)
    trained = dataclasses.replace(inputs, weight=inputs.weight.detach().requires_grad_())
    step = fused(trained, FROZEN_HEAD, main_grad=buffer)
    return lambda: step()._replace(weight=buffer)


def recompute(inputs: Inputs) -> Step:
    """Run our head at 8F: log-probs and entropy are differentiable, and the loss is the caller's own."""

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs, _ = linear_token_logprobs(hidden, weight, inputs.targets, softcap=inputs.softcap)
        return mean_token_loss(logprobs, inputs)

    return differentiated(inputs, loss)


def from_logits(inputs: Inputs, inplace: bool = False) -> Step:
    """Run our loss from ready logits. In place, the gradient is written over a copy of them. From the second step on
    the logits are then the gradient of the step before, which is the same work on other numbers.
    """
    if inplace:
        inputs = dataclasses.replace(inputs, logits=inputs.logits.clone())

    def loss(logits: Tensor) -> Tensor:
        rows = inputs.targets, inputs.old_logprobs, inputs.advantages
        return policy_loss(logits, *rows, objective=OBJECTIVE, inplace=inplace).loss

    return differentiated(inputs, loss, wrt=LOGITS)


BF16_LOGITS, SPARSE = "bf16 logits", "sparse gradient"
FLOORS = {
    "gemms_whole": Method(whole_gemms, "floor: three GEMMs, unchunked", held_to=None),
    "gemms": Method(chunked_gemms, "three GEMMs, in chunks", held_to=None),
    "gemms_frozen": Method(
        partial(whole_gemms, weight_gradient=False), "floor of a frozen head: two GEMMs", FROZEN_HEAD, held_to=None
    ),
    "gemms_recompute": Method(partial(whole_gemms, forwards=2), "floor of recomputation: four GEMMs", held_to=None),
    "copy": Method(copied_logits, "floor: one copy of the logits", LOGITS, held_to=None),
}
OURS = {
    "linear_policy_loss": Method(fused, "`linear_policy_loss`"),
    "linear_policy_loss_bf16_logits": Method(
        partial(fused, logits_dtype=torch.bfloat16),
        "`linear_policy_loss`, bf16 logits",
        rounds=BF16_LOGITS,
        dtypes=("bfloat16",),
    ),
    "linear_policy_loss_not_compacted": Method(
        partial(fused, compact="none"), '`linear_policy_loss`, `compact="none"`'
    ),
    "linear_policy_loss_frozen_head": Method(
        partial(fused, wrt=FROZEN_HEAD), "`linear_policy_loss`, frozen head", FROZEN_HEAD, held_to="gemms_frozen"
    ),
    "linear_policy_loss_main_grad": Method(main_grad, "`linear_policy_loss`, `main_grad`", reuses=("weight",)),
    "linear_policy_loss_sparse": Method(
        partial(sparse, tolerance=SPARSE_GRAD), "`linear_policy_loss`, `sparse_grad=0.01`", rounds=SPARSE
    ),
    "linear_policy_loss_sparse_tight": Method(
        partial(sparse, tolerance=TIGHT_SPARSE_GRAD), "`linear_policy_loss`, `sparse_grad=0.003`", rounds=SPARSE
    ),
    "linear_token_logprobs": Method(recompute, "`linear_token_logprobs` + objective", held_to="gemms_recompute"),
    "batch_invariant": Method(
        partial(fused, batch_invariant=True), "`linear_policy_loss`, `batch_invariant=True`", gpu=True
    ),
    "policy_loss": Method(from_logits, "`policy_loss`", LOGITS, held_to="copy"),
    "policy_loss_inplace": Method(
        partial(from_logits, inplace=True), "`policy_loss`, in place", LOGITS, held_to="copy", reuses=LOGITS
    ),
}
PLAIN = {
    "eager": Method(eager, "eager PyTorch", rounds=BF16_LOGITS),
    "eager_compiled": Method(compiled, "eager PyTorch under `torch.compile`", rounds=BF16_LOGITS),
    "eager_from_logits": Method(eager_from_logits, "eager PyTorch from logits", LOGITS, held_to="copy"),
}
METHODS = {**FLOORS, **PLAIN, **OURS, **PEERS}
