"""Each condition gives exactly its sentence, from the metrics of a real call that shows it; a healthy run none."""

import math

import pytest
import torch

import drpo_kernels as dk
import problems
from drpo_kernels.diagnosis import CONDITIONS, diagnose
from drpo_kernels.distributed import reduce_metrics

ROWS, LENGTH, VOCAB = 16, 32, 64


def batch(seed=0, temperature=1.0, spread=3.0):
    """512 tokens sampled from the policy itself at `temperature`: (logits, targets, old_logprobs, advantages)."""
    g = problems.generator(seed)
    logits = spread * torch.randn(ROWS, LENGTH, VOCAB, generator=g)
    logp = torch.log_softmax(logits / temperature, -1)
    targets = torch.multinomial(logp.exp().view(-1, VOCAB), 1, generator=g).view(ROWS, LENGTH)
    old = logp.gather(-1, targets[..., None])[..., 0]
    noise = 0.02 * torch.randn(old.shape, generator=g)
    return logits, targets, (old + noise).clamp(max=0), torch.randn(ROWS, LENGTH, generator=g)


def said(logits, targets, old, advantages, mask=None, **options):
    out = dk.policy_loss(logits, targets, old, advantages, mask, **options)
    return diagnose(out.metrics, loss=out.loss)


def test_a_healthy_batch_says_nothing():
    out = dk.policy_loss(*batch(), objective=dk.DRPO(0.2))
    assert diagnose(out.metrics, objective=dk.DRPO(0.2), loss=out.loss) == []
    assert diagnose(reduce_metrics([out.metrics, out.metrics])) == []
    assert diagnose({name: value.item() for name, value in out.metrics.items()}) == []


def test_an_on_policy_batch_says_nothing():
    logits, targets, _, advantages = batch()
    assert said(logits, targets, None, advantages) == []


def test_temperature():
    (sentence,) = said(*batch(temperature=0.5))
    assert all(word in sentence for word in ("mean log-ratio", "temperature", "top-p or top-k", "misaligned", "512"))


def test_targets_not_shifted():
    logits, targets, old, advantages = batch(spread=6.0)
    (sentence,) = said(logits, targets.roll(1, -1), old, advantages)
    assert "not aligned" in sentence and "hidden[i] must predict targets[i]" in sentence


def test_all_advantages_zero():
    logits, targets, old, _ = batch()
    for compact in ("active", "mask"):
        (sentence,) = said(logits, targets, old, torch.zeros(ROWS), compact=compact)
        assert sentence.startswith("All advantages are 0 on the 512 valid tokens")


def test_empty_mask():
    (sentence,) = said(*batch(), torch.zeros(ROWS, LENGTH))
    assert sentence.startswith("The mask is empty")


def test_old_logprobs_missing():
    logits, targets, old, advantages = batch()
    (sentence,) = said(logits, targets, torch.full_like(old, math.nan), advantages)
    assert sentence.startswith("None of the 512 tokens in the mask has an old log-prob")
    old[:, ::4] = -math.inf
    (sentence,) = said(logits, targets, old, advantages)
    assert sentence.startswith("128 tokens in the mask have no old log-prob (NaN, -inf, or -100 and below), beside 384")


@pytest.mark.parametrize("change", [torch.exp, torch.neg], ids=["probabilities", "negated"])
def test_positive_old_logprobs(change):
    """An error where values are checked; a sentence where they are not, as on a GPU."""
    logits, targets, old, advantages = batch()
    with pytest.raises(ValueError, match="are these probabilities, or negated"):
        said(logits, targets, change(old), advantages)
    (sentence,) = said(logits, targets, change(old), advantages, validate=False)
    assert "are these probabilities, or negated?" in sentence


def test_nan_logits():
    logits, targets, old, advantages = batch()
    logits[0, 0, 0] = math.nan
    (sentence,) = said(logits, targets, old, advantages)
    assert sentence.startswith("1 computed tokens have a log-prob or a slope that is not finite")


