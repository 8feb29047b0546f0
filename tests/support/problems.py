"""This module makes problems from a seed, and compares a backend with the oracle on them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

import oracle

FORMS = ("linear", "logits")
BACKENDS = ("reference", "torch", "triton")
REDUCTIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
# Each name stands for (objective, hyper-parameters). With these, the problems below reach both sides of every branch.
SPECS = {
    "drpo-default": ("DRPO", {}),
    "drpo-active": ("DRPO", {"delta": 0.15}),
    "dppo-tv": ("DPPO", {"delta_low": 0.1, "delta_high": 0.12, "divergence": "tv", "ratio_cap": 1.3}),
    "dppo-kl": ("DPPO", {"delta_low": 0.02, "delta_high": 0.03, "divergence": "kl", "ratio_cap": 1.3}),
    "spo": ("SPO", {"epsilon": 0.2}),
    "ppo": ("PPO", {"clip_low": 0.2, "clip_high": 0.28}),
    "ppo-dual": ("PPO", {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 1.4}),
    "cispo": ("CISPO", {"ratio_cap": 1.25}),
    "pg": ("PolicyGradient", {}),
    "pg-cap": ("PolicyGradient", {"ratio_cap": 1.25}),
    "gspo": ("GSPO", {"clip_low": 0.02, "clip_high": 0.03}),
    "gspo-token": ("GSPO", {"clip_low": 0.02, "clip_high": 0.03, "token_level": True}),
}
# These metrics look at neighbouring tokens. Parts of a batch do not see the rows beyond their ends, so that the mean
# over parts is not the whole's.
OF_NEIGHBOURS = {
    f"drpo/evidence/{name}" for name in ("misfit_previous", "misfit_next", "misfit_cumulative", "repeated_share")
}
SMALL_WORKSPACE = 640  # bytes for a few rows, so that every problem below takes several chunks
TENSORS = ("hidden", "weight", "bias", "targets", "old_logprobs", "advantages", "mask")


@dataclass(frozen=True)
class Problem:
    """The inputs of one call. A problem of ready `logits` has no hidden states or weight. `options` are keywords."""

    targets: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    logits: Tensor | None = None
    options: dict = field(default_factory=dict)

    def with_options(self, **changes) -> Problem:
        return replace(self, options={**self.options, **changes})

    def as_logits(self) -> Problem:
        """Return the same problem with ready logits, rounded to the dtype of the hidden states."""
        with torch.no_grad():
            logits = self.hidden.double() @ self.weight.double().T
            logits = logits if self.bias is None else logits + self.bias.double()
        return replace(self, logits=logits.to(self.hidden.dtype), hidden=None, weight=None, bias=None)

    def leaves(self) -> dict[str, Tensor]:
        """Return the differentiable inputs by their names."""
        names = ("logits",) if self.logits is not None else ("hidden", "weight", "bias")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def grid(*axes):
    """Return every combination with each backend and both forms of input. The interpreter takes about 30 ms for a row,
    so that Triton gets the two forms in turn.
    """
    cases = []
    for i, case in enumerate(itertools.product(*axes)):
        for backend, form in itertools.product(BACKENDS, FORMS):
            if backend != "triton" or form == FORMS[(i + i // 6) % 2]:
                cases.append(pytest.param(*case, form, backend, id="-".join(map(str, (*case, form, backend)))))
    return cases


def generator(seed: int) -> torch.Generator:
    """Return a generator on the default device, so that `with device:` draws a large problem where that is fast."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def trained_looking(seed, shape, hidden_size, vocab, dtype=torch.float32, bias=False):
    """Return (hidden, weight, bias, targets). How far the target's logit is above the others differs by row."""
    g = generator(seed)
    weight = torch.randn(vocab, hidden_size, generator=g, dtype=torch.float64)
    targets = torch.randint(vocab, shape, generator=g)
    pull = 12.0 * torch.rand(shape, generator=g, dtype=torch.float64).unsqueeze(-1) - 1.0
    aim = weight[targets]
    hidden = pull * aim / aim.square().sum(-1, keepdim=True) + 0.5 * torch.randn(
        *shape, hidden_size, generator=g, dtype=torch.float64
    )
    offset = 0.3 * torch.randn(vocab, generator=g, dtype=torch.float64) if bias else None
    return hidden.to(dtype), weight.to(dtype), None if offset is None else offset.to(dtype), targets


def transform_of(options: dict) -> dict:
    return {key: options[key] for key in ("temperature", "logit_scale", "softcap", "vocab_size") if key in options}


def current_logprobs(hidden, weight, bias, targets, options) -> Tensor:
    """Return the policy's own log-probs in float64. The old and the reference ones are drawn around them."""
    raw = hidden.double() @ weight.double().T
    raw = raw if bias is None else raw + bias.double()
    kw = dict(transform_of(options))
    heat = kw.pop("temperature", 1.0)
    heat = heat.double().unsqueeze(-1) if isinstance(heat, Tensor) and heat.dim() else heat
    z = oracle.transform(raw, heat, **kw)
    z = z.reshape(-1, z.shape[-1])
    return oracle.statistics(z, targets.reshape(-1))[0].reshape(targets.shape)


