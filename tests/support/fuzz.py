"""Check one fuzz case: every backend gives the oracle's result within its error budget, or the same documented error.

What `check` asserts of a case:
  * a wrong argument raises TypeError or ValueError naming it, on every backend; nothing else raises;
  * loss, log-probs, entropy and gradients are within `fuzz_budget` of the oracle, and exactly 0 where a row or a
    column of the weight takes no part;
  * no NaN from finite valid input, metrics included; a loss the oracle has no finite value for is not finite;
  * the caller's tensors are bitwise what they were (ready logits may change with inplace=True alone);
  * what masked rows carry is bitwise irrelevant.

`make fuzz` runs many (run_fuzz.py); a failure prints a Case to rerun.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import drpo_kernels as dk
import fuzz_budget
import oracle
import problems
from fuzz_budget import Setting
from fuzz_cases import FLOAT, Built, Case, build


@dataclass(frozen=True)
class UserObjective(dk.Objective):
    """This is the README's example of a user's own objective."""

    delta: float = 0.4

    def token_loss(self, tokens):
        penalty = tokens.old_probs * tokens.ratio_minus_one.square() / (2 * self.delta)
        return penalty - tokens.advantages * tokens.ratio


@dataclass
class Result:
    """A call's loss (0-d), log-probs, entropy and computed rows [...], and its gradients and metrics by name."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    computed: Tensor
    gradients: dict[str, Tensor]
    metrics: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        own = {"loss": self.loss, "logprobs": self.logprobs, "entropy": self.entropy, "computed": self.computed}
        return own | {f"gradient of {k}": g for k, g in self.gradients.items()} | self.metrics


def check(case: Case) -> None:
    """Raise AssertionError, or whatever a call raised, where the case breaks a promise."""
    built = build(case)
    backends = ["torch", "reference"] + (["triton"] if case.triton else [])
    if "triton" in backends and case.dtype == "f64":
        if not built.expected_errors:
            _assert_no_double_precision(built)
        backends.remove("triton")
    if built.expected_errors:
        for backend in backends:
            _assert_refused(built, backend)
        return
    results = {}
    for backend in backends:
        given = build(case) if case.inplace else built  # the call may overwrite these logits
        before = _snapshots(given)
        results[backend] = run(given, backend)
        _assert_untouched(before, backend)
    _assert_right(built, results)
    if case.poison and case.layout != "expanded" and case.mask is not None:
        for backend, result in results.items():
            clean = run(build(replace(case, poison=False)), backend)
            _assert_same_bits(result, clean, backend)


# ---------------------------------------------------------------------------------------------------------------
# calling


def leaves_of(built: Built) -> dict[str, Tensor]:
    """Return the differentiable inputs over the case's own memory, frozen as the case says."""
    frozen = built.case.frozen
    return {
        name: x.detach().requires_grad_(not (frozen == "both" or frozen == name))
        for name, x in built.problem.leaves().items()
    }


def run(built: Built, backend: str) -> Result:
    case, problem, leaves = built.case, built.problem, leaves_of(built)
    autocast = torch.autocast("cpu", FLOAT[case.autocast]) if case.autocast else contextlib.nullcontext()
    with autocast:
        if case.call == "policy":
            objective = UserObjective() if case.objective == "user" else problems.build(built.spec)
            extra = {"inplace": case.inplace} if case.form == "logits" else {}
            out = problems.call(problem, objective, backend, leaves=leaves, **extra)
            loss, logprobs, entropy, computed, metrics, _ = out
        else:
            logprobs, entropy = _call_logprobs(built, backend, leaves)
            slopes = _cotangents(built).to(logprobs.dtype)
            loss = torch.where(built.counted, logprobs * slopes[0] + entropy * slopes[1], 0).sum()
            computed, metrics = built.counted, {}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(loss * case.upstream, list(wanted.values())) if wanted else ()
    gradients = dict(zip(wanted, gradients, strict=True))
    return Result(loss.detach(), logprobs.detach(), entropy.detach(), computed, gradients, metrics)


def _call_logprobs(built: Built, backend: str, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    problem = built.problem
    keywords = {**problem.options, "mask": problem.mask, "backend": backend}
    if problem.logits is not None:
        return dk.token_logprobs(leaves["logits"], problem.targets, **keywords)
    keywords["bias"] = leaves.get("bias")
    return dk.linear_token_logprobs(leaves["hidden"], leaves["weight"], problem.targets, **keywords)


def _cotangents(built: Built) -> Tensor:
    generator = problems.generator(built.case.seed + 1)
    return torch.randn(2, *built.problem.targets.shape, generator=generator, dtype=torch.float64).float()


def _assert_refused(built: Built, backend: str) -> None:
    wrong = sorted(built.expected_errors)
    # this fails with "DID NOT RAISE" if a wrong number comes out
    with pytest.raises((TypeError, ValueError)) as caught:
        run(built, backend)
    message = str(caught.value).split(",")[0]
    assert any(name in message for name in wrong), f"{backend}: {message} names none of {wrong}"


def _assert_no_double_precision(built: Built) -> None:
    with pytest.raises(RuntimeError, match="float64"):
        run(built, "triton")


# ---------------------------------------------------------------------------------------------------------------
# memory


def _snapshots(built: Built) -> list[tuple[str, Tensor, Tensor]]:
    """Return (name, storage, its bytes) of everything that the call is given."""
    problem, case = built.problem, built.case
    named = {n: getattr(problem, n) for n in ("hidden", "weight", "bias", "logits", *problems.TENSORS[3:])}
    for key, value in problem.options.items():
        named |= {f"{key}[{i}]": v for i, v in enumerate(value if isinstance(value, tuple) else (value,))}
    if case.inplace and case.call == "policy" and case.frozen not in ("both", "logits"):
        del named["logits"]
    tensors = [(name, x) for name, x in named.items() if isinstance(x, Tensor)]
    storages = [(name, torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())) for name, x in tensors]
    return [(name, storage, storage.clone()) for name, storage in storages]


