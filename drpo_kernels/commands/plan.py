"""`python -m drpo_kernels plan`: the chunks and buffers of a call on a device, and why. The device may be elsewhere."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch

from drpo_kernels.backends.devices import GIB, PRESETS, DeviceProperties, device_properties
from drpo_kernels.backends.planning import NeedsGrad, Sizes, Storage, SweepPlan, plan
from drpo_kernels.backends.sparse.plan import sparse_plan

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str]) -> int:
    """Print the plan of `linear_policy_loss`."""
    options = _parse(argv)
    device = PRESETS[options.device] if options.device != "here" else _here()
    made = plan_for(device, options)
    head = "frozen head" if options.frozen_head else "main_grad" if options.main_grad else "head with a gradient"
    sizes = f"T={options.tokens} H={options.hidden} V={options.vocab}"
    print(f"linear_policy_loss on {device.name}, {sizes}, {options.dtype}, {head}")
    print(made.explain())
    return 0


def plan_for(device: DeviceProperties, options: argparse.Namespace) -> SweepPlan:
    dtype = getattr(torch, options.dtype)
    # Products on a CPU upcast 16-bit operands; every GPU among the presets multiplies them into float32.
    operand = torch.float32 if device.type == "cpu" else dtype
    logits = torch.bfloat16 if options.bf16_logits else torch.float32
    needs_grad = NeedsGrad(hidden=True, weight=not options.frozen_head, bias=False)
    copied = 0 if dtype == operand else operand.itemsize
    make_plan = sparse_plan if options.sparse_grad > 0 else plan
    return make_plan(
        device,
        Sizes(options.tokens, 0, options.hidden, options.vocab),
        Storage(logits, operand, torch.float32, dtype, copied),
        needs_grad,
        workspace=options.workspace,
        main_grad=options.main_grad,
    )


def _here() -> DeviceProperties:
    return device_properties(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def size(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def gibibytes(text: str) -> int:
    """A number of GiB as bytes."""
    count = float(text) * GIB
    if not 1 <= count < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return int(count)


def tolerance(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return number


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m drpo_kernels plan", description=__doc__)
    parser.add_argument("--tokens", type=size, required=True, metavar="T", help="tokens with a gradient")
    parser.add_argument("--hidden", type=size, required=True, metavar="H", help="hidden size")
    parser.add_argument("--vocab", type=size, required=True, metavar="V", help="vocabulary, or this rank's share of it")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of hidden and weight (default: %(default)s)"
    )
    parser.add_argument(
        "--device", choices=("here", *PRESETS), default="here", help="default: this machine's GPU, or its CPU"
    )
    parser.add_argument(
        "--workspace-gib", type=gibibytes, metavar="G", dest="workspace", help="default: the device's own"
    )
    parser.add_argument("--bf16-logits", action="store_true", help="logits_dtype=torch.bfloat16")
    parser.add_argument(
        "--sparse-grad", type=tolerance, nargs="?", const=0.01, default=0.0, metavar="TAU", help="sparse_grad=TAU"
    )
    head = parser.add_mutually_exclusive_group()
    head.add_argument("--frozen-head", action="store_true", help="weight.requires_grad is False")
    head.add_argument("--main-grad", action="store_true", help="main_grad is given")
    return parser.parse_args(argv)
