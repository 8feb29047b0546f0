"""Tests of verl's own trainers with our losses: their configuration, their choice of μ, and how verl finds us."""

import __future__

import ast
import subprocess
import sys
import types
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch

import drpo_kernels
from snippets import ROOT, run, snippet
from verl_calls import DELTA, batch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it


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
    """Return verl's own method out of a file whose other imports are not installed here; `names` is what the method
    uses.
    """
    tree = ast.parse(verls(path).read_text(encoding="utf-8"))
    tree.body = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == name]
    exec(compile(tree, path, "exec", __future__.annotations.compiler_flag), names)
    return names[name]


def test_the_v1_trainers_keep_the_loss(verl):
    """With bypass_mode=true, verl's own step from the batch to μ keeps the loss in all v1
    trainers, synchronous or not.
    """
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
    loss_mode: such an actor keeps the loss and takes μ from the rollout engine, while an actor that is built later is
    refused.
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


def entry_points():
    """Return the entry points in pyproject.toml as {group: {name: module}}."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]


LOADS = {
    "verl-first": "import verl",
    "ours-first": "import drpo_kernels; assert not {'verl', 'transformers'} & set(sys.modules)\n"
    "import drpo_kernels.integrations.verl",
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_verl_loads_the_plugin(verl, tmp_path, load):
    """This is the state after `pip install .`: the test writes the metadata that pip would write, and the package is on
    the path.
    """
    metadata = tmp_path / f"drpo_kernels-{drpo_kernels.__version__}.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text(f"Name: drpo_kernels\nVersion: {drpo_kernels.__version__}\n")
    written = ConfigParser()
    written.read_dict(entry_points())
    with metadata.joinpath("entry_points.txt").open("w") as file:
        written.write(file)
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
