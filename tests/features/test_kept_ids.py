"""Tests of `kept_ids`, a softmax over the ids that top-p or top-k sampling kept.

It is compared in float64 with a softmax over the whole vocabulary in which every other logit is -inf.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import drpo_kernels as dk
from drpo_kernels.backends.sparse.torch_ops import TorchEntries
from problems import BACKENDS, SPECS, build, random_problem, relative, replace

V, K = 37, 9
CAPPED = {"softcap": 3.0, "logit_scale": 1.3, "temperature": 0.8}
CASES = {
    "plain": {},
    "transform": CAPPED,
    "every term": {"entropy_coef": 0.1, "z_loss_coef": 0.01, "kl_coef": 0.2, **CAPPED},
    "per token": {"reduction": "none", "entropy_coef": 0.1},
    "every row": {"compact": "none"},
    "padded vocabulary": {"vocab_size": V - 4},
}
# The bound of float32 is what rounded logits do to the slope, as for a whole vocabulary.
GRADIENT_BOUNDS = {torch.float64: 1e-12, torch.float32: 5e-5, torch.bfloat16: 3 * 4e-3}


def problem_with_ids(seed=3, shape=(4, 6), dtype=torch.float32, bias=True, **options):
    """Return a problem and ids [..., K] in any order, some of them twice and the target anywhere among them. Masked ids
    may be anything.
    """
    problem = random_problem(seed, shape, 12, V, dtype, bias=bias, **options)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-8, options.get("vocab_size", V), (*shape, K), generator=g)
    ids.scatter_(-1, torch.randint(K, (*shape, 1), generator=g), problem.targets[..., None])
    ids[~problem.mask] = V + 100
    return problem, ids


def call(problem, form, backend, **options):
    """Return (output, gradients by name) of a call and its backward."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in problem.leaves().items()}
    function = dk.policy_loss if form == "logits" else dk.linear_policy_loss
    arguments = problem.targets, problem.old_logprobs, problem.advantages, problem.mask
    out = function(*(x for n, x in leaves.items() if n != "bias"), *arguments, backend=backend, **options,
                   **({"bias": leaves["bias"]} if "bias" in leaves else {}))  # fmt: skip
    out.loss.sum().backward()
    return out, {name: x.grad for name, x in leaves.items()}


