"""`main_grad`: the weight's gradient added to the trainer's own float32 buffer, at a loss scale given up front."""

import pytest
import torch

import drpo_kernels as dk
import problems
from drpo_kernels.backends.rows import Field, Terms, Transform
from drpo_kernels.backends.spec import Execution, Spec
from problems import SMALL_WORKSPACE, SPECS, full_problem, random_problem, relative

GRADIENTS = {torch.float32: 5e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}  # the contract's bounds
CASES = [*((torch.float32, scale) for scale in (1.0, 1 / 3, 1024.0)), (torch.bfloat16, 3.0), (torch.float16, 64.0)]
START = 0.25  # value of the buffer before the call


def differentiated(problem, spec, backend, device, scale, **options):
    """Return (loss, gradients by leaf, what was added to main_grad) of one call and its backward."""
    leaves = {name: value.detach().to(device).requires_grad_() for name, value in problem.leaves().items()}
    buffer = torch.full_like(leaves["weight"], START, dtype=torch.float32)
    out = problems.call(problem, problems.build(spec), backend, device, leaves, main_grad=buffer, **options)
    (out.loss * scale).backward()
    assert leaves["weight"].grad is None
    return out.loss, {name: x.grad for name, x in leaves.items()}, buffer - START


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype, scale", CASES)
def test_agrees_with_the_oracle(dtype, scale, backend, device):
    """The call takes several chunks, every optional term, masked rows, a bias and a padded vocabulary."""
    problem = full_problem(3, dtype=dtype, vocab_size=33, workspace_bytes=SMALL_WORKSPACE)
    spec, bound = SPECS["drpo-active"], GRADIENTS[dtype]
    want, want_grads = problems.solve(problem, spec, scale)
    loss, grads, added = differentiated(problem, spec, backend, device, scale, loss_scale=scale)
    assert loss.item() == pytest.approx(want.loss.item(), rel=1e-4)
    assert relative(added, want_grads["weight"]) <= bound + START * 2**-24 * added.numel() ** 0.5 / added.norm().item()
    assert (added[33:] == 0).all()
    for name in ("hidden", "bias"):
        assert relative(grads[name], want_grads[name]) <= bound, name


@pytest.mark.parametrize("spec", ["drpo-active", "gspo"])
def test_micro_batches_add_up(spec, device):
    problem = random_problem(5, (4, 6), reduction="token-sum")
    _, want = problems.solve(problem, SPECS[spec])
    buffer = torch.zeros(problem.weight.shape, device=device)
    for part in (slice(0, 1), slice(1, 4)):
        names = ("hidden", "targets", "old_logprobs", "advantages", "mask")
        piece = problems.replace(problem, **{name: getattr(problem, name)[part] for name in names})
        leaves = {n: x.detach().clone().to(device).requires_grad_() for n, x in piece.leaves().items()}
        problems.call(piece, problems.build(SPECS[spec]), None, device, leaves, main_grad=buffer).loss.backward()
    assert relative(buffer, want["weight"]) <= 5e-5


@pytest.mark.parametrize("function", ["logprobs", "gspo"])
def test_recomputing_routes_add_in_every_backward(function, device):
    """The recomputing routes add dW times the upstream gradient in every backward, whatever loss_scale says."""
    problem = random_problem(7)
    leaves = {n: x.detach().clone().to(device).requires_grad_() for n, x in problem.leaves().items()}
    buffer = torch.zeros_like(leaves["weight"])

    def loss(**options):
        if function == "gspo":
            return problems.call(problem, problems.build(SPECS["gspo"]), None, device, leaves, **options).loss
        options |= {"targets": problem.targets.to(device), "return_logsumexp": True}
        logprobs, entropy, logsumexp = dk.linear_token_logprobs(*leaves.values(), **options)
        return (logprobs + 0.3 * entropy + 0.1 * logsumexp**2).mean()

    (2.5 * loss()).backward()
    want, hidden = leaves["weight"].grad, leaves["hidden"].grad
    leaves["weight"].grad = leaves["hidden"].grad = None
    total = 2.5 * loss(main_grad=buffer)
    assert (buffer == 0).all()
    total.backward(retain_graph=True)
    assert relative(buffer, want) <= 1e-6 and relative(leaves["hidden"].grad, hidden) <= 1e-6
    total.backward()
    assert leaves["weight"].grad is None
    assert relative(buffer, 2 * want) <= 1e-6


