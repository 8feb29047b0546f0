"""What a GPU run is held to: each bar with its limit, and how its number comes from the records of `device`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.measure import Record
from benchmarks.method import HEAD
from benchmarks.peers import PEERS
from drpo_kernels.backends.planning import workspace_bytes

GIB = 1 << 30
PEER_PARTS = ("peers", "slow_peers")
# log-probs to any loss from hidden states, and every gradient: what filters is another bargain
EXACT_PEERS = tuple(
    name for name, m in PEERS.items() if m.same_loss and m.wrt == HEAD and m.rounds != "gradient filter"
)
OTHER_HEADS = ("trl", "liger_scaled")


class NotMeasured(Exception):
    """Raised where a bar's number cannot be had; the message names what is missing."""


@dataclass(frozen=True)
class Results:
    """The lines of speed.jsonl, each with the part of the run that wrote it."""

    records: Sequence[Record]

    def of(self, part: str, method: str, dtype: str = "bfloat16", share: float = 1.0) -> list[Record]:
        wanted = {"part": part, "method": method, "dtype": dtype, "active_share": share}
        return [record for record in self.records if wanted.items() <= record.items()]

    def one(self, part: str, method: str, dtype: str = "bfloat16", share: float = 1.0) -> Record:
        """The timed record."""
        found = self.of(part, method, dtype, share)
        timed = [record for record in found if record["median_s"] is not None]
        if not timed:
            raise NotMeasured(f"{method}: {found[-1]['status'] if found else 'no record'}")
        return timed[-1]

    def seconds(self, part: str, method: str, dtype: str = "bfloat16", share: float = 1.0) -> float:
        return self.one(part, method, dtype, share)["median_s"]


@dataclass(frozen=True)
class Bar:
    """`value` gives the number and a remark, or raises `NotMeasured`; `at_least`: it must reach the limit, not stay
    below it.
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
    """`word` is PASS, MISS or "not measured"."""

    bar: Bar
    word: str
    number: str
    remark: str


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Of every bar; a CPU's records are a rehearsal, whose numbers are computed and not shown."""
    results, found = Results(records), []
    rehearsal = not all("gpu" in record["device"] for record in records)
    for bar in BARS:
        try:
            value, remark = bar.value(results)
        except NotMeasured as missing:
            found.append(Verdict(bar, "not measured", "–", str(missing)))
            continue
        if rehearsal:
            found.append(Verdict(bar, "not measured", "–", "rehearsal"))
        else:
            found.append(Verdict(bar, "PASS" if bar.met(value) else "MISS", bar.form.format(value), remark))
    return found


def ratio(method: str, base: str, results: Results, dtype: str = "bfloat16", share: float = 1.0) -> tuple[float, str]:
    """Of medians, both of the part "ours"; the base with every row active."""
    times = results.seconds("ours", method, dtype, share), results.seconds("ours", base, dtype)
    return times[0] / times[1], "{:.2f} ms over {:.2f} ms".format(*(1e3 * seconds for seconds in times))


def of_mixed(base: str, results: Results) -> tuple[float, str]:
    """The sparse path's median over another's, on the mixed entropies that sparse gradients are held to."""
    mixed = Results([record for record in results.records if record["inputs"] == "mixed"])
    sparse = mixed.one("sparse", SPARSE)
    seconds = mixed.seconds("sparse", base)
    error = max(sparse["gradient_error"].values())
    remark = f"{1e3 * sparse['median_s']:.2f} ms over {1e3 * seconds:.2f} ms, gradient error {error:.2%}"
    return sparse["median_s"] / seconds, remark


def bandwidth_share(dtype: str, results: Results) -> tuple[float, str]:
    """Of the copy's, counting one read and one write of the logits for both."""
    inverse, remark = ratio("policy_loss", "copy", results, dtype)
    return 1 / inverse, remark


