"""What `sparse_grad` saves and costs in Markdown: what `benchmarks.report` writes into docs/sparse.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from benchmarks.harness.blocks import NOT_YET, Block, origin, origin_with_samples
from benchmarks.harness.measure import largest_error, ratio
from benchmarks.harness.mixes import MIXES
from benchmarks.harness.records import Record
from benchmarks.harness.runs import latest
from benchmarks.harness.tables import NOTHING, milliseconds, table, times
from benchmarks.harness.workloads import KINDS as LABELS
from benchmarks.harness.workloads import MODELS
from drpo_kernels.backends.sparse.contract import entry_limit

FLOOR, DENSE, SPARSE, TIGHT = (
    "gemms_whole", "linear_policy_loss", "linear_policy_loss_sparse", "linear_policy_loss_sparse_tight",
)  # fmt: skip
METHODS = (FLOOR, DENSE, SPARSE, TIGHT)
REAL_KINDS = tuple(name for name in LABELS if name.startswith("real"))
MADE_UP_KINDS = (*MIXES, "trained", "random")
TOLERANCES = {SPARSE: "0.01", TIGHT: "0.003"}
PAYS = 0.95  # of the dense path's time, at most, for what is said to pay
SIZE = "T={tokens} H={hidden} V={vocab}, "


def of_part(records: Sequence[Record], part: str) -> list[Record]:
    return [record for record in records if record["part"] == part]


def by_kind(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """Return {kind of inputs: {method: record}} where sparse gradients have a time."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["inputs"] in REAL_KINDS + MADE_UP_KINDS and record["method"] in METHODS:
            found.setdefault(record["inputs"], {})[record["method"]] = record
    return {kind: methods for kind, methods in found.items() if SPARSE in methods and methods[SPARSE]["median_s"]}


def speed(records: Sequence[Record]) -> Iterator[str]:
    """Yield a table with a row per kind of inputs and τ."""
    groups = by_kind(records)
    first = next(iter(groups.values()))[SPARSE]
    sizes = list(dict.fromkeys(methods[SPARSE]["shape"]["tokens"] for methods in groups.values()))
    tokens = " or ".join(map(str, sizes)) + (" (a single topic)" if len(sizes) > 1 else "")
    yield SIZE.format(**first["shape"] | {"tokens": tokens}) + f"{first['dtype']}:"
    yield ""
    header = (
        "rows", "entropy: median, 80 %", "τ", "sparse rows", "entries", "gradient error", "dense, ms", "sparse, ms",
        "× dense", "× three GEMMs", "beyond gradients: dense, sparse",
    )  # fmt: skip
    rows = []
    for kind, methods in groups.items():
        nats = ", ".join(f"{nats:.2g}" for nats in methods[SPARSE]["entropy_quantiles"][:2])
        for name, tolerance in TOLERANCES.items():
            if name in methods:
                rows.append((LABELS[kind], nats, tolerance, *_speed_cells(methods[name], methods)))
    yield table(header, rows)
    yield ""


def _speed_cells(record: Record, methods: dict[str, Record]) -> tuple[str, ...]:
    if record["median_s"] is None:
        return (record["status"], *[NOTHING] * 7)
    metrics, dense = record["metrics"], methods.get(DENSE)
    sizes = [each and each["peak_beyond_gradients_bytes"] for each in (dense, record)]
    return (
        f"{metrics['drpo/sparse_share']:.0%}",
        f"{metrics['drpo/sparse_entries']:.0f}" if metrics["drpo/sparse_share"] else NOTHING,
        f"{largest_error(record):.2%}",
        milliseconds(dense) if dense and dense["median_s"] else NOTHING,
        milliseconds(record),
        *(times(ratio(record, base, list(methods.values()))) for base in (DENSE, FLOOR)),
        ", ".join(NOTHING if size is None else f"{size / 2**20:.0f}" for size in sizes) + " MiB",
    )


def render_regimes(records: Sequence[Record]) -> str:
    """Render errors over τ: the larger of dX's and dW's, each beside the error of the same from rounding dlogits to
    bf16.
    """
    records, rows = of_part(records, "regimes"), []
    if not records:
        return NOT_YET
    for record in records:
        cells = (f"{_worst(f['errors'])} ({f['drpo/sparse_share']:.0%})" for f in record["over_tolerance"].values())
        rows.append((record["label"], record["dtype"], _worst(record["rounded"]), *cells))
    header = ("regime", "inputs", "bf16 dlogits", *(f"τ = {tau}" for tau in records[0]["over_tolerance"]))
    return f"{table(header, rows, left=2)}\n\n{origin(records[:1])}"


def _worst(errors: dict[str, float]) -> str:
    return f"{max(errors.values()):.2%}"


