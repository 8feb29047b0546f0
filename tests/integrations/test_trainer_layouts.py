"""The snippets of docs/integrations run on each trainer's own layout and are compared with float64.

trainer_ways.py holds the ways from a rollout to the loss; rollouts.py says what is expected of them, and how far off
they may be.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import trainer_names
import trainer_ways as ways
from rollouts import DELTA, ELSEWHERE, GRADIENT_BOUND, LOSS_BOUND, Rollout, assert_agrees, expected, make_rollout
from trainer_ways import PAGES, TRAINERS, WAYS, page_snippets

every_way = pytest.mark.parametrize("name", WAYS)
every_fused_way = pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.fused])


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    trainer_names.stand_in(monkeypatch)


@every_way
def test_loss_and_gradients(name):
    way = WAYS[name]
    rollout = way.rollout()
    assert_agrees(rollout, way.run(rollout), way.coefficient(rollout), way.kl_coef)


@every_fused_way
def test_bf16(name):
    """The trainers train in this dtype: hidden states and head are bf16, and log-probs are float32."""
    way = WAYS[name]
    rollout = way.rollout(torch.bfloat16)
    loss = way.run(rollout)
    assert loss.dtype == torch.float32
    assert_agrees(rollout, loss, way.coefficient(rollout), way.kl_coef)


@every_way
def test_nothing_crosses_a_boundary(name):
    """A sequence's gradient has the same bits whatever the other sequences of the batch contain."""
    way = WAYS[name]
    rollout, other = way.rollout(), way.rollout(seed=1)
    for kept, sequence in enumerate(rollout.sequences):
        sequences = [*other.sequences[:kept], sequence, *other.sequences[kept + 1 :]]
        losses = [way.run(x) for x in (rollout, Rollout(sequences, rollout.weight))]
        assert losses[0] != losses[1]
        alone, beside = (torch.autograd.grad(loss, sequence.hidden)[0] for loss in losses)
        assert torch.equal(alone, beside)


@every_way
def test_micro_batches_add_up(name):
    """With the caller's global count, the micro-batches sum to the loss of the whole batch."""
    way = WAYS[name]
    whole = way.rollout()
    want_loss, want, scale = expected(whole, way.coefficient(whole), way.kl_coef)
    loss, gradients = 0.0, [torch.zeros_like(leaf) for leaf in whole.leaves]
    for part in (slice(0, 2), slice(2, 4)):
        micro = Rollout(whole.sequences[part], whole.weight)
        first = micro.sequences[0]
        micro_loss = way.run(micro) * (way.coefficient(whole)(first, 1) / way.coefficient(micro)(first, 1))
        loss += micro_loss.item()
        found = torch.autograd.grad(micro_loss, whole.leaves, allow_unused=True)
        gradients = [total if new is None else total + new for total, new in zip(gradients, found, strict=True)]
    assert abs(loss - want_loss.item()) <= LOSS_BOUND * scale
    assert (gradients[-1].double() - want[-1]).norm() / want[-1].norm() <= GRADIENT_BOUND[torch.float32]


@pytest.mark.parametrize("run", [ways.prime_loss_only, ways.prime_fused_head])
def test_prime_rl_weight_stream(run):
    rollout = WAYS["prime-rl, loss only"].rollout()
    streams = [torch.rand(len(s), generator=torch.Generator().manual_seed(i)) + 0.5
               for i, s in enumerate(rollout.sequences)]  # fmt: skip
    weights = {id(s): stream for s, stream in zip(rollout.sequences, streams, strict=True)}
    count = rollout.count + ELSEWHERE
    assert_agrees(rollout, run(rollout, streams), lambda s, t: weights[id(s)][t].double() / count)


def test_prime_rl_without_a_token_of_the_component():
    rollout = WAYS["prime-rl, loss only"].rollout()
    for s in rollout.sequences:
        s.mask[:] = False
    gradients = torch.autograd.grad(ways.prime_loss_only(rollout), rollout.leaves)
    assert all((g == 0).all() for g in gradients)


def test_openrlhf_per_sample_mean():
    rollout = make_rollout()
    loss = ways.openrlhf_loss_only(rollout, token_level=False, dp_size=2, global_batch_size=torch.tensor(9.0))
    assert_agrees(rollout, loss, lambda s, t: 2 / 9 / s.mask.sum().item())


