"""The verl integration against the real verl, which `make verl-env` installs apart from everything else."""

import __future__

import ast
import importlib.util
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import drpo_kernels
from drpo_kernels.distributed import VocabShard
from snippets import ROOT, run, snippet

ENVIRONMENTS = (Path(sys.prefix) / "verl", ROOT / ".venv" / "verl")
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
GLOBAL = {"dp_size": 4, "batch_num_tokens": 57, "global_batch_size": 12, "loss_scale_factor": 31}
DELTA, EPSILON = 0.2, 0.3
BATCH, LENGTH = 6, 9
every_loss = pytest.mark.parametrize("name", ["drpo", "spo"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])

# fp32: Δ of |Δ| < 4 rounds by 2^-23 and so do exp, expm1, the handful of products and the sum of at most 54 tokens,
# of which no term is amplified (the scale below is that of the terms): 40 roundings of 2^-24 are 2.4e-6.
# fp64: verl divides "seq-mean-token-mean" by length + 1e-8.
LOSS_BOUND = {torch.float32: 2.4e-6, torch.float64: 1.1e-8}


@pytest.fixture(scope="module")
def verl():
    """verl's modules and ours, once verl can be imported; otherwise the reason why not."""
    environment = next((path for path in ENVIRONMENTS if (path / "verl" / "__init__.py").exists()), None)
    if environment is None and importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed; `make verl-env` installs it beside the virtual environment")
    with pytest.MonkeyPatch.context() as patch:
        if environment is not None:
            patch.setattr(sys, "path", [*sys.path, str(environment)])
        try:
            from verl.trainer.ppo import core_algos
            from verl.utils.experimental import torch_functional
            from verl.utils.kernel import linear_cross_entropy as kernel
            from verl.workers import config
            from verl.workers.utils import losses
        except ImportError as error:
            pytest.skip(f"verl cannot be imported here: {error}")
        from drpo_kernels.integrations import verl as ours

        yield types.SimpleNamespace(
            core=core_algos, torch_head=torch_functional, kernel=kernel, config=config, losses=losses, ours=ours,
            environment=environment,
        )  # fmt: skip


@pytest.fixture
def restored_head(verl):
    yield
    verl.ours.use_verl_head()


def actor_config(verl, name="drpo", mode="token-mean", info=None, **policy_loss):
    settings = {"drpo_delta": DELTA, "spo_epsilon": EPSILON, **policy_loss}
    return verl.config.FSDPActorConfig(
        rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode, global_batch_info=dict(info or {}),
        loss_scale_factor=(info or {}).get("loss_scale_factor"),
        policy_loss=verl.ours.DRPOPolicyLossConfig(loss_mode=name, **settings),
    )  # fmt: skip


