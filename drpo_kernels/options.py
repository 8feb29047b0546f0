"""The keywords of the public functions.

`LogprobOptions` and `PolicyOptions` hold each keyword's documentation and default. The `...Keywords` below say which
function takes which, for editors and type checkers, and `@takes(Options)` gives a function that ends in
`**keywords: Unpack[...Keywords]` its full signature and documentation. A new option is a field here, an entry there and
its use; `tests/package/test_types.py` compares the two.
"""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from drpo_kernels.aggregation import TokenCoefficients
from drpo_kernels.collectives import VocabShard
from drpo_kernels.keywords import with_known_keywords
from drpo_kernels.objectives import DRPO, Objective

Function = TypeVar("Function", bound=Callable)

# A graph can trace a function's default that is an object, but not a dataclass's.
DEFAULT_OBJECTIVE = DRPO()


@dataclass(frozen=True, kw_only=True, eq=False)
class LogprobOptions:
    """temperature       number in [1e-6, 1e6], or a tensor of such numbers: 0-d, per token or, like advantages, per
                      sequence. The softmax is taken of z = softcap(logit_scale · x) / temperature. It is a constant: a
                      temperature that requires grad is an error. To learn one, divide hidden or logits by it before
                      the call
    logit_scale       number > 0 on the logits (Cohere, Granite)
    softcap           number > 0 or None: cap · tanh(· / cap) on the scaled logits (Gemma)
    vocab_size        number of real entries of a padded vocabulary; the softmax ignores the columns beyond them
    kept_ids          [..., K] integer. For each token the ids that top-p, top-k or min-p sampling kept, the token's own
                      among them, in any order and padded with -1 (vLLM's `SamplingMask`). The policy is then a softmax
                      over these ids, as the engine's was, so that the ratio compares like with like; over the whole
                      vocabulary it is off by the mass that was cut (arXiv 2512.02556, section 3.1). logprobs, entropy
                      and logsumexp are of this softmax. Each id costs 6H FLOP, in place of 6VH for a token (2H where
                      A = 0), and each place of [..., K] about 50 bytes. Masked tokens may have any ids. It cannot be
                      combined with logits_dtype=torch.bfloat16, head_dtype, batch_invariant, main_grad or sparse_grad
    backend           None (Triton on CUDA and ROCm, chunked PyTorch elsewhere), "triton", "torch" or "reference"
    validate          True: raise ValueError for values too, not only for shapes, dtypes, devices and plain numbers,
                      which are always checked: targets in range, a mask of 0 and 1, temperatures in range, rising
                      cu_seqlens, log-probs of at most 0.01, finite advantages, weights and coefficients, a tensor
                      normalizer above 0. None: only on a CPU, because reading the data makes the host wait for a
                      GPU. Unchecked, a bad target or a token outside of every sequence makes the loss NaN, offsets are
                      brought into order and range, and any other value enters the formula as it is
    workspace_bytes   bytes that the linear functions take for logits and their gradients; None: 64 to 128 MiB on a CPU,
                      1 GiB on a GPU. If the head is trained, bf16 gradients of all rows' logits or a float32 gradient
                      of the weight may come on top: `python -m drpo_kernels plan` says what a call takes, and why
    logits_dtype      None: the linear functions keep logits in float32. torch.bfloat16 halves their traffic and rounds
                      a logit of 16 to 32 by ±0.06, that is ±6 % on the ratio
    head_dtype        experimental. "fp8_e4m3" or "fp8_e5m2": the linear functions quantise hidden per row and weight
                      per output channel (absmax scales in float32, rounded to nearest even) for the product of the
                      logits, as an fp8 inference engine does; statistics stay float32 and the gradients' products
                      take the unquantised operands (straight-through). It removes the mismatch with such an engine and
                      is less precise: against the unquantised model the ratio is off by 6 % (E4M3) or 20 % (E5M2; p99
                      over trained-looking tokens, docs/precision.md). torch._scaled_mm multiplies if it takes E4M3
                      into float32 (CUDA, sm_89 and later); elsewhere wider products follow the same definition
    batch_invariant   True: the linear functions multiply with Triton kernels that add in one fixed order. A row's
                      log-prob, entropy, log-sum-exp, loss and dX are then bitwise the same whatever rows are beside it,
                      wherever it lies, and for any `compact` and workspace; the gradients of weight and bias are the
                      same for any workspace. This is slower than the vendor's products; see docs/determinism.md. It
                      needs backend None or "triton"
    vocab_shard       `drpo_kernels.distributed.VocabShard` for the linear functions: weight and bias are this rank's
                      rows of a head split over a process group, and their gradients are local; targets and vocab_size
                      stay those of the whole head. Every rank of the group makes the same call with the same other
                      arguments and the same requires_grad, and gets the same results and the same, complete gradient
                      of hidden
    main_grad         contiguous float32 tensor [V, H] for the linear functions: the trainer's own gradient buffer
                      (Megatron's `weight.main_grad`). The weight's gradient is added to it; weight.grad stays as it is,
                      and hooks on the weight find no gradient (Megatron's overlap_grad_reduce asserts one). Such a call
                      holds nothing beside its workspace, and the larger the workspace is, the less often the buffer is
                      read and written. The weight must require grad, and the call be made outside of torch.no_grad().
                      `linear_policy_loss` adds in its *forward*, times `loss_scale`: call it once per micro-batch, not
                      inside activation checkpointing, which would run it twice, and drop the buffer if a call fails
                      half-way. Log-probs, and objectives of whole sequences, add in every backward instead
    """

    temperature: float | Tensor = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    kept_ids: Tensor | None = None
    backend: str | None = None
    validate: bool | None = None
    workspace_bytes: int | None = None
    logits_dtype: torch.dtype | None = None
    head_dtype: str | None = None
    batch_invariant: bool = False
    vocab_shard: VocabShard | None = None
    main_grad: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyOptions(LogprobOptions):
    """objective         the per-token loss, e.g. `DRPO(delta=0.2)`, `PPO()`, or your own `Objective`
    reduction         "token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
                      or `TokenCoefficients`; "none": out.loss is shaped like targets, 0 where nothing was computed, and
                      you sum it yourself; its backward recomputes the logits (8F in place of 6F)
    normalizer        number or 0-d tensor > 0 that replaces the reduction's own count (of tokens, or of non-empty
                      sequences): the global count over ranks and accumulation steps, or 1 if that count is 0. A tensor
                      of 0 that is not validated makes the loss NaN or infinite
    horizon           number > 0, the constant length that "seq-mean-token-sum-norm" divides by (Dr. GRPO)
    cu_seqlens        [S + 1] integer offsets of the sequences of a packed batch; what lies beyond the last one is
                      padding and must be masked. If they are not validated, offsets beyond the batch mean its end
    ref_logprobs      log-probs under a reference policy, shaped like targets and above -1000. The KL term needs them;
                      metrics["drpo/ref_kl"] is computed with and without that term
    kl_coef           coefficient of the KL term
    kl_estimator      "k1", "k2" or "k3": d, d²/2 or exp(-d) + d - 1, with d = log π - log π_ref
    kl_importance     True: multiply the KL term by the token's ratio r, differentiably. With samples of μ it estimates
                      the KL and its gradient without bias (arXiv 2512.02556). GSPO's KL term takes the token's ratio
                      too, where TRL and Liger take the ratio of the sequence
    kl_cap            None, or a number in [1e-6, 1e6] to which log π - log π_ref is clamped in the KL term. Beyond it
                      that term has no gradient. 20 keeps exp(-d) of k3 finite if the reference all but bans a token
    entropy_coef      coefficient of the entropy bonus (differentiable)
    z_loss_coef       coefficient of (log Σ exp z)², which holds the logits' normalisation near 1 (arXiv 2204.02311,
                      section 5)
    token_weights     factor per token on the policy term alone, shaped like targets (importance correction)
    compact           "active": rows that cannot contribute are dropped before any product: masked ones, and those with
                      A = 0 unless a KL term, an entropy bonus, a z-loss or the objective needs them. "mask": only
                      masked rows are dropped; rows with A = 0 cost a forward and are reported. "none": every row is
                      computed, and no count is read back from the device
    loss_scale        number > 0 for `linear_policy_loss`: the factor that you will multiply the loss by before its
                      backward (loss scale, 1 / accumulation steps). The forward computes the gradients with it, so that
                      the backward neither reads nor rounds them again; out.loss stays the same. If the loss is
                      multiplied by another factor, the backward corrects the gradients; with main_grad a difference
                      beyond 1e-5 is an error, on a GPU by a device-side assertion
    sparse_grad       experimental, because so far it saves time on CPUs alone. τ in [0, 1) for `linear_policy_loss`: a
                      row's gradient reaches its target and the fewest other tokens that leave out at most τ · (1 - p_y)
                      of the row's probability. Such a row costs the 2F of its logits in place of 6F. Rows that need
                      many tokens stay dense and exact (all rows do, for τ below 4e-6). What is left out is spread
                      evenly over the vocabulary. The loss, log-probs and entropy are exact. 0: every gradient is exact;
                      0.003 errs less than rounding dlogits to bf16; 0.01 errs up to twice as much, but the same way in
                      every step (docs/sparse.md).
                      metrics["drpo/sparse_share"] is the share of rows that were sparse. It cannot be combined with an
                      entropy bonus, z-loss, softcap, vocab_shard, batch_invariant, a sequence objective or reduction
                      "none"
    """

    objective: Objective = DEFAULT_OBJECTIVE
    reduction: str | TokenCoefficients = "token-mean"
    normalizer: float | Tensor | None = None
    horizon: float | None = None
    cu_seqlens: Tensor | None = None
    ref_logprobs: Tensor | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_importance: bool = False
    kl_cap: float | None = None
    entropy_coef: float = 0.0
    z_loss_coef: float = 0.0
    token_weights: Tensor | None = None
    compact: str = "active"
    loss_scale: float = 1.0
    sparse_grad: float = 0.0


