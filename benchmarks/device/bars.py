"""The bars that a GPU run must reach: each has its limit, and a function that finds its number in the run's records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.device.plan import FROZEN, LOGPROBS, LOSS, MIDDLE, SMALL, SPARSE, WHOLE
from benchmarks.device.tiles import COPY
from benchmarks.harness.measure import OVER_BUDGET
from benchmarks.harness.method import HEAD
from benchmarks.harness.methods import METHODS
from benchmarks.harness.peers import PEERS
from benchmarks.harness.records import Record, select
from benchmarks.harness.runs import DEVICE, MAIN, SPEED, Run, record_of
from benchmarks.harness.tables import NOTHING, gibibytes
from benchmarks.harness.workloads import Workload
from drpo_kernels.backends.planning import workspace_bytes

GIB = 1 << 30
# Heads that take log-probs to any loss and give every gradient. They may round the logits, but filter nothing.
RL_PEERS = tuple(name for name, m in PEERS.items() if m.same_loss and m.wrt == HEAD and m.rounds != "gradient filter")
OTHER_HEADS = ("trl", "liger_scaled")
PASS, MISS, NOT_MEASURED = "PASS", "MISS", "not measured"


class NotMeasured(Exception):
    """This is raised where a bar's number cannot be had. The message names what is missing."""


class Found(NamedTuple):
    """A bar's number, a remark about it, and the records from which the number comes."""

    value: float
    remark: str
    records: Sequence[Record] = ()


class Verdict(NamedTuple):
    """The result of a bar, whose `word` is PASS, MISS or NOT_MEASURED."""

    bar: Bar
    word: str
    number: str
    remark: str


@dataclass(frozen=True)
class Bar:
    """A limit, and a function that finds the number in a run or raises `NotMeasured`. With `at_least` the number must
    reach the limit, without it must not exceed the limit.
    """

    what: str
    limit: float
    find: Callable[[Run], Found]
    at_least: bool = False
    form: str = "{:.3f}×"

    def verdict(self, run: Run) -> Verdict:
        """Return the verdict. The numbers of a CPU, on which a run is a rehearsal, are computed and not shown."""
        try:
            value, remark, records = self.find(run)
        except NotMeasured as missing:
            return Verdict(self, NOT_MEASURED, NOTHING, str(missing))
        if not all("gpu" in record["device"] for record in run[SPEED]):
            return Verdict(self, NOT_MEASURED, NOTHING, "rehearsal")
        if earlier := _earlier_commits(records, run):
            remark += f"; some or all of it at commit {earlier}"
        met = value >= self.limit if self.at_least else value <= self.limit
        return Verdict(self, PASS if met else MISS, self.form.format(value), remark)


def _earlier_commits(records: Sequence[Record], run: Run) -> str:
    """Return the commits before the run's last one. A run may take several sittings, each at its own commit."""
    newest = max(run[SPEED], key=lambda record: record["date"])["commit"] if run[SPEED] else None
    return ", ".join(dict.fromkeys(r["commit"][:12] for r in records if r["commit"] not in (None, newest)))


def verdicts(run: Run) -> list[Verdict]:
    return [bar.verdict(run) for bar in BARS]


# --- how the numbers come from the records ----------------------------------------------------------------------------


def failed_tests(run: Run) -> Found:
    """Return the number of failed tests. A part that runs tests and has not come to its end counts as one more."""
    runs = [record for record in run[DEVICE] if "tests" in record]
    if not runs:
        raise NotMeasured("no test was run")
    failed = sum(len(record["failed"]) for record in runs)
    cut_off = [record["tests"] for record in runs if not record["finished"]]
    passed = sum(record["passed"] for record in runs)
    remark = "; ".join([f"{passed} passed", *(f"`{tests}` was cut off" for tests in cut_off)])
    return Found(failed + len(cut_off), remark)


def timed(run: Run, method: str, workload: Workload = MAIN, share: float = 1.0) -> Record:
    """Return the record of the case, which must have a time."""
    record = record_of(run, method, workload, share)
    if obstacle := _obstacle(method, record):
        raise NotMeasured(obstacle)
    return record


