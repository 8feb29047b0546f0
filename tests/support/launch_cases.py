"""The calls here launch every kernel in every specialisation that the package asks for; see launch_worker.py.

A group is a function that yields (label, call), and is registered with the kernels that its calls launch. Values do not
matter; dtypes, shapes, strides and options do. To Triton's JIT a size of 1 is a constant, and a size that 16 divides is
an alignment.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import drpo_kernels as dk
import problems
from drpo_kernels.backends.sparse import triton_ops
from drpo_kernels.backends.sparse.contract import GatheredSums
from drpo_kernels.backends.triton import launch
from drpo_kernels.kl import KL_ESTIMATORS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Calls = Iterator[tuple[str, Callable[[], object]]]
GROUPS: dict[str, Callable[[], Calls]] = {}
# By group and kernel, the number of threads of the largest block that is launched.
LAUNCHED: dict[str, dict[str, int]] = {}
ALWAYS = ("policy", "policy_metrics", "statistics", "gradient", "scale")
# Threads of kernels whose blocks do not depend on the width of a row: two rows of 512 threads fill a multiprocessor.
THREADS = {
    "policy_metrics": 512, "scale": 512, "select": 512, "losses": 128, "matmul": 256, "column_sum": 128,
    "gathered_sums": 32, "gathered_dots": 32,
}  # fmt: skip
# Threads by the width of the widest float32 row. Rows of a few kept ids take one warp, and so does their scaling.
ROW_THREADS = {5: 32, 1040: 256, 8208: 512}


def group(*kernels: str, widest: int = 1040):
    """Register a group that launches these kernels and those of ALWAYS; the names are without `_kernel`."""

    def register(function):
        GROUPS[function.__name__] = function
        LAUNCHED[function.__name__] = {
            f"{kernel}_kernel": THREADS.get(kernel, ROW_THREADS[widest]) for kernel in (*ALWAYS, *kernels)
        }
        if ROW_THREADS[widest] == 32:
            LAUNCHED[function.__name__]["scale_kernel"] = 32
        return function

    return register


def tokens(count: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return targets, old log-probs, and advantages of which every fifth is 0."""
    return torch.arange(count) % vocab, -torch.rand(count), torch.arange(count) % 5 - 1.0


def linear(dtype: torch.dtype, count: int = 48, vocab: int = 1040, bias: bool = False, **options) -> None:
    """Call `linear_policy_loss`, and its backward with an upstream factor other than 1."""
    hidden, weight = (torch.randn(n, 64).to(dtype).requires_grad_() for n in (count, vocab))
    options |= {"bias": torch.zeros(vocab, dtype=dtype).requires_grad_()} if bias else {}
    out = dk.linear_policy_loss(hidden, weight, *tokens(count, vocab), backend="triton", **options)
    if torch.is_grad_enabled():
        (2 * out.loss).backward()


def linear_logprobs(dtype: torch.dtype, entropy: bool = True, vocab: int = 1040, **options) -> None:
    hidden, weight = (torch.randn(n, 64).to(dtype).requires_grad_() for n in (48, vocab))
    results = dk.linear_token_logprobs(hidden, weight, tokens(48, vocab)[0], backend="triton", **options)
    sum(x.sum() for x in results[: 1 + entropy]).backward()


def ready(logits: Tensor, **options) -> None:
    """Call `policy_loss` on logits [N, V], and its backward."""
    out = dk.policy_loss(logits.requires_grad_() * 1, *tokens(*logits.shape), backend="triton", **options)
    (2 * out.loss).backward()


def ready_logprobs(logits: Tensor, entropy: bool = True, **options) -> None:
    count, vocab = logits.shape
    results = dk.token_logprobs(logits.requires_grad_(), tokens(count, vocab)[0], backend="triton", **options)
    sum(x.sum() for x in results[: 1 + entropy]).backward()


def forward_only() -> None:
    with torch.no_grad():
        linear(torch.bfloat16)


@group("losses")
def objectives() -> Calls:
    """An objective runs inside one launch, or in float16 between two kernels. One without a twin is recomputed."""
    for name, (objective, hyper) in problems.SPECS.items():
        options = {"objective": getattr(dk, objective)(**hyper), "cu_seqlens": torch.tensor([0, 20, 48])}
        for dtype in (torch.bfloat16, torch.float16):
            yield f"{name} {dtype}", partial(linear, dtype, **options)


@group("losses")
def terms() -> Calls:
    """Each term runs alone in one dtype, and none and all of them run in every dtype."""
    reference = {"kl_coef": 0.1, "ref_logprobs": -torch.rand(48)}
    alone = {
        "softcap": {"softcap": 30.0}, "bias": {"bias": True}, "entropy": {"entropy_coef": 0.1},
        "z-loss": {"z_loss_coef": 0.1}, "kl": reference,
    }  # fmt: skip
    everything: dict = {"kl_importance": True}
    for options in alone.values():
        everything |= options
    for label, options in alone.items():
        yield f"{label} alone", partial(linear, torch.bfloat16, **options)
    for dtype in DTYPES:
        yield f"plain {dtype}", partial(linear, dtype)
        yield f"everything {dtype}", partial(linear, dtype, **everything)
    for estimator in KL_ESTIMATORS:
        options = {**reference, "kl_estimator": estimator, "kl_importance": True}
        yield f"{estimator}, with importance", partial(linear, torch.bfloat16, **options)


