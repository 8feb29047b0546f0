"""Every option, and every field of what a call becomes, reaches the computation inside one compiled graph.

Each case sets several options to values that are not their defaults. Outside of a graph each of them must matter: the
call without it gives something else. Inside the graph the call must give what it gives outside, so that an option which
is lost on the way into the graph turns its case red.
"""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")
import drpo_kernels as dk
from drpo_kernels import inputs
from drpo_kernels.backends.rows import Terms, Transform
from drpo_kernels.backends.sparse.torch_ops import TorchEntries
from drpo_kernels.backends.sparse.triton_ops import TritonEntries
from drpo_kernels.backends.spec import Execution, Spec
from drpo_kernels.backends.torch_rows import TorchRows
from drpo_kernels.backends.triton.launch import TritonRows
from drpo_kernels.collectives import VocabShard
from drpo_kernels.options import LogprobOptions, PolicyOptions
from problems import SMALL_WORKSPACE, generator, random_problem, relative

pytestmark = pytest.mark.interpreted  # the tensors are on the CPU

# Outside of a graph Triton adds up the metrics in a kernel, and so in another order. Everything else is the same.
SAME, DIFFERENT = 2e-6, 1e-5
UPSTREAM = 1 / 3  # every loss is multiplied by it, and it is not a power of two
ROWS, HIDDEN, VOCAB = 15, 16, 37
MADE = random_problem(8, (ROWS,), HIDDEN, VOCAB, bias=True)
TARGETS, REF = MADE.targets % (VOCAB - 1), MADE.old_logprobs - torch.linspace(0.1, 0.7, ROWS)
OLD = MADE.old_logprobs.clone()
OLD[MADE.mask.nonzero()[0]] = 0.5  # only validate=False takes such a log-prob
IDS = torch.cat([TARGETS[:, None], torch.randint(VOCAB - 1, (ROWS, 3), generator=generator(5))], 1)

CASES = {
    "terms": {
        "temperature": torch.linspace(0.7, 1.3, ROWS), "logit_scale": 1.3, "softcap": 6.0, "vocab_size": VOCAB - 1,
        "objective": dk.PPO(0.05, 0.07), "reduction": "seq-mean-token-sum-norm", "normalizer": 2.5, "horizon": 7.0,
        "cu_seqlens": torch.tensor([0, 3, 8, ROWS]), "ref_logprobs": REF, "kl_coef": 0.3, "kl_estimator": "k2",
        "kl_importance": True, "kl_cap": 0.4, "entropy_coef": 0.2, "z_loss_coef": 0.1,
        "token_weights": torch.linspace(0.5, 2, ROWS), "workspace_bytes": SMALL_WORKSPACE,
    },
    "bfloat16": {
        "logits_dtype": torch.bfloat16, "head_dtype": "fp8_e4m3", "sparse_grad": 0.2, "compact": "none",
        "main_grad": torch.zeros(VOCAB, HIDDEN), "loss_scale": UPSTREAM,
    },
    "kept": {"kept_ids": IDS, "backend": "triton", "reduction": "none", "temperature": 0.8},
    "invariant": {"batch_invariant": True, "compact": "mask"},
}  # fmt: skip
# `validate` is False in every case. A shard cannot enter a graph, because it holds a process group.
OPTIONS = {"validate", "vocab_shard"}.union(*CASES.values())


@pytest.fixture
def swept(monkeypatch):
    """Return a list that fills with the (backend, rows) that the backends are asked to compute."""
    seen = []

    def record(cls, name, told):
        original = getattr(cls, name)

        def recorded(self, *arguments, **keywords):
            seen.append(told(*arguments, **keywords))
            return original(self, *arguments, **keywords)

        monkeypatch.setattr(cls, name, recorded)

    for number, (cls, entries) in enumerate(((TorchRows, TorchEntries), (TritonRows, TritonEntries))):
        for owner, name in ((cls, "policy"), (cls, "statistics"), (entries, "consume")):
            record(owner, name, lambda batch, *_, number=number, **__: (number, batch.rows.shape[1]))
    record(TritonRows, "invariant", lambda: (1, -1))
    return seen


