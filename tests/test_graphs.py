"""Inside one graph with coefficients that change, with tensors that have no values, and under torch.export."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import drpo_kernels as dk
from problems import BACKENDS, random_problem, relative

MADE = random_problem(8, (2, 5), 8, 23)
REF = MADE.old_logprobs - 0.25


@dataclasses.dataclass(frozen=True)
class Own(dk.Objective):
    def token_loss(self, tokens):
        return -tokens.advantages * tokens.ratio


# how a coefficient changes from step to step: options of a call from one number
ANNEALED = {
    "entropy_coef": lambda x: {"entropy_coef": x},
    "z_loss_coef": lambda x: {"z_loss_coef": x},
    "entropy_coef to 0": lambda x: {"entropy_coef": x if x > 0.15 else 0.0},
    "sparse_grad": lambda x: {"sparse_grad": x / 10},
    "sparse_grad to 0": lambda x: {"sparse_grad": x / 10 if x > 0.15 else 0.0},
    "kl_coef": lambda x: {"kl_coef": x, "ref_logprobs": REF},
    "temperature": lambda x: {"temperature": x},
    "logit_scale": lambda x: {"logit_scale": x},
    "softcap": lambda x: {"softcap": 10 * x},
    "horizon": lambda x: {"horizon": 10 * x, "reduction": "seq-mean-token-sum-norm"},
    "normalizer": lambda x: {"normalizer": 10 * x},
    "delta": lambda x: {"objective": dk.DRPO(x)},
    "clip": lambda x: {"objective": dk.PPO(x, 2 * x)},
    "clip of sequences": lambda x: {"objective": dk.GSPO(x, x)},
    "floor": lambda x: {"objective": dk.CISPO(5.0, x)},
}


class Step:
    """A loss whose coefficient is an attribute."""

    coefficient = 0.0


@pytest.mark.parametrize("by, dynamic", [("closure", None), ("attribute", True)])
@pytest.mark.parametrize("name", ANNEALED)
def test_a_coefficient_changes_inside_a_graph(name, by, dynamic, device):
    """The graph gives the eager call's loss and gradients at every value, in the same operations: hence 1e-6."""
    torch.compiler.reset()
    rest = [x.to(device) for x in (MADE.targets, MADE.old_logprobs, MADE.advantages)]
    leaves = [x.clone().to(device).requires_grad_() for x in (MADE.hidden, MADE.weight)]
    step, coefficient = Step(), 0.0

    def loss(hidden, weight):
        options = ANNEALED[name](step.coefficient if by == "attribute" else coefficient)
        options = {key: value.to(device) if torch.is_tensor(value) else value for key, value in options.items()}
        return dk.linear_policy_loss(hidden, weight, *rest, **options).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for coefficient in (0.3, 0.2, 0.1):
        step.coefficient = coefficient
        found, want = compiled(*leaves), loss(*leaves)
        assert found.item() == pytest.approx(want.item(), rel=1e-6)
        pairs = zip(torch.autograd.grad(found, leaves), torch.autograd.grad(want, leaves), strict=True)
        assert all(relative(got, exact) <= 1e-6 for got, exact in pairs)


FAKE = {
    "policy": lambda h, w, *rest, **kw: dk.linear_policy_loss(h, w, *rest, **kw),
    "sequences": lambda h, w, *rest, **kw: dk.linear_policy_loss(h, w, *rest, objective=dk.GSPO(), **kw),
    "own": lambda h, w, *rest, **kw: dk.linear_policy_loss(h, w, *rest, objective=Own(), **kw),
    "all terms": lambda h, w, t, old, adv, **kw: dk.linear_policy_loss(
        h, w, t, old, adv, adv > 0, ref_logprobs=old, kl_coef=0.1, entropy_coef=0.1, compact="mask", **kw
    ),
    "per token": lambda h, w, *rest, **kw: dk.linear_policy_loss(h, w, *rest, reduction="none", **kw),
    "packed": lambda h, w, t, old, adv, **kw: dk.linear_policy_loss(
        h.view(10, 8), w, t.view(10), old.view(10), adv.view(10), reduction="seq-mean-token-mean",
        cu_seqlens=torch.tensor([0, 4, 10], device=t.device), **kw,
    ),
    "logits": lambda h, w, *rest, **kw: dk.policy_loss(h @ w.T, *rest, **kw),
    "log-probs": lambda h, w, t, *_, **kw: dk.linear_token_logprobs(h, w, t, **kw),
    "masked log-probs": lambda h, w, t, old, adv, **kw: dk.linear_token_logprobs(h, w, t, mask=adv > 0, **kw),
    "log-probs of logits": lambda h, w, t, *_, **kw: dk.token_logprobs(h @ w.T, t, **kw),
}  # fmt: skip


@pytest.mark.interpreted  # the fake tensors are on the CPU, where PyTorch can differentiate them without a GPU
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAKE)
def test_fake_tensors_have_shapes_and_gradients(name, backend):
    """For estimates of memory: as the real call's, and nothing is read."""
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


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["policy", "logits", "log-probs", "log-probs of logits"])
def test_export_is_refused_by_name(name, strict):
    given = MADE.hidden, MADE.targets, MADE.old_logprobs, MADE.advantages
    with pytest.raises(Exception, match=r"torch\.export of the functions of drpo_kernels is not supported"):
        torch.export.export(Model(FAKE[name]), given, strict=strict)