@group("losses")
def routes() -> Calls:
    """These calls take every way to the logits and to the gradient, from every form of input."""
    for dtype in DTYPES:
        yield f"recompute {dtype}", partial(linear_logprobs, dtype)
        yield f"recompute without entropy {dtype}", partial(linear_logprobs, dtype, entropy=False)
        yield f"ready {dtype}", lambda dtype=dtype: ready(torch.randn(48, 1040).to(dtype))
        yield f"ready log-probs {dtype}", lambda dtype=dtype: ready_logprobs(torch.randn(48, 1040).to(dtype))
    for head in ("fp8_e4m3", "fp8_e5m2"):
        yield head, partial(linear, torch.bfloat16, head_dtype=head)
    yield "bf16 logits", partial(linear, torch.bfloat16, logits_dtype=torch.bfloat16)
    yield "every row", partial(linear, torch.bfloat16, compact="none")
    yield "rows without a gradient", partial(linear, torch.bfloat16, compact="mask")
    yield "no gradient", forward_only
    yield "padded vocabulary", partial(linear, torch.bfloat16, vocab_size=1030)
    yield "several chunks", partial(linear, torch.bfloat16, workspace_bytes=1 << 16)
    yield "in place", lambda: ready(torch.randn(48, 1040), inplace=True)


@group("matmul", widest=8208)
def sizes() -> Calls:
    """Sizes and strides are 1, are not divisible by 16, or need 64 bits; and a row takes several blocks."""
    yield "a wide row", partial(linear, torch.bfloat16, vocab=8208)
    yield "a wide row, recomputed", partial(linear_logprobs, torch.bfloat16, vocab=8208)
    for count, vocab in ((1, 1040), (48, 1), (48, 1037), (1, 1)):
        yield f"{count} x {vocab}", partial(linear, torch.bfloat16, count, vocab)
        yield f"{count} x {vocab}, ready", partial(ready, torch.randn(count, vocab))
        yield f"{count} x {vocab}, in one order", partial(linear, torch.bfloat16, count, vocab, batch_invariant=True)
    yield "log-probs of columns", lambda: ready_logprobs(torch.randn(1040, 48).T)
    yield "log-probs of parts of rows", lambda: ready_logprobs(torch.randn(48, 1041)[:, :1040])
    far = torch.zeros(1).as_strided((1, 1), (1 << 31, 1))
    yield "a row stride of 2^31", lambda: ready_logprobs(far)
    many = torch.zeros(1).expand((1 << 31) + 16)
    yield "2^31 elements", lambda: launch.TritonRows().scale(many, torch.ones(()))


@group("matmul", "column_sum")
def batch_invariant() -> Calls:
    for dtype in DTYPES:
        yield f"one chunk {dtype}", partial(linear, dtype, bias=True, batch_invariant=True)
        small = {"batch_invariant": True, "workspace_bytes": 1 << 16}
        yield f"several chunks {dtype}", partial(linear, dtype, count=400, bias=True, **small)
        yield f"recompute {dtype}", partial(linear_logprobs, dtype, batch_invariant=True)
    yield "odd vocabulary", partial(linear, torch.bfloat16, vocab=1037, batch_invariant=True)
    yield "autocast", autocast


def autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        linear(torch.float32, batch_invariant=True)


@group("losses", "select", "gathered_sums")
def sparse_grad() -> Calls:
    for dtype in DTYPES:
        for options in ({"compact": "mask"}, {"logit_scale": 1.25}, {"bias": True}):
            yield f"{options} {dtype}", partial(linear, dtype, sparse_grad=0.01, **options)
        for out in {dtype, torch.float32}:
            for base in (None, (torch.ones(64), torch.ones(8))):
                label = f"sums {dtype} into {out}{', on a base' if base else ''}"
                yield label, partial(gathered_sums, dtype, out, base)


@group("gathered_dots", "gathered_sums", widest=5)
def kept_ids() -> Calls:
    for dtype in DTYPES:
        ids = torch.arange(48)[:, None] + torch.arange(5)
        yield f"sets {dtype}", partial(linear, dtype, kept_ids=ids)
        yield f"sets of one {dtype}", partial(linear_logprobs, dtype, kept_ids=ids[:, :1])


def gathered_sums(dtype: torch.dtype, out: torch.dtype, base: tuple[Tensor, Tensor] | None) -> None:
    sums = GatheredSums(torch.arange(32), torch.ones(32), torch.arange(0, 33, 4), torch.arange(8))
    table, sum_of_rows = torch.ones(32, 64, dtype=dtype), torch.zeros(8, 64, dtype=out)
    triton_ops.TritonEntries().gathered_sums(table, sums, sum_of_rows, dtype, base)
