"""How far a correct computation may be from the fp64 oracle, element by element, derived from the rounding it does.

With u the unit roundoff of the statistics (2^-24, or 2^-53 for fp64 inputs) and o that of the operands' dtype:

    a logit        (H + 4) u Σ_k |x_k w_k|, plus 4 u |x| + 8 u |z| in its transform, plus 2^-8 |x| (without the bias)
                   where kept in bf16
    log π          e = 2 max_j (error of z_j) + (V + 16) u + 4 u |log π|; relative to p and to 1 - p_y: expm1(2 e)
    dℓ/dlogπ, ℓ    what they change when log π moves by ± (e + 2 u (|log π| + |log μ| + |log π_ref|)), so that a token
                   at the edge of a clip may fall on either side of it, plus 64 u of their parts before cancellation
    log Σ exp z    max_j (error of z_j) + (V + 16) u + 4 u (max |z| + |log Σ exp z|); it moves the z-loss and its slope
    dlogits        those through dz = s (onehot - p) + a p (log p + H) + t p, and o of the result for its rounding
    dX, dW, db     |dlogits error| times |W| or |X|, plus (length of the sum + 8) u of the sum of magnitudes, plus
                   three roundings to the result's dtype

Every bound is relative to sums of magnitudes, never to a cancelled sum, with a floor of 2^-120 for what underflows.
SAFETY covers what these first-order terms leave out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import oracle
from oracle import Rows

SAFETY, FLOOR = 2.0, 2.0**-120
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = {torch.float64: 2.0**-1022, torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


@dataclass
class Budget:
    """The largest allowed errors: of the loss (0-d), of the valid rows [n], and of the gradients by name (valid rows
    alone).
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    gradients: dict[str, Tensor]


@dataclass
class Setting:
    """The valid rows of a problem in fp64, and how they are computed."""

    inputs: tuple[Tensor, Tensor | None, Tensor | None]  # hidden [n, H], weight, bias; or logits [n, V], None, None
    targets: Tensor  # [n]
    temperature: Tensor  # [n, 1]
    transform: dict  # logit_scale, softcap, vocab_size
    compute: torch.dtype  # dtype of the operands
    results: dict[str, torch.dtype]  # dtype of each gradient
    bf16_logits: bool
    naive: bool  # the reference: 1 - p_y by subtraction
    kept_ids: Tensor | None = None  # [n, K]

    @property
    def unit(self) -> float:
        return UNIT[torch.float64 if self.compute == torch.float64 else torch.float32]


@dataclass
class Terms:
    """The loss as a function of log π, and the coefficients [n] of the entropy and of (log Σ exp z)²."""

    evaluate: object  # logp [n] -> (share of the loss [n], its derivative [n], magnitudes of both)
    size: Tensor  # |log μ| + |log π_ref|, [n]
    entropy: Tensor
    z_loss: Tensor


