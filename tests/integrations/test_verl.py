"""Tests of our losses in the real verl, which `make verl-env` installs apart from everything else."""

import math

import pytest
import torch

import drpo_kernels
from verl_calls import BATCH, DELTA, GLOBAL, LENGTH, LOSS_BOUND, MODES, actor_config, batch, call, expected, relative

every_loss = pytest.mark.parametrize("name", ["drpo", "spo"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@every_dtype
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("mode", MODES)
@every_loss
def test_loss_and_gradient_are_the_formulas(verl, name, mode, weighted, info, dtype):
    data = batch(dtype)
    loss, gradient, _ = call(verl, name, data, actor_config(verl, name, mode, info), weighted)
    reference, reference_gradient, scale = expected(name, data, mode, info, weighted)
    assert loss.dtype == dtype
    assert abs(loss - reference) <= LOSS_BOUND[dtype] * scale
    assert relative(gradient, reference_gradient) <= LOSS_BOUND[dtype]
    assert gradient[0, 0] == 0 and (gradient[~data["response_mask"]] == 0).all()


@every_loss
def test_what_is_masked_does_not_matter(verl, name):
    batches = (batch(torch.float32, poison=poison) for poison in (0.5, math.nan))
    results = [call(verl, name, data, actor_config(verl, name)) for data in batches]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


@every_loss
def test_on_policy_gradient_is_verls_vanilla(verl, name):
    """At r = 1 both penalties have no slope and no ratio is clipped, so the gradient is -A, bit for bit."""
    data = batch(torch.float32, poison=0.0)
    data["log_prob"] = data["old_log_prob"]
    _, gradient, _ = call(verl, name, data, actor_config(verl, name))
    _, vanilla, _ = call(verl, "vanilla", data, actor_config(verl, "vanilla"))
    assert gradient.abs().sum() > 0 and torch.equal(gradient, vanilla)


@every_loss
@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_add_up_to_the_batch(verl, name, mode):
    """Micro-batches add up with the global normalisers, which no micro-batch can know. Each sum rounds as above."""
    data = batch(torch.float32)
    config = actor_config(verl, name, mode, {**GLOBAL, "dp_size": 1})
    whole, gradient, _ = call(verl, name, data, config)
    halves = ({key: x[rows] for key, x in data.items()} for rows in (slice(0, 2), slice(2, None)))
    parts = [call(verl, name, half, config) for half in halves]
    _, _, scale = expected(name, data, mode, {**GLOBAL, "dp_size": 1})
    assert abs(whole - sum(part[0] for part in parts)) <= LOSS_BOUND[torch.float32] * scale
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=1e-6, atol=0)


def test_metrics(verl):
    data = batch(torch.float32)
    mask, config = data["response_mask"], actor_config(verl)
    _, _, metrics = call(verl, "drpo", data, config)
    logp, old, adv = (data[key][mask].double() for key in ("log_prob", "old_log_prob", "advantages"))
    ratio, shift = (logp - old).clamp(-20, 20).exp(), logp.exp() - old.exp()
    weight = (1 - adv.sign() * shift / DELTA)[adv != 0]
    beyond = (adv * (logp - old) > 0) & (shift.abs() >= DELTA)
    _, _, vanilla = call(verl, "vanilla", batch(torch.float32, poison=0.0), config)
    reference = {
        "actor/ppo_kl": vanilla["actor/ppo_kl"],
        "actor/pg_clipfrac": beyond.double().mean(),
        "drpo/beyond_trust_region": beyond.sum() / (adv != 0).sum(),
        "drpo/ratio_mean": ratio.mean(),
        "drpo/ratio_max": ratio.max(),
        "drpo/weight_mean": weight[1:].sum() / len(weight),  # the clamped token's weight is 0
        "drpo/prob_shift_max": shift.abs().max(),
        "drpo/unscorable": 0,
    }
    assert 0 < reference["actor/pg_clipfrac"] < 1
    assert all(type(value) is float for value in metrics.values())
    assert "drpo/entropy_mean" not in metrics  # verl reports its own entropy
    for key, value in reference.items():
        # These are fp32 means of a few dozen tokens, as above.
        assert metrics[key] == pytest.approx(float(value), rel=1e-5, abs=1e-6), key


def test_reads_the_device_once(verl, monkeypatch):
    def forbidden(self):
        raise AssertionError("a synchronisation per value")

    data, config = batch(torch.float32), actor_config(verl)
    monkeypatch.setattr(torch.Tensor, "item", forbidden)
    verl.core.get_policy_loss_fn("drpo")(config=config, **data)


@every_loss
def test_unscorable_tokens_are_masked(verl, name):
    """vLLM gives NaN for a token it could not score. The token counts as masked, in the mode's own normaliser too."""
    data = batch(torch.float32)
    data["old_log_prob"][4, 2] = math.nan
    result = call(verl, name, data, actor_config(verl, name))
    masked = dict(data, response_mask=data["response_mask"].clone())
    masked["response_mask"][4, 2] = False
    reference = call(verl, name, masked, actor_config(verl, name))
    assert torch.equal(result[0], reference[0]) and torch.equal(result[1], reference[1])
    assert result[2]["drpo/unscorable"] == 1 and reference[2]["drpo/unscorable"] == 0


def test_without_gradients_and_in_half_precision(verl):
    data, config = batch(torch.bfloat16), actor_config(verl)
    with torch.no_grad():
        loss, metrics = verl.core.get_policy_loss_fn("drpo")(config=config, **data)
    assert loss.dtype == torch.float32 and math.isfinite(loss) and metrics["drpo/weight_min"] < 0
    widened = {key: x.float() if x.is_floating_point() else x for key, x in data.items()}
    assert torch.equal(loss, call(verl, "drpo", widened, config)[0])


def test_hyper_parameters(verl):
    data = batch(torch.float32)
    plain = verl.config.FSDPActorConfig(
        rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=verl.config.PolicyLossConfig(loss_mode="drpo")
    )
    paper = actor_config(verl, drpo_delta=12.5)
    assert torch.equal(call(verl, "drpo", data, plain)[0], call(verl, "drpo", data, paper)[0])
    assert not torch.equal(call(verl, "drpo", data, paper)[0], call(verl, "drpo", data, actor_config(verl))[0])
    with pytest.raises(ValueError, match="delta must be positive and finite, got -1"):
        actor_config(verl, drpo_delta=-1.0)
    with pytest.raises(TypeError, match="epsilon must be a number, got 'large'"):
        actor_config(verl, spo_epsilon="large")
    with pytest.raises(TypeError, match="config must be verl's ActorConfig, got None"):
        verl.core.get_policy_loss_fn("drpo")(**data)


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "token-mean"])
def test_gspo_is_verls_with_token_level(verl, mode):
    """Advantages and weights differ within a sequence, so that our two forms have the same loss and different
    gradients.
    """
    data = batch(torch.float64, poison=-1.0)
    data["log_prob"][0, 0] = data["old_log_prob"][0, 0] - 0.1  # verl does not clamp the log-ratio of one token
    config = actor_config(verl, "gspo", mode)
    loss, gradient, metrics = call(verl, "gspo", data, config)
    assert 0 < metrics["actor/pg_clipfrac"] < 1
    leaf = data["log_prob"].clone().requires_grad_()
    logits = torch.stack([leaf, torch.log1p(-leaf.exp())], -1)  # log π of the first of two tokens is the leaf
    for token_level in (True, False):
        objective = drpo_kernels.GSPO(config.clip_ratio_low, config.clip_ratio_high, token_level=token_level)
        out = drpo_kernels.policy_loss(
            logits, torch.zeros_like(leaf, dtype=torch.long), data["old_log_prob"], data["advantages"],
            data["response_mask"], token_weights=data["rollout_is_weights"], objective=objective, reduction=mode,
        )  # fmt: skip
        (ours,) = torch.autograd.grad(out.loss, leaf, retain_graph=True)
        assert out.loss.item() == pytest.approx(loss.item(), rel=LOSS_BOUND[torch.float64])
        assert (relative(ours, gradient) <= LOSS_BOUND[torch.float64]) == token_level


