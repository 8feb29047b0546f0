"""A few hundred fuzz cases, the same on every run; `make fuzz` runs at least 20,000 others. What `check` asserts of a
case, and its error budget, is in fuzz.py and fuzz_budget.py."""

import pytest
from hypothesis import HealthCheck, given, settings

from fuzz import check
from fuzz_cases import CASES, HAZARDS, Case

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy warns in the interpreter when poison overflows
]


@settings(max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(CASES)
def test_random_cases(case):
    check(case)


@pytest.mark.parametrize("form", ["linear", "logits"])
@pytest.mark.parametrize("hazard", HAZARDS)
def test_every_hazard_on_every_backend(hazard, form):
    """One token's value is wrong or unusual, and torch, the reference and Triton give the same verdict."""
    options = {"kl": "k3", "token_weights": True, "bias": True, "temperature": "token", "normalizer": "tensor"}
    options["reduction"] = "coefficients" if hazard.startswith("coefficient") else "token-mean"
    for objective in ("dppo-kl", "cispo"):
        check(Case(seed=3, form=form, mask="u8", hazard=hazard, objective=objective, triton=True, **options))


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "offset"])
@pytest.mark.parametrize("form", ["linear", "logits"])
def test_poison_behind_every_layout(form, layout):
    for compact in ("active", "mask", "none"):
        check(
            Case(
                seed=5, form=form, mask="bool", poison=True, layout=layout, compact=compact, kl="k2",
                entropy_coef=0.2, z_loss_coef=0.1, token_weights=True, temperature="token", reduction="coefficients",
                triton=compact == "none",
            )
        )  # fmt: skip
