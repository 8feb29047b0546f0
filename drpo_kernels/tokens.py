"""What an objective sees of a batch of tokens, and the numerically careful quantities every objective is made of.

Each quantity is written once in PyTorch (`Tokens`) and once, beside it, as its Triton twin. Source: DESIGN of the
family, arXiv 2606.09821.
"""

import torch
from torch import Tensor

from drpo_kernels.triton_support import jit, tl

# No sampled token has a log-prob as low as this. Random numbers of 32 bits choose a token at most 23 nats below the
# likeliest, at the temperature τ of the sampling, and that one is within log V <= 13 of 0: log μ > -23 τ - 13, above
# -100 for every τ up to 3. Engines write -9999 or -1e9 for a log-prob that they do not have, since JSON has no -inf.
LEAST_LOGPROB = -100.0


def scorable(old_logprobs: Tensor) -> Tensor:
    """False where the rollout engine has no log-prob: NaN, or what no token that was sampled can have."""
    return old_logprobs > LEAST_LOGPROB


def log_ratio_limit() -> float:
    """The largest |Δ|. Not a constant of the module: `torch.compile(dynamic=True)` takes those for numbers that change,
    and cannot hand such a number to the backward of an autograd function.
    """
    return 20.0


def between(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """x clamped to [low, high]; inside a graph by tensors, because it would be compiled again for each new number."""
    if torch.compiler.is_compiling():
        one = x.new_ones(())
        low, high = one * low, one * high
    return x.clamp(low, high)


class Sequences:
    """How the N flattened tokens of a batch group into S sequences.

    Built from a leading shape [..., L] (each last-axis run is a sequence) or from `cu_seqlens` [S + 1] of a packed
    batch, whose tokens beyond the last offset are in no sequence. Offsets that nobody has validated lead to no other
    token's memory: they are brought into [0, N] and into order first.
    """

    def __init__(self, shape: torch.Size, cu_seqlens: Tensor | None = None):
        self._tokens = shape.numel()
        packed = cu_seqlens is not None
        self.offsets = cu_seqlens.to(torch.int64).clamp(0, self._tokens).cummax(0).values if packed else None
        self.length = None if packed else shape[-1]
        self.count = cu_seqlens.numel() - 1 if packed else shape[:-1].numel()

    @property
    def ids(self) -> Tensor:
        """The sequence of each packed token, [N] int64; S where it is in none."""
        positions = torch.arange(self._tokens, device=self.offsets.device)
        return torch.searchsorted(self.offsets[1:].contiguous(), positions, right=True)

    def sum(self, values: Tensor) -> Tensor:
        """Sum per sequence, [N] -> [S], in a fixed order (differentiable)."""
        if self.offsets is None:
            return values.reshape(self.count, self.length).sum(1)
        return _SegmentSum.apply(values, self)

    def expand(self, values: Tensor) -> Tensor:
        """Each sequence's value at each of its tokens, [S] -> [N] (differentiable); NaN, or the integer 0, where a
        token is in none.
        """
        if self.offsets is None:
            return values[:, None].expand(self.count, self.length).reshape(-1)
        return _SegmentExpand.apply(values, self)

    def _segment_sum(self, values: Tensor) -> Tensor:
        # segment_reduce adds in order; index_add would use atomics on a GPU
        if values.dtype in (torch.float32, torch.float64):
            offsets = torch.cat([self.offsets, self.offsets.new_full((1,), self._tokens)])
            return torch.segment_reduce(values, "sum", offsets=offsets, initial=0.0)[:-1]
        zeros = torch.zeros(self.count + 1, dtype=values.dtype, device=values.device)
        return zeros.index_add_(0, self.ids, values)[:-1]

    def _at_tokens(self, values: Tensor, elsewhere: float) -> Tensor:
        return torch.nn.functional.pad(values, (0, 1), value=elsewhere)[self.ids]


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, sequences):
        ctx.sequences = sequences
        return sequences._segment_sum(values)

    @staticmethod
    def backward(ctx, grad):
        return ctx.sequences._at_tokens(grad, 0), None


class _SegmentExpand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, sequences):
        ctx.sequences = sequences
        return sequences._at_tokens(values, torch.nan if values.dtype.is_floating_point else 0)

    @staticmethod
    def backward(ctx, grad):
        return ctx.sequences._segment_sum(grad.contiguous()), None