class LogprobKeywords(TypedDict, total=False):
    """The keywords that every function takes."""

    temperature: float | Tensor
    logit_scale: float
    softcap: float | None
    vocab_size: int | None
    kept_ids: Tensor | None
    backend: str | None
    validate: bool | None


class HeadKeywords(TypedDict, total=False):
    """The keywords that only functions of hidden states and a head take."""

    workspace_bytes: int | None
    logits_dtype: torch.dtype | None
    head_dtype: str | None
    batch_invariant: bool
    vocab_shard: VocabShard | None
    main_grad: Tensor | None


class LinearLogprobKeywords(LogprobKeywords, HeadKeywords, total=False):
    """The keywords that `linear_token_logprobs` takes."""


class LossKeywords(LogprobKeywords, total=False):
    """The keywords that every policy loss takes, beside the objective."""

    reduction: str | TokenCoefficients
    normalizer: float | Tensor | None
    horizon: float | None
    cu_seqlens: Tensor | None
    ref_logprobs: Tensor | None
    kl_coef: float
    kl_estimator: str
    kl_importance: bool
    kl_cap: float | None
    entropy_coef: float
    z_loss_coef: float
    token_weights: Tensor | None
    compact: str


class LinearLossKeywords(LossKeywords, HeadKeywords, total=False):
    """The keywords that `linear_policy_loss` and `linear_drpo_loss` take, beside the objective."""

    loss_scale: float
    sparse_grad: float


