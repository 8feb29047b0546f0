"""The speed benchmark in Markdown: what `benchmarks.report` writes into README.md and docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.harness.blocks import Block, origin_with_samples
from benchmarks.harness.exact import WRONG
from benchmarks.harness.measure import largest_error, ratio
from benchmarks.harness.records import Record
from benchmarks.harness.tables import NOTHING, milliseconds, size, table, three_figures, times
from benchmarks.harness.workloads import KINDS

HEADER = (
    "method", "median ms (min to max)", "× its floor", "× eager", "peak extra memory", "beyond gradients",
    "gradient error",
)  # fmt: skip
LABELS = {
    "gemms_whole": "floor: three GEMMs, unchunked",
    "gemms": "three GEMMs, in chunks",
    "gemms_frozen": "floor of a frozen head: two GEMMs",
    "gemms_recompute": "floor of recomputation: four GEMMs",
    "copy": "floor: one copy of the logits",
    "eager": "eager PyTorch",
    "eager_compiled": "eager PyTorch under `torch.compile`",
    "eager_from_logits": "eager PyTorch from logits",
    "linear_policy_loss": "`linear_policy_loss`",
    "linear_policy_loss_bf16_logits": "`linear_policy_loss`, bf16 logits",
    "linear_policy_loss_not_compacted": '`linear_policy_loss`, `compact="none"`',
    "linear_policy_loss_frozen_head": "`linear_policy_loss`, frozen head",
    "linear_policy_loss_main_grad": "`linear_policy_loss`, `main_grad`",
    "linear_policy_loss_sparse": "`linear_policy_loss`, `sparse_grad=0.01`",
    "linear_policy_loss_sparse_tight": "`linear_policy_loss`, `sparse_grad=0.003`",
    "linear_token_logprobs": "`linear_token_logprobs` + objective",
    "batch_invariant": "`linear_policy_loss`, `batch_invariant=True`",
    "policy_loss": "`policy_loss`",
    "policy_loss_inplace": "`policy_loss`, in place",
    "trl": "TRL's fused head",
    "liger_scaled": "Liger's fused scaled CE, PyTorch",
    "liger_scaled_sm90": "Liger's fused scaled CE, Hopper kernels",
    "liger_grpo": "Liger's chunked GRPO loss",
    "liger_triton_grpo": "Liger's Triton GRPO loss",
    "cce": "cut-cross-entropy",
    "cce_exact": "cut-cross-entropy, exact",
    "torch_linear": "PyTorch's `linear_cross_entropy`",
}
PLOTS = {
    "time": "Time of forward and backward against the number of tokens",
    "memory": "Peak extra memory against the number of tokens",
}
EAGER = {"hidden": "eager", "logits": "eager_from_logits"}


class Setting(NamedTuple):
    """What the records of one table have in common."""

    model: str
    tokens: int
    inputs: str
    dtype: str
    takes: str


def setting_of(record: Record) -> Setting:
    return Setting(record["workload"], record["shape"]["tokens"], record["inputs"], record["dtype"], record["takes"])


def by_setting(records: Sequence[Record]) -> dict[Setting, list[Record]]:
    """Tables in the order in which they were measured."""
    groups: dict[Setting, list[Record]] = {}
    for record in records:
        groups.setdefault(setting_of(record), []).append(record)
    return groups


def swept(records: Sequence[Record]) -> dict[int, list[Record]]:
    """By T, the first record's setting and those that differ from it in T alone."""
    main = setting_of(records[0])
    groups = by_setting(records)
    return {
        setting.tokens: groups[setting] for setting in sorted(groups) if setting._replace(tokens=main.tokens) == main
    }


def pictures(records: Sequence[Record]) -> list[str]:
    """Of `PLOTS`, those for which there is something to show: all where several T were measured."""
    return list(PLOTS) if len(swept(records)) > 1 else []


def label(record: Record) -> str:
    name = LABELS.get(record["method"], record["method"])
    return name if record["same_loss"] else name + " (same cost, other loss)"