def against(method: str, peers: Sequence[str], results: Results) -> tuple[float, str]:
    """The fastest peer's median over ours, both of one process, and the memory of both."""
    found, missing = [], []
    for peer in peers:
        part = next((part for part in PEER_PARTS if results.of(part, peer)), PEER_PARTS[0])
        try:
            theirs, ours = results.one(part, peer), results.one(part, method)
        except NotMeasured as reason:
            missing.append(str(reason))
        else:
            found.append((theirs["median_s"] / ours["median_s"], peer, ours, theirs))
    if not found:
        raise NotMeasured("; ".join(missing))
    value, peer, ours, theirs = min(found, key=lambda row: row[0])
    memory = " against ".join(_gib(record["peak_beyond_gradients_bytes"]) for record in (ours, theirs))
    return value, "; ".join([f"fastest: {peer}", f"beyond the gradients {memory}", *missing])


def beyond_allowance(method: str, trains_weight: bool, results: Results) -> tuple[float, str]:
    """The most over all T, in GiB, beyond gradients, workspace and what dW is granted."""
    records = results.of("memory", method)
    if not records:
        raise NotMeasured(f"{method}: no record")
    for record in records:
        if record["peak_beyond_gradients_bytes"] is None:
            raise NotMeasured(f"T={record['shape']['tokens']}: {record['status']}")
    worst = max(records, key=partial(_excess, trains_weight))
    tokens = [record["shape"]["tokens"] for record in records]
    remark = f"worst at T={worst['shape']['tokens']}, {_gib(worst['peak_beyond_gradients_bytes'])} beyond the gradients"
    return _excess(trains_weight, worst) / GIB, f"{remark}; T from {min(tokens)} to {max(tokens)}"


def _excess(trains_weight: bool, record: Record) -> int:
    tokens, hidden, vocab = (record["shape"][name] for name in ("tokens", "hidden", "vocab"))
    workspace = workspace_bytes(torch.device("cuda" if "gpu" in record["device"] else "cpu"), vocab, 4, None)
    retained = 2 * tokens * vocab if tokens <= 2 * hidden else 0
    granted = max(4 * vocab * hidden, retained) if trains_weight else 0
    return record["peak_beyond_gradients_bytes"] - workspace - granted


def _gib(count: int | None) -> str:
    return "?" if count is None else f"{count / GIB:.2f} GiB"


LOSS, LOGPROBS, WHOLE = "linear_policy_loss", "linear_token_logprobs", "gemms_whole"
FROZEN, SPARSE = "linear_policy_loss_frozen_head", "linear_policy_loss_sparse"
BARS = (
    Bar("all rows active, over three bare products", 1.10, partial(ratio, LOSS, WHOLE)),
    Bar("the same with a workspace of 1 GiB", 1.18, partial(ratio, f"{LOSS}_1gib", WHOLE)),
    Bar("the best exact peer's time over ours", 1.2, partial(against, LOSS, EXACT_PEERS), at_least=True),
    Bar(
        "peak beyond gradients and workspace, frozen head",
        0.1,
        partial(beyond_allowance, FROZEN, False),
        form="{:.3f} GiB",
    ),
    Bar("the same beyond what dW is granted", 0.1, partial(beyond_allowance, LOSS, True), form="{:.3f} GiB"),
    Bar("25 % of rows active, over dense", 0.29, partial(ratio, LOSS, LOSS, share=0.25)),
    Bar("bf16 logits, share of copy bandwidth", 0.80, partial(bandwidth_share, "bfloat16"), True, "{:.1%}"),
    Bar("fp32 logits, share of copy bandwidth", 0.60, partial(bandwidth_share, "float32"), True, "{:.1%}"),
    Bar("recompute with entropy, over four bare products", 1.12, partial(ratio, LOGPROBS, "gemms_recompute")),
    Bar("TRL's and verl's heads' time over the recompute path's", 1.0, partial(against, LOGPROBS, OTHER_HEADS), True),
    Bar("frozen head, over trained", 0.72, partial(ratio, FROZEN, LOSS)),
    Bar("sparse gradients of mixed entropies, over three bare products", 0.60, partial(of_mixed, WHOLE)),
)