def banned(problem, ids):
    """Return the leaves in float64, their logits, and which logits are kept."""
    wide = {name: x.double().requires_grad_() for name, x in problem.leaves().items()}
    logits = wide["hidden"] @ wide["weight"].T + wide.get("bias", 0)
    kept = torch.zeros(*ids.shape[:-1], V + 1, dtype=torch.bool)
    kept = kept.scatter(-1, torch.where((ids < 0) | (ids > V), V, ids), True)[..., :V]
    kept |= ~problem.mask[..., None]
    return wide, logits, kept


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("spec", "name"), [*(("drpo-active", name) for name in CASES), ("gspo", "every row")])
def test_the_loss_is_that_of_banned_logits(spec, backend, name):
    options = dict(CASES[name])
    transform = {k: options[k] for k in ("vocab_size",) if k in options}
    problem, ids = problem_with_ids(**transform)
    if options.get("kl_coef"):
        options["ref_logprobs"] = problem.old_logprobs - 0.3
    options["objective"] = build(SPECS[spec])
    out, grads = call(problem, "linear", backend, kept_ids=ids, **options)

    wide, logits, kept = banned(problem, ids)
    cap = options.pop("softcap", None)  # tanh(-inf) is -1, so a softcap would lift the ban
    if cap:
        logits = cap * torch.tanh(logits * options.pop("logit_scale") / cap)
    exact = dk.policy_loss(
        logits.masked_fill(~kept, -torch.inf), problem.targets, problem.old_logprobs, problem.advantages, problem.mask,
        backend="reference", **options,
    )  # fmt: skip
    exact.loss.sum().backward()
    valid = out.computed & problem.mask
    for found, want in zip(out[:3] + out[5:], exact[:3] + exact[5:], strict=True):
        where = valid if found.dim() else ...
        torch.testing.assert_close(found[where].double(), want[where], rtol=1e-5, atol=1e-4)
    assert torch.equal(out.computed, exact.computed)
    for name, x in wide.items():
        assert relative(grads[name], x.grad) <= GRADIENT_BOUNDS[torch.float32], name
    for name, value in out.metrics.items():
        torch.testing.assert_close(value.double(), exact.metrics[name].double(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", GRADIENT_BOUNDS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dtypes(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")
    problem, ids = problem_with_ids(dtype=dtype)
    objective = dk.DRPO(delta=0.15)
    out, grads = call(problem, "linear", backend, kept_ids=ids, objective=objective)
    exact, wanted = call(problem, "linear", "reference", kept_ids=ids, objective=objective)
    assert {n: g.dtype for n, g in grads.items()} == dict.fromkeys(grads, dtype)
    for name in grads:
        assert relative(grads[name], wanted[name]) <= GRADIENT_BOUNDS[dtype], name
    torch.testing.assert_close(out.loss, exact.loss, rtol=1e-4, atol=1e-5)


def test_rows_without_a_gradient_have_no_entries(monkeypatch):
    problem, ids = problem_with_ids()
    out, _ = call(problem, "linear", "torch", kept_ids=ids, compact="active", logits_dtype=torch.float32)
    summed, gathered_sums = [], TorchEntries.gathered_sums
    monkeypatch.setattr(TorchEntries, "gathered_sums", lambda *a: summed.append(a[2]) or gathered_sums(*a))
    call(problem, "linear", "torch", kept_ids=ids, compact="active")
    places = (out.computed[..., None] & (ids >= 0)).sum()
    assert len(summed) == 2 and all(0 < len(sums.rows) <= places for sums in summed)


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", BACKENDS)
def test_ready_logits_and_logprobs(backend):
    problem, ids = problem_with_ids(bias=False)
    linear, _ = call(problem, "linear", backend, kept_ids=ids)
    ready = problem.as_logits()
    out, grads = call(ready, "logits", backend, kept_ids=ids)
    torch.testing.assert_close(out.logprobs, linear.logprobs, rtol=1e-5, atol=1e-5, equal_nan=True)
    _, logits, kept = banned(problem, ids)
    # There is no gradient outside the set, and none in a masked row.
    assert not grads["logits"][~kept | ~problem.mask[..., None]].any() and grads["logits"].any()
    options = {"mask": problem.mask, "kept_ids": ids, "backend": backend}
    for scored in (
        dk.linear_token_logprobs(problem.hidden, problem.weight, problem.targets, **options),
        dk.token_logprobs(ready.logits, problem.targets, **options),
    ):
        want = logits.masked_fill(~kept, -torch.inf).log_softmax(-1).gather(-1, problem.targets[..., None])[..., 0]
        torch.testing.assert_close(scored[0][problem.mask].double(), want[problem.mask], rtol=1e-5, atol=1e-4)
        assert not scored[0][~problem.mask].any()


def test_the_ratio_is_exact():
    """This is what `kept_ids` is for: under top-p sampling an unchanged policy has a ratio of 1, and without the ids it
    does not.
    """
    problem, _ = problem_with_ids(bias=False)
    probs = (problem.hidden @ problem.weight.T).double().softmax(-1)
    ids = probs.topk(5).indices
    of_set = probs.gather(-1, ids)
    problem = replace(
        problem, targets=ids[..., 2], old_logprobs=(of_set[..., 2] / of_set.sum(-1)).log(), mask=problem.mask
    )
    with_ids, _ = call(problem, "linear", "torch", kept_ids=ids)
    without, _ = call(problem, "linear", "torch")
    assert abs(with_ids.metrics["drpo/ratio_max"] - 1) <= 1e-4 < 0.05 <= 1 - without.metrics["drpo/ratio_mean"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, _: {"kept_ids": ids[:, :-1]}, "one more dimension"),
        (lambda ids, _: {"kept_ids": ids.float()}, "integer"),
        (lambda ids, _: {"kept_ids": ids.masked_fill(ids == ids[1, 1, 1], V)}, f"below {V}"),
        (lambda ids, t: {"kept_ids": ids.where(ids != t[..., None], -1)}, "among the kept_ids of its own token"),
        (lambda ids, _: {"kept_ids": ids.roll(1, 1)}, "next or the previous token"),
        (lambda ids, _: {"kept_ids": ids, "sparse_grad": 0.01}, "sparse_grad must be 0 with kept_ids, got 0.01"),
        (lambda ids, _: {"kept_ids": ids, "head_dtype": "fp8_e4m3"}, "head_dtype must be None with kept_ids"),
        (lambda ids, _: {"kept_ids": ids, "logits_dtype": torch.bfloat16}, "logits_dtype must be None with kept_ids"),
        (lambda ids, _: {"kept_ids": ids, "batch_invariant": True, "backend": None}, "batch_invariant must be False"),
        (lambda ids, _: {"kept_ids": ids, "main_grad": torch.zeros(V, 12)}, "main_grad must be None with kept_ids"),
    ],
)
def test_errors(change, message):
    problem, ids = problem_with_ids()
    problem = replace(problem, mask=torch.ones_like(problem.mask), targets=ids.amax(-1) % V)
    ids = ids % V
    ids[..., 0] = problem.targets
    with pytest.raises((TypeError, ValueError), match=message):
        call(problem, "linear", **({"backend": "torch"} | change(ids, problem.targets)))


