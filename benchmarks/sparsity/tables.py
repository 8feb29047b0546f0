"""What `sparse_grad` saves and costs in Markdown: what `benchmarks.report` writes into docs/sparse.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from benchmarks.harness.blocks import NOT_YET, Block, origin, origin_with_samples
from benchmarks.harness.measure import largest_error, ratio
from benchmarks.harness.mixes import MIXES
from benchmarks.harness.records import Record
from benchmarks.harness.tables import NOTHING, milliseconds, table, times
from benchmarks.harness.workloads import KINDS as LABELS

FLOOR, DENSE, SPARSE, TIGHT = (
    "gemms_whole", "linear_policy_loss", "linear_policy_loss_sparse", "linear_policy_loss_sparse_tight",
)  # fmt: skip
METHODS = (FLOOR, DENSE, SPARSE, TIGHT, "cce")
KINDS = (*MIXES, "trained", "random")
WAYS = {
    "rounded": "nothing left out, dlogits rounded to bf16",
    "dropped": "dropped",
    "renormalised": "the kept scaled up to its mass",
    "spread": "spread evenly (this package)",
    "sampled": "sampled, unbiased",
    "spread_twice": "spread evenly, with as many tokens as the sampled",
    "cce": "cut-cross-entropy's filter",
}
QUANTITIES = {"hidden": "dX", "weight": "dW", "rare": "rows of dW that are no target's"}
SIZE = "T={tokens} H={hidden} V={vocab}, "


def of_part(records: Sequence[Record], part: str) -> list[Record]:
    return [record for record in records if record["part"] == part]


def by_kind(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """Kind of inputs -> method -> record, where sparse gradients have a time."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["inputs"] in KINDS and record["method"] in METHODS:
            found.setdefault(record["inputs"], {})[record["method"]] = record
    return {kind: methods for kind, methods in found.items() if SPARSE in methods and methods[SPARSE]["median_s"]}


def speed(records: Sequence[Record]) -> Iterator[str]:
    """A row per kind of inputs and τ."""
    groups = by_kind(records)
    first = next(iter(groups.values()))[SPARSE]
    yield SIZE.format(**first["shape"]) + f"{first['dtype']}:"
    yield ""
    header = (
        "rows", "entropy: median, 80 %", "τ", "sparse rows", "tokens", "gradient error", "dense, ms", "sparse, ms",
        "× dense", "× three GEMMs", "beyond gradients: dense, sparse",
    )  # fmt: skip
    rows = []
    for kind, methods in groups.items():
        nats = ", ".join(f"{nats:.2g}" for nats in methods[SPARSE]["entropy_quantiles"][:2])
        for name, tolerance in ((SPARSE, "0.01"), (TIGHT, "0.003")):
            if name in methods:
                rows.append((LABELS[kind], nats, tolerance, *_speed_cells(methods[name], methods)))
    yield table(header, rows)


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


def cce(records: Sequence[Record]) -> str:
    """What cut-cross-entropy did on the same inputs."""
    rows = []
    for kind, methods in by_kind(records).items():
        record = methods.get("cce")
        if record and record["median_s"] is None:
            rows.append((LABELS[kind], record["status"], NOTHING, NOTHING))
        elif record:
            relative = times(record["median_s"] / methods[DENSE]["median_s"])
            rows.append((LABELS[kind], milliseconds(record), relative, f"{largest_error(record):.1e}"))
    return table(("rows", "cut-cross-entropy, ms", "× our dense", "gradient error"), rows)


def ways(records: Sequence[Record]) -> Iterator[str]:
    """A table per kind of inputs; errors where the weight's rows have no common mean, and where they do."""
    found = {(record["inputs"], record["common_mean"], record["way"]): record for record in records}
    header = ("what is left out is", "tokens per row", *QUANTITIES.values(), "dX where rows of W share a mean")
    for kind in dict.fromkeys(record["inputs"] for record in records):
        rows = []
        for way, label in WAYS.items():
            record, shared = found[kind, False, way], found[kind, True, way]
            tokens = NOTHING if "entries" not in record else f"{record['entries']:.0f}"
            if "blocks" in record:
                label += f" ({record['blocks']:.0%} of the blocks kept)"
            errors = [f"{record['errors'][quantity]:.2%}" for quantity in QUANTITIES]
            rows.append((label, tokens, *errors, f"{shared['errors']['hidden']:.2%}"))
        yield f"{LABELS[kind]}, " + SIZE.format(**records[0]["shape"]) + f"τ = {records[0]['tolerance']}:"
        yield ""
        yield table(header, rows)
        yield ""