def batch(dtype, *, seed=0, poison=math.nan):
    """[B, L] tensors as verl pads them: lengths 0 to L, `poison` behind each response, both signs and zeros of A."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(BATCH, LENGTH, generator=generator, dtype=torch.float64)

    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 5, 0, 1, 7, 4])[:, None]
    old = -normal().abs()
    log_prob = (old + 0.7 * normal()).clamp(max=-1e-3)
    log_prob[0, 0], old[0, 0] = -30.0, -2.0  # beyond the clamp of the log-ratio: no gradient
    advantages = normal()
    advantages[1] = 0
    weights = normal().exp()
    tensors = {"old_log_prob": old, "log_prob": log_prob, "advantages": advantages, "rollout_is_weights": weights}
    return {name: torch.where(mask, x, poison).to(dtype) for name, x in tensors.items()} | {"response_mask": mask}


def call(verl, name, data, config, weighted=True):
    """-> (loss, gradient of log_prob, metrics) by the function that verl finds under the name."""
    data = dict(data, log_prob=data["log_prob"].clone().requires_grad_())
    if not weighted:
        data["rollout_is_weights"] = None
    loss, metrics = verl.core.get_policy_loss_fn(name)(loss_agg_mode=config.loss_agg_mode, config=config, **data)
    loss.backward()
    return loss.detach(), data["log_prob"].grad, metrics


def formula(name, logp, old, adv):
    """(r A, penalty) of each token: the loss is penalty - r A."""
    ratio = (logp - old).clamp(-20, 20).exp()
    penalty = adv.abs() * (ratio - 1) ** 2
    return ratio * adv, penalty * old.exp() / (2 * DELTA) if name == "drpo" else penalty / (2 * EPSILON)


def aggregated(mode, rows, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None):
    """The aggregation of a list of per-sequence losses without their padding, as verl documents each mode."""
    sums = torch.stack([row.sum() for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    sequences = global_batch_size or int((lengths > 0).sum())
    if mode == "token-mean":
        return dp_size * sums.sum() / (batch_num_tokens or lengths.sum())
    if mode == "token-sum":
        return dp_size * sums.sum()
    if mode == "seq-mean-token-mean":
        return dp_size * (sums / lengths.clamp(min=1)).sum() / sequences
    horizon = (loss_scale_factor or LENGTH) if mode == "seq-mean-token-sum-norm" else 1
    return dp_size * sums.sum() / sequences / horizon


def expected(name, data, mode, info, weighted=True):
    """-> (loss, gradient, sum of the absolute terms) in float64, never reading what is masked."""
    mask = data["response_mask"]
    logp = torch.where(mask, data["log_prob"], -1).double().requires_grad_()
    weights = data["rollout_is_weights"].double() if weighted else torch.ones(BATCH, LENGTH, dtype=torch.float64)
    losses, sizes = [], []
    for i in range(BATCH):
        old, adv, weight = (x[i][mask[i]].double() for x in (data["old_log_prob"], data["advantages"], weights))
        gain, penalty = formula(name, logp[i][mask[i]], old, adv)
        losses.append(weight * (penalty - gain))
        sizes.append(weight * (penalty + gain.abs()).detach())
    loss = aggregated(mode, losses, **info)
    loss.backward()
    return loss.detach(), logp.grad, aggregated(mode, sizes, **info)


def relative(x, reference):
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


# ---------------------------------------------------------------------------------------------------------------
# the losses


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
    """At r = 1 both penalties have no slope and no ratio is clipped: -A, bit for bit."""
    data = batch(torch.float32, poison=0.0)
    data["log_prob"] = data["old_log_prob"]
    _, gradient, _ = call(verl, name, data, actor_config(verl, name))
    _, vanilla, _ = call(verl, "vanilla", data, actor_config(verl, "vanilla"))
    assert gradient.abs().sum() > 0 and torch.equal(gradient, vanilla)


@every_loss
@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_add_up_to_the_batch(verl, name, mode):
    """With the global normalisers, which no micro-batch can know. Each sum rounds as above."""
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
    assert "drpo/entropy_mean" not in metrics  # verl reports its own
    for key, value in reference.items():
        # fp32 means of a few dozen tokens, as above
        assert metrics[key] == pytest.approx(float(value), rel=1e-5, abs=1e-6), key


def test_reads_the_device_once(verl, monkeypatch):
    def forbidden(self):
        raise AssertionError("a synchronisation per value")

    data, config = batch(torch.float32), actor_config(verl)
    monkeypatch.setattr(torch.Tensor, "item", forbidden)
    verl.core.get_policy_loss_fn("drpo")(config=config, **data)


@every_loss
def test_unscorable_tokens_are_masked(verl, name):
    """vLLM gives NaN for a token it could not score: it counts as masked, in the mode's own normaliser too."""
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
    """Advantages and weights differ within a sequence: then our two forms have the same loss and other gradients."""
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


def test_configured_as_the_documentation_says(verl, restored_head):
    from hydra import compose, initialize_config_module
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.import_utils import import_external_libs

    text = (ROOT / "docs" / "integrations" / "verl.md").read_text(encoding="utf-8")
    overrides = [word for line in text.splitlines() if line.startswith("  ") for word in line.split() if "=" in word]
    overrides = [word for word in overrides if word.lstrip("+").startswith(("actor_rollout_ref.", "algorithm."))]
    assert len(overrides) == 8
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", [*overrides, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"])
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor.policy_loss, verl.ours.DRPOPolicyLossConfig)
    assert (actor.policy_loss.loss_mode, actor.policy_loss.drpo_delta) == ("drpo", 0.2)
    sys.modules.pop("drpo_kernels.integrations.verl_fused_head", None)
    import_external_libs(config.actor_rollout_ref.model.external_lib)
    assert verl.kernel.linear_cross_entropy is verl.ours.linear_cross_entropy


