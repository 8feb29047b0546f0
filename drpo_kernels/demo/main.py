"""`python -m drpo_kernels demo`: a small transformer learns to add by reinforcement learning with the fused loss."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

EXTRA = ("transformers", "matplotlib", "tqdm", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo -> exit status: 0 if the reward rose and the fused loss agrees with the eager one."""
    arguments = _parse(argv)
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        print(f"error: the demo needs {', '.join(missing)}: pip install 'drpo_kernels[demo]'", file=sys.stderr)
        return 2

    from drpo_kernels.demo.run import run
    from drpo_kernels.demo.settings import Settings

    changes = {name: getattr(arguments, name) for name in ("seed", "steps", "objective", "sparse_grad")}
    changes = {name: value for name, value in changes.items() if value is not None}
    settings = Settings.quick(**changes) if arguments.quick else Settings(**changes)
    return run(settings, arguments.device, arguments.out)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m drpo_kernels demo", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--objective", choices=("drpo", "ppo", "spo", "dppo"), help="the policy loss (default: drpo)")
    parser.add_argument("--steps", type=int, help="reinforcement learning steps (default: 150)")
    parser.add_argument("--seed", type=int, help="of the weights, the problems and the sampling (default: 0)")
    parser.add_argument("--sparse-grad", type=float, help="sparse gradients, such as 0.01 (default: 0, exact)")
    parser.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the plots (default: demo_out)")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: too short to learn")
    arguments = parser.parse_args(argv)
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    if arguments.sparse_grad is not None and not 0 <= arguments.sparse_grad < 1:
        parser.error(f"--sparse-grad must be in [0, 1), got {arguments.sparse_grad}")
    return arguments
