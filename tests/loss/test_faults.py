"""A call that dies half-way, out of memory or by Ctrl-C, leaves nothing behind, wherever it dies.

A TorchDispatchMode raises the fault at the k-th tensor operation inside the call: products, row operations, allocations
and copies alike. k goes through forward and backward in steps that do not divide the number of a chunk's operations.
"""

import contextlib
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import drpo_kernels as dk
import problems

pytestmark = pytest.mark.interpreted
VOCAB = 33  # the largest size here: only the workspace, the logits and gradients of the head have it
SPECS = {"seq": ("GSPO", {}), "token": ("DRPO", {"delta": 0.2})}


@pytest.fixture(autouse=True)
def fast_collection():
    """Let gc.collect() look only at objects that the test has made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class FailAt(TorchDispatchMode):
    """Raise `error` at the k-th operation, and remember every tensor that was made before it."""

    def __init__(self, k: int | None, error: type[BaseException]):
        super().__init__()
        self.k, self.error, self.count, self.made = k, error, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.count == self.k:
            raise self.error("a fault, on purpose")
        self.count += 1
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.made.append(weakref.ref(x))
        return result


def state(problem, leaves):
    """Return everything of the caller and of the process that a call must not change."""
    tensors = [*leaves.values(), problem.targets, problem.old_logprobs, problem.advantages, problem.mask]
    tensors += [value for value in problem.options.values() if isinstance(value, torch.Tensor)]
    settings = [torch.get_float32_matmul_precision(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    settings += [torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.get_num_threads()]
    for where in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)):
        settings.append(getattr(where, "fp32_precision", None))
    gradients = [None if x.grad is None else x.grad.clone() for x in leaves.values()]
    return [x.detach().clone() for x in tensors], gradients, settings, torch.get_rng_state()


def assert_same_state(before, after):
    for old, new in zip(before[0] + before[1] + [before[3]], after[0] + after[1] + [after[3]], strict=True):
        assert (old is None) == (new is None)
        assert old is None or torch.equal(old, new)
    assert before[2] == after[2]


def case_of(name, form):
    problem = problems.full_problem(2, (2, 3), 4, VOCAB, dtype=torch.bfloat16 if form == "bf16" else torch.float32)
    problem = problem.as_logits() if form == "logits" else problem
    problem = problem.with_options(workspace_bytes=280) if form != "logits" else problem
    leaves = {name: x.clone().requires_grad_() for name, x in problem.leaves().items()}
    for leaf in leaves.values():
        leaf.grad = torch.full_like(leaf, 0.5)
    return problem, leaves, problems.build(SPECS[name])


def forward_backward(problem, leaves, objective, mode, **extra):
    """Run forward and backward, in either of which the fault may strike."""
    with mode:
        out = problems.call(problem, objective, "torch", leaves=leaves, **extra)
        gradients = torch.autograd.grad(out.loss, list(leaves.values()))
    return out, gradients


def attempt(problem, leaves, objective, k, error, **extra):
    """Return whether the fault was raised at the k-th operation. Nothing of the call is referenced afterwards."""
    mode = FailAt(k, error)
    try:
        forward_backward(problem, leaves, objective, mode, **extra)
    except error as raised:
        raised.__traceback__ = None
        return True, mode
    return False, mode


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("form", ["linear", "bf16", "logits"])
@pytest.mark.parametrize("name", SPECS)
def test_a_fault_at_every_operation(name, form, error):
    problem, leaves, objective = case_of(name, form)
    want, want_gradients = forward_backward(problem, leaves, objective, FailAt(None, error))
    before, k, struck = state(problem, leaves), 0, True
    step = 7 if error is torch.OutOfMemoryError else 31
    while struck:
        struck, mode = attempt(problem, leaves, objective, k, error)
        assert_same_state(before, state(problem, leaves))
        if struck:
            gc.collect()
            # PyTorch keeps the graph of a backward that fails in one of its own operations; here it holds [N] values
            # alone.
            alive = [x for x in (made() for made in mode.made) if x is not None and max(x.shape, default=0) >= VOCAB]
            assert not alive, f"{len(alive)} tensors outlive a fault at operation {k}"
        k += step
    assert k > 50
    out, gradients = forward_backward(problem, leaves, objective, FailAt(None, error))
    for a, b in zip([out.loss, out.logprobs, *gradients], [want.loss, want.logprobs, *want_gradients], strict=True):
        assert torch.equal(a, b)


def test_inplace_only_where_asked():
    """A fault leaves ready logits alone unless inplace=True gave them away."""
    problem, leaves, objective = case_of("token", "logits")
    original, touched, mode = leaves["logits"].detach().clone(), False, FailAt(None, KeyboardInterrupt)
    forward_backward(problem, leaves, objective, mode)
    for k in range(0, mode.count, 13):
        given = {"logits": original.clone().requires_grad_()}
        attempt(problem, given, objective, k, torch.OutOfMemoryError)
        assert torch.equal(given["logits"].detach(), original)
        given = {"logits": original.clone().requires_grad_()}
        attempt(problem, given, objective, k, torch.OutOfMemoryError, inplace=True)
        touched |= not torch.equal(given["logits"].detach(), original)
    assert touched  # inplace=True does overwrite, so the first half of this test says something


@pytest.mark.parametrize("product", ["mm", "addmm_"])
def test_out_of_memory_in_a_product(product, monkeypatch):
    """The k-th product of the chunk loop fails, for every k, in a process that allows bf16 for fp32 products."""
    problem, leaves, objective = case_of("token", "linear")
    want = problems.call(problem, objective, "torch", leaves=leaves)
    owner = torch if product == "mm" else torch.Tensor
    original, before = getattr(owner, product), torch.get_float32_matmul_precision()
    calls = {"count": 0, "fail": -1}

    def failing(*args, **kwargs):
        calls["count"] += 1
        if calls["count"] == calls["fail"]:
            raise torch.OutOfMemoryError("CUDA out of memory, on purpose")
        return original(*args, **kwargs)

    try:
        torch.set_float32_matmul_precision("medium")
        monkeypatch.setattr(owner, product, failing)
        problems.call(problem, objective, "torch", leaves=leaves)
        total, calls["count"] = calls["count"], 0
        assert total >= 1
        for calls["fail"] in range(1, total + 1):
            calls["count"] = 0
            with pytest.raises(torch.OutOfMemoryError):
                problems.call(problem, objective, "torch", leaves=leaves)
            assert torch.get_float32_matmul_precision() == "medium"
            calls["count"], calls["fail"] = 0, -1
            assert torch.equal(problems.call(problem, objective, "torch", leaves=leaves).loss, want.loss)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_a_user_objective_that_raises(backend):
    """A bug in the user's own formula is reported as it is, and leaves the modes of autograd as they were."""

    class Broken(dk.Objective):
        def token_loss(self, tokens):
            raise ZeroDivisionError("my own bug")

    problem, leaves, _ = case_of("token", "linear")
    before = state(problem, leaves)
    with pytest.raises(ZeroDivisionError, match="my own bug"):
        problems.call(problem, Broken(), backend, leaves=leaves)
    assert_same_state(before, state(problem, leaves))


def test_an_interrupted_backward_can_be_repeated():
    """Until a first backward has finished, a second one hands out the gradients or says that it cannot."""
    problem, leaves, objective = case_of("token", "linear")
    want = torch.autograd.grad(problems.call(problem, objective, "torch", leaves=leaves).loss, list(leaves.values()))
    out = problems.call(problem, objective, "torch", leaves=leaves)
    with pytest.raises(KeyboardInterrupt), FailAt(1, KeyboardInterrupt):
        torch.autograd.grad(out.loss, list(leaves.values()), retain_graph=True)
    with contextlib.suppress(RuntimeError):  # "second backward": the first one had begun to scale the gradients
        again = torch.autograd.grad(out.loss, list(leaves.values()))
        assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))