class Tokens:
    """Per-token inputs of an objective and the quantities derived from them; all [N], float32 or float64, flattened.

    logprobs      log π of the sampled token under the current policy (carries the gradient)
    old_logprobs  log μ under the behaviour policy, a constant
    advantages    A
    valid         bool, False where a token must not count (only set for sequence-level objectives)
    sequences     how the tokens group into sequences (only set for sequence-level objectives)
    """

    def __init__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        *,
        valid: Tensor | None = None,
        sequences: Sequences | None = None,
    ):
        self.logprobs = logprobs
        self.old_logprobs = old_logprobs
        self.advantages = advantages
        self.valid = valid
        self.sequences = sequences

    @property
    def log_ratio(self) -> Tensor:
        """Δ = clamp(log π - log μ, ±20)."""
        return (self.logprobs - self.old_logprobs).clamp(-log_ratio_limit(), log_ratio_limit())

    @property
    def ratio(self) -> Tensor:
        """r = exp(Δ)."""
        return self.log_ratio.exp()

    @property
    def ratio_minus_one(self) -> Tensor:
        """r - 1 = expm1(Δ), exact where r is close to 1; its derivative is r (autograd's own, expm1 + 1, loses a small
        r).
        """
        return _with_gradient_of(self.log_ratio.expm1(), self.ratio)

    @property
    def probs(self) -> Tensor:
        """π."""
        return self.logprobs.exp()

    @property
    def old_probs(self) -> Tensor:
        """μ."""
        return self.old_logprobs.exp()

    @property
    def prob_shift(self) -> Tensor:
        """π - μ from the unclamped difference, without cancellation and without overflow where μ is tiny or 0."""
        difference = self.logprobs - self.old_logprobs
        larger = torch.where(difference > 0, self.probs, self.old_probs)
        return _with_gradient_of(-larger * torch.expm1(-difference.abs()) * torch.sign(difference), self.probs)

    @property
    def clamped_shift(self) -> Tensor:
        """μ (r - 1), which is π - μ where the clamp on Δ changes nothing and has no gradient where it does."""
        within = (self.logprobs - self.old_logprobs).abs() <= log_ratio_limit()
        return torch.where(within, self.prob_shift, self.old_probs * self.ratio_minus_one)


def _with_gradient_of(value: Tensor, source: Tensor) -> Tensor:
    """`value`, exactly, with the derivative of `source`."""
    if not source.requires_grad:
        return value
    return value.detach() + (source - source.detach())


@jit
def expm1(x):
    """exp(x) - 1 to fp32 accuracy: a series near 0, where exp(x) - 1 would cancel."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(tl.abs(x) < 0.4, series, tl.exp(x) - 1)


@jit
def log1p(x):
    """log(1 + x) to fp32 accuracy for x >= 0 (Kahan's correction of the rounding of 1 + x)."""
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * (x / tl.where(y == 1, 1.0, y - 1)))


@jit
def clamped_log_ratio(logp, old):
    """Δ, the twin of `Tokens.log_ratio`; a NaN stays one, which tl.minimum would drop."""
    difference = logp - old
    return tl.where(difference == difference, tl.minimum(tl.maximum(difference, -20.0), 20.0), difference)


@jit
def ratio_terms(logp, old):
    """-> (r, r - 1, dr/dlogπ): the derivative is 0 beyond the clamp."""
    difference = logp - old
    log_ratio = tl.minimum(tl.maximum(difference, -20.0), 20.0)
    ratio = tl.exp(log_ratio)
    return ratio, expm1(log_ratio), tl.where(tl.abs(difference) <= 20.0, ratio, 0.0)


@jit
def prob_shift(logp, old):
    """-> π - μ, the twin of `Tokens.prob_shift`."""
    difference = logp - old
    magnitude = -tl.exp(tl.maximum(logp, old)) * expm1(-tl.abs(difference))
    return tl.where(difference > 0, magnitude, -magnitude)


@jit
def clamped_shift(logp, old):
    """-> μ (r - 1), the twin of `Tokens.clamped_shift`."""
    clamped = tl.exp(old) * expm1(clamped_log_ratio(logp, old))
    return tl.where(tl.abs(logp - old) <= 20.0, prob_shift(logp, old), clamped)
