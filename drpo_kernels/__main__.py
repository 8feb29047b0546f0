"""`python -m drpo_kernels <command>`; a command's module is imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from drpo_kernels.version import __version__

# Each module has main(argv) -> exit status. A new command (bench) is one module and one line here.
COMMANDS = {
    "doctor": ("drpo_kernels.commands.doctor", "what this machine has, which backend runs and why, a self-check"),
    "plan": ("drpo_kernels.commands.plan", "the chunks and buffers of a problem on any device, with bytes and reasons"),
    "demo": ("drpo_kernels.demo.main", "train a small transformer with the fused loss (needs the demo extra)"),
    "compile": ("drpo_kernels.commands.compile", "compile the kernels for every GPU target: registers, spills, loads"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m drpo_kernels",
        description="Fused policy losses for LLM reinforcement learning.",
        epilog="commands:\n" + "\n".join(f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"drpo_kernels {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of these; each has its --help")
    command = parser.parse_args(argv[:1]).command  # what follows belongs to the command
    try:
        module = importlib.import_module(COMMANDS[command][0])
    except ModuleNotFoundError as error:
        if command != "demo" or (error.name or "").startswith("drpo_kernels"):
            raise
        print(f"error: the demo needs {error.name}: pip install 'drpo_kernels[demo]'", file=sys.stderr)
        return 2
    return module.main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
