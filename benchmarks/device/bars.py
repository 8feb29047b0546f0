"""What a GPU run is held to: each bar with its limit, and how its number comes from the records of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.device.parts import MIDDLE, SMALL
from benchmarks.device.tiles import COPY
from benchmarks.harness.measure import OVER_BUDGET
from benchmarks.harness.method import HEAD
from benchmarks.harness.methods import METHODS
from benchmarks.harness.peers import PEERS
from benchmarks.harness.records import Record
from benchmarks.harness.runs import DEVICE, MAIN, SPEED, Run
from benchmarks.harness.tables import gibibytes
from drpo_kernels.backends.planning import workspace_bytes

GIB = 1 << 30
LOSS, LOGPROBS, WHOLE = "linear_policy_loss", "linear_token_logprobs", "gemms_whole"
FROZEN, SPARSE = "linear_policy_loss_frozen_head", "linear_policy_loss_sparse"
PEER_PARTS = ("peers", "liger_sm90", "slow_peers")
# Heads that take log-probs to any loss and give every gradient. They may round the logits, but filter nothing.
RL_PEERS = tuple(
    name for name, m in PEERS.items() if m.same_loss and m.wrt == HEAD and m.rounds != "gradient filter"
)
OTHER_HEADS = ("trl", "liger_scaled")


class NotMeasured(Exception):
    """Raised where a bar's number cannot be had; the message names what is missing."""


@dataclass(frozen=True)
class Results:
    """The lines of speed.jsonl and device.jsonl; `used` collects the records from which a bar's number comes."""

    speed: Sequence[Record]
    device: Sequence[Record]
    used: list[Record] = field(default_factory=list)

    def of(self, part: str, method: str, share: float = 1.0, inputs: str = "trained") -> list[Record]:
        wanted = {"part": part, "method": method, "dtype": "bfloat16", "active_share": share, "inputs": inputs}
        return [record for record in self.speed if wanted.items() <= record.items()]

    def one(
        self, part: str, method: str, share: float = 1.0, inputs: str = "trained", model=MAIN.model, tokens=MAIN.tokens
    ) -> Record:
        """The record of the case, which must have a time."""
        found = [
            record
            for record in self.of(part, method, share, inputs)
            if (record["workload"], record["shape"]["tokens"]) == (model, tokens)
        ]
        if not found or found[-1]["median_s"] is None:
            raise NotMeasured(f"{method}: {found[-1]['status'] if found else 'no record'}")
        self.used.append(found[-1])
        return found[-1]

    @property
    def earlier(self) -> str:
        """The older commits among the records used. A run may take several sittings, each at its own commit."""
        newest = max(self.speed, key=lambda record: record["date"])["commit"] if self.speed else None
        return ", ".join(dict.fromkeys(r["commit"][:12] for r in self.used if r["commit"] not in (None, newest)))


@dataclass(frozen=True)
class Bar:
    """A limit and a function that gives the number and a remark, or raises `NotMeasured`. With `at_least` the number
    must reach the limit, without it must not exceed the limit.
    """

    what: str
    limit: float
    value: Callable[[Results], tuple[float, str]]
    at_least: bool = False
    form: str = "{:.3f}×"

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Verdict:
    """What became of a bar: `word` is PASS, MISS or "not measured"."""

    bar: Bar
    word: str
    number: str
    remark: str


def verdicts(run: Run) -> list[Verdict]:
    """A verdict on every bar. The numbers of a CPU, on which a run is a rehearsal, are computed and not shown."""
    found = []
    rehearsal = not all("gpu" in record["device"] for record in run[SPEED])
    for bar in BARS:
        results = Results(run[SPEED], run[DEVICE])
        try:
            value, remark = bar.value(results)
        except NotMeasured as missing:
            found.append(Verdict(bar, "not measured", "–", str(missing)))
            continue
        if results.earlier:
            remark += f"; some or all of it at commit {results.earlier}"
        if rehearsal:
            found.append(Verdict(bar, "not measured", "–", "rehearsal"))
        else:
            found.append(Verdict(bar, "PASS" if bar.met(value) else "MISS", bar.form.format(value), remark))
    return found


# --- how the numbers come from the records ----------------------------------------------------------------------------