class RowErrors:
    """The logits, the probabilities and their errors, [n, V'] or [n]."""

    def __init__(self, s: Setting):
        u, (x, weight, bias) = s.unit, s.inputs
        magnitude = product = x.abs()
        if weight is not None:
            product = x @ weight.T
            magnitude = x.abs() @ weight.abs().T
            x = product if bias is None else product + bias
            magnitude = magnitude if bias is None else magnitude + bias.abs()
        vocab = s.transform.get("vocab_size")
        x, magnitude, product = x[:, :vocab], magnitude[:, :vocab], product[:, :vocab].abs()
        scale, cap, heat = s.transform["logit_scale"], s.transform["softcap"], s.temperature
        finite = x.isfinite()
        size = x.where(finite, 0).abs()
        error = (s.inputs[0].shape[1] + 4) * u * magnitude.where(finite, 0) if weight is not None else 0 * size
        error = error + (2.0**-8 * product if s.bf16_logits else 0) + 4 * u * size
        z = oracle.kept_only(oracle.transform(x, heat, logit_scale=scale, softcap=cap), s.kept_ids)
        self.banned = torch.isneginf(z)
        self.chain = (scale / heat).expand_as(x).masked_fill(self.banned, 0)
        self.chain_error = torch.zeros_like(x)
        z_error = scale / heat * error
        if cap is not None:
            b = torch.tanh(scale * x / cap)
            b_error = (1 - b.square()) * scale / cap * error + 4 * u
            z_error = cap / heat * b_error
            self.chain_error = scale / heat * (2 * b.abs() * b_error + b_error.square() + 4 * u)
            self.chain = self.chain * (1 - b.square())
        z_error = (z_error + 8 * u * z.abs()).masked_fill(self.banned, 0)
        self.logp_all = torch.log_softmax(z, 1)
        self.p = self.logp_all.exp()
        self.logp_all = self.logp_all.masked_fill(self.banned, 0)
        self.onehot = torch.nn.functional.one_hot(s.targets, x.shape[1]).double()
        self.logp = torch.log_softmax(z, 1).gather(1, s.targets[:, None])[:, 0]
        self.entropy = -(self.p * self.logp_all).sum(1)
        self.e = 2 * z_error.amax(1) + (x.shape[1] + 16) * u + 4 * u * finite_part(self.logp).abs()
        self.relative = torch.expm1((2 * self.e).clamp(max=80.0))[:, None]
        self.lse = torch.logsumexp(z, 1)
        sizes = z.masked_fill(self.banned, 0).abs().amax(1) + finite_part(self.lse).abs()
        self.e_lse = z_error.amax(1) + (x.shape[1] + 16) * u + 4 * u * sizes
        spread = (self.p * (self.logp_all.abs() + 1 + self.entropy[:, None])).sum(1)
        self.e_entropy = self.relative[:, 0] * spread + 16 * u * (math.log(x.shape[1]) + self.entropy + 1)


def finite_part(x: Tensor) -> Tensor:
    return x.where(x.isfinite(), torch.zeros_like(x))


def budget(s: Setting, terms: Terms, upstream: float) -> Budget:
    u, rows = s.unit, RowErrors(s)
    loss, slope, parts, slope_parts = terms.evaluate(rows.logp)
    moved = rows.e + 2 * u * (finite_part(rows.logp).abs() + terms.size)
    sides = [terms.evaluate((rows.logp + sign * moved).clamp(max=0.0)) for sign in (1, -1)]
    loss_error = torch.stack([(side[0] - loss).abs() for side in sides]).amax(0) + 64 * u * parts + FLOOR
    slope_error = torch.stack([(side[1] - slope).abs() for side in sides]).amax(0) + 64 * u * slope_parts + FLOOR
    total = (loss_error + terms.entropy.abs() * rows.e_entropy).sum() + 8 * u * loss.abs().sum()
    size = terms.z_loss.abs() * (2 * rows.lse.abs() + rows.e_lse)
    total = total + (size * rows.e_lse + 8 * u * size * rows.lse.abs()).sum()
    dx, dx_error = _dlogits(s, rows, slope, slope_error, terms)
    gradients = _gradients(s, upstream * dx, abs(upstream) * dx_error)
    return Budget(
        SAFETY * total, SAFETY * rows.e, SAFETY * rows.e_entropy, {k: SAFETY * v for k, v in gradients.items()}
    )


def _dlogits(s: Setting, rows: RowErrors, slope, slope_error, terms: Terms) -> tuple[Tensor, Tensor]:
    """Return (dloss/dx, its error), each [n, V'], over the real vocabulary."""
    u, p = s.unit, rows.p
    others = (p * (1 - rows.onehot)).sum(1, keepdim=True)
    shape = rows.onehot * others - (1 - rows.onehot) * p  # onehot - p
    a, slope, slope_error = terms.entropy[:, None], slope[:, None], slope_error[:, None]
    t, t_error = 2 * (terms.z_loss * rows.lse)[:, None], 2 * (terms.z_loss.abs() * rows.e_lse)[:, None]
    surprise = rows.logp_all + rows.entropy[:, None]
    dz = slope * shape + a * p * surprise + t * p
    size = rows.logp_all.abs() + rows.entropy[:, None] + 1
    error = (slope_error + slope.abs() * rows.relative) * shape.abs()
    error = error + a.abs() * p * (rows.relative * size + rows.e_entropy[:, None])
    error = error + p * (t_error + t.abs() * (rows.relative + 8 * u))
    # The oracle itself computes 1 - p_y by subtraction, in fp64.
    naive = u if s.naive else UNIT[torch.float64]
    error = error + 16 * naive * (slope.abs() * (rows.onehot + p) + a.abs() * (size * p + rows.onehot * size))
    dx, dx_error = rows.chain * dz, rows.chain * error + rows.chain_error * (dz.abs() + error)
    operand = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(s.compute, 2 * u)
    dx_error = dx_error + (operand + 16 * u) * (dx.abs() + dx_error)
    if s.compute == torch.float16 and len(dx):
        # dlogits are scaled so that the largest possible entry is about 2^14: below 2^-38 of that, an entry is
        # subnormal or zero.
        heat = s.transform["logit_scale"] / s.temperature
        dx_error = dx_error + 2.0**-37 * ((slope.abs() + 16 * a.abs() + t.abs()) * heat).amax()
    return dx, dx_error + TINY[torch.float32] * (slope.abs() + a.abs() + t.abs())