def dense(group: Sequence[Record]) -> list[Record]:
    """With all rows active, each method once: what has a time before what has none."""
    found: dict[str, Record] = {}
    for record in group:
        if record["active_share"] == 1:
            known = found.setdefault(record["method"], record)
            if known["median_s"] is None and record["median_s"] is not None:
                found[record["method"]] = record
    return list(found.values())


def render_all(records: Sequence[Record]) -> str:
    """Settings of which nothing has a time are left out."""
    groups = [group for group in by_setting(records).values() if any(r["median_s"] for r in group)]
    return "\n".join(line for group in groups for line in section(group))


def section(group: Sequence[Record]) -> Iterator[str]:
    """A table of what has a time or should have one, a sentence about the rest, and a table of the shares."""
    yield f"{title(group[0])}:"
    yield ""
    records = dense(group)
    absent = [r for r in records if r["median_s"] is None and r["status"] != WRONG]
    yield table(HEADER, [_cells(record, group) for record in records if record not in absent])
    yield ""
    if absent:
        yield "No numbers: " + "; ".join(f"{label(record)} ({record['status']})" for record in absent) + "."
        yield ""
    yield from _shares(group)


def _shares(group: Sequence[Record]) -> Iterator[str]:
    """Medians by active share, beside their ratio to `linear_policy_loss` with all rows active."""
    timed = {(r["active_share"], r["method"]): r for r in group if r["median_s"] is not None}
    shares = sorted({share for share, _ in timed if share < 1}, reverse=True)
    methods = dict.fromkeys(method for share, method in timed if share < 1)
    if not shares:
        return
    rows = []
    for share in shares:
        records = [timed.get((share, method)) for method in methods]
        rows.append((f"{share:.0%}", *(NOTHING if r is None else _median_and_ratio(r, group) for r in records)))
    yield table(("rows with an advantage", *(f"{LABELS.get(name, name)}, ms" for name in methods)), rows, left=0)
    yield ""


def _median_and_ratio(record: Record, group: Sequence[Record]) -> str:
    median = three_figures(1e3 * record["median_s"])
    return f"{median} ({times(ratio(record, 'linear_policy_loss', group))} of all rows)"


def title(record: Record) -> str:
    shape = "T={tokens} H={hidden} V={vocab}".format(**record["shape"])
    entropy = "" if record["entropy_nats"] is None else f" (mean entropy {record['entropy_nats']:.2g} nat)"
    start = "from hidden states" if record["takes"] == "hidden" else "from logits"
    model = "" if record["workload"].startswith("cpu") else f"{record['workload']}, "
    return f"{model}{shape}, {record['dtype']}, {start}, {KINDS[record['inputs']]}{entropy}"


def _cells(record: Record, group: Sequence[Record]) -> tuple[str, ...]:
    if record["median_s"] is None:
        return (label(record), record["status"], *[NOTHING] * 4, _error(record))
    return (
        label(record),
        milliseconds(record),
        times(ratio(record, record["held_to"], group)),
        times(ratio(record, EAGER[record["takes"]], group)),
        size(record["peak_extra_bytes"]),
        size(record["peak_beyond_gradients_bytes"]),
        _error(record),
    )


def _error(record: Record) -> str:
    error = largest_error(record)
    if error is None:
        return NOTHING
    text = f"{100 * error:.2g} %" if error >= 1e-4 else f"{error:.0e}"
    return text if record["status"] in ("ok", WRONG) else f"{text} ({record['rounds_away']})"


def render(records: Sequence[Record]) -> str:
    """The README's: the tables of the workload on which everything was measured, the plots, and their origin."""
    first = setting_of(records[0])
    groups = [group for setting, group in by_setting(records).items() if setting[:-1] == first[:-1]]
    lines = [line for group in groups for line in section(group)]
    images = [f"![{PLOTS[name]}](bench_results/cpu_{name}.png)" for name in pictures(records)]
    return "\n".join([*lines, *images, "", origin_with_samples(records)])


def render_every(records: Sequence[Record]) -> str:
    return "\n".join([render_all(records), origin_with_samples(records)])


BLOCKS = (
    Block("cpu", "speed", "cpu.jsonl", "README.md", render, plots="benchmarks.speed.plots"),
    Block("every-cpu", "speed", "cpu.jsonl", "docs/benchmarks.md", render_every),
)