def failed_tests(results: Results) -> tuple[float, str]:
    """The number of failed tests. A part that runs tests and has not come to its end counts as one more."""
    runs = [record for record in results.device if "tests" in record]
    if not runs:
        raise NotMeasured("no test was run")
    failed = [name for run in runs for name in run["failed"]]
    cut_off = [run["tests"] for run in runs if not run["finished"]]
    passed = sum(run["passed"] for run in runs)
    remark = "; ".join([f"{passed} passed", *(f"`{tests}` was cut off" for tests in cut_off)])
    return len(failed) + len(cut_off), remark


def of_floor(record: Record) -> tuple[float, str]:
    """The method's median over that of its floor, whose samples were interleaved with its own."""
    if record["floor_median_s"] is None:
        raise NotMeasured(f"{record['method']}: its floor has no time")
    return _over(record["median_s"], record["floor_median_s"])


def _over(one: float, other: float) -> tuple[float, str]:
    return one / other, f"{1e3 * one:.2f} ms over {1e3 * other:.2f} ms"


def held(method: str, results: Results, part: str = "ours", **where) -> tuple[float, str]:
    return of_floor(results.one(part, method, **where))


def against_dense(method: str, share: float, results: Results) -> tuple[float, str]:
    """The method's median over that of `linear_policy_loss` with every row active."""
    record = results.one("ours", method, share)
    return _over(record["median_s"], dense_beside(record, results.speed)["median_s"])


def dense_beside(record: Record, records: Sequence[Record]) -> Record:
    """`linear_policy_loss` with every row active on the same inputs at the same commit, preferably of the same part."""
    same = {name: record[name] for name in ("workload", "shape", "inputs", "dtype", "commit")}
    wanted = {"method": LOSS, "active_share": 1.0, **same}
    found = [r for r in records if wanted.items() <= r.items() and r["median_s"] is not None]
    if not found:
        raise NotMeasured(f"{LOSS}: no record at the same commit")
    return min(found, key=lambda other: other["part"] != record["part"])


def sparse_over_floor(results: Results) -> tuple[float, str]:
    record = results.one("sparse", SPARSE, inputs="mixed")
    value, remark = of_floor(record)
    return value, f"{remark}, gradient error {max(record['gradient_error'].values()):.2%}"


def over_eager(results: Results) -> tuple[float, str]:
    """The smallest of eager's times over ours, over the shapes of small models."""
    found = []
    for model, tokens in (*SMALL, MIDDLE):
        ours, eager = (results.one("small", name, model=model, tokens=tokens) for name in (LOSS, "eager"))
        found.append((eager["median_s"] / ours["median_s"], model, tokens))
    value, model, tokens = min(found)
    faster = sum(ratio >= 1 for ratio, _, _ in found)
    return value, f"worst: {model} T={tokens}; faster at {faster} of {len(found)} shapes"


def bandwidth_share(dtype: str, results: Results) -> tuple[float, str]:
    """The TB/s of the row kernel at the tile that is chosen, over a copy's."""
    rows = [r for r in results.device if r.get("row_kernel") and r["logits"] == dtype and r["TB/s"] is not None]
    kernels, copies = [r for r in rows if r["chosen"]], [r["TB/s"] for r in rows if r["row_kernel"] == COPY]
    if not kernels or not copies:
        raise NotMeasured("the row kernels have no times")
    results.used.append(kernels[-1])
    rate = kernels[-1]["TB/s"]
    return rate / copies[-1], f"{rate:.2f} of {copies[-1]:.2f} TB/s, one read and one write counted"


def against(method: str, peers: Sequence[str], results: Results) -> tuple[float, str]:
    """The fastest peer's time over ours, each in units of the floor beside it, and the memory of both."""
    found, missing = [], []
    for peer in peers:
        part = next((part for part in PEER_PARTS if results.of(part, peer)), PEER_PARTS[0])
        try:
            theirs, ours = results.one(part, peer), results.one("ours", method)
        except NotMeasured as reason:
            missing.append(str(reason))
        else:
            found.append((in_floors(theirs) / in_floors(ours), peer, ours, theirs))
    if not found:
        raise NotMeasured("; ".join(missing))
    value, peer, ours, theirs = min(found, key=lambda row: row[0])
    memory = " against ".join(gibibytes(record["peak_beyond_gradients_bytes"]) for record in (ours, theirs))
    return value, "; ".join([f"fastest: {peer}", f"beyond the gradients {memory}", *missing])