def seen_of(options, swept, compiled):
    """Return everything that can be seen of a call, as tensors by name."""
    swept.clear()
    dtype = torch.bfloat16 if "logits_dtype" in options else torch.float32
    leaves = [x.to(dtype).clone().requires_grad_() for x in (MADE.hidden, MADE.weight, MADE.bias)]
    options = {name: value.clone() if torch.is_tensor(value) else value for name, value in options.items()}

    def step(hidden, weight, bias, options):
        out = dk.linear_policy_loss(hidden, weight, TARGETS, OLD, MADE.advantages, MADE.mask, bias=bias, **options)
        return out.loss.sum() * UPSTREAM, out

    if compiled:
        torch.compiler.reset()
        step = torch.compile(step, fullgraph=True, backend="eager")
    total, out = step(*leaves, options)
    total.backward()
    seen = {"main_grad": options.get("main_grad", torch.zeros(())), "swept": torch.tensor(swept).reshape(-1)}
    seen |= {f"gradient {place}": leaf.grad for place, leaf in enumerate(leaves) if leaf.grad is not None}
    return seen | out._asdict() | out.metrics


def difference(seen, other):
    """Return the largest relative difference of anything that can be seen of two calls."""
    if seen.keys() != other.keys():
        return math.inf
    pairs = [(seen[name], other[name]) for name in seen if name != "metrics"]
    if any(a.shape != b.shape or a.isnan().ne(b.isnan()).any() for a, b in pairs):
        return math.inf
    return max(relative(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


@pytest.mark.parametrize("name", CASES)
def test_no_option_is_lost_on_the_way_into_a_graph(name, swept):
    options = {"validate": False} | CASES[name]
    seen = seen_of(options, swept, compiled=False)
    for field in options:
        fewer = {other: value for other, value in options.items() if other != field}
        try:
            change = difference(seen_of(fewer, swept, compiled=False), seen)
        except (ValueError, RuntimeError):  # the other options need the one that is left out
            continue
        assert change > DIFFERENT, f"{field} changes nothing that this test sees"
    assert difference(seen_of(options, swept, compiled=True), seen) <= SAME


def test_a_shard_is_refused():
    shard = VocabShard(None, (VOCAB,))

    @torch.compile(fullgraph=True, backend="eager")
    def step(hidden, weight):
        return dk.linear_policy_loss(hidden, weight, TARGETS, OLD, MADE.advantages, vocab_shard=shard).loss

    with pytest.raises(Exception, match="vocab_shard"):
        step(MADE.hidden.clone().requires_grad_(), MADE.weight)


def test_every_option_is_in_a_case():
    assert {field.name for field in dataclasses.fields(PolicyOptions)} == OPTIONS
    assert {field.name for field in dataclasses.fields(LogprobOptions)} <= OPTIONS


def test_every_field_of_what_a_call_becomes_differs_in_a_case(swept, monkeypatch):
    specs, original = [], inputs.Problem.spec

    def kept(self, *arguments, **keywords):
        specs.append(original(self, *arguments, **keywords))
        return specs[-1]

    monkeypatch.setattr(inputs.Problem, "spec", kept)

    def fields(options):
        specs.clear()
        seen_of({"validate": False} | options, swept, compiled=False)
        parts = [part for spec in specs for part in (spec, spec.transform, spec.execution, spec.terms) if part]
        return {(type(part), name, getattr(part, name)) for part in parts for name in part.__dataclass_fields__}

    plain = fields({})
    differ = {(cls, name) for options in CASES.values() for cls, name, _ in fields(options) - plain}
    every = {(cls, field.name) for cls in (Spec, Transform, Execution, Terms) for field in dataclasses.fields(cls)}
    assert every - differ == {(Execution, "vocab_shard")}