def _assert_untouched(snapshots, backend: str) -> None:
    for name, storage, before in snapshots:
        assert torch.equal(storage, before), f"{backend}: {name} was written to"


def _assert_same_bits(first: Result, second: Result, backend: str) -> None:
    for (name, a), b in zip(first.tensors().items(), second.tensors().values(), strict=True):
        same = torch.equal(a.nan_to_num(7.25, 7.5, 7.75), b.nan_to_num(7.25, 7.5, 7.75))
        assert same, f"{backend}: {name} depends on what masked rows carry"


# ---------------------------------------------------------------------------------------------------------------
# numbers


def _assert_right(built: Built, results: dict[str, Result]) -> None:
    with torch.no_grad():
        operands = _operands(built)
    want = _oracle(built, operands)
    finite = want.loss.isfinite() and all(g.isfinite().all() for g in want.gradients.values())
    for backend, got in results.items():
        if not finite:
            _assert_not_a_number(want, got, backend)
            continue
        allowed = _budget(built, operands, want, naive=backend == "reference")
        _close(got.loss, want.loss, allowed.loss, f"{backend}: loss")
        rows = want.computed
        assert not (got.computed & ~rows).any(), f"{backend}: computed rows that do not count"
        computed, mask = got.computed[rows], built.problem.mask
        unmasked = torch.ones_like(rows) if mask is None else (mask != 0) & (mask == mask)
        for name in ("logprobs", "entropy"):
            value = getattr(got, name)
            assert (value[~unmasked] == 0).all(), f"{backend}: {name} of masked rows"
            assert value[unmasked & ~got.computed].isnan().all(), f"{backend}: {name} of rows not computed"
            bound = getattr(allowed, name)[computed]
            _close(value[rows][computed], getattr(want, name)[rows][computed], bound, f"{backend}: {name}")
        for name, gradient in got.gradients.items():
            assert gradient.dtype == getattr(built.problem, name).dtype, f"{backend}: dtype of {name}"
            bound = _full_size(allowed.gradients[name], name, built, rows)
            _close(gradient, want.gradients[name], bound, f"{backend}: gradient of {name}")
        bad = [name for name, value in got.metrics.items() if not value.isfinite()]
        assert not bad or built.case.hazard in ("ban target", "ban row"), f"{backend}: {bad} are not finite"


def _assert_not_a_number(want: Result, got: Result, backend: str) -> None:
    """A row for which the oracle has no number may be dropped if its advantage is 0. Otherwise it must show in the
    loss.
    """
    if want.loss.isfinite():
        assert got.loss.isfinite(), f"{backend}: loss {got.loss} instead of {want.loss}"
        return
    sick = ~want.logprobs.isfinite() & got.computed
    assert not (sick & got.logprobs.isfinite()).any(), f"{backend}: a number for a row that has none"
    if sick.any() and want.loss.isnan() and got.logprobs.isnan().any():
        assert got.loss.isnan(), f"{backend}: loss {got.loss} over a NaN row"


def _close(got: Tensor, want: Tensor, bound: Tensor, what: str) -> None:
    largest = 65504.0 if got.dtype == torch.float16 else math.inf  # beyond this, inf is right
    got, want = got.detach().double(), want.double()
    overflows = (want.abs() > largest) | ((want.abs() + bound > largest) & (got == want.sign() * math.inf))
    error = torch.where(overflows | (got == want), 0, (got - want).abs())
    worst = (error - bound).nan_to_num(nan=math.inf)
    if worst.numel() and worst.max() > 0:
        i = worst.argmax()
        raise AssertionError(
            f"{what} {got.reshape(-1)[i].item()!r} instead of {want.reshape(-1)[i].item()!r}, "
            f"allowed error {bound.expand_as(error).reshape(-1)[i].item():.3g}"
        )


