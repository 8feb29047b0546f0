"""Problems of `sparse_grad`, their gradients in float64, and what a call left out of them.

Hidden states, weights and biases are multiples of 1/16, and a logit is a sum of few of them, so that every float32
logit is exact: what a row leaves out does not depend on the rounding of a product. What remains is the softmax,
`Exact.rounding`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

import drpo_kernels as dk
import problems
from drpo_kernels import ops
from drpo_kernels.backends.sparse.contract import LEVELS_PER_OCTAVE, SHARE_ROUNDING, Sparsity, entry_limit
from problems import SPECS, Problem, generator

ULP = 2.0**-24
COMPACT = ("active", "mask", "none")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ROW = 4 * 130  # bytes of the logits of a row of `case_of`
SHARES = ("drpo/sparse_share", "drpo/sparse_entries", "drpo/left_out_mean", "drpo/left_out_share_max")
# The relative rounding of dlogits and of gradients in this dtype: half an ulp each, and twice that for what adds up.
STORED = {FP64: 0.0, FP32: 0.0, BF16: 2 * 2.0**-8, FP16: 2 * 2.0**-11}


class Shift(dk.Objective):
    """This is a user's objective: it has no twin, is not registered, and has a gradient where A = 0."""

    def token_loss(self, tokens):
        return 0.3 * tokens.log_ratio.square() - tokens.advantages * tokens.logprobs


def shift(rows):
    """Return the loss of `Shift` for the oracle."""
    return 0.3 * rows.log_ratio.square() - rows.adv * rows.logp


# (the package's objective, the oracle's)
OBJECTIVES = {name: (spec, spec) for name, spec in SPECS.items() if spec[0] != "GSPO"}
OBJECTIVES["user"] = ((Shift, {}), (shift, {}))


@dataclass(frozen=True)
class Case:
    problem: Problem
    objective: str = "drpo-active"
    tau: float = 0.02

    @property
    def vocab(self) -> int:
        return self.problem.options.get("vocab_size") or self.problem.weight.shape[0]

    def with_options(self, **changes) -> Case:
        return replace(self, problem=self.problem.with_options(**changes))

    def with_tensors(self, **changes) -> Case:
        return replace(self, problem=replace(self.problem, **changes))


def sixteenths(values: Tensor) -> Tensor:
    """Return float32 multiples of 1/16, which rounding to bfloat16 does not change below 16."""
    return (16 * values).round().clamp(-255, 255).div(16).float()


# --- drawing ----------------------------------------------------------------------------------------------------------


def rows_between(g, shape, hidden, vocab, spread, pull, miss=0.2):
    """Return (hidden, weight, targets). The logits of a row have a standard deviation of 0 to `spread`, and one of them
    is pulled up by 0 to `pull`: the target's, or in a share `miss` of the rows another one.
    """
    weight = sixteenths(torch.randn(vocab, hidden, generator=g))
    targets = torch.randint(vocab, shape, generator=g)
    stray = torch.rand(shape, generator=g) < miss
    aim = weight[torch.where(stray, torch.randint(vocab, shape, generator=g), targets)]
    height, width = (most * torch.rand(*shape, 1, generator=g) for most in (pull, spread / hidden**0.5))
    x = width * torch.randn(*shape, hidden, generator=g)
    return sixteenths(x + height * aim / aim.square().sum(-1, keepdim=True).clamp(min=0.5)), weight, targets


def with_behaviour(g, problem: Problem, spread=0.3) -> Problem:
    """Return the problem with old log-probs near the policy's own, and with advantages of both signs and 0."""
    shape = problem.targets.shape
    logp = problems.current_logprobs(
        problem.hidden, problem.weight, problem.bias, problem.targets, problem.options
    )  # fmt: skip
    advantages = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) > 0.15)
    old, ref = (problems.behaviour(logp, g, spread) for _ in range(2))
    options = problem.options | ({"ref_logprobs": ref} if problem.options.get("kl_coef") else {})
    return replace(problem, old_logprobs=old, advantages=advantages, options=options)


