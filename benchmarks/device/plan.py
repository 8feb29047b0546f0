"""What the parts of `benchmarks.device` measure, and what each of them is given."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.harness import plans
from benchmarks.harness.measure import Case
from benchmarks.harness.methods import FLOORS, METHODS, OURS
from benchmarks.harness.mixes import MIXES
from benchmarks.harness.peers import PEERS
from benchmarks.harness.provenance import provenance
from benchmarks.harness.records import Record
from benchmarks.harness.runs import MAIN

# Seconds that a part keeps for writing down how a program that it started has ended.
RESERVE = 3.0
LOSS, FROZEN, LOGPROBS = "linear_policy_loss", "linear_policy_loss_frozen_head", "linear_token_logprobs"
WHOLE, SPARSE = "gemms_whole", "linear_policy_loss_sparse"
# The backward of Liger's Hopper head is one kernel with a barrier across the device, which may never be passed.
HANGS = "liger_scaled_sm90"
# These compile or tune themselves at their first call.
SLOW = ("liger_grpo", "cce_exact", "cce", "eager_compiled")
# Small models and small batches. At the shapes of COMPILED the eager loss is compiled too, which takes seconds each.
SMALL = tuple(
    replace(MAIN, model=model, tokens=tokens)
    for model in ("Qwen2.5-0.5B", "Qwen2.5-1.5B")
    for tokens in (512, 1024, 256, 2048)
)
MIDDLE = replace(MAIN, model="Qwen3-30B-A3B")
REAL = replace(MAIN, model="SmolLM2-135M", tokens=2048, kind="real")
COMPILED = (SMALL[0], SMALL[5])


@dataclass(frozen=True)
class Job:
    """This says where a part's results go, until when it may run (in `time.monotonic`), and whether it is a rehearsal
    on a CPU.
    """

    folder: Path
    deadline: float
    rehearse: bool
    device: torch.device

    @property
    def seconds(self) -> float:
        """The time that is left for a program."""
        return max(self.deadline - RESERVE - time.monotonic(), 0.0)

    def source(self, part: str) -> Record:
        """Return what every record of the part says of its origin."""
        rehearse = " --rehearse" if self.rehearse else ""
        return provenance(f"python -m benchmarks.device{rehearse} --parts {part}", self.device)


def _plans() -> dict[str, list[Case]]:
    """Return the cases of every part of speed. `sweep` has what the standard plan of a GPU holds and no earlier part
    does.
    """
    logits = [name for name in ("copy", *OURS) if METHODS[name].takes == "logits"]
    hidden = [name for name in (*FLOORS, *OURS) if METHODS[name].takes == "hidden"]
    quick = [name for name in PEERS if name not in (*SLOW, HANGS) and METHODS[name].takes == "hidden"]
    by_logits = ("copy", "policy_loss", "eager_from_logits", "liger_triton_grpo")
    small = [Case(name, workload) for workload in (*SMALL, MIDDLE) for name in (WHOLE, "eager", LOSS)]
    found = {
        "ours": [
            *(Case(name, MAIN) for name in hidden),
            Case(LOSS, MAIN, 0.25),
            *(Case(name, replace(MAIN, dtype=dtype)) for dtype in ("bfloat16", "float32") for name in logits),
        ],
        "peers": [Case(name, MAIN) for name in (WHOLE, LOSS, LOGPROBS, *quick, "eager")],
        "liger_sm90": [Case(HANGS, MAIN)],
        "slow_peers": [Case(name, MAIN) for name in (WHOLE, LOSS, LOGPROBS, *SLOW, *by_logits)],
        "small": [*small, *(Case("eager_compiled", workload) for workload in COMPILED)],
        "sparse": [
            Case(name, replace(MAIN, kind=kind))
            for kind in (*MIXES, "trained", "random")
            for name in (WHOLE, LOSS, SPARSE, f"{SPARSE}_tight")
        ],
        "real": [Case(name, REAL) for name in (WHOLE, LOSS, SPARSE, f"{SPARSE}_tight", "eager", "trl")],
        "memory": [
            Case(name, replace(MAIN, tokens=tokens))
            for tokens in (8192, 65_536, 2048, 32_768, 16_384)
            for name in (LOSS, FROZEN)
        ],
    }
    taken = {case for name in ("ours", "peers", "liger_sm90", "slow_peers") for case in found[name]}
    found["sweep"] = [case for case in plans.STANDARD["cuda"].cases() if case not in taken]
    return found


PLANS = _plans()
