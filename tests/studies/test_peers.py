"""Tests that each installed peer computes what its row says, and that the row of a missing one says so."""

import sys

import pytest
import torch

from benchmarks.harness.method import HEAD, OBJECTIVE, Unsupported
from benchmarks.harness.peers import PEERS
from benchmarks.harness.workloads import Shape, make_inputs
from drpo_kernels import Tokens
from problems import relative

SHAPE = Shape(48, 8, 70)
# This allows for float32 rounding over a few dozen additions.
TOLERANCE = 1e-5
# These run on a CPU; of the Triton kernels, those that the interpreter can run.
RUNNABLE = [name for name, method in PEERS.items() if not method.gpu]
RUNNABLE.append(pytest.param("liger_triton_grpo", marks=pytest.mark.interpreted))


def exact_gradients(method, inputs):
    """Return the float64 gradients of the DRPO loss or of the mean of -log π."""
    leaves = [getattr(inputs, name).double().requires_grad_() for name in method.wrt]
    logits = leaves[0]
    if method.wrt == HEAD:
        logits = leaves[0] @ leaves[1].T
        logits = logits if inputs.softcap is None else inputs.softcap * torch.tanh(logits / inputs.softcap)
    logprobs = torch.log_softmax(logits, -1).gather(-1, inputs.targets[:, None])[:, 0]
    tokens = Tokens(logprobs, inputs.old_logprobs.double(), inputs.advantages.double())
    loss = OBJECTIVE.token_loss(tokens) if method.same_loss else -logprobs
    return torch.autograd.grad(loss.mean(), leaves)


@pytest.mark.parametrize("kind, softcap", [("random", None), ("random", 5.0), ("trained", None)])
@pytest.mark.parametrize("name", RUNNABLE)
def test_gradients(name, kind, softcap):
    """A soft-cap is applied or refused, never ignored."""
    method, inputs = PEERS[name], make_inputs(kind, SHAPE, softcap=softcap).with_logits()
    if method.package:
        pytest.importorskip(method.package)
    try:
        step = method.prepare(inputs)
    except Unsupported as reason:
        pytest.skip(str(reason))
    for result in (step(), step()):  # a step must leave its inputs as they were
        for found, want in zip(method.wrt, exact_gradients(method, inputs), strict=True):
            assert relative(getattr(result, found), want) <= TOLERANCE, found


@pytest.mark.parametrize("name", [name for name, method in PEERS.items() if method.package])
def test_absent_package(name, monkeypatch):
    package = PEERS[name].package
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        PEERS[name].prepare(make_inputs("random", SHAPE).with_logits())
    assert caught.value.name.split(".")[0] == package


def test_torch_without_the_function(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(Unsupported, match="has no chunked linear_cross_entropy"):
        PEERS["torch_linear"].prepare(make_inputs("random", SHAPE))