def test_normalizer_of_zero():
    """An error where values are checked; a sentence where they are not."""
    with pytest.raises(ValueError, match=r"normalizer must be positive and finite, got 0\.0: a batch without a"):
        said(*batch(), normalizer=torch.tensor(0.0))
    (sentence,) = said(*batch(), normalizer=torch.tensor(0.0), validate=False)
    assert "normalizer is probably 0" in sentence


def test_ratio_explosion():
    logits, targets, old, advantages = batch(spread=1.0)
    old[3, 3] = -40.0
    (sentence,) = said(logits, targets, old, advantages)
    assert sentence.startswith("The largest ratio")


def test_entropy_collapse():
    (sentence,) = said(*batch(spread=2000.0))
    assert "policy has collapsed" in sentence


def test_boundary_never_active():
    """Informational, with the objective at hand, once."""
    metrics, seen = dk.policy_loss(*batch()).metrics, set()
    (sentence,) = diagnose(metrics, objective=dk.DRPO(), seen=seen)
    assert "never active" in sentence and "δ = 12.5" in sentence
    assert diagnose(metrics, objective=dk.DRPO(), seen=seen) == []


def test_each_thing_once():
    logits, targets, old, advantages = batch(temperature=0.5)
    seen = set()
    metrics = dk.policy_loss(logits, targets, old, advantages).metrics
    assert len(diagnose(metrics, seen=seen)) == 1
    assert diagnose(metrics, seen=seen) == []
    assert len(diagnose(dk.policy_loss(logits, targets, old, 0 * advantages).metrics, seen=seen)) == 1
    assert seen == {"mismatch", "no advantage"}


def test_conditions_have_different_names():
    assert len({condition.kind for condition in CONDITIONS}) == len(CONDITIONS)


def test_what_are_not_metrics():
    with pytest.raises(ValueError, match=r"metrics must be out\.metrics"):
        diagnose({"loss": 1.0})


# ---------------------------------------------------------------------------------------------------------------
# messages at the door


class LooksLikeADTensor(torch.Tensor):
    device_mesh = None


@pytest.mark.parametrize("name", ["hidden", "weight", "targets", "old_logprobs"])
def test_distributed_tensors_are_refused_at_the_door(name):
    given = {
        "hidden": torch.ones(2, 3), "weight": torch.ones(4, 3), "targets": torch.zeros(2, dtype=torch.long),
        "old_logprobs": -torch.ones(2), "advantages": torch.ones(2),
    }  # fmt: skip
    given[name] = given[name].as_subclass(LooksLikeADTensor)
    with pytest.raises(TypeError, match=rf"^{name} must be a plain tensor.*add_fused_head.*vocab_shard"):
        dk.linear_policy_loss(**given)


@pytest.mark.parametrize("backend", problems.BACKENDS)
@pytest.mark.parametrize("form", ["linear", "logits"])
@pytest.mark.parametrize("shape", ["sequence", "column", "packed"])
def test_temperature_per_sequence(shape, form, backend, device):
    """As advantages: [B], [B, 1] or one per packed sequence equals the same temperature on each of its tokens."""
    problem = problems.random_problem(4, (3, 2), 5, 11)
    problem = problem if form == "linear" else problem.as_logits()
    heat = torch.tensor([0.6, 1.0, 1.7])
    per_token = heat[:, None].expand(3, 2)
    given = {"sequence": heat, "column": heat[:, None], "packed": heat}[shape]
    want = problems.run(problem.with_options(temperature=per_token), dk.DRPO(), backend, device)
    other = problem.with_options(temperature=None)
    other = problems.packed(other) if shape == "packed" else other
    got = problems.run(other.with_options(temperature=given), dk.DRPO(), backend, device)
    assert torch.equal(got[0].loss, want[0].loss)
    for name, gradient in got[1].items():
        assert torch.equal(gradient.reshape(want[1][name].shape), want[1][name]), name
