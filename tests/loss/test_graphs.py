"""Tests inside one graph: with coefficients that change, with tensors that have no values, and under torch.export."""

import dataclasses
import enum

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import drpo_kernels as dk
from problems import BACKENDS, random_problem, relative

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
MADE = random_problem(8, (2, 5), 8, 23)
REF = MADE.old_logprobs - 0.25


@dataclasses.dataclass(frozen=True)
class Own(dk.Objective):
    def token_loss(self, tokens):
        return -tokens.advantages * tokens.ratio


def every_term(x):
    coefficients = {"entropy_coef": x, "z_loss_coef": x, "kl_coef": x, "kl_cap": x, "ref_logprobs": REF}
    return {**coefficients, "temperature": x, "logit_scale": x, "softcap": 10 * x}


class Kind(enum.IntEnum):
    FIRST = 1
    SECOND = 2


@dk.register_objective
@dataclasses.dataclass(frozen=True)
class Settings(dk.Objective):
    """This objective has a field of every kind, and each field matters."""

    times: int = 3
    mirrored: bool = True
    mode: str = "plain"
    kind: int = Kind.FIRST
    floor: float | None = None
    strength: float = 0.5

    def token_loss(self, tokens):
        ratio = tokens.ratio if self.floor is None else tokens.ratio.clamp(min=self.floor)
        loss = sum(self.strength * tokens.advantages * ratio for _ in range(self.times))
        return -loss if self.mirrored is True and self.mode == "plain" and self.kind == Kind.FIRST else loss


# Each name stands for the options of a call that change from step to step, made from one number.
ANNEALED = {
    "terms": lambda x: {**every_term(x), "normalizer": 10 * x},
    "terms per token": lambda x: {**every_term(x), "kl_importance": True, "reduction": "none"},
    "terms of sequences": lambda x: {**every_term(x), "objective": dk.GSPO(x, x)},
    "GSPO per token": lambda x: {"objective": dk.GSPO(x, x, token_level=True)},
    "entropy to 0": lambda x: {"entropy_coef": x if x > 0.15 else 0.0},
    "z-loss to 0": lambda x: {"z_loss_coef": x if x > 0.15 else 0.0},
    "sparse_grad": lambda x: {"sparse_grad": x / 10},
    "sparse_grad to 0": lambda x: {"sparse_grad": x / 10 if x > 0.15 else 0.0},
    "horizon": lambda x: {"horizon": 10 * x, "reduction": "seq-mean-token-sum-norm"},
    "DRPO": lambda x: {"objective": dk.DRPO(x)},
    "PPO": lambda x: {"objective": dk.PPO(x, 2 * x, 1 + x)},
    "PPO per token": lambda x: {"objective": dk.PPO(x, 2 * x, 1 + x), "reduction": "none"},
    "CISPO": lambda x: {"objective": dk.CISPO(5.0, x)},
    "CISPO per token": lambda x: {"objective": dk.CISPO(5 * x, x), "reduction": "none"},
    "DPPO per token": lambda x: {"objective": dk.DPPO(x, x, "kl", 5 * x), "reduction": "none"},
}
# Each of these cases takes another way through the package, and PyTorch also derives its backward graph.
WAYS = ("terms", "terms per token", "terms of sequences", "sparse_grad")
# These cases keep their metrics, which take most of the time of tracing.
WITH_METRICS = ("terms", "terms of sequences")


class Step:
    """This is a loss whose coefficient is an attribute."""

    coefficient = 0.0


def annealed():
    for i, name in enumerate(ANNEALED):
        ways = (("closure", None), ("attribute", True))
        for by, dynamic in ways if name == "terms" else ways[i % 2 :][:1]:
            yield pytest.param(name, by, dynamic, id=f"{name}, {by}, {dynamic}")


@pytest.mark.parametrize("name, by, dynamic", list(annealed()))
@torch._dynamo.config.patch(recompile_limit=4 if TORCH > (2, 11) else 8)
def test_a_coefficient_changes_inside_a_graph(name, by, dynamic, device, request):
    """The graph gives the eager call's loss and gradients at every value. The operations are the same, hence 1e-6. Four
    graphs are allowed, so that not every value may have its own: one with a number, one with a symbol, and one without
    the term. Up to 2.11 PyTorch makes one for each value of some, such as 10 · x for a number x that changes.
    """
    torch.compiler.reset()
    if name not in WITH_METRICS:
        request.getfixturevalue("without_metrics")
    rest = [x.to(device) for x in (MADE.targets, MADE.old_logprobs, MADE.advantages)]
    leaves = [x.clone().to(device).requires_grad_() for x in (MADE.hidden, MADE.weight)]
    step, coefficient = Step(), 0.0

    def loss(hidden, weight):
        options = ANNEALED[name](step.coefficient if by == "attribute" else coefficient)
        options = {key: value.to(device) if torch.is_tensor(value) else value for key, value in options.items()}
        return dk.linear_policy_loss(hidden, weight, *rest, **options).loss.sum()

    compiler = "aot_eager" if name in WAYS else "eager"
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=compiler)
    for coefficient in (0.3, 0.28, 0.26, 0.24, 0.22, 0.1):
        step.coefficient = coefficient
        found, want = compiled(*leaves), loss(*leaves)
        assert found.item() == pytest.approx(want.item(), rel=1e-6)
        pairs = zip(torch.autograd.grad(found, leaves), torch.autograd.grad(want, leaves), strict=True)
        assert all(relative(got, exact) <= 1e-6 for got, exact in pairs)


