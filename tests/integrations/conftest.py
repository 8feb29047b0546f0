"""The fixture of the real verl, for the tests that run where it is installed."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

from snippets import ROOT

ENVIRONMENTS = (Path(sys.prefix) / "verl", ROOT / ".venv" / "verl")


@pytest.fixture(scope="module")
def verl():
    """Return verl's modules and ours, or skip with the reason why verl cannot be imported."""
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
