"""Which cases a run holds: the standard plan of a device, its rehearsal at tiny shapes, or a product of options."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.harness.measure import Case, in_order
from benchmarks.harness.methods import METHODS
from benchmarks.harness.workloads import Workload

SHARES = (1.0, 0.5, 0.25, 0.1)
# measured at every share: what drops rows, and the same with all of them
SHARED = ("linear_policy_loss", "linear_policy_loss_not_compacted")
HIDDEN = tuple(name for name, method in METHODS.items() if method.takes == "hidden")
LOGITS = tuple(name for name, method in METHODS.items() if method.takes == "logits")
# of `pytest benchmarks` on a CPU, which is to take minutes: the shares of active rows, and what it leaves out
FRONT_SHARES = (1.0, 0.25)
BEHIND = (
    "gemms", "gemms_frozen", "gemms_recompute", "linear_policy_loss_not_compacted", "linear_policy_loss_sparse_tight",
)  # fmt: skip
QUICK_MODEL, QUICK_TOKENS = "cpu_small", 4


@dataclass(frozen=True)
class Standard:
    """The plan of a kind of device. What matters most comes first: a time budget cuts the end off.

    model, tokens, dtype      of the workload on which everything is measured, with trained-looking inputs
    random                    the methods measured on random inputs too
    sweep, swept              the other T, and the methods measured at them
    other_models              at the same T
    other_dtype               of the logits at the same T, and of the linear methods at the first T of the sweep
    front_tokens              the T of `pytest benchmarks`, which then runs the main workload alone; None: all cases
    """

    model: str
    tokens: int
    dtype: str
    random: tuple[str, ...]
    sweep: tuple[int, ...]
    swept: tuple[str, ...]
    other_models: tuple[str, ...] = ()
    other_dtype: str | None = None
    front_tokens: int | None = None

    def cases(self) -> list[Case]:
        main = Workload(self.model, self.tokens, "trained", self.dtype)
        plan = [Case(name, main) for name in METHODS]
        plan += [Case(name, main, share) for share in SHARES for name in SHARED]
        if self.other_dtype is not None:
            plan += [Case(name, replace(main, dtype=self.other_dtype)) for name in LOGITS]
        plan += [Case(name, replace(main, kind="random")) for name in self.random]
        plan += [Case(name, replace(main, model=model)) for model in self.other_models for name in HIDDEN]
        plan += [Case(name, replace(main, tokens=tokens)) for tokens in self.sweep for name in self.swept]
        if self.other_dtype is not None:
            plan += [Case(name, replace(main, dtype=self.other_dtype, tokens=self.sweep[0])) for name in HIDDEN]
        return list(dict.fromkeys(plan))


STANDARD = {
    # over half an hour on two cores, most of it the peers
    "cpu": Standard(
        "cpu",
        2048,
        "float32",
        random=("gemms_whole", "eager", "cce", "linear_policy_loss"),
        sweep=(256, 512, 1024, 4096),
        swept=("gemms_whole", "eager", "trl", "linear_policy_loss"),
        front_tokens=1024,
    ),
    "cuda": Standard(
        "Qwen3-8B",
        8192,
        "bfloat16",
        random=HIDDEN,
        sweep=(2048, 4096, 16_384, 32_768, 65_536),
        swept=HIDDEN,
        other_models=("Llama-3-8B", "Qwen3-4B", "Qwen3-30B-A3B", "Qwen3-0.6B", "Gemma-3-12B"),
        other_dtype="float32",
    ),
}


def front_door(device_type: str, rehearse: bool) -> list[Case]:
    """The cases of `pytest benchmarks`, in the order in which neighbours share their inputs."""
    standard = STANDARD[device_type]
    cases = standard.cases()
    if standard.front_tokens is not None:
        main = Workload(standard.model, standard.tokens, "trained", standard.dtype)
        front = replace(main, tokens=standard.front_tokens)
        cases = [
            replace(case, workload=front)
            for case in cases
            if case.workload == main and case.active_share in FRONT_SHARES and case.method not in BEHIND
        ]
    return in_order(quick(cases) if rehearse else cases)


def quick(plan: Sequence[Case]) -> list[Case]:
    """The same cases at tiny shapes, with different T where theirs differ."""
    most = max((case.workload.tokens for case in plan), default=1)
    return list(dict.fromkeys(replace(case, workload=tiny(case.workload, most)) for case in plan))


def tiny(workload: Workload, most: int) -> Workload:
    """The workload at a small model's size, with T in proportion to `most`, which becomes 128."""
    return replace(workload, model=QUICK_MODEL, tokens=max(128 * workload.tokens // most, QUICK_TOKENS))


def product(
    standard: Standard,
    *,
    models: Sequence[str] | None,
    tokens: Sequence[int] | None,
    kinds: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    shares: Sequence[float] | None,
) -> list[Case]:
    """Every method at every combination, floors with all rows active only; for None the standard plan's own choice."""
    workloads = itertools.product(
        models or [standard.model], tokens or [standard.tokens], kinds or ["trained"], dtypes or [standard.dtype]
    )
    return [
        Case(name, Workload(*workload), share)
        for workload in workloads
        for name, method in METHODS.items()
        for share in (SHARES[:1] if method.floor else shares or SHARES[:1])
    ]