def regimes(records: Sequence[Record]) -> Iterator[str]:
    """Errors over τ: the larger of dX's and dW's, each beside what rounding dlogits to bf16 makes of the same."""
    tolerances = list(records[0]["over_tolerance"])
    rows = []
    for record in records:
        cells = (f"{_worst(f['errors'])} ({f['drpo/sparse_share']:.0%})" for f in record["over_tolerance"].values())
        rows.append((record["label"], record["dtype"], _worst(record["rounded"]), *cells))
    yield table(("regime", "inputs", "bf16 dlogits", *(f"τ = {tolerance}" for tolerance in tolerances)), rows, left=2)


def _worst(errors: dict[str, float]) -> str:
    return f"{max(errors.values()):.2%}"


def demo(records: Sequence[Record]) -> Iterator[str]:
    """A sentence and a table over τ."""
    (record,) = records
    median, most, largest = record["entropy_quantiles"]
    yield SIZE.format(**record["shape"]) + (
        f"float32; entropies of a median of {median:.2g} nat, 80 % below {most:.2g}, all below {largest:.2g}. "
        f"The dense path takes {1e3 * record['dense_s']:.2f} ms."
    )
    yield ""
    rows = []
    for tolerance, found in record["over_tolerance"].items():
        errors = (f"{found['errors'][name]:.2%}" for name in ("hidden", "weight"))
        share, tokens = f"{found['drpo/sparse_share']:.0%}", f"{found['drpo/sparse_entries']:.1f}"
        rows.append((tolerance, share, tokens, *errors, f"{1e3 * found['median_s']:.2f}"))
    yield table(("τ", "sparse rows", "tokens", "error of dX", "error of dW", "sparse, ms"), rows, left=0)


def learning(records: Sequence[Record]) -> Iterator[str]:
    """Mean rewards and the paired difference with its standard error, in points."""
    tolerance = max(record["sparse_grad"] for record in records)
    rows = []
    for name in ("sampled", "greedy"):
        points = {(record["seed"], record["sparse_grad"]): 100 * record[name] for record in records}
        seeds = sorted({seed for seed, _ in points})
        exact, sparse = ([points[seed, tau] for seed in seeds] for tau in (0.0, tolerance))
        paired = [b - a for a, b in zip(exact, sparse, strict=True)]
        error = statistics.stdev(paired) / len(paired) ** 0.5
        means = (f"{statistics.mean(values):.1f} %" for values in (exact, sparse))
        rows.append((f"{name}, {len(seeds)} seeds", *means, f"{statistics.mean(paired):+.1f} ± {error:.1f}"))
    header = ("reward on held-out problems", "exact", f"`sparse_grad={tolerance:g}`", "paired difference, points")
    yield table(header, rows)


def render_speed(records: Sequence[Record]) -> str:
    records = of_part(records, "speed")
    if not by_kind(records):
        return NOT_YET
    return "\n".join([*speed(records), "", cce(records), "", origin_with_samples(records)])


def render_part(lines: Callable[[Sequence[Record]], Iterator[str]], records: Sequence[Record]) -> str:
    """The part that is named as the function."""
    records = of_part(records, lines.__name__)
    return "\n".join([*lines(records), "", origin(records[:1])]) if records else NOT_YET


RESULTS, PAGE = "sparsity.jsonl", "docs/sparse.md"
BLOCKS = (
    Block("sparse-speed", "sparsity", RESULTS, PAGE, render_speed, plots="benchmarks.sparsity.plots"),
    *(
        Block(f"sparse-{lines.__name__}", "sparsity", RESULTS, PAGE, partial(render_part, lines))
        for lines in (ways, regimes, demo, learning)
    ),
)
