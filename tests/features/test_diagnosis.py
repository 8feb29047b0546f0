"""Tests of `diagnose`: a real call that shows a condition gets exactly that condition's
sentence, a healthy run none.
"""

import math
from dataclasses import replace

import pytest
import torch

import drpo_kernels as dk
import problems
from diagnosis_batches import CAUSES, HEALTHY, Batch, engine, heated, raw, scored, unrewarded
from drpo_kernels.diagnosis import CONDITIONS, diagnose
from drpo_kernels.distributed import reduce_metrics

ROWS, LENGTH, VOCAB = 16, 32, 64


def batch(seed=0, temperature=1.0, spread=3.0):
    """Return (logits, targets, old_logprobs, advantages) of 512 tokens that the policy sampled at `temperature`."""
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


def metrics_of(batch: Batch, form="logits", **options):
    """Return `out.metrics` of a call on all tokens of the batch, whose shape is [N]."""
    first = (batch.hidden, batch.head) if form == "linear" else (batch.logits,)
    call = dk.linear_policy_loss if form == "linear" else dk.policy_loss
    options = {"temperature": batch.temperature, "validate": False, "compact": "mask", **options}
    return call(*first, batch.targets, batch.old_logprobs, batch.advantages, **options).metrics


def found_in(batch: Batch, **options) -> list[str]:
    return diagnose(metrics_of(batch, **options))


def parts(batch: Batch, tokens: int) -> list[Batch]:
    """Cut the batch into batches of `tokens` tokens each."""
    cut = [x.split(tokens) for x in (batch.hidden, batch.targets, batch.old_logprobs, batch.advantages)]
    return [
        replace(batch, hidden=hidden, targets=targets, old_logprobs=old, advantages=advantages)
        for hidden, targets, old, advantages in zip(*cut, strict=True)
    ]


ENTROPIES = [(300, 0.3), (300, 1.4)]


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_comes_first(name):
    """From 256 tokens on, the first sentence names the cause, at entropies below and above one nat. With 64 tokens it
    does so too, or nothing is said.
    """
    phrase, make = CAUSES[name]
    for seed, (vocab, entropy) in enumerate(ENTROPIES):
        for tokens in (64, 256, 1024)[: 2 + seed]:
            said = found_in(make(seed, tokens, vocab, entropy))
            assert (said or tokens == 64) and all(phrase in sentence for sentence in said[:1]), (tokens, entropy, said)


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_mismatch_says_nothing(name):
    """A real engine differs from its trainer by this much, for almost certain to flat policies and for a vocabulary of
    five.
    """
    for seed, (vocab, entropy) in enumerate([(300, 0.05), (300, 0.3), (300, 1.4), (1500, 4.0), (5, 0.3), (49, 3.5)]):
        for tokens in (64, 256, 1024):
            assert found_in(HEALTHY[name](seed, tokens, vocab, entropy)) == [], (tokens, vocab, entropy)


@pytest.mark.parametrize("temperature", [0.6, 0.8, 1.3])
@pytest.mark.parametrize("tokens", [256, 2048])
def test_the_temperature_is_estimated(tokens, temperature):
    """The error of the estimate is of second order in the temperature's logarithm, and stays within 15 %."""
    (sentence,) = found_in(heated(temperature)(0, tokens, 300, 0.6))
    estimate = float(sentence.split("about ")[1].split(" times")[0])
    assert estimate == pytest.approx(temperature, rel=0.15)