def case_of(seed=0, shape=(24,), hidden=16, vocab=130, *, spread=5.0, pull=12.0, bias=False, tau=0.02,
            objective="drpo-active", **options) -> Case:  # fmt: skip
    g = generator(seed)
    x, weight, targets = rows_between(g, shape, hidden, vocab, spread, pull)
    targets = targets % options.get("vocab_size", vocab)
    offset = sixteenths(torch.randn(vocab, generator=g)) if bias else None
    problem = Problem(targets, None, None, hidden=x, weight=weight, bias=offset, options=options)
    return Case(with_behaviour(g, problem), objective, tau)


def options_of(r: random.Random, g, shape, vocab: int) -> dict:
    """Return a random mixture of the options that `sparse_grad` allows beside it."""
    options = {"compact": r.choice(["active", "mask", "none"])}
    heat = r.choice([None, "number", "tensor"])
    if heat:
        options["temperature"] = r.uniform(0.6, 2) if heat == "number" else 0.6 + 1.4 * torch.rand(shape, generator=g)
    if r.random() < 0.3:
        options["logit_scale"] = r.choice([0.5, 1.25])
    if r.random() < 0.3:
        options |= {"kl_coef": 0.1, "kl_estimator": r.choice(["k1", "k2", "k3"]), "kl_importance": r.random() < 0.5}
    if r.random() < 0.3:
        options["token_weights"] = 0.5 + torch.rand(shape, generator=g)
    if len(shape) > 1:
        options |= {"reduction": r.choice(problems.REDUCTIONS), "horizon": 11.0}
    elif r.random() < 0.3:
        options["reduction"] = tuple(torch.rand(shape, generator=g) for _ in range(3))
    if r.random() < 0.8:
        options["workspace_bytes"] = 4 * vocab * r.choice([1, 3, 8, 20])  # room for this many rows of logits
    return options


def drawn(seed: int) -> Case:
    """Return a random case of 50 rows."""
    r, g = random.Random(seed), generator(1000 + seed)
    shape = r.choice([(50,), (5, 10)])
    hidden = r.randint(1, 40)
    vocab = r.choice([1, 2, 3, 7, 40, 64, 65, 100, 128, 130, 200, 257, 320, 511, 640, 1000, 1500])
    x, weight, targets = rows_between(g, shape, hidden, vocab, r.uniform(0.3, 8), r.uniform(2, 18), r.random() / 2)
    options = options_of(r, g, shape, vocab)
    if vocab > 8 and r.random() < 0.2:
        options["vocab_size"] = vocab - r.randint(1, 7)
        targets = targets % options["vocab_size"]
    bias = sixteenths(r.uniform(0.2, 2) * torch.randn(vocab, generator=g)) if r.random() < 0.4 else None
    mask = torch.rand(shape, generator=g) < 0.8 if r.random() < 0.5 else None
    problem = Problem(targets, None, None, mask, x, weight, bias, options=options)
    tau = math.exp(r.uniform(math.log(1e-4), math.log(0.5)))
    problem = with_behaviour(g, problem)
    if r.random() < 0.15:
        problem = replace(problem, old_logprobs=None)
    return Case(problem, r.choice(list(OBJECTIVES)), tau)


REST = 3  # columns of the head beside those that show the logits' gradient


def visible(case: Case, seed=0) -> Case:
    """Return the case with a head [I, R] over hidden states that are the logits, so that the first V columns of dX
    *are* dlogits.
    """
    p, g = case.problem, generator(seed)
    vocab = p.weight.shape[0]
    raw = p.hidden.double() @ p.weight.double().T  # these are multiples of 1/256
    rest = sixteenths(torch.randn(vocab, REST, generator=g))
    x = sixteenths(0.3 * torch.randn(*p.targets.shape, REST, generator=g))
    hidden = torch.cat([(raw - x.double() @ rest.double().T).float(), x], -1)
    return case.with_tensors(hidden=hidden, weight=torch.cat([torch.eye(vocab), rest], 1))


