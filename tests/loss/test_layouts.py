"""Strides, shared memory and dtypes of the arguments: none of them changes a number."""

import pytest
import torch

import problems
from problems import BACKENDS, SPECS, Problem, assert_agrees, generator, random_problem, relative

FP32 = {"grad_bound": 5e-5, "loss_bound": 1e-4}
DRPO = SPECS["drpo-active"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_form = pytest.mark.parametrize("form", ["linear", "logits"])


def strided(x, kind):
    if kind == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced":
        big = torch.full([2 * size + 1 for size in x.shape], 7, dtype=x.dtype)
        view = big[tuple(slice(1, None, 2) for _ in x.shape)]
        view.copy_(x)
        return view
    return x


@every_backend
@every_form
@pytest.mark.parametrize("kind", ["transposed", "sliced"])
def test_non_contiguous(kind, form, backend, device):
    problem = problems.full_problem(14)
    problem = problem if form == "linear" else problem.as_logits()
    want = {name: x.clone() for name, x in problem.leaves().items()}
    names = ("hidden", "weight", "bias", "logits", "targets", "old_logprobs", "advantages", "mask")
    changed = {n: strided(getattr(problem, n), kind) for n in names if getattr(problem, n) is not None}
    options = {
        k: strided(v, kind) if isinstance(v, torch.Tensor) and v.dim() else v for k, v in problem.options.items()
    }
    problem = problems.replace(problem, **changed, options=options)
    assert_agrees(problem, DRPO, backend, device, **FP32)
    assert all(torch.equal(x, getattr(problem, n)) for n, x in want.items()), "an input was written to"


@every_backend
@every_form
def test_zero_stride(form, backend, device):
    """An expanded tensor is one row of values that is seen many times. It must never be written to."""
    hidden, weight, _, targets = problems.trained_looking(15, (1, 6), 8, 21)
    one = Problem(targets, torch.full((1, 6), -1.2), torch.randn(1, 6, generator=generator(3)), None, hidden, weight)
    one = one if form == "linear" else one.as_logits()
    names = ("targets", "old_logprobs", "advantages", "hidden", "logits")
    many = {n: getattr(one, n).expand(3, *getattr(one, n).shape[1:]) for n in names if getattr(one, n) is not None}
    problem = problems.replace(one, **many, mask=torch.ones(1, 1, dtype=torch.bool).expand(3, 6))
    before = problem.logits.clone() if form == "logits" else None
    assert_agrees(problem, DRPO, backend, device, **FP32)
    if form == "logits":
        leaf = one.logits.clone().to(device).requires_grad_()
        out = problems.call(problem, problems.build(DRPO), backend, device, {"logits": leaf.expand(3, 6, 21)})
        (grad,) = torch.autograd.grad(out.loss, leaf)
        _, want = problems.solve(problem, DRPO)
        assert relative(grad, want["logits"].sum(0, keepdim=True)) <= 5e-5
        assert torch.equal(before, problem.logits)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_in_place_over_shared_memory(backend, device):
    """An expanded tensor has no room for its gradient. The call refuses it by name, or puts the gradient elsewhere."""
    problem = random_problem(18, (1, 4)).as_logits()
    leaf = problem.logits[:, :1].clone().to(device).requires_grad_()
    want, want_grads = problems.solve(problems.replace(problem, logits=problem.logits[:, :1].expand(1, 4, -1)), DRPO)
    logits = (leaf * 1.0).expand(1, 4, -1)
    try:
        out = problems.call(problem, problems.build(DRPO), backend, device, {"logits": logits}, inplace=True)
    except (TypeError, ValueError) as error:
        message = str(error)
    else:
        (grad,) = torch.autograd.grad(out.loss, leaf)
        assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-4)
        assert relative(grad, want_grads["logits"].sum(1, keepdim=True)) <= 5e-5
        return
    assert "inplace" in message or "logits" in message


@every_backend
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_mask_of_any_dtype(dtype, backend, device):
    problem = random_problem(16)
    assert_agrees(problems.replace(problem, mask=problem.mask.to(dtype)), DRPO, backend, device, **FP32)


@every_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16], ids=str)
def test_targets_of_any_integer_dtype(dtype, backend, device):
    """The call gives the same numbers, or an error that names the argument."""
    problem = random_problem(17)
    try:
        assert_agrees(problems.replace(problem, targets=problem.targets.to(dtype)), DRPO, backend, device, **FP32)
    except (TypeError, ValueError) as error:
        message = str(error)
    else:
        return
    assert "targets" in message
