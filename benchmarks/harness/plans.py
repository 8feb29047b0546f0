"""The cases that a run holds: the standard plan of a device, its rehearsal at tiny shapes, or a product of options."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.harness.measure import Case, in_order
from benchmarks.harness.methods import METHODS
from benchmarks.harness.workloads import Workload

SHARES = (1.0, 0.5, 0.25, 0.1)
# These are measured at every share: the loss that drops rows, and the same with all of them.
SHARED = ("linear_policy_loss", "linear_policy_loss_not_compacted")
HIDDEN = tuple(name for name, method in METHODS.items() if method.takes == "hidden")
LOGITS = tuple(name for name, method in METHODS.items() if method.takes == "logits")
MODELS = ("Llama-3-8B", "Qwen3-4B", "Qwen3-30B-A3B", "Qwen3-0.6B", "Gemma-3-12B")
# `pytest benchmarks` on a CPU should take minutes, so it has its own T and shares, and leaves out the methods of
# BEHIND.
FRONT_TOKENS, FRONT_SHARES = 1024, (1.0, 0.25)
BEHIND = (
    "gemms", "gemms_frozen", "gemms_recompute", "linear_policy_loss_not_compacted", "linear_policy_loss_sparse_tight",
)  # fmt: skip
QUICK_MODEL, QUICK_TOKENS = "cpu_small", 4


@dataclass(frozen=True)
class Standard:
    """The plan of a kind of device: every method on the main workload, then methods on workloads that differ from it in
    some fields. What matters most comes first: a time budget cuts the end off.
    """

    main: Workload
    others: tuple[tuple[Sequence[str], dict], ...]

    def cases(self) -> list[Case]:
        plan = [Case(name, self.main) for name in METHODS]
        plan += [Case(name, self.main, share) for share in SHARES for name in SHARED]
        plan += [Case(name, replace(self.main, **fields)) for methods, fields in self.others for name in methods]
        return list(dict.fromkeys(plan))


STANDARD = {
    # This takes over half an hour on two cores, most of it the peers.
    "cpu": Standard(
        Workload("cpu", 2048, "trained", "float32"),
        (
            (("gemms_whole", "eager", "cce", "linear_policy_loss"), {"kind": "random"}),
            *((("gemms_whole", "eager", "trl", "linear_policy_loss"), {"tokens": t}) for t in (256, 512, 1024, 4096)),
        ),
    ),
    "cuda": Standard(
        Workload("Qwen3-8B", 8192, "trained", "bfloat16"),
        (
            (LOGITS, {"dtype": "float32"}),
            (HIDDEN, {"kind": "random"}),
            *((HIDDEN, {"model": model}) for model in MODELS),
            *((HIDDEN, {"tokens": tokens}) for tokens in (2048, 4096, 16_384, 32_768, 65_536)),
            (HIDDEN, {"tokens": 2048, "dtype": "float32"}),
        ),
    ),
}


def front_door(device_type: str, rehearse: bool) -> list[Case]:
    """Return the cases of `pytest benchmarks`, in the order in which neighbours share their inputs. On a CPU these are
    the cases of the main workload at another T.
    """
    main, cases = STANDARD[device_type].main, STANDARD[device_type].cases()
    if device_type == "cpu":
        front = replace(main, tokens=FRONT_TOKENS)
        cases = [case for case in cases if case.workload == main and case.active_share in FRONT_SHARES]
        cases = [replace(case, workload=front) for case in cases if case.method not in BEHIND]
    return in_order(quick(cases) if rehearse else cases)


def quick(plan: Sequence[Case]) -> list[Case]:
    """Return the same cases at tiny shapes, with different T where theirs differ."""
    most = max((case.workload.tokens for case in plan), default=1)
    return list(dict.fromkeys(replace(case, workload=tiny(case.workload, most)) for case in plan))


def tiny(workload: Workload, most: int) -> Workload:
    """Return the workload at a small model's size, with T in proportion to `most`, which becomes 128. Trained-looking
    inputs stand for real ones, of which there is one size.
    """
    kind = "trained" if workload.kind.startswith("real") else workload.kind
    return replace(workload, model=QUICK_MODEL, kind=kind, tokens=max(128 * workload.tokens // most, QUICK_TOKENS))


def product(
    standard: Standard,
    *,
    models: Sequence[str] | None,
    tokens: Sequence[int] | None,
    kinds: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    shares: Sequence[float] | None,
) -> list[Case]:
    """Return every method at every combination, but floors only with all rows active. None means the standard plan's
    own choice.
    """
    main = standard.main
    workloads = itertools.product(
        models or [main.model], tokens or [main.tokens], kinds or [main.kind], dtypes or [main.dtype]
    )
    return [
        Case(name, Workload(*workload), share)
        for workload in workloads
        for name, method in METHODS.items()
        for share in (SHARES[:1] if method.floor else shares or SHARES[:1])
    ]