def test_the_readmes_snippet(verl, restored_head):
    from hydra import compose, initialize_config_module
    from verl.utils.config import omega_conf_to_dataclass

    names = run(snippet("integrations.verl"))
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", [*names["overrides"], "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"])
    policy_loss = omega_conf_to_dataclass(config.actor_rollout_ref.actor).policy_loss
    assert (policy_loss.loss_mode, policy_loss.drpo_delta) == ("drpo", 0.2)
    assert verl.core.get_policy_loss_fn(policy_loss.loss_mode) is verl.core.POLICY_LOSS_REGISTRY["drpo"]
    assert verl.kernel.linear_cross_entropy is verl.ours.linear_cross_entropy


def test_inside_verls_ppo_loss(verl):
    """What verl's actor calls: unpadded log-probs, the normalisers put into the config, one Metric per value."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    data = batch(torch.float32)
    lengths = data["response_mask"].sum(1)
    keep = lengths > 0  # verl pads no response of length 0
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
    # position t predicts the token at t + 1: responses begin one position earlier
    leaf = data["log_prob"].clone().requires_grad_()
    rows = [torch.cat([torch.zeros(prompt - 1), leaf[i][: lengths[i]], torch.zeros(1)]) for i in keep.nonzero()[:, 0]]
    log_probs = torch.nested.nested_tensor_from_jagged(torch.cat(rows), torch.tensor([0, *map(len, rows)]).cumsum(0))
    loss, metrics = verl.losses.ppo_loss(config, {"log_probs": log_probs}, tensors)
    loss.backward()
    reference, gradient, scale = expected("drpo", data, config.loss_agg_mode, info)
    assert abs(loss.detach() - reference) <= LOSS_BOUND[torch.float32] * scale
    assert relative(torch.where(data["response_mask"], leaf.grad, 0), gradient) <= LOSS_BOUND[torch.float32]
    assert metrics["drpo/weight_mean"].aggregate() > 0


# ---------------------------------------------------------------------------------------------------------------
# how verl's trainers choose μ

OURS = (
    "actor_rollout_ref.actor.policy_loss._target_=drpo_kernels.integrations.verl.DRPOPolicyLossConfig",
    "actor_rollout_ref.actor.policy_loss.loss_mode=drpo",
    f"+actor_rollout_ref.actor.policy_loss.drpo_delta={DELTA}",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
)


def verls(path):
    return Path(sys.modules["verl"].__file__).parent / path


def composed(folder, name, *overrides):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(verls(folder)), version_base=None):
        return compose(name, [*OURS, *overrides])


def method(path, name, **names):
    """verl's own method, out of a file whose other imports are not installed here; `names` is what it uses."""
    tree = ast.parse(verls(path).read_text(encoding="utf-8"))
    tree.body = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == name]
    exec(compile(tree, path, "exec", __future__.annotations.compiler_flag), names)
    return names[name]


def test_the_v1_trainers_keep_the_loss(verl):
    """verl's own step from the batch to μ with bypass_mode=true: of all its v1 trainers, synchronous or not."""
    bypass = "algorithm.rollout_correction.bypass_mode=true"
    config = composed("trainer/config", "ppo_trainer", bypass)
    assert config.trainer.use_v1
    sampled, stored = batch(torch.float32)["old_log_prob"], {}
    queue = types.SimpleNamespace(
        kv_batch_get=lambda select_fields, **_: dict.fromkeys(select_fields, sampled),
        kv_batch_put=lambda fields, **_: stored.update(fields),
    )
    rows = types.SimpleNamespace(keys=[], partition_id="train")
    step = method("trainer/ppo/v1/trainer_base.py", "_compute_old_log_prob", tq=queue)
    assert step(types.SimpleNamespace(config=config), rows, {}) is rows
    assert stored == {"old_log_probs": sampled}
    from verl.utils.config import omega_conf_to_dataclass

    assert omega_conf_to_dataclass(config.actor_rollout_ref.actor).policy_loss.loss_mode == "drpo"


