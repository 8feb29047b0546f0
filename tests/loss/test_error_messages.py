"""Tests of what an error says: the name or the call to write instead, and what would silently get no gradient."""

import itertools
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import drpo_kernels as dk
from small_call import LOGITS, ROWS, A, B, H, L, V, arguments, changed, expect


def test_the_labels_of_others_are_named():
    """In other libraries -100 does what a mask does here. Meta tensors have no values to look at."""
    given = arguments() | {"targets": changed(A["targets"], -100)}
    with pytest.raises(ValueError, match=r"targets must be .*mask=targets != -100"):
        dk.linear_policy_loss(**given)
    given = {name: x.to("meta") for name, x in arguments().items()}
    expect("hidden", dk.linear_policy_loss, **given)
    expect("logits", dk.token_logprobs, LOGITS.to("meta"), given["targets"])


# Each row is (function, keyword, what the message says of the keyword).
KEYWORDS = [
    ("linear_policy_loss", "temprature", "did you mean 'temperature'?"),
    ("linear_policy_loss", "old_log_probs", "did you mean 'old_logprobs'?"),
    ("linear_policy_loss", "ref_log_prob", "did you mean 'ref_logprobs'?"),
    ("linear_policy_loss", "entropy_coeff", "did you mean 'entropy_coef'?"),
    ("linear_policy_loss", "hidden_states", "write hidden=..."),
    ("linear_policy_loss", "beta", "write kl_coef=..."),
    ("linear_policy_loss", "epsilon", "write objective=PPO(clip_low=..., clip_high=...)"),
    ("policy_loss", "delta", "write objective=DRPO(delta=...)"),
    ("policy_loss", "labels", "write targets=..."),
    ("policy_loss", "response_mask", "write mask=..."),
    ("drpo_loss", "old_per_token_logps", "write old_logprobs=..."),
    ("linear_drpo_loss", "objective", "linear_policy_loss and policy_loss take it"),
    ("linear_drpo_loss", "logits", "policy_loss and token_logprobs take logits"),
    ("drpo_loss", "head_dtype", "the logits exist already"),
    ("policy_loss", "weight", "the logits exist already"),
    ("token_logprobs", "input_ids", "write targets=..."),
    ("linear_token_logprobs", "kl_coef", "linear_policy_loss and policy_loss take it"),
    ("linear_token_logprobs", "beta", "its help() lists those that it takes"),
    ("DRPO", "detla", "did you mean 'delta'?"),
    ("PPO", "eps", "it takes clip_low, clip_high, dual_clip"),
    ("GSPO", "clip_hi", "did you mean 'clip_high'?"),
]


@pytest.mark.parametrize("function, keyword, said", KEYWORDS)
def test_unknown_keywords(function, keyword, said):
    """The keyword is named even if arguments are missing because they were given under this name."""
    message = f"{function}() got an unexpected keyword argument {keyword!r}: {said}"
    with pytest.raises(TypeError, match=re.escape(message)):
        getattr(dk, function)(**{keyword: 0.2})


# Each row is (call, changed arguments, what the message says).
SAID = [
    ("linear", {"weight": torch.nn.Linear(H, V)}, "weight must be a tensor, got Linear: pass lm_head.weight"),
    ("linear", {"weight": A["weight"].T}, r"weight must be \[V, H\] .*, got shape \(4, 7\): pass weight.T where it"),
    ("linear", {"hidden": LOGITS}, r"weight must be .* like hidden, .* where hidden are logits, call policy_loss"),
    ("ready", {"logits": A["hidden"], "targets": changed(A["targets"], H)}, "got 4 at .*: .* call linear_policy_loss"),
    ("linear", {"old_logprobs": changed(A["old_logprobs"], 0.02)}, "at most 0.01, .*, got 0.0.* at .*, or negated?"),
    ("linear", {"normalizer": 0}, "normalizer must be positive and finite, got 0: a batch without .* counts as 1"),
    ("linear", {"normalizer": torch.tensor(0)}, "normalizer must be positive .*, got 0: a batch without .* as 1"),
]


@pytest.mark.parametrize("call, change, said", SAID, ids=[f"{i}-{next(iter(row[1]))}" for i, row in enumerate(SAID)])
def test_what_to_write_instead(call, change, said):
    given = {**arguments(), "logits": LOGITS, **change}
    left_out = ("logits",) if call == "linear" else ("hidden", "weight")
    function = dk.linear_policy_loss if call == "linear" else dk.policy_loss
    with pytest.raises((ValueError, TypeError), match=said):
        function(**{name: value for name, value in given.items() if name not in left_out})


CONSTANTS = {
    "old_logprobs": A["old_logprobs"],
    "ref_logprobs": A["old_logprobs"],
    "advantages": A["advantages"],
    "mask": A["mask"].float(),
    "temperature": torch.tensor(1.0),
    "token_weights": ROWS,
    "normalizer": torch.tensor(5.0),
    "reduction.kl": ROWS,
}
ROUTES = {
    "fused": {"backend": "torch"},
    "per token": {"backend": "torch", "reduction": "none"},
    "sequences": {"backend": "torch", "objective": dk.GSPO()},
    "reference": {"backend": "reference"},
}


# a loss per token takes no such constant
WITHOUT_AGGREGATION = [("normalizer", "per token"), ("reduction.kl", "per token")]


@pytest.mark.parametrize("name, route", sorted({*itertools.product(CONSTANTS, ROUTES)} - {*WITHOUT_AGGREGATION}))
def test_constants_that_would_get_no_gradient(name, route):
    value = CONSTANTS[name].clone().requires_grad_()
    change = {name: value} if "." not in name else {"reduction": dk.TokenCoefficients(ROWS, kl=value)}
    given = {**arguments(), **ROUTES[route], **change}
    with pytest.raises(ValueError, match=rf"{name} must not require grad, .*: pass {name}\.detach\(\)"):
        dk.linear_policy_loss(**given)
    with torch.no_grad():
        dk.linear_policy_loss(**given)


def test_constants_of_log_probs_and_inside_a_graph():
    scale = torch.ones(B, L, requires_grad=True)
    with pytest.raises(ValueError, match=r"temperature must not require grad, .* to learn it, divide hidden or logits"):
        dk.linear_token_logprobs(A["hidden"], A["weight"], A["targets"], temperature=scale)
    given = {**arguments(), "old_logprobs": A["old_logprobs"].clone().requires_grad_()}
    with pytest.raises(ValueError, match="old_logprobs must not require grad"):
        torch.compile(lambda: dk.linear_policy_loss(**given), backend="eager")()


def test_unavailable_backend_is_an_error_not_a_fallback():
    """Triton is asked for on CPU tensors, in a process whose interpreter is off."""
    code = (
        "import torch, drpo_kernels as dk\n"
        "try:\n"
        "    dk.linear_policy_loss(torch.ones(2, 4), torch.ones(3, 4), torch.zeros(2, dtype=torch.long),"
        " -torch.ones(2), torch.ones(2), backend='triton')\n"
        "except (ValueError, TypeError, RuntimeError) as error:\n"
        "    assert 'backend' in str(error), error\n"
        "    print('refused')\n"
    )
    root = pathlib.Path(__file__).parents[2]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=120,
        env={**env, "PYTHONPATH": str(root)},
    )
    assert result.stdout.strip() == "refused", result.stderr