def behaviour(logp: Tensor, g: torch.Generator, spread: float = 0.5) -> Tensor:
    """Return log-probs below 0 of a policy near the current one."""
    noise = spread * torch.randn(logp.shape, generator=g, dtype=torch.float64)
    return (logp + noise).clamp(max=-1e-3).float()


def random_problem(seed=0, shape=(4, 6), hidden_size=12, vocab=37, dtype=torch.float32, **options) -> Problem:
    """Return a problem with every kind of row: peaked and flat ones, A of both signs and 0, masked rows, and a sequence
    without a token.
    """
    bias = options.pop("bias", False)
    hidden, weight, offset, targets = trained_looking(seed, shape, hidden_size, vocab, dtype, bias)
    g = generator(seed + 1)
    if options.get("vocab_size"):
        targets = targets % options["vocab_size"]
    logp = current_logprobs(hidden, weight, offset, targets, options)
    advantages = torch.randn(shape, generator=g)
    advantages[torch.rand(shape, generator=g) < 0.2] = 0.0
    mask = torch.rand(shape, generator=g) < 0.8
    if len(shape) == 2 and shape[0] > 2:
        mask[1] = False
        advantages[0] = 0.0
        mask[0, : shape[1] // 2] = True
        mask[2, 0] = True
    return Problem(targets, behaviour(logp, g), advantages, mask, hidden, weight, offset, options=options)


def full_options(seed: int, shape=(4, 6)) -> dict:
    """Return options that switch on every optional term."""
    g = generator(seed + 2)
    return {
        "temperature": 0.7 + 0.6 * torch.rand(shape, generator=g),
        "softcap": 9.0,
        "logit_scale": 1.25,
        "kl_coef": 0.11,
        "kl_estimator": ("k1", "k2", "k3")[seed % 3],
        "entropy_coef": 0.07,
        "z_loss_coef": 0.013,
        "token_weights": 0.5 + torch.rand(shape, generator=g),
    }


def full_problem(seed=0, shape=(4, 6), hidden_size=12, vocab=37, dtype=torch.float32, **options) -> Problem:
    problem = random_problem(
        seed, shape, hidden_size, vocab, dtype, **{"bias": True, **full_options(seed, shape), **options}
    )
    logp = current_logprobs(problem.hidden, problem.weight, problem.bias, problem.targets, problem.options)
    return problem.with_options(ref_logprobs=behaviour(logp, generator(seed + 3), 0.5))


def packed(problem: Problem) -> Problem:
    """Return the same rows as [T], with `cu_seqlens` for sequences of equal length."""
    rows, length = problem.targets.shape

    def flat(value):
        return (
            value.reshape(rows * length, *value.shape[2:]) if isinstance(value, Tensor) and value.dim() > 1 else value
        )

    tensors = {name: flat(getattr(problem, name)) for name in ("hidden", "logits", *TENSORS[3:])}
    options = {key: flat(value) for key, value in problem.options.items()}
    options["cu_seqlens"] = torch.arange(rows + 1, dtype=torch.int32) * length
    return replace(problem, **tensors, options=options)


# ---------------------------------------------------------------------------------------------------------------
# running


def build(spec):
    """Return the package's objective for a spec."""
    import drpo_kernels

    name, params = spec
    return getattr(drpo_kernels, name)(**params) if isinstance(name, str) else name(**params)


def _moved(value, device):
    return value.to(device) if isinstance(value, Tensor) else value


def call(problem: Problem, objective, backend, device="cpu", leaves=None, **extra):
    """Call the package and return its output."""
    import drpo_kernels

    leaves = leaves if leaves is not None else {k: v.to(device) for k, v in problem.leaves().items()}
    options = {key: _moved(value, device) for key, value in {**problem.options, **extra}.items()}
    if isinstance(options.get("reduction"), tuple):
        options["reduction"] = drpo_kernels.TokenCoefficients(*(_moved(c, device) for c in options["reduction"]))
    rest = [_moved(getattr(problem, n), device) for n in ("targets", "old_logprobs", "advantages", "mask")]
    if problem.logits is not None:
        options.pop("workspace_bytes", None)  # only the linear calls take it
        return drpo_kernels.policy_loss(leaves["logits"], *rest, objective=objective, backend=backend, **options)
    return drpo_kernels.linear_policy_loss(
        leaves["hidden"],
        leaves["weight"],
        *rest,
        bias=leaves.get("bias"),
        objective=objective,
        backend=backend,
        **options,
    )


def run(problem: Problem, objective, backend, device="cpu", upstream=1.0, **extra):
    """Call the package, differentiate `upstream` times the loss, and return (output, gradients by leaf name)."""
    leaves = {name: value.detach().to(device).requires_grad_() for name, value in problem.leaves().items()}
    out = call(problem, objective, backend, device, leaves, **extra)
    grads = torch.autograd.grad(out.loss * upstream, list(leaves.values()))
    return out, dict(zip(leaves, grads, strict=True))


def solve(problem: Problem, spec, upstream=1.0):
    """Return the (output, gradients by leaf name) of the oracle."""
    leaves = {name: value.detach().cpu().double().requires_grad_() for name, value in problem.leaves().items()}
    raw = leaves["logits"] if problem.logits is not None else (leaves["hidden"], leaves["weight"])
    ignored = ("compact", "workspace_bytes", "validate", "logits_dtype", "inplace")
    options = {key: value for key, value in problem.options.items() if key not in ignored}
    out = oracle.policy_loss(
        raw,
        problem.targets,
        problem.old_logprobs,
        problem.advantages,
        problem.mask,
        spec=spec,
        bias=leaves.get("bias"),
        **options,
    )
    grads = torch.autograd.grad(out.loss * upstream, list(leaves.values()), allow_unused=True)
    return out, {
        name: g if g is not None else torch.zeros_like(x) for (name, x), g in zip(leaves.items(), grads, strict=True)
    }


# ---------------------------------------------------------------------------------------------------------------
# comparing


def relative(got: Tensor, want: Tensor) -> float:
    """Return |got - want| / |want| of the norms in float64, or |got| where `want` is 0. A NaN makes it infinite."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    error = float((got - want).norm())
    norm = float(want.norm())
    return math.inf if math.isnan(error) else error / norm if norm else error


def row_relative(got: Tensor, want: Tensor) -> float:
    """Return the largest `relative` error of a row, so that an error in a small row does not hide behind large rows."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    rows = zip(got.flatten(0, -2), want.flatten(0, -2), strict=True)
    return max((relative(a, b) for a, b in rows), default=0.0)


def logit_error(problem: Problem, gradients: bool = False) -> float:
    """Return the contract's ε = 3 (H + 10) 2^-24 S / temperature. S is the largest sum of absolute products of a logit;
    ready logits have H = 0. For gradients, a soft-cap that is below the temperature takes its place.
    """
    options = problem.options
    if problem.logits is not None:
        count, size = 0, problem.logits.detach().double().abs()
    else:
        count, size = problem.hidden.shape[-1], problem.hidden.detach().double().abs() @ problem.weight.double().abs().T
        size = size if problem.bias is None else size + problem.bias.detach().double().abs()
    size = size[..., : options.get("vocab_size")].nan_to_num(0, 0, 0)
    size = size if problem.mask is None else size * (problem.mask != 0).unsqueeze(-1)
    heat = options.get("temperature", 1.0)
    if isinstance(heat, Tensor):
        heat = heat.min().item() if heat.numel() else 1.0
    heat = min(heat, options.get("softcap") or math.inf) if gradients else heat
    largest = options.get("logit_scale", 1.0) * size.amax().item() if size.numel() else 0.0
    return 3 * (count + 10) * 2.0**-24 * largest / heat


def logprob_bound(problem: Problem) -> float:
    """Return the contract's bound on the error of log π and log Σ exp. The tests hold the entropy to it as well."""
    return max(1e-4, logit_error(problem))


def assert_agrees(problem: Problem, spec, backend, device="cpu", *, upstream=3.7, grad_bound, loss_bound=1e-4, **extra):
    """Compare the loss, gradients, log-probs, entropy, log-sum-exp and computed rows of one call with the oracle's."""
    want, want_grads = solve(problem, spec, upstream)
    out, grads = run(problem, build(spec), backend, device, upstream, **extra)
    got_loss, want_loss = out.loss.item(), want.loss.item()
    assert abs(got_loss - want_loss) <= loss_bound * abs(want_loss), f"loss {got_loss} instead of {want_loss}"
    for name, grad in grads.items():
        assert grad.dtype == getattr(problem, name).dtype, name
        found = relative(grad, want_grads[name])
        assert found <= grad_bound, f"gradient of {name}: relative error {found:.2e} > {grad_bound:.0e}"
    computed = out.computed.cpu()
    assert computed.dtype == torch.bool
    assert computed.shape == problem.targets.shape
    unmasked = torch.ones_like(computed) if problem.mask is None else problem.mask != 0
    bound = logprob_bound(problem)
    for name in ("logprobs", "entropy", "logsumexp"):
        value = getattr(out, name).detach().cpu().double()
        assert not getattr(out, name).requires_grad, name
        assert (value[~unmasked] == 0).all(), f"{name} of masked rows"
        assert value[unmasked & ~computed].isnan().all(), f"{name} of rows not computed"
        rows = computed & want.valid
        assert (value - getattr(want, name))[rows].abs().max().item() <= bound if rows.any() else True, name
    assert (out.entropy.cpu()[computed & want.valid] >= 0).all()
    return out, grads