def _obstacle(method: str, record: Record | None) -> str | None:
    """Return why the method has no time, or None if it has one."""
    if record is None:
        return f"{method}: no record"
    return None if record["median_s"] else f"{method}: {record['status']}"


def floor_of(record: Record) -> float:
    """Return the seconds of the method's floor, whose samples were interleaved with its own."""
    if record["floor_median_s"] is None:
        raise NotMeasured(f"{record['method']}: its floor has no time")
    return record["floor_median_s"]


def _ratio(record: Record, seconds: float) -> Found:
    return Found(
        record["median_s"] / seconds, f"{1e3 * record['median_s']:.2f} ms over {1e3 * seconds:.2f} ms", [record]
    )


def over_floor(method: str, run: Run, workload: Workload = MAIN) -> Found:
    record = timed(run, method, workload)
    return _ratio(record, floor_of(record))


def over_dense(method: str, share: float, run: Run) -> Found:
    """Return the method's time over that of `linear_policy_loss` with every row active."""
    record = timed(run, method, share=share)
    return _ratio(record, dense_beside(record, run)["median_s"])


def dense_beside(record: Record, run: Run) -> Record:
    """Return the record of `linear_policy_loss` with every row active, on the same inputs, at the same commit and
    preferably of the same part.
    """
    same = {name: record[name] for name in ("workload", "shape", "inputs", "dtype", "commit")}
    found = [r for r in select(run[SPEED], method=LOSS, active_share=1.0, **same) if r["median_s"] is not None]
    if not found:
        raise NotMeasured(f"{LOSS}: no record at the same commit")
    return min(found, key=lambda other: other["part"] != record["part"])


def over_eager(run: Run) -> Found:
    """Return the smallest ratio of eager's time to ours, over the shapes of small models."""
    pairs = [(timed(run, "eager", workload), timed(run, LOSS, workload)) for workload in (*SMALL, MIDDLE)]
    ratios = [eager["median_s"] / ours["median_s"] for eager, ours in pairs]
    value, (_, ours) = min(zip(ratios, pairs, strict=True), key=lambda row: row[0])
    faster = sum(ratio >= 1 for ratio in ratios)
    where = f"{ours['workload']} T={ours['shape']['tokens']}"
    return Found(
        value,
        f"worst: {where}; faster at {faster} of {len(ratios)} shapes",
        [record for eager, ours in pairs for record in (ours, eager)],
    )


def bandwidth_share(dtype: str, run: Run) -> Found:
    """Return the TB/s of the row kernel at the tile that is chosen, divided by a copy's."""
    rows = [r for r in run[DEVICE] if r.get("row_kernel") and r["logits"] == dtype and r["TB/s"] is not None]
    kernels, copies = select(rows, chosen=True), select(rows, row_kernel=COPY)
    if not kernels or not copies:
        raise NotMeasured("the row kernels have no times")
    rate, copied = kernels[-1]["TB/s"], copies[-1]["TB/s"]
    return Found(rate / copied, f"{rate:.2f} of {copied:.2f} TB/s, one read and one write counted", [kernels[-1]])


def over_peers(method: str, peers: Sequence[str], run: Run) -> Found:
    """Return the fastest peer's time over ours, each in units of the floor beside it, and the memory of both."""
    ours = timed(run, method)
    records = {peer: record_of(run, peer) for peer in peers}
    missing = [_obstacle(peer, record) for peer, record in records.items() if _obstacle(peer, record)]
    found = [record for peer, record in records.items() if not _obstacle(peer, record)]
    if not found:
        raise NotMeasured("; ".join(missing))
    theirs = min(found, key=in_floors)
    memory = " against ".join(gibibytes(record["peak_beyond_gradients_bytes"]) for record in (ours, theirs))
    remark = "; ".join([f"fastest: {theirs['method']}", f"beyond the gradients {memory}", *missing])
    return Found(in_floors(theirs) / in_floors(ours), remark, [*found, ours])