def render_learning(records: Sequence[Record]) -> str:
    """Render mean rewards and the paired difference with its standard error, in points."""
    records, rows = of_part(records, "learning"), []
    if not records:
        return NOT_YET
    rewards = pd.DataFrame(records).pivot(index="seed", columns="sparse_grad", values=["sampled", "greedy"]) * 100
    tolerance = max(record["sparse_grad"] for record in records)
    for name in ("sampled", "greedy"):
        exact, sparse = rewards[name, 0.0], rewards[name, tolerance]
        paired = sparse - exact
        means = (f"{values.mean():.1f} %" for values in (exact, sparse))
        rows.append((f"{name}, {len(paired)} seeds", *means, f"{paired.mean():+.1f} ± {paired.sem():.1f}"))
    header = ("reward on held-out problems", "exact", f"`sparse_grad={tolerance:g}`", "paired difference, points")
    return f"{table(header, rows)}\n\n{origin(records[:1])}"


def render_speed(records: Sequence[Record]) -> str:
    return _render_timed(of_part(records, "speed"))


def _render_timed(records: Sequence[Record]) -> str:
    if not by_kind(records):
        return NOT_YET
    return "\n".join([*speed(records), origin_with_samples(records)])


def render_verdict(records: Sequence[Record]) -> str:
    """Say whether a sparse gradient pays on a real model's tokens, at each τ, and what it takes on each topic."""
    groups = by_kind(of_part(records, "real"))
    if "real" not in groups:
        return NOT_YET
    record, found, pays = groups["real"][SPARSE], [], False
    for name, tolerance in TOLERANCES.items():
        spent = {kind: ratio(methods[name], DENSE, list(methods.values())) for kind, methods in groups.items()}
        topics = {LABELS[kind].partition(", ")[2]: x for kind, x in spent.items() if kind != "real"}
        share = groups["real"][name]["metrics"]["drpo/sparse_share"]
        pays = pays or spent["real"] <= PAYS
        found.append(
            f"at τ = {tolerance} {share:.0%} of the rows are sparse, and a call takes {times(spent['real'])} the dense "
            f"path's time ({', '.join(f'{topic} {times(x)}' for topic, x in topics.items())})"
        )
    where = "{tokens} tokens of SmolLM2-135M, {dtype}, {cores} CPU cores, a mean entropy of {nats:.1f} nat".format(
        **record["shape"], dtype=record["dtype"], cores=record["device"]["cores"], nats=record["entropy_nats"]
    )
    start = f"On a real model's own tokens a sparse gradient {'pays' if pays else 'does not pay'} on a CPU"
    return f"**{start}**: {'; '.join(found)}. Measured on {where}."


def render_real(records: Sequence[Record]) -> str:
    return _render_timed(of_part(records, "real"))


def render_tails(records: Sequence[Record]) -> str:
    """Render how many entries a row needs, with a row per range of entropies."""
    records, rows = of_part(records, "tails"), []
    if not records:
        return NOT_YET
    limit = entry_limit(MODELS["SmolLM2-135M"].vocab, "cpu")
    tolerances = list(dict.fromkeys(record["tolerance"] for record in records))
    for low, high in dict.fromkeys((record["from"], record["to"]) for record in records):
        found = [r for r in records if (r["from"], r["to"]) == (low, high)]
        name = f"over {low:g} nat" if high > 10 else f"{low:g} to {high:g} nat"
        cells = ("{} ({})".format(*record["needed"]) for record in found)
        rows.append((name, f"{found[0]['rows'] / found[0]['of']:.0%}", *cells))
    header = ("entropy of the row", "rows", *(f"entries at τ = {tau:g}: median (90 %)" for tau in tolerances))
    return "\n\n".join([
        f"A row is sparse if it needs at most {limit} entries beside its target:", table(header, rows),
        origin(records[:1]),
    ])  # fmt: skip


def render_gpu(records: Sequence[Record]) -> str:
    """Render the same for a GPU, from the lines of its run."""
    records = of_part(latest(records), "sparse")
    if not by_kind(records):
        return NOT_YET
    absent = [r for r in records if r["method"] == SPARSE and r["median_s"] is None]
    lines = list(speed(records))
    if absent:
        reasons = "; ".join(f"{LABELS[record['inputs']]} ({record['status']})" for record in absent)
        lines += [f"Without a time: {reasons}.", ""]
    return "\n".join([*lines, origin_with_samples(records)])


RESULTS, PAGE = "sparsity.jsonl", "docs/sparse.md"
REAL = "smollm/sparsity.jsonl"
BLOCKS = (
    Block("sparse-verdict", "sparsity", REAL, PAGE, render_verdict, NOT_YET),
    Block("sparse-real", "sparsity", REAL, PAGE, render_real, NOT_YET),
    Block("sparse-tails", "sparsity", REAL, PAGE, render_tails, NOT_YET),
    Block("sparse-speed", "sparsity", RESULTS, PAGE, render_speed, plots="benchmarks.sparsity.plots"),
    Block("sparse-regimes", "sparsity", RESULTS, PAGE, render_regimes),
    Block("sparse-learning", "sparsity", RESULTS, PAGE, render_learning),
    Block("sparse-gpu", "speed", "gpu/speed.jsonl", PAGE, render_gpu, NOT_YET),
)