def _gradients(s: Setting, dx: Tensor, error: Tensor) -> dict[str, Tensor]:
    u, (x, weight, bias) = s.unit, s.inputs
    if weight is None:
        return {"logits": rounded(s, "logits", dx, error)}
    real = weight[: dx.shape[1]]
    sums = {
        "hidden": (dx @ real, error @ real.abs(), dx.abs() @ real.abs(), dx.shape[1]),
        "weight": (dx.T @ x, error.T @ x.abs(), dx.abs().T @ x.abs(), len(dx)),
        "bias": (dx.sum(0), error.sum(0), dx.abs().sum(0), len(dx)),
    }
    if bias is None:
        del sums["bias"]
    return {n: rounded(s, n, want, e + (length + 8) * u * size) for n, (want, e, size, length) in sums.items()}


def rounded(s: Setting, name: str, want: Tensor, error: Tensor) -> Tensor:
    """Return the error after rounding the operand, the result and the product with the upstream factor to the
    gradient's dtype.
    """
    dtype = s.results[name]
    return error + 3 * UNIT[dtype] * (want.abs() + error) + TINY[dtype]


def policy_terms(spec, old, ref, advantages, sequences, coefficients, kl) -> Terms:
    """Return the terms of a policy loss. `old` of None means on-policy. `coefficients` are those of the policy (with
    token weights), the KL, the entropy and the z-loss. `kl` is (estimator, importance).
    """
    c_policy, c_kl, c_entropy, c_z_loss = coefficients
    seq, n_seq = sequences

    def parts(logp: Tensor, adv: Tensor, with_kl: bool) -> tuple[Tensor, Tensor]:
        leaf = logp.detach().clone().requires_grad_()
        behaviour = leaf.detach() if old is None else old
        loss = c_policy * oracle.token_loss(spec, Rows(leaf, behaviour, adv, seq, n_seq))
        if with_kl and kl is not None:
            ratio = (leaf - behaviour).clamp(-20, 20).exp() if kl[1] else 1
            loss = loss + c_kl * ratio * oracle.kl_term(leaf, ref, kl[0])
        (slope,) = torch.autograd.grad(loss.sum() + 0 * leaf.sum(), leaf)
        return loss.detach(), slope

    def evaluate(logp: Tensor):
        loss, slope = parts(logp, advantages, True)
        # With A of either sign, a difference of two parts becomes their sum.
        signed = [parts(logp, sign * advantages.abs(), False) for sign in (1, -1)]
        magnitudes = [sum(side[i].abs() for side in signed) for i in range(2)]
        if kl is not None:
            d = finite_part(logp - ref)
            ratio = (logp - old).clamp(-20, 20).exp() if kl[1] and old is not None else 1
            size = d.abs() + d.square() + (torch.expm1(-d).abs() if kl[0] == "k3" else 0) + 1
            magnitudes = [m + c_kl.abs() * ratio * size for m in magnitudes]
        return loss, slope, *magnitudes

    size = torch.zeros_like(advantages)
    for values in (old, ref):
        size = size if values is None else size + finite_part(values).abs()
    return Terms(evaluate, size, c_entropy, c_z_loss)


def logprob_terms(slopes: Tensor, entropy_slopes: Tensor) -> Terms:
    """Return the terms of Σ slopes · logprob + entropy_slopes · entropy."""

    def evaluate(logp: Tensor):
        value = slopes * finite_part(logp)
        return value, slopes, value.abs(), slopes.abs()

    return Terms(evaluate, torch.zeros_like(slopes), -entropy_slopes, torch.zeros_like(slopes))