def in_floors(record: Record) -> float:
    """A time in units of the three bare products, also for a method whose floor has four of them."""
    products = {WHOLE: 3, "gemms_recompute": 4}[METHODS[record["method"]].held_to]
    return of_floor(record)[0] * products / 3


def beyond_allowance(method: str, results: Results) -> tuple[float, str]:
    """How far the peak is above what is allowed, in GiB, at the T where it is furthest."""
    records = [record for record in results.of("memory", method) if record["status"] != OVER_BUDGET]
    if not records:
        raise NotMeasured(f"{method}: no record")
    for record in records:
        if record["peak_beyond_gradients_bytes"] is None:
            raise NotMeasured(f"T={record['shape']['tokens']}: {record['status']}")
    results.used.extend(records)
    worst = max(records, key=lambda record: record["peak_beyond_gradients_bytes"] - allowance(record))
    peak, tokens = worst["peak_beyond_gradients_bytes"], sorted(record["shape"]["tokens"] for record in records)
    remark = f"worst at T={worst['shape']['tokens']}, {gibibytes(peak)} beyond the gradients"
    return (peak - allowance(worst)) / GIB, f"{remark}; T of {', '.join(map(str, tokens))}"


def allowance(record: Record) -> int:
    """The bytes beyond the gradients that a step may hold: the workspace and, unless the head is frozen, one float32 dW
    or the retained bf16 dlogits of up to 2H tokens, whichever are larger.
    """
    tokens, hidden, vocab = (record["shape"][name] for name in ("tokens", "hidden", "vocab"))
    workspace = workspace_bytes(torch.device("cuda" if "gpu" in record["device"] else "cpu"), vocab, 4, None)
    retained = 2 * tokens * vocab if tokens <= 2 * hidden else 0
    return workspace + (0 if record["method"] == FROZEN else max(4 * vocab * hidden, retained))


GIBIBYTES = "{:.3f} GiB"
BARS = (
    Bar("GPU tests that fail", 0, failed_tests, form="{:.0f}"),
    Bar("T=8192 H=4096 V=151936, over three bare products", 1.10, partial(held, LOSS)),
    Bar("the best head for RL: its time over ours", 1.2, partial(against, LOSS, RL_PEERS), at_least=True),
    *(
        Bar(what, limit, partial(held, LOSS, part="small", model=model, tokens=tokens))
        for what, limit, model, tokens in (
            ("T=8192 H=2048, over three bare products", 1.15, *MIDDLE),
            ("T=1024 H=1536, over three bare products", 1.25, "Qwen2.5-1.5B", 1024),
            ("T=512 H=896, over three bare products", 1.50, "Qwen2.5-0.5B", 512),
        )
    ),
    Bar("the slowest small shape: eager's time over ours", 1.0, over_eager, at_least=True),
    Bar("peak memory of a frozen head above what is allowed", 0.1, partial(beyond_allowance, FROZEN), form=GIBIBYTES),
    Bar("peak memory above what is allowed", 0.1, partial(beyond_allowance, LOSS), form=GIBIBYTES),
    Bar("25 % of rows active, over dense", 0.29, partial(against_dense, LOSS, 0.25)),
    Bar("frozen head, over dense", 0.72, partial(against_dense, FROZEN, 1.0)),
    Bar("sparse gradients of mixed entropies, over three bare products", 0.60, sparse_over_floor),
    *(
        Bar(f"row kernel on {dtype} logits, of a copy's TB/s", limit, partial(bandwidth_share, dtype), True, "{:.1%}")
        for dtype, limit in (("bfloat16", 0.80), ("float32", 0.60))
    ),
    Bar("recompute with entropy, over four bare products", 1.12, partial(held, LOGPROBS)),
    Bar("TRL's and verl's heads' time over the recompute path's", 1.0, partial(against, LOGPROBS, OTHER_HEADS), True),
)