@pytest.mark.parametrize(
    "objective", [Settings(), Settings(2, False), Settings(floor=1, mode="other"), Settings(kind=Kind.SECOND)]
)
def test_settings_of_a_registered_objective_enter_a_graph(objective, device):
    torch.compiler.reset()
    given = [x.to(device) for x in (MADE.hidden, MADE.weight, MADE.targets, MADE.old_logprobs, MADE.advantages)]

    def loss(*given):
        return dk.linear_policy_loss(*given, objective=objective).loss

    assert torch.compile(loss, fullgraph=True, backend="eager")(*given) == loss(*given)


def test_an_unregistered_objective_says_how_it_enters_a_graph(device):
    torch.compiler.reset()
    given = [x.to(device) for x in (MADE.hidden, MADE.weight, MADE.targets, MADE.old_logprobs, MADE.advantages)]
    with pytest.raises(Exception, match=r"without @drpo_kernels\.register_objective"):
        torch.compile(lambda *given: dk.linear_policy_loss(*given, objective=Own()).loss, fullgraph=True)(*given)


FAKE = {
    "policy": lambda h, w, *rest, **kw: dk.linear_policy_loss(h, w, *rest, **kw),
    "sequences": lambda h, w, *rest, **kw: dk.linear_policy_loss(h, w, *rest, objective=dk.GSPO(), **kw),
    "own": lambda h, w, *rest, **kw: dk.linear_policy_loss(h, w, *rest, objective=Own(), **kw),
    "all terms": lambda h, w, t, old, adv, **kw: dk.linear_policy_loss(
        h, w, t, old, adv, adv > 0, ref_logprobs=old, kl_coef=0.1, entropy_coef=0.1, z_loss_coef=0.1, compact="mask",
        **kw
    ),
    "per token": lambda h, w, *rest, **kw: dk.linear_policy_loss(h, w, *rest, reduction="none", **kw),
    "packed": lambda h, w, t, old, adv, **kw: dk.linear_policy_loss(
        h.view(10, 8), w, t.view(10), old.view(10), adv.view(10), reduction="seq-mean-token-mean",
        cu_seqlens=torch.tensor([0, 4, 10], device=t.device), **kw,
    ),
    "logits": lambda h, w, *rest, **kw: dk.policy_loss(h @ w.T, *rest, **kw),
    "log-probs": lambda h, w, t, *_, **kw: dk.linear_token_logprobs(h, w, t, **kw),
    "log-sum-exp": lambda h, w, t, *_, **kw: dk.linear_token_logprobs(h, w, t, return_logsumexp=True, **kw)[::-1],
    "masked log-probs": lambda h, w, t, old, adv, **kw: dk.linear_token_logprobs(h, w, t, mask=adv > 0, **kw),
    "log-probs of logits": lambda h, w, t, *_, **kw: dk.token_logprobs(h @ w.T, t, **kw),
}  # fmt: skip


@pytest.mark.interpreted  # the fake tensors are on the CPU, where PyTorch can differentiate them without a GPU
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAKE)
def test_fake_tensors_have_shapes_and_gradients(name, backend):
    """Estimates of memory need fake tensors: shapes are those of the real call, and no value is read."""
    tensors = MADE.hidden, MADE.weight, MADE.targets, MADE.old_logprobs, MADE.advantages

    def shapes(tensors):
        hidden, weight, *rest = tensors
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = FAKE[name](*leaves, *rest, backend=backend)
        loss = out.loss if hasattr(out, "loss") else out[0]
        loss.sum().backward()
        fields = [x for x in out if torch.is_tensor(x)] + [x.grad for x in leaves]
        metrics = sorted(out.metrics) if hasattr(out, "metrics") else []
        return [(x.shape, x.dtype) for x in fields], metrics

    want = shapes(tensors)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = [mode.from_tensor(x) for x in tensors]
    with mode:
        assert shapes(fake) == want
    assert shapes(fake) == want, "outside the mode too"


class Model(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.weight, self.call = torch.nn.Parameter(MADE.weight.clone()), call

    def forward(self, hidden, *rest):
        out = self.call(hidden, self.weight, *rest)
        return out.loss if hasattr(out, "loss") else out[0]


@pytest.mark.parametrize("form", ["linear", "logits"])
def test_the_log_sum_exp_inside_a_graph(form, device):
    torch.compiler.reset()
    leaves = [x.clone().to(device).requires_grad_() for x in (MADE.hidden, MADE.weight)]
    targets = MADE.targets.to(device)

    def loss(hidden, weight):
        if form == "linear":
            logprobs, _, logsumexp = dk.linear_token_logprobs(hidden, weight, targets, return_logsumexp=True)
        else:
            logprobs, _, logsumexp = dk.token_logprobs(hidden @ weight.T, targets, return_logsumexp=True)
        return (logprobs + logsumexp.square()).sum()

    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    want = loss(*leaves)
    assert found.item() == pytest.approx(want.item(), rel=1e-6)
    pairs = zip(torch.autograd.grad(found, leaves), torch.autograd.grad(want, leaves), strict=True)
    assert all(relative(got, exact) <= 1e-6 for got, exact in pairs)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["policy", "logits", "log-probs", "log-probs of logits"])
def test_export_is_refused_by_name(name, strict):
    given = MADE.hidden, MADE.targets, MADE.old_logprobs, MADE.advantages
    with pytest.raises(Exception, match=r"torch\.export of the functions of drpo_kernels is not supported"):
        torch.export.export(Model(FAKE[name]), given, strict=strict)