def in_floors(record: Record) -> float:
    """Return a time in units of the three bare products, also for a method whose floor has four of them."""
    products = {WHOLE: 3, "gemms_recompute": 4}[METHODS[record["method"]].held_to]
    return record["median_s"] / floor_of(record) * products / 3


def beyond_allowance(method: str, run: Run) -> Found:
    """Return how far the peak is above the allowance, in GiB, at the T where it is furthest."""
    records = [r for r in select(run[SPEED], part="memory", method=method) if r["status"] != OVER_BUDGET]
    if not records:
        raise NotMeasured(f"{method}: no record")
    for record in records:
        if record["peak_beyond_gradients_bytes"] is None:
            raise NotMeasured(f"T={record['shape']['tokens']}: {record['status']}")
    worst = max(records, key=lambda record: record["peak_beyond_gradients_bytes"] - allowance(record))
    peak, tokens = worst["peak_beyond_gradients_bytes"], sorted(record["shape"]["tokens"] for record in records)
    remark = f"worst at T={worst['shape']['tokens']}, {gibibytes(peak)} beyond the gradients"
    return Found((peak - allowance(worst)) / GIB, f"{remark}; T of {', '.join(map(str, tokens))}", records)


def allowance(record: Record) -> int:
    """Return the bytes beyond the gradients that a step may hold: the workspace and, unless the head is frozen, one
    float32 dW or the retained bf16 dlogits of up to 2H tokens, whichever are larger.
    """
    tokens, hidden, vocab = (record["shape"][name] for name in ("tokens", "hidden", "vocab"))
    workspace = workspace_bytes(torch.device("cuda" if "gpu" in record["device"] else "cpu"), vocab, 4, None)
    retained = 2 * tokens * vocab if tokens <= 2 * hidden else 0
    return workspace + (0 if record["method"] == FROZEN else max(4 * vocab * hidden, retained))


def of_loss(model: str = MAIN.model, tokens: int = MAIN.tokens) -> Callable[[Run], Found]:
    return partial(over_floor, LOSS, workload=replace(MAIN, model=model, tokens=tokens))


GIBIBYTES, PERCENT = "{:.3f} GiB", "{:.1%}"
BARS = (
    Bar("GPU tests that fail", 0, failed_tests, form="{:.0f}"),
    Bar("T=8192 H=4096 V=151936, over three bare products", 1.10, of_loss()),
    Bar("the best head for RL: its time over ours", 1.2, partial(over_peers, LOSS, RL_PEERS), at_least=True),
    Bar("T=8192 H=2048, over three bare products", 1.15, of_loss(MIDDLE.model)),
    Bar("T=1024 H=1536, over three bare products", 1.25, of_loss("Qwen2.5-1.5B", 1024)),
    Bar("T=512 H=896, over three bare products", 1.50, of_loss("Qwen2.5-0.5B", 512)),
    Bar("the slowest small shape: eager's time over ours", 1.0, over_eager, at_least=True),
    Bar("peak memory of a frozen head above what is allowed", 0.1, partial(beyond_allowance, FROZEN), form=GIBIBYTES),
    Bar("peak memory above what is allowed", 0.1, partial(beyond_allowance, LOSS), form=GIBIBYTES),
    Bar("25 % of rows active, over dense", 0.29, partial(over_dense, LOSS, 0.25)),
    Bar("frozen head, over dense", 0.72, partial(over_dense, FROZEN, 1.0)),
    Bar("sparse gradients of mixed entropies, over three bare products", 0.60,
        partial(over_floor, SPARSE, workload=replace(MAIN, kind="mixed"))),
    Bar("row kernel on bfloat16 logits, of a copy's TB/s", 0.80, partial(bandwidth_share, "bfloat16"), True, PERCENT),
    Bar("row kernel on float32 logits, of a copy's TB/s", 0.60, partial(bandwidth_share, "float32"), True, PERCENT),
    Bar("recompute with entropy, over four bare products", 1.12, partial(over_floor, LOGPROBS)),
    Bar("TRL's and verl's heads' time over the recompute path's", 1.0, partial(over_peers, LOGPROBS, OTHER_HEADS),
        at_least=True),
)  # fmt: skip