# --- the exact gradients ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """The exact gradients in float64 of N flattened rows: dlogits = slope · pushes, with slope the loss's own times
    dz/dx.
    """

    dlogits: Tensor  # [N, V]
    pushes: Tensor  # onehot - p, [N, V]
    probs: Tensor  # [N, V]
    at_target: Tensor  # bool [N, V]
    slope: Tensor  # [N]
    miss: Tensor  # 1 - p_y, [N]
    active: Tensor  # bool [N], has a gradient
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H], of the real vocabulary
    rounding: Tensor  # relative, of a p or a logprob's effect on a slope in float32, [N]

    @property
    def uncertain(self) -> Tensor:
        """Return how much rounding may change each slope, [N]. It is relative to the largest, because terms of a small
        slope may cancel.
        """
        return torch.where(self.active, self.rounding * (self.slope.abs() + self.slope.abs().max()), 0)

    @property
    def slack(self) -> Tensor:
        """Return how much rounding may change dlogits, [N, V]."""
        return (self.uncertain + 8 * ULP * self.slope.abs())[:, None] * self.pushes.abs()


def exact(case: Case) -> Exact:
    """Return the oracle's gradients by z itself, whatever z was made from."""
    p, vocab = case.problem, case.vocab
    options, scale = dict(p.options), p.options.get("logit_scale", 1.0)
    heat = torch.as_tensor(options.pop("temperature", 1.0)).double().expand(p.targets.shape)[..., None]
    for name in ("logit_scale", "vocab_size", "head_dtype"):
        options.pop(name, None)
    hidden, weight = p.hidden.double(), p.weight.double()[:vocab]
    raw = hidden @ weight.T
    z = scale * (raw if p.bias is None else raw + p.bias.double()[:vocab]) / heat
    ready = replace(p, logits=z.detach(), hidden=None, weight=None, bias=None, options=options)
    _, grads = problems.solve(ready, OBJECTIVES[case.objective][1])
    # z - max z is rounded five times on its way into exp2, and then there are a few dozen sums and products.
    span = (z.amax(-1) - z.masked_fill(z.isinf(), torch.inf).amin(-1)).detach().flatten()
    dz, probs = (x.detach().flatten(0, -2) for x in (grads["logits"], z.softmax(-1)))
    counted = torch.ones(len(dz), dtype=torch.bool) if p.mask is None else p.mask.flatten()
    target = torch.where(counted, p.targets.flatten(), 0)
    at_target = torch.nn.functional.one_hot(target, vocab).bool()
    others = probs.masked_fill(at_target, 0)
    miss = others.sum(1)
    pushes = torch.where(at_target, miss[:, None], -probs)
    # The slope comes from the other tokens, because autograd subtracts to get the target's gradient, s · (1 - p_y): 0
    # where p_y is 1.
    slope = -(dz * others).sum(1) / others.square().sum(1).clamp(min=1e-300) * (scale / heat).flatten()
    return Exact(
        slope[:, None] * pushes, pushes, probs, at_target, slope, miss, slope != 0, hidden.flatten(0, -2), weight,
        ULP * (5 * span + 64),
    )  # fmt: skip


# --- a call and what is asked of it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A call with `sparse_grad`, and its gradients in float64: [N, H], [V, H] and [V], or None where not wanted."""

    out: dk.PolicyLossOutput
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    entries: Tensor  # number that each row reports, [N]; 0 means dense
    left_out: Tensor  # probability, [N]


def found(case: Case, backend="torch", device="cpu", upstream=1.0, **extra) -> Found:
    outcomes = []

    def spy(*arguments):
        result = sweep(*arguments)
        outcomes.append(result[0].cpu().double())
        return result

    sweep = ops.sparse_policy.function
    with mock.patch.object(ops, "sparse_policy", ops.sparse_policy._replace(function=spy)):
        out, grads = problems.run(
            case.problem, problems.build(OBJECTIVES[case.objective][0]), backend, device, upstream,
            **{"sparse_grad": case.tau, **extra},
        )  # fmt: skip
    (outcome,) = outcomes
    grads = {name: grad.cpu().double() / upstream for name, grad in grads.items()}
    return Found(
        out, grads["hidden"].flatten(0, -2), grads["weight"], grads.get("bias"),
        outcome[Sparsity.ENTRIES], outcome[Sparsity.LEFT_OUT],
    )  # fmt: skip