@pytest.mark.parametrize("recipe", ["fully_async", "one_step_off"])
def test_the_experimental_trainers_cannot_fall_back_to_ppo(verl, recipe):
    """Their configurations come with bypass_mode=true. verl builds its actors before the first step, which overwrites
    loss_mode: such an actor keeps the loss and takes μ from the rollout engine, and a later one is refused.
    """
    from verl.utils.config import omega_conf_to_dataclass

    search = "hydra.searchpath=[pkg://verl.trainer.config]"
    config = composed(f"experimental/{recipe}_policy/config", f"{recipe}_ppo_trainer", search)
    assert config.algorithm.rollout_correction.bypass_mode and config.actor_rollout_ref.rollout.calculate_log_probs
    built = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    data = batch(torch.float32)
    rows = types.SimpleNamespace(batch={"rollout_log_probs": data["old_log_prob"]})
    step = method("experimental/separation/ray_trainer.py", "_fit_compute_log_prob")
    step(types.SimpleNamespace(config=config, metrics={}, timing_raw={}), rows)
    assert rows.batch["old_log_probs"] is data["old_log_prob"]
    assert verl.core.get_policy_loss_fn(built.policy_loss.loss_mode).__module__ == verl.ours.__name__
    assert built.policy_loss.drpo_delta == DELTA
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "bypass_mode"
    with pytest.raises(Exception, match="loss_mode must be 'drpo', 'spo'"):
        omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def test_bypass_mode_is_refused(verl):
    from verl.utils.config import omega_conf_to_dataclass

    ours, refused = verl.ours.DRPOPolicyLossConfig, pytest.raises(ValueError, match="loss_mode must be 'drpo', 'spo'")
    with refused:
        ours(loss_mode="bypass_mode")
    with refused:
        ours(loss_mode="drpo").loss_mode = "bypass_mode"
    with refused:
        omega_conf_to_dataclass({"loss_mode": "bypass_mode", "drpo_delta": DELTA}, ours)


# ---------------------------------------------------------------------------------------------------------------
# the head

HIDDEN, VOCAB, TEMPERATURE = 24, 151, 0.7
# The package's contract from float32 inputs (README): 1e-4 on a log-prob, 5e-5 of a gradient's norm. Entropy sums
# p log p of the same errors, the largest weight being 1.
LOGPROB_BOUND, GRADIENT_BOUND = 1e-4, 5e-5


def head_inputs(*lead, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(*lead, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).mul(0.7).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, lead, generator=generator)


def head_reference(hidden, weight, labels):
    """-> (logprobs [N], entropy [N]) in float64."""
    logp = (hidden.double().reshape(-1, HIDDEN) @ weight.double().T / TEMPERATURE).log_softmax(-1)
    return logp.gather(-1, labels.reshape(-1, 1))[:, 0], -(logp.exp() * logp).sum(-1)


def gradients(outputs, slopes, leaves):
    used = [(out, slope.to(out.dtype)) for out, slope in zip(outputs, slopes, strict=True) if slope is not None]
    return torch.autograd.grad([out for out, _ in used], leaves, [slope for _, slope in used])


def slopes_for(outputs, what):
    generator = torch.Generator().manual_seed(4)
    slopes = [torch.randn(out.shape, generator=generator) for out in outputs]
    return [slope if name in what else None for name, slope in zip(("logprobs", "entropy"), slopes, strict=True)]


