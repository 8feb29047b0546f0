"""What an objective sees of a batch of tokens: the ratio π/μ, the difference π - μ, and how tokens form sequences.

Each quantity is written once in PyTorch (`Tokens`) and once, further down, as its Triton twin; both avoid cancellation
and overflow. Source of the definitions: arXiv 2606.09821.
"""

import torch
from torch import Tensor

from drpo_kernels.triton_support import jit, tl

# No sampled token has a log-prob as low as this. A sampler with 32 random bits and temperature τ chooses tokens at most
# 23 τ nats below the likeliest one, which itself is at most log V <= 13 nats below 0. So log μ > -23 τ - 13, which is
# above -100 for every τ up to 3. Engines write -9999 or -1e9 for a log-prob that they do not have: JSON has no -inf.
LEAST_LOGPROB = -100.0


def scorable(old_logprobs: Tensor) -> Tensor:
    """True where the rollout engine gave a log-prob: not NaN, and not so low that no sampled token can have it."""
    return old_logprobs > LEAST_LOGPROB


def between(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """x clamped to [low, high]. Inside a graph the bounds become tensors, because a graph that is compiled with numbers
    would be compiled again for every new value.
    """
    if torch.compiler.is_compiling():
        one = x.new_ones(())
        return x.clamp(one * low, one * high)
    return x.clamp(low, high)  # type: ignore[arg-type]  # two numbers or two tensors


class Sequences:
    """How the N flattened tokens of a batch form S sequences.

    With a shape [..., L] alone, each sequence is L consecutive tokens. With `cu_seqlens` [S + 1], sequence s is the
    tokens from offset s to offset s + 1, and tokens beyond the last offset are in no sequence. Offsets are clamped to
    [0, N] and made non-decreasing, so that unchecked ones never lead to memory outside the batch.
    """

    def __init__(self, shape: torch.Size, cu_seqlens: Tensor | None = None):
        self._tokens = shape.numel()
        self.offsets: Tensor | None = None
        if cu_seqlens is None:
            self.length, self.count = shape[-1], shape[:-1].numel()
        else:
            self.offsets = cu_seqlens.to(torch.int64).clamp(0, self._tokens).cummax(0).values
            self.count = cu_seqlens.numel() - 1

    @property
    def ids(self) -> Tensor:
        """The sequence of each packed token, [N] int64; S for a token that is in no sequence."""
        assert self.offsets is not None
        positions = torch.arange(self._tokens, device=self.offsets.device)
        return torch.searchsorted(self.offsets[1:].contiguous(), positions, right=True)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over each sequence, [N] -> [S], added in a fixed order (differentiable)."""
        if self.offsets is None:
            return values.reshape(self.count, self.length).sum(1)
        return _SegmentSum.apply(values, self)

    def expand(self, values: Tensor) -> Tensor:
        """The value of each token's sequence, [S] -> [N] (differentiable). A token that is in no sequence gets NaN, or
        0 if the values are integers.
        """
        if self.offsets is None:
            return values[:, None].expand(self.count, self.length).reshape(-1)
        return _SegmentExpand.apply(values, self)

    def _segment_sum(self, values: Tensor) -> Tensor:
        assert self.offsets is not None
        # segment_reduce adds in order. index_add would use atomics on a GPU, which for integers changes nothing.
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
    """The inputs of an objective, one entry per token, and the quantities derived from them: [N], float32 or float64.

    logprobs      log π of the sampled token under the current policy; it carries the gradient
    old_logprobs  log μ of the sampled token under the policy that sampled it, a constant
    advantages    A
    valid         bool, False for a token that must not count; None unless the objective is sequence-level
    sequences     how the tokens form sequences; None unless the objective is sequence-level

    Every quantity is computed anew each time it is asked for: an objective may write to what it gets.
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
        # Literals, here and below: `torch.compile(dynamic=True)` takes a constant of a module for a number that may
        # change, and cannot hand such a number to the backward of an autograd function.
        return (self.logprobs - self.old_logprobs).clamp(-20.0, 20.0)

    @property
    def ratio(self) -> Tensor:
        """r = exp(Δ)."""
        return self.log_ratio.exp()

    @property
    def ratio_minus_one(self) -> Tensor:
        """r - 1 = expm1(Δ), which is exact even for r close to 1. Its derivative is r; autograd would compute it as
        expm1(Δ) + 1, which rounds a small r to 0.
        """
        log_ratio = self.log_ratio
        excess = log_ratio.expm1()
        if not excess.requires_grad:
            return excess
        ratio = log_ratio.exp()
        return excess.detach() + (ratio - ratio.detach())

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
        """π - μ, from log π - log μ without the clamp. It does not cancel, and does not overflow if μ is tiny or 0."""
        probs, difference = self.logprobs.exp(), (self.logprobs - self.old_logprobs).detach()
        larger = torch.where(difference > 0, probs.detach(), self.old_logprobs.exp())
        shift = -larger * torch.expm1(-difference.abs()) * torch.sign(difference)
        return shift + (probs - probs.detach()) if probs.requires_grad else shift

    @property
    def clamped_shift(self) -> Tensor:
        """μ (r - 1). It equals π - μ unless the clamp on Δ is active; there its gradient is 0."""
        within = (self.logprobs - self.old_logprobs).abs() <= 20.0
        return torch.where(within, self.prob_shift, self.old_logprobs.exp() * self.ratio_minus_one)


@jit
def expm1(x):
    """exp(x) - 1 to fp32 accuracy. A series takes over near 0, where the subtraction would cancel."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(tl.abs(x) < 0.4, series, tl.exp(x) - 1)


@jit
def log1p(x):
    """log(1 + x) to fp32 accuracy for x >= 0, with Kahan's correction for the rounding of 1 + x."""
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * (x / tl.where(y == 1, 1.0, y - 1)))


@jit
def clamped_log_ratio(logp, old):
    """Δ, the twin of `Tokens.log_ratio`. It keeps a NaN, which tl.minimum would drop."""
    difference = logp - old
    return tl.where(difference == difference, tl.minimum(tl.maximum(difference, -20.0), 20.0), difference)


@jit
def ratio_terms(logp, old):
    """-> (r, r - 1, dr/dlogπ), the twin of `Tokens.ratio` and `ratio_minus_one`; dr/dlogπ is 0 beyond the clamp."""
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