def test_a_loss_of_verls_own_is_left_in_place(verl, monkeypatch):
    theirs, registry = object(), verl.core.POLICY_LOSS_REGISTRY
    monkeypatch.setitem(registry, "spo", theirs)
    monkeypatch.delitem(registry, "drpo")
    with pytest.warns(UserWarning, match="verl has a policy loss 'spo' already"):
        verl.ours._register()
    assert registry["spo"] is theirs and "drpo" in registry


def test_inside_verls_ppo_loss(verl):
    """verl's actor calls the loss like this: with unpadded log-probs, the normalisers put into the config, and one
    Metric per value.
    """
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    data = batch(torch.float32)
    lengths = data["response_mask"].sum(1)
    keep = lengths > 0  # verl does not pad responses of length 0
    prompt = 2

    def nested(values, front=0):
        rows = [torch.cat([torch.zeros(front), row[:n]]) for row, n in zip(values[keep], lengths[keep], strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    names = {"old_log_probs": "old_log_prob", "advantages": "advantages", "rollout_is_weights": "rollout_is_weights"}
    fields = {name: nested(data[source]) for name, source in names.items()}
    ones = torch.ones(BATCH, LENGTH)
    fields |= {"responses": nested(ones), "response_mask": nested(ones), "prompts": nested(ones[:, :0], prompt)}
    tensors = TensorDict(fields, batch_size=int(keep.sum()))
    info = {**GLOBAL, "dp_size": 2}
    for key in ("dp_size", "batch_num_tokens", "global_batch_size"):
        tensordict_utils.assign_non_tensor_data(tensors, key, info[key])
    config = actor_config(verl, "drpo", "seq-mean-token-sum-norm", {"loss_scale_factor": info["loss_scale_factor"]})
    # Position t predicts the token at t + 1, so responses begin one position earlier.
    leaf = data["log_prob"].clone().requires_grad_()
    rows = [torch.cat([torch.zeros(prompt - 1), leaf[i][: lengths[i]], torch.zeros(1)]) for i in keep.nonzero()[:, 0]]
    log_probs = torch.nested.nested_tensor_from_jagged(torch.cat(rows), torch.tensor([0, *map(len, rows)]).cumsum(0))
    loss, metrics = verl.losses.ppo_loss(config, {"log_probs": log_probs}, tensors)
    loss.backward()
    reference, gradient, scale = expected("drpo", data, config.loss_agg_mode, info)
    assert abs(loss.detach() - reference) <= LOSS_BOUND[torch.float32] * scale
    assert relative(torch.where(data["response_mask"], leaf.grad, 0), gradient) <= LOSS_BOUND[torch.float32]
    assert metrics["drpo/weight_mean"].aggregate() > 0