@pytest.mark.parametrize("factor", [0.5, 1.001, float("nan")])
def test_another_factor_is_an_error(factor):
    """A factor other than loss_scale raises here. On a GPU it is a device-side assertion, which
    would end this process.
    """
    problem = random_problem(1)
    leaves = {name: value.clone().requires_grad_() for name, value in problem.leaves().items()}
    buffer = torch.zeros_like(leaves["weight"])
    out = problems.call(problem, dk.DRPO(), "torch", "cpu", leaves, main_grad=buffer, loss_scale=4.0)
    with pytest.raises(RuntimeError, match=r"loss_scale must be what the loss is multiplied by .* got 4.0"):
        (out.loss * 4.0 * factor).backward()


@pytest.mark.parametrize("said, multiplied", [(1 / 3, 1 / 3), (0.1, 0.1), (0.1, 0.2), (3.0, 1.0)])
def test_loss_scale_without_main_grad(said, multiplied, device):
    """The gradients are those of the loss times the factor. They are rounded only once if loss_scale announced that
    factor.
    """
    problem = random_problem(9, dtype=torch.bfloat16, bias=True)

    def gradients(factor, **options):
        leaves = {n: x.detach().clone().to(device).requires_grad_() for n, x in problem.leaves().items()}
        out = problems.call(problem, dk.DRPO(delta=0.2), None, device, leaves, **options)
        (factor * out.loss).backward()
        return out.loss.item(), {name: leaf.grad for name, leaf in leaves.items()}

    loss, found = gradients(multiplied, loss_scale=said)
    plain_loss, _ = gradients(1.0)
    _, want = problems.solve(problem, ("DRPO", {"delta": 0.2}), multiplied)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    # here the factor is applied before any rounding
    _, at_once = gradients(1.0, token_weights=torch.full(problem.targets.shape, said))
    for name, grad in found.items():
        if said == multiplied:
            assert relative(grad, at_once[name].double()) <= 1e-4, name
        assert relative(grad, want[name]) <= 4e-3, name


WEIGHT = torch.zeros(37, 12)
ERRORS = [
    (TypeError, "main_grad must be a tensor, got int", {"main_grad": 1}),
    (TypeError, "main_grad must be float32, got torch.bfloat16", {"main_grad": WEIGHT.bfloat16()}),
    (ValueError, r"main_grad must be shaped like weight \(37, 12\), got \(12, 37\)", {"main_grad": WEIGHT.T}),
    (ValueError, "main_grad must be contiguous", {"main_grad": torch.zeros(12, 37).T}),
    (ValueError, "main_grad must be .* not require grad", {"main_grad": WEIGHT.clone().requires_grad_()}),
    (ValueError, "backend must be .* with main_grad, got 'reference'", {"main_grad": WEIGHT, "backend": "reference"}),
    (ValueError, "loss_scale must be positive and finite, got 0", {"main_grad": WEIGHT, "loss_scale": 0}),
    (TypeError, "loss_scale must be a number, got Tensor", {"main_grad": WEIGHT, "loss_scale": torch.ones(())}),
]


@pytest.mark.parametrize("error, message, options", ERRORS)
def test_errors(error, message, options):
    problem = random_problem(1)
    leaves = {name: value.clone().requires_grad_() for name, value in problem.leaves().items()}
    options = {"backend": "torch", **options}
    with pytest.raises(error, match=message):
        problems.call(problem, dk.DRPO(), options.pop("backend"), "cpu", leaves, **options)