@pytest.mark.parametrize("form", ["linear", "logits"])
def test_a_set_without_its_token_is_never_a_number(form):
    """The values are not read here, as on a GPU by default."""
    problem, ids = problem_with_ids(bias=False)
    problem = problem if form == "linear" else problem.as_logits()
    row = tuple(problem.mask.nonzero()[-1])
    target, padding = problem.targets[row].clone(), torch.full((K - 1,), -1)
    for own, rest, wrong_target in ((-1, padding, target), (target, padding + V + 1, target), (5, padding, -1)):
        ids[row], problem.targets[row] = torch.cat([torch.tensor([own]), rest]), wrong_target
        out, _ = call(problem, form, "torch", kept_ids=ids, validate=False, compact="mask")
        assert out.loss.isnan() and out.logprobs[row].isnan() and out.metrics["drpo/nonfinite"] == 1


def test_a_token_without_an_old_logprob_needs_no_set():
    problem, ids = problem_with_ids()
    row = tuple(problem.mask.nonzero()[0])
    problem.old_logprobs[row] = -9999.0
    ids[row] = -1
    out, _ = call(problem, "linear", "torch", kept_ids=ids)
    assert out.loss.isfinite() and out.metrics["drpo/unscorable"] == 1


def test_another_argument_is_refused_as_ever():
    problem, ids = problem_with_ids()
    for wrong in ([-1.0], problem.old_logprobs[:1], problem.targets):
        with pytest.raises((TypeError, ValueError), match="old_logprobs must"):
            call(replace(problem, old_logprobs=wrong), "linear", "torch", kept_ids=ids)


@pytest.mark.interpreted
@pytest.mark.usefixtures("without_metrics")
@pytest.mark.parametrize(("form", "dynamic", "compiler"), [("linear", None, "eager"), ("logits", True, "aot_eager")])
def test_in_one_graph(form, dynamic, compiler):
    problem, ids = problem_with_ids(bias=form == "linear")
    problem = problem if form == "linear" else problem.as_logits()
    options = {"kept_ids": ids, "entropy_coef": 0.1} | ({} if dynamic else CAPPED)
    want, wanted = call(problem, form, "torch", **options)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in problem.leaves().items()}
    function = dk.policy_loss if form == "logits" else dk.linear_policy_loss
    given = (problem.targets, problem.old_logprobs, problem.advantages, problem.mask)

    @torch.compile(backend=compiler, fullgraph=True, dynamic=dynamic)
    def step(leaves, given, options):
        bias = {"bias": leaves["bias"]} if "bias" in leaves else {}
        return function(*(x for n, x in leaves.items() if n != "bias"), *given, backend="torch", **options, **bias).loss

    loss = step(leaves, given, options)
    loss.backward()
    torch.testing.assert_close(loss, want.loss, rtol=1e-6, atol=1e-7)
    for name, leaf in leaves.items():
        assert relative(leaf.grad, wanted[name]) <= 1e-6, name


def test_without_values():
    with FakeTensorMode():
        x, w = torch.empty(4, 16, requires_grad=True), torch.empty(50_000, 16, requires_grad=True)
        ids, targets = torch.empty(4, 8, dtype=torch.int32), torch.empty(4, dtype=torch.int64)
        out = dk.linear_policy_loss(x, w, targets, torch.empty(4), torch.empty(4), kept_ids=ids)
        out.loss.backward()
        assert w.grad.shape == w.shape and out.logprobs.shape == (4,)