def test_openrlhf_padded():
    """The page describes the layout without packing, which is tested in both aggregations."""
    from drpo_kernels import DRPO, linear_policy_loss

    rollout = make_rollout()
    experience, sequences = ways.openrlhf_experience(rollout), rollout.layout("tokens")
    A = experience.action_mask.shape[1]
    for reduction, count, coefficient in (
        ("token-sum", rollout.count, lambda s, t: 2 / rollout.count),
        ("seq-mean-token-mean", 9, lambda s, t: 2 / 9 / s.mask.sum().item()),
    ):
        out = linear_policy_loss(
            rollout.layout("hidden")[:, -A - 1 : -1], rollout.weight, sequences[:, -A:], experience.rollout_log_probs,
            experience.advantages, experience.action_mask, objective=DRPO(delta=DELTA), reduction=reduction,
            normalizer=torch.tensor(float(count)) / 2,
        )  # fmt: skip
        assert_agrees(rollout, out.loss, coefficient)


def test_skyrl_under_their_autocast():
    """Float32 hidden states and head hold bf16 values under torch.autocast. The bound is that of bf16."""
    exact = WAYS["SkyRL, fused loss"].rollout(torch.bfloat16)
    sequences = [dataclasses.replace(s, hidden=s.hidden.detach().float().requires_grad_()) for s in exact.sequences]
    rollout = Rollout(sequences, nn.Parameter(exact.weight.detach().float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ways.skyrl_fused(rollout)
    want_loss, want, scale = expected(rollout, ways.by_count(rollout))
    assert abs(loss.item() - want_loss.item()) <= LOSS_BOUND * scale
    gradients = torch.autograd.grad(loss, rollout.leaves)
    for got, true in ((torch.cat(gradients[:-1]), torch.cat(want[:-1])), (gradients[-1], want[-1])):
        assert (got.double() - true).norm() / true.norm() <= GRADIENT_BOUND[torch.bfloat16]


def test_slime_from_logits():
    """For logits that exist anyway, the page says to call `policy_loss` with the same arguments."""
    rollout = WAYS["slime, fused loss"].rollout()
    source = page_snippets("slime")[1].replace("linear_policy_loss", "policy_loss")
    source = source.replace("hidden.to(head.weight.dtype), head.weight", "hidden")
    namespace = {}
    exec(source, namespace)
    batch, logits = ways.slime_batch(rollout), rollout.packed("hidden", padding=3) @ rollout.weight.T
    loss, _ = namespace["fused_drpo_loss"](ways.slime_args(rollout), batch, logits, ways.slime_reducer(batch))
    assert_agrees(rollout, loss, ways.slime_coefficient(rollout))


@pytest.mark.parametrize("name", ["open-instruct, loss only", "open-instruct, fused loss"])
def test_open_instruct_unscored_tokens(name):
    """vLLM gave NaN for a response token. The token leaves the loss, and the denominator stays the caller's."""
    way = WAYS[name]
    rollout = way.rollout()
    for s in rollout.sequences[1:]:
        s.old[-1] = torch.nan
    want_loss, want, scale = expected(rollout, way.coefficient(rollout), way.kl_coef)
    loss = way.run(rollout)
    assert abs(loss.item() - want_loss.item()) <= LOSS_BOUND * scale
    for got, exact in zip(torch.autograd.grad(loss, rollout.leaves), want, strict=True):
        assert (got.double() - exact).norm() <= GRADIENT_BOUND[torch.float32] * exact.norm()


@pytest.mark.parametrize("page", TRAINERS)
def test_page(page):
    """Snippets are short, and the page names the commit that it was written against."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    assert re.search(r"^Written against `[\w.-]+/[\w.-]+` at `[0-9a-f]{8,9}` \(\d{4}-\d\d-\d\d\)", text, re.MULTILINE)
    for snippet in page_snippets(page):
        lines = [line for line in snippet.splitlines() if line.strip()]
        imports = [line for line in lines if line.startswith(("import", "from"))]
        assert 5 <= len(lines) <= 15 + len(imports)


def test_every_snippet_is_run():
    """A snippet added to a page without a runner here would go untested."""
    source = Path(ways.__file__).read_text(encoding="utf-8")
    for page in TRAINERS:
        for index in range(len(page_snippets(page))):
            assert re.search(rf'run_snippet\(\s*"{page}", {index}\b', source), f"{page}.md, snippet {index + 1}"


def test_index_names_every_page():
    text = (PAGES / "README.md").read_text(encoding="utf-8")
    assert all(f"({page}.md)" in text for page in (*TRAINERS, "trl", "verl", "transformers"))