def test_a_weight_without_a_gradient_is_an_error():
    problem, buffer = random_problem(1), torch.zeros(37, 12)
    leaves = problem.leaves()
    with pytest.raises(ValueError, match="main_grad must be None where weight gets no gradient"):
        problems.call(problem, dk.DRPO(), "torch", "cpu", leaves, main_grad=buffer)
    leaves["weight"].requires_grad_()
    with pytest.raises(ValueError, match="main_grad must be None"), torch.no_grad():
        problems.call(problem, dk.DRPO(), "torch", "cpu", leaves, main_grad=buffer)
    for name in ("main_grad", "loss_scale"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument {name!r}"):
            problems.call(problem.as_logits(), dk.DRPO(), "torch", "cpu", **{name: 1.0})
    assert (buffer == 0).all()


def test_float64_is_an_error():
    problem = random_problem(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="main_grad must be None for float64 inputs"):
        problems.call(problem, dk.DRPO(), "torch", "cpu", main_grad=torch.zeros(37, 12))


def test_another_device_is_an_error():
    hidden, weight, targets = torch.zeros(3, 12), WEIGHT.clone().requires_grad_(), torch.arange(3)
    with pytest.raises(ValueError, match="main_grad must be on cpu like the other tensors, got meta"):
        dk.linear_token_logprobs(hidden, weight, targets, main_grad=WEIGHT.to("meta"))


def test_bitwise_in_any_chunks(device):
    """With `batch_invariant` each product continues from what the buffer holds."""
    pytest.importorskip("triton")
    problem, added = random_problem(9, (2, 9), dtype=torch.bfloat16), []
    for workspace in (1, 37 * 6 * 5, None):
        options = {"batch_invariant": True, "workspace_bytes": workspace, "loss_scale": 2.0}
        added.append(differentiated(problem, SPECS["drpo-active"], "triton", device, 2.0, **options)[2])
    assert added[0].norm() > 0
    assert torch.equal(added[0], added[1]) and torch.equal(added[0], added[2])


def test_in_one_graph():
    problem = random_problem(1)
    leaves = {name: value.clone().requires_grad_() for name, value in problem.leaves().items()}

    def loss(buffer):
        out = problems.call(problem, dk.DRPO(delta=0.2), "torch", "cpu", leaves, main_grad=buffer, loss_scale=2.0)
        return 2.0 * out.loss

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        buffer = torch.ones(37, 12)
        function(buffer).backward()
        found.append((buffer, leaves["hidden"].grad.clone()))
        leaves["hidden"].grad = None
    assert all(map(torch.equal, *found)) and not torch.equal(found[0][0], torch.ones(37, 12))
    assert leaves["weight"].grad is None


@pytest.mark.parametrize("given", [True, False])
def test_the_ops_say_what_they_write(given):
    g = problems.generator(0)
    hidden, weight, targets = torch.randn(5, 8, generator=g), torch.randn(11, 8, generator=g), torch.arange(5)
    rows = 0.5 + torch.rand(len(Field), 5, generator=g)
    rows[Field.KIND], rows[Field.OLD_LOGPROB] = 2, -3
    spec = Spec(11, Transform(), Execution("torch", torch.float32), Terms(dk.DRPO()))
    buffer = torch.ones(11, 8) if given else None
    words, numbers = spec.encode()
    encoded = words, torch.tensor(numbers, dtype=torch.float64)
    head, rest = (hidden, weight, None, targets, rows), (buffer, *encoded, [True, True, False])
    statistics = torch.ops.drpo_kernels.linear_statistics(*head, *encoded)
    torch.library.opcheck(torch.ops.drpo_kernels.linear_policy, (*head, *rest))
    torch.library.opcheck(torch.ops.drpo_kernels.linear_recompute, (*head, statistics, torch.ones(3, 5), *rest))