def assert_below(error: Tensor, bound: Tensor, what: str) -> None:
    """Assert that each error is at most its bound. A NaN is not below anything."""
    error, bound = torch.broadcast_tensors(error, bound)
    bad = ~(error <= bound)
    assert not bad.any(), f"{what}: {error[bad][:4].tolist()} > {bound[bad][:4].tolist()}"


def assert_within_bounds(case: Case, got: Found, want: Exact | None = None, stored=0.0) -> None:
    """Assert the bounds of docs/sparse.md against float64.

    The error of a row's dlogits is its slope s_t times e_v = p_v [v left out] - m / V, where m <= τ (1 - p_y) is all
    that is left out. With W̄ the mean row of the weight,
        |ΔdX_t| = |s_t Σ_{left out} p_v (W_v - W̄)| <= |s_t| τ (1 - p_y) max |W_v - W̄|
        ‖ΔdW‖  <= Σ_t |s_t| |e| |x_t|,  |e|² = Σ_{left out} p_v² - m²/V <= m²
        |Δdb|  <= Σ_t |s_t| |e|
    The rounding of dlogits, times |W_v| and |x_t|, comes on top. `stored` is the relative rounding of dlogits or
    gradients that are kept in 16 bits.
    """
    want = want or exact(case)
    left = want.slope.abs() * case.tau * want.miss
    slack = want.slack + stored * want.dlogits.abs()
    assert_below(
        (got.hidden - want.dlogits @ want.weight).norm(dim=1),
        left * (want.weight - want.weight.mean(0)).norm(dim=1).max() + slack @ want.weight.norm(dim=1), "dX",
    )  # fmt: skip
    assert_below(
        (got.weight[: case.vocab] - want.dlogits.T @ want.hidden).norm(),
        ((left + slack.norm(dim=1)) * want.hidden.norm(dim=1)).sum(), "dW",
    )  # fmt: skip
    assert not got.weight[case.vocab :].any()
    if got.bias is not None:
        assert_below((got.bias[: case.vocab] - want.dlogits.sum(0)).norm(), (left + slack.norm(dim=1)).sum(), "db")
        assert not got.bias[case.vocab :].any()
    assert_below(got.left_out, case.tau * want.miss * (1 + want.rounding), "what a row says it left out")


def assert_exact_but_for_the_least(case: Case, got: Found, device_type="cpu") -> None:
    """Assert that each entry of dlogits in a `visible` case is the exact one or its row's even share. The latter are
    the smallest entries, at most τ (1 - p_y) together, and as many as that allows, within a level of 1/8 octave.
    """
    want, vocab, limit = exact(case), case.vocab, entry_limit(case.vocab, device_type)
    d = got.hidden[:, :vocab]
    assert not got.hidden[~want.active].any()
    sparse, scale = got.entries > 0, want.slope.abs() * want.miss
    even = -want.slope * got.left_out / vocab
    # A kept entry differs from the share by at least the weight of the smallest candidate.
    gap = 0.5 * scale * case.tau / (2 * limit)
    left = sparse[:, None] & ~want.at_target & ((d - even[:, None]).abs() <= gap[:, None])
    some = want.active & (want.miss > 0)  # rows in which something can be seen
    sparse &= some
    left &= some[:, None]
    assert (left.sum(1) == vocab - got.entries)[sparse].all()

    error = (d - torch.where(left, 0, want.dlogits) - even[:, None]).abs()
    known = torch.where(some, want.uncertain / want.slope.abs(), 0)[:, None]
    assert_below(error, want.slack + known * even[:, None].abs(), "dlogits")

    mass = torch.where(left, want.probs, 0).sum(1)
    assert_below(mass, case.tau * want.miss, "mass left out")
    allowed = torch.where(sparse, (SHARE_ROUNDING + want.rounding) * want.miss, 0)
    assert_below((got.left_out - mass).abs()[some], allowed[some], "mass left out, beside what was reported")
    size = want.dlogits.norm(dim=1)
    assert_below((d - want.dlogits).norm(dim=1), case.tau * size + want.slack.norm(dim=1), "dlogits")
    assert_below(d.sum(1).abs(), want.slack.sum(1) + SHARE_ROUNDING * scale, "Σ dlogits")

    others = want.probs.masked_fill(want.at_target, 0)
    least_kept = torch.where(left | want.at_target, torch.inf, others).amin(1)
    least_kept *= 1 + want.rounding
    assert_below(torch.where(left, others, 0).amax(1)[sparse], least_kept[sparse], "the largest left out")
    few = fewest(want, case.tau - SHARE_ROUNDING - want.rounding)
    assert_below((got.entries - 1)[sparse], few[sparse], "entries")

    x, weight, sums = want.hidden, want.weight, ULP * (8 + vocab**0.5)  # roundings of a sum of V terms add at random
    assert_below((got.hidden[:, vocab:] - d @ weight[:, vocab:]).abs(), sums * d.abs() @ weight[:, vocab:].abs(), "dX")
    size = d.norm(dim=1)
    assert_below((got.weight[:vocab] - d.T @ x).norm(), sums * (size * x.norm(dim=1)).sum(), "dW")
    if got.bias is not None:
        assert_below((got.bias[:vocab] - d.sum(0)).norm(), sums * size.sum(), "db")