@pytest.mark.parametrize("what", [("logprobs",), ("entropy",), ("logprobs", "entropy")], ids="+".join)
@pytest.mark.parametrize("lead", [(13,), (1, 13), (3, 7)], ids=str)
def test_head_is_the_formula(verl, lead, what):
    hidden, weight, labels = head_inputs(*lead)
    outputs = verl.ours.linear_cross_entropy(hidden, weight, labels, TEMPERATURE, "none")
    reference = head_reference(hidden, weight, labels)
    for out, exact in zip(outputs, reference, strict=True):
        assert out.shape == (labels.numel(),) and out.dtype == torch.float32  # verl flattens
        assert (out - exact).abs().max() <= LOGPROB_BOUND
    assert (outputs[0] < 0).all()
    slopes = slopes_for(outputs, what)
    for grad, exact in zip(*(gradients(x, slopes, (hidden, weight)) for x in (outputs, reference)), strict=True):
        assert relative(grad, exact) <= GRADIENT_BOUND


@pytest.mark.parametrize("reduction", ["none", "sum", "Mean"])
def test_head_reduces_log_probs_alone(verl, reduction):
    hidden, weight, labels = head_inputs(3, 7)
    logprobs, entropy = verl.ours.linear_cross_entropy(hidden, weight, labels, TEMPERATURE, reduction)
    exact = head_reference(hidden, weight, labels)[0]
    exact = {"none": exact, "sum": exact.sum(), "Mean": exact.mean()}[reduction]
    assert logprobs.shape == exact.shape and entropy.shape == (21,)
    assert (logprobs - exact).abs().max() <= LOGPROB_BOUND * (21 if reduction == "sum" else 1)
    with pytest.raises(ValueError, match="reduction must be one of 'none', 'sum', 'mean', got 'max'"):
        verl.ours.linear_cross_entropy(hidden, weight, labels, TEMPERATURE, "max")


def test_head_agrees_with_verls_torch_path(verl):
    """Both round: twice the bounds."""
    hidden, weight, labels = head_inputs(3, 7)
    outputs = verl.ours.linear_cross_entropy(hidden, weight, labels, TEMPERATURE)
    theirs = verl.torch_head.FusedLinearForPPO()(hidden, weight, labels, TEMPERATURE)
    for out, other in zip(outputs, theirs, strict=True):
        torch.testing.assert_close(out, other.flatten(), rtol=0, atol=2 * LOGPROB_BOUND)
    slopes = slopes_for(outputs, ("logprobs", "entropy"))
    mine = gradients(outputs, slopes, (hidden, weight))
    for grad, other in zip(mine, gradients(theirs, [s.view(3, 7) for s in slopes], (hidden, weight)), strict=True):
        assert relative(grad, other) <= 2 * GRADIENT_BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_head_agrees_with_verls_kernel(verl, device, reduction):
    """verl's kernel runs on a GPU alone, with hidden sizes that are multiples of 128; it multiplies fp32 as TF32."""
    hidden, weight, labels = (torch.randn(1, 40, 256), torch.randn(1000, 256) / 16, torch.randint(1000, (1, 40)))
    leaves = [x.to(device, torch.bfloat16).requires_grad_() for x in (hidden, weight)]
    mine, theirs = (
        head(*leaves, labels.to(device), TEMPERATURE, reduction)
        for head in (verl.ours.linear_cross_entropy, verl.ours.VERL_HEAD)
    )
    for out, other in zip(mine, theirs, strict=True):
        assert out.shape == other.shape and out.dtype == other.dtype
        # two fp32 accumulations of the same bf16 products
        torch.testing.assert_close(out, other, rtol=1e-5, atol=2 * LOGPROB_BOUND)
    slopes = [torch.randn_like(out) for out in mine]
    for grad, other in zip(*(gradients(out, slopes, leaves) for out in (mine, theirs)), strict=True):
        assert relative(grad, other) <= 2 * 0.004  # the contract from bf16 inputs, on each side


def test_head_in_a_process_group(verl, monkeypatch):
    hidden, weight, labels = head_inputs(5)
    plain = verl.ours.linear_cross_entropy(hidden, weight, labels, 1.0, "none", None)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    world = torch.distributed.group.WORLD
    try:
        alone = verl.ours.linear_cross_entropy(hidden, weight, labels, 1.0, "none", world)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
        received = {}
        monkeypatch.setattr(verl.ours, "linear_token_logprobs", lambda *_, **keywords: (received.update(keywords), 0))
        verl.ours.linear_cross_entropy(hidden, weight, labels, 1.0, "none", world)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(plain, alone, strict=True))
    # tests/distributed/test_distributed.py holds such a shard to one process's numbers
    rows = weight.shape[0]
    assert received["vocab_shard"] == VocabShard(world, (rows, rows), partial_hidden_gradient=True)