@pytest.mark.parametrize("backend", problems.BACKENDS)
@pytest.mark.parametrize(
    ("name", "form"), [("one early", "linear"), ("temperature 0.6", "logits"), ("softmax", "logits")]
)
def test_through_every_backend_and_layout(name, form, backend, device):
    """Tokens are [B, L] with padding on both sides, sequences of A = 0 are left out, and two micro-batches are
    combined.
    """
    phrase, make = CAUSES[name]
    batch = make(3, 160, 64, 1.0)
    sequences = len(batch.targets) // 16
    advantages = batch.advantages.view(sequences, 16).clone()
    advantages[::4] = 0
    mask = torch.zeros(sequences, 20)
    mask[:, 2:18] = 1

    def padded(values, fill):
        out = torch.full((sequences, 20, *values.shape[1:]), fill, dtype=values.dtype)
        out[:, 2:18] = values.view(sequences, 16, *values.shape[1:])
        return out.to(device)

    first = padded(batch.hidden if form == "linear" else batch.logits, math.nan)
    rest = [padded(batch.targets, 3), padded(batch.old_logprobs, -1.0), padded(advantages.view(-1), 7.0)]
    metrics = []
    for half in torch.arange(sequences).split(sequences // 2):
        tensors = [x[half] for x in (*rest, mask.to(device))]
        if form == "linear":
            out = dk.linear_policy_loss(first[half], batch.head.to(device), *tensors, backend=backend)
        else:
            out = dk.policy_loss(first[half], *tensors, backend=backend)
        metrics.append(out.metrics)
    assert 0 < out.computed.sum() < mask[half].sum()
    sentence = diagnose(reduce_metrics(metrics))[0]
    assert phrase in sentence and "tokens only" in sentence


def test_what_few_tokens_say_is_qualified():
    few, many = (found_in(heated(0.6)(0, tokens, 300, 1.4))[0] for tokens in (64, 256))
    assert few.endswith("(From 64 tokens only: see whether it stays.)")
    assert "only" not in many


@pytest.mark.parametrize("temperature", [0.7, 1.3, 1.5])
@pytest.mark.parametrize("tokens", [256, 1024])
def test_the_log_probs_before_a_temperature_are_told_from_those_after(tokens, temperature):
    """The two are told apart by whether the tokens follow the trainer's temperature or the engine's."""
    (before,), (after,) = (found_in(made(temperature)(0, tokens, 300, 1.4)) for made in (raw, heated))
    assert "ask for processed ones" in before and "the engine sampled at about" in after


@pytest.mark.parametrize(
    ("temperature", "phrases"),
    [(0.6, ("a lower temperature", "pass kept_ids= with")), (1.3, ("a higher temperature", "processed_logprobs"))],
)
def test_tokens_of_another_temperature_than_their_log_probs(temperature, phrases):
    drawn, _ = engine(0, 1024, 300, 1.4, temperature=temperature)
    (sentence,) = found_in(replace(drawn, old_logprobs=scored(drawn)))
    assert all(phrase in sentence for phrase in phrases)


def test_steps_on_answers_of_which_none_was_good_are_no_filter():
    """After such steps every sampled token is a little less likely than before, which is no sign of top-k or top-p."""
    assert found_in(unrewarded(0, 256, 300, 0.3)) == []


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_a_handful_of_tokens_says_nothing(tokens):
    """Each of 64 small batches shows the mismatch of an fp8 engine, but the spread of so few tokens does not measure
    chance.
    """
    metrics = [metrics_of(part) for part in parts(HEALTHY["fp8 engine"](0, 64 * tokens, 300, 4.0), tokens)]
    assert [said for m in metrics for said in diagnose(m)] == []


def test_a_log_ratio_that_does_not_vary():
    """Rows are uniform over 8 or 4 tokens, of which the engine kept half. The log-ratio has no spread, and yet it is
    not due to chance.
    """
    four = torch.arange(256) % 3 % 2
    hidden = torch.stack([1.0 - four, four.float()], -1)
    head = torch.stack([torch.zeros(8), -1e4 * (torch.arange(8) >= 4).float()], -1)
    old = -torch.where(four > 0, 2.0, 4.0).log()
    (sentence,) = found_in(Batch(hidden, head, torch.arange(256) % 2, old, torch.ones(256), 16))
    assert "after top-p, top-k or min-p filtering" in sentence


def test_a_waste_does_not_hide_an_error():
    both = replace(heated(0.6)(0, 256, 300, 1.4), squash=lambda z: z.log_softmax(-1))
    first, second = found_in(both)
    assert "Temperatures differ" in first and "log-probs already" in second


def test_a_prompt_in_the_mask_on_policy():
    made = CAUSES["zeros on a prompt"][1](0, 512, 300, 1.4)
    (sentence,) = found_in(replace(made, old_logprobs=None))
    assert "the mask covers tokens that nobody sampled" in sentence


@pytest.mark.parametrize("name", ["temperature 0.5", "targets one late"])
def test_metrics_without_evidence(name):
    """Metrics of an old log have no evidence, and give one sentence that names every cause."""
    metrics = metrics_of(CAUSES[name][1](0, 512, 300, 4.0))
    (sentence,) = diagnose({key: value for key, value in metrics.items() if "evidence" not in key})
    assert "misaligned" in sentence or "not aligned" in sentence


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
    """Positive log-probs are an error where values are checked, and a sentence where they are not, as on a GPU."""
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
    """A normalizer of 0 is an error where values are checked, and a sentence where they are not."""
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
    """The sentence is informational, names the objective, and is said once."""
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
    assert seen == {"temperature", "no advantage"}


def test_conditions_have_different_names():
    assert len({condition.kind for condition in CONDITIONS}) == len(CONDITIONS)


def test_what_are_not_metrics():
    with pytest.raises(ValueError, match=r"metrics must be out\.metrics"):
        diagnose({"loss": 1.0})


# ---------------------------------------------------------------------------------------------------------------
# messages of the input checks


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
    """A temperature of shape [B], [B, 1] or one per packed sequence equals the same temperature
    on each of its tokens.
    """
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


def test_log_probs_over_more_than_the_kept_ids():
    """The policy is over the ids that top-k kept. `diagnose` names old log-probs from before top-k, and accepts those
    from after it.
    """
    logits, _, _, advantages = batch(spread=1.5)
    ids = logits.topk(8).indices
    kept = logits.gather(-1, ids).log_softmax(-1)
    at = torch.multinomial(kept.exp().view(-1, 8), 1, generator=problems.generator(1)).view(ROWS, LENGTH, 1)
    targets, options = ids.gather(-1, at)[..., 0], {"kept_ids": ids}
    whole = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    (sentence,) = said(logits, targets, whole, advantages, **options)
    assert "they are over the whole vocabulary" in sentence
    assert said(logits, targets, kept.gather(-1, at)[..., 0], advantages, **options) == []


def test_zeros_are_placeholders_whatever_the_targets():
    logits, targets, old, advantages = batch()
    (sentence,) = said(logits, targets.roll(1, 1), torch.zeros_like(old), advantages)
    assert "these are placeholders" in sentence


@pytest.mark.parametrize("wrong", [None, [], "metrics", {}, {"drpo/kl_k1": 0.0}])
def test_what_is_not_metrics(wrong):
    with pytest.raises((TypeError, ValueError), match=r"metrics must be out\.metrics"):
        diagnose(wrong)
    with pytest.raises((TypeError, ValueError), match=r"metrics must be out\.metrics"):
        diagnose(dk.policy_loss(*batch()))