def _full_size(bound: Tensor, name: str, built: Built, rows: Tensor) -> Tensor:
    """Return the bound in the gradient's shape, with 0 for rows that do not count and for padding of the vocabulary."""
    full = torch.zeros(getattr(built.problem, name).shape, dtype=torch.float64)
    if name == "hidden":
        full[rows] = bound
    elif name == "logits":
        part = torch.zeros(len(bound), full.shape[-1], dtype=torch.float64)
        part[:, : bound.shape[1]] = bound
        full[rows] = part
    else:
        full[: len(bound)] = bound
    return full


def _operands(built: Built) -> problems.Problem:
    """Return the problem with the operands that the products really multiply, which autocast rounds to its dtype."""
    problem, case = built.problem, built.case
    if case.packed and problem.advantages.shape != problem.targets.shape:
        seq = oracle.sequence_ids(problem.targets.shape, problem.options["cu_seqlens"])
        problem = problems.replace(problem, advantages=problem.advantages[seq])
    if not case.autocast:
        return problem
    narrow = FLOAT[case.autocast]
    return problems.replace(problem, hidden=problem.hidden.to(narrow), weight=problem.weight.to(narrow))


def _oracle(built: Built, operands: problems.Problem) -> Result:
    if built.case.call == "policy":
        out, gradients = problems.solve(operands, built.spec, built.case.upstream)
        return Result(out.loss.detach(), out.logprobs, out.entropy, out.valid, gradients, {})
    return _oracle_logprobs(built, operands)


def _oracle_logprobs(built: Built, operands: problems.Problem) -> Result:
    leaves = {name: x.detach().double().requires_grad_() for name, x in operands.leaves().items()}
    rows, shape = built.counted, operands.targets.shape
    if operands.logits is not None:
        raw = leaves["logits"][rows]
    else:
        raw = leaves["hidden"][rows] @ leaves["weight"].T
        raw = raw + leaves["bias"] if "bias" in leaves else raw
    transform = problems.transform_of(operands.options)
    heat = oracle.spread(transform.pop("temperature"), shape).reshape(shape)[rows].unsqueeze(-1)
    z = oracle.kept_only(oracle.transform(raw, heat, **transform), _kept_ids(operands, rows))
    parts = oracle.statistics(z, operands.targets[rows])
    slopes = _cotangents(built).double()[:, rows]
    loss = (parts[0] * slopes[0] + parts[1] * slopes[1]).sum()
    gradients = torch.autograd.grad(loss * built.case.upstream, list(leaves.values()))
    full = [torch.zeros(shape, dtype=torch.float64).index_put((rows,), part.detach()) for part in parts]
    return Result(loss.detach(), *full, rows, dict(zip(leaves, gradients, strict=True)), {})


def _kept_ids(operands: problems.Problem, rows: Tensor) -> Tensor | None:
    ids = operands.options.get("kept_ids")
    return None if ids is None else ids[rows]


def _budget(built: Built, operands: problems.Problem, want: Result, naive: bool) -> fuzz_budget.Budget:
    problem, case, rows = operands, built.case, want.computed
    shape, options = problem.targets.shape, problem.options
    heat = oracle.spread(options["temperature"], shape).reshape(shape)[rows].unsqueeze(-1)
    main = problem.logits if problem.logits is not None else problem.hidden
    inputs = tuple(None if x is None else x.detach().double() for x in (main[rows], problem.weight, problem.bias))
    transform = {key: value for key, value in problems.transform_of(options).items() if key != "temperature"}
    results = {name: getattr(built.problem, name).dtype for name in built.problem.leaves()}
    setting = Setting(
        inputs, problem.targets[rows].long(), heat, transform, main.dtype, results,
        options.get("logits_dtype") == torch.bfloat16 and not naive, naive, _kept_ids(problem, rows),
    )  # fmt: skip
    if case.call == "logprobs":
        terms = fuzz_budget.logprob_terms(*_cotangents(built).double()[:, rows])
    else:
        terms = _terms(built, problem, rows.reshape(-1))
    return fuzz_budget.budget(setting, terms, case.upstream)


def _terms(built: Built, problem: problems.Problem, keep: Tensor) -> fuzz_budget.Terms:
    options, shape = problem.options, problem.targets.shape

    def rows(value):
        return None if value is None else oracle.spread(value, shape)[keep]

    seq = oracle.sequence_ids(shape, options.get("cu_seqlens"))
    chosen = oracle.term_coefficients(options["reduction"], keep, seq, options["horizon"], options.get("normalizer"))
    policy, kl, entropy, z_loss = (c[keep] for c in chosen)
    weights = rows(options.get("token_weights"))
    policy = policy if weights is None else policy * weights
    coefficients = policy, options.get("kl_coef", 0.0) * kl, options["entropy_coef"] * entropy
    coefficients += (options["z_loss_coef"] * z_loss,)
    sequences = (None, 0) if seq is None else (seq[keep], int(seq.max()) + 1 if len(seq) else 0)
    estimator = (options["kl_estimator"], options["kl_importance"]) if "kl_coef" in options else None
    return fuzz_budget.policy_terms(
        built.spec, rows(problem.old_logprobs), rows(options.get("ref_logprobs")), rows(problem.advantages), sequences,
        coefficients, estimator,
    )  # fmt: skip