def test_head_is_replaced_and_put_back(verl, monkeypatch, restored_head):
    """Megatron's modules, which need megatron-core, bind the name when they are loaded: one stands in for them."""
    loaded = types.ModuleType("verl.models.mcore.loaded_before")
    loaded.linear_cross_entropy = verl.ours.VERL_HEAD
    monkeypatch.setitem(sys.modules, loaded.__name__, loaded)
    for _ in range(2):
        verl.ours.use_fused_head()
        assert verl.kernel.linear_cross_entropy is loaded.linear_cross_entropy is verl.ours.linear_cross_entropy
    for _ in range(2):
        verl.ours.use_verl_head()
        assert verl.kernel.linear_cross_entropy is loaded.linear_cross_entropy is verl.ours.VERL_HEAD
    monkeypatch.delitem(sys.modules, "drpo_kernels.integrations.verl_fused_head", raising=False)
    importlib.import_module("drpo_kernels.integrations.verl_fused_head")
    assert verl.kernel.linear_cross_entropy is verl.ours.linear_cross_entropy


def test_head_in_a_model_that_verl_patched(verl, monkeypatch, restored_head):
    """verl's own forward for `impl_backend: triton`, on a CPU, against its forward for `impl_backend: torch`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", Qwen2ForCausalLM.forward)  # verl patches the class
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=97)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, tie_word_embeddings=True))
    tokens = torch.randint(97, (1, 11))
    verl.ours.use_fused_head()
    results = {}
    for backend in ("torch", "triton"):
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
        out = model(input_ids=tokens, temperature=TEMPERATURE, return_dict=True)
        logprobs, entropy = out.log_probs.squeeze(0), out.entropy.squeeze(0)  # as verl's FSDP engine does
        model.zero_grad()
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
        results[backend] = (logprobs, entropy, model.lm_head.weight.grad.clone())
    theirs, mine = results["torch"], results["triton"]
    for a, b in zip(mine[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2 * LOGPROB_BOUND)
    assert relative(mine[2], theirs[2]) <= 2 * GRADIENT_BOUND


# ---------------------------------------------------------------------------------------------------------------
# how verl finds us


def entry_points():
    """The entry points in setup.py, {group: [line]}."""
    calls = [x for x in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))) if isinstance(x, ast.Call)]
    return next(ast.literal_eval(k.value) for call in calls for k in call.keywords if k.arg == "entry_points")


LOADS = {
    "verl-first": "import verl",
    "ours-first": "import drpo_kernels; assert not {'verl', 'transformers'} & set(sys.modules)\n"
    "import drpo_kernels.integrations.verl",
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_verl_loads_the_plugin(verl, tmp_path, load):
    """As after `pip install .`: the metadata that pip writes are written here, the package itself is on the path."""
    metadata = tmp_path / f"drpo_kernels-{drpo_kernels.__version__}.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text(f"Name: drpo_kernels\nVersion: {drpo_kernels.__version__}\n")
    lines = [line for group, names in entry_points().items() for line in (f"[{group}]", *names)]
    metadata.joinpath("entry_points.txt").write_text("\n".join(lines))
    path = [str(tmp_path), str(ROOT)]
    environment = [] if verl.environment is None else [str(verl.environment)]
    script = f"""
import sys
sys.path[:] = {path} + sys.path + {environment}
{load}
from verl.trainer.ppo.core_algos import get_policy_loss_fn
assert [get_policy_loss_fn(name).__module__ for name in ("drpo", "spo")] == ["drpo_kernels.integrations.verl"] * 2
from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
assert linear_cross_entropy is sys.modules["drpo_kernels.integrations.verl"].VERL_HEAD
"""
    done = subprocess.run([sys.executable, "-W", "error:verl has", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