def _documentation(of: Any) -> str:
    return inspect.cleandoc(of.__doc__ or "")


def takes(options: type) -> Callable[[Function], Function]:
    """Give a function ending in `**keywords: Unpack[...Keywords]` the signature and the documentation of these options.
    It then raises TypeError for any other keyword, and says what to write instead.
    """
    classes = [cls for cls in reversed(options.__mro__) if dataclasses.is_dataclass(cls)]
    documented = "\n".join(_documentation(cls) for cls in classes).replace("\n", "\n    ")

    def decorate(function: Function) -> Function:
        *own, rest = inspect.signature(function).parameters.values()
        (keywords,) = get_args(rest.annotation)
        taken = get_type_hints(keywords)
        keyword_only = inspect.Parameter.KEYWORD_ONLY
        own += [
            inspect.Parameter(field.name, keyword_only, default=field.default, annotation=field.type)
            for field in dataclasses.fields(options)
            if field.name in taken
        ]
        known = tuple(p.name for p in own)
        checked = with_known_keywords(
            function, function.__name__, known, lambda name: _of_another_function(name, known)
        )
        checked.__signature__ = inspect.signature(function).replace(parameters=own)  # type: ignore[attr-defined]
        checked.__doc__ = f"{_documentation(function)}\n\nOptions\n    {documented}\n"
        return checked

    return decorate


def _of_another_function(name: str, known: tuple[str, ...]) -> str | None:
    """The hint for a keyword that only another public function takes, or None."""
    linear_only = get_type_hints(LinearLossKeywords).keys() - get_type_hints(LossKeywords).keys()
    if "logits" in known and name in ("hidden", "weight", "bias", *linear_only):
        return "the logits exist already; linear_policy_loss and linear_token_logprobs take hidden states"
    if name == "return_logsumexp":
        return "linear_token_logprobs and token_logprobs take it; out.logsumexp is there anyway"
    if name == "logits":
        return "policy_loss and token_logprobs take logits"
    if name in ("old_logprobs", "advantages", *(f.name for f in dataclasses.fields(PolicyOptions))):
        return "linear_policy_loss and policy_loss take it"
    return None
