"""The process's default dtype changes nothing: every tensor is made in a dtype of its own."""

import pytest
import torch

import problems
from problems import SPECS, random_problem
from sparse_cases import case_of, gradients, rows_of

KINDS = {
    "tokens": {},
    "sums": {"reduction": "seq-mean-token-mean", "kl_coef": 0.1, "entropy_coef": 0.01, "temperature": 0.7},
    "capped": {"softcap": 20.0, "compact": "none", "token_weights": None},
}


@pytest.fixture(params=[torch.float16, torch.float64], ids=str)
def other_default(request):
    def run(function):
        torch.set_default_dtype(request.param)
        try:
            return function()
        finally:
            torch.set_default_dtype(torch.float32)

    return run


def assert_equal(got, want):
    (out, grads), (expected, exactly) = got, want
    assert torch.equal(out.loss, expected.loss)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=0, atol=0, equal_nan=True)
    for found, known in ((out.metrics, expected.metrics), (grads, exactly)):
        assert found.keys() == known.keys()
        for name, value in found.items():
            assert value.dtype == known[name].dtype and torch.equal(value, known[name]), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sparse_gradients(backend, other_default, device):
    if backend == "triton":
        pytest.importorskip("triton")
    case = case_of(30, (40,), vocab=131, bias=True)
    case = case if backend == "torch" else rows_of(case, slice(0, 8))
    want = gradients(case, device=device, backend=backend)
    assert 0 < want[0].metrics["drpo/sparse_share"] < 1
    assert_equal(other_default(lambda: gradients(case, device=device, backend=backend)), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["drpo-active", "gspo"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_losses(backend, objective, kind, other_default, device):
    if backend == "triton":
        pytest.importorskip("triton")
    problem = random_problem(3).with_options(**{k: v for k, v in KINDS[kind].items() if v is not None})
    if "kl_coef" in KINDS[kind]:
        problem = problem.with_options(ref_logprobs=problem.old_logprobs.clone().nan_to_num(-1, -1, -1))

    def run():
        return problems.run(problem, problems.build(SPECS[objective]), backend, device)

    want = run()
    assert_equal(other_default(run), want)