def fewest(want: Exact, tau: Tensor) -> Tensor:
    """Return [N] counts of the entries beside the target that are at least as large as the smallest of the fewest which
    leave out at most τ (1 - p_y), less one level of the selection.
    """
    others = want.probs.masked_fill(want.at_target, 0)
    ordered = others.sort(dim=1, descending=True).values
    rest = ordered.flip(1).cumsum(1).flip(1)  # sum of an entry and all smaller ones
    count = (rest > (tau * want.miss)[:, None]).sum(1)
    smallest = ordered.gather(1, (count - 1).clamp(min=0)[:, None])
    near = others >= smallest * 2 ** (-1 / LEVELS_PER_OCTAVE) * (1 - want.rounding[:, None])
    return torch.where(count > 0, near.sum(1), 0)


def gradients(case: Case, wanted=("hidden", "weight", "bias"), device="cpu", upstream=1.0, backend="torch", **extra):
    """Return (output, gradients by name) of a call in which only the `wanted` leaves require a gradient."""
    leaves = {k: v.detach().to(device).requires_grad_(k in wanted) for k, v in case.problem.leaves().items()}
    objective = problems.build(OBJECTIVES[case.objective][0])
    out = problems.call(case.problem, objective, backend, device, leaves, **{"sparse_grad": case.tau, **extra})
    (upstream * out.loss).backward()
    return out, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_same(got: dict, want: dict, bound=0.0) -> None:
    """Assert that the gradients have the same bits, or with a `bound` that they agree in norm."""
    assert got.keys() == want.keys()
    for name in want:
        if bound:
            assert problems.relative(got[name], want[name]) <= bound, name
        else:
            assert torch.equal(got[name], want[name]), name


def one_row(logits, target=0, tau=0.02, **options) -> Case:
    """Return a case of one row, whose logits are these plus half of a ramp from -1 to 1."""
    weight = torch.stack([logits, torch.linspace(-1, 1, len(logits))], 1)
    problem = problems.Problem(
        torch.tensor([target]), torch.tensor([-1.0]), torch.tensor([1.5]), hidden=torch.tensor([[1.0, 0.5]]),
        weight=weight, options=options,
    )  # fmt: skip
    return Case(problem, "pg", tau)


def rows_of(case: Case, rows, **options) -> Case:
    """Return the case with only these rows, from a case of shape [T]."""
    names = ("hidden", "targets", "old_logprobs", "advantages", "mask")
    tensors = {n: getattr(case.problem, n) for n in names if getattr(case.problem, n) is not None}
    return case.with_tensors(**{n: x[rows] for n, x in tensors.items()}).with_options(**options)


def in_dtype(case: Case, dtype) -> Case:
    p = case.problem
    bias = None if p.bias is None else p.bias.to(dtype)
    return case.with_tensors(hidden=p.hidden.to(dtype), weight=p.weight.to(dtype), bias=bias)
