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
    yield "T={tokens} H={hidden} V={vocab}, ".format(**first["shape"]) + f"{first['dtype']}:"
    yield ""
    header = (
        "rows", "entropy: median, 80 %", "τ", "sparse rows", "tokens", "gradient error", "dense, ms", "sparse, ms",
        "× dense", "× three GEMMs", "beyond gradients: dense, sparse",
    )  # fmt: skip
    yield table(header, [
        (LABELS[kind], _nats(methods[SPARSE]), tolerance, *_speed_cells(name, methods))
        for kind, methods in groups.items()
        for name, tolerance in ((SPARSE, "0.01"), (TIGHT, "0.003"))
        if name in methods
    ])  # fmt: skip


def _nats(record: Record) -> str:
    return ", ".join(f"{nats:.2g}" for nats in record["entropy_quantiles"][:2])


def _speed_cells(name: str, methods: dict[str, Record]) -> tuple[str, ...]:
    record, group = methods[name], list(methods.values())
    if record["median_s"] is None:
        return (record["status"], *[NOTHING] * 7)
    metrics = record["metrics"]
    relative = (ratio(record, base, group) for base in (DENSE, FLOOR))
    dense = methods.get(DENSE, {"median_s": None, "peak_beyond_gradients_bytes": None})
    sizes = (each["peak_beyond_gradients_bytes"] for each in (dense, record))
    return (
        f"{metrics['drpo/sparse_share']:.0%}",
        f"{metrics['drpo/sparse_entries']:.0f}" if metrics["drpo/sparse_share"] else NOTHING,
        f"{largest_error(record):.2%}",
        milliseconds(dense) if dense["median_s"] else NOTHING,
        milliseconds(record),
        *map(times, relative),
        ", ".join(NOTHING if size is None else f"{size / 2**20:.0f}" for size in sizes) + " MiB",
    )


def cce(records: Sequence[Record]) -> str:
    """What cut-cross-entropy did on the same inputs."""
    groups = {kind: methods for kind, methods in by_kind(records).items() if "cce" in methods}
    rows = []
    for kind, methods in groups.items():
        record = methods["cce"]
        if record["median_s"] is None:
            rows.append((LABELS[kind], record["status"], NOTHING, NOTHING))
            continue
        relative = record["median_s"] / methods[DENSE]["median_s"]
        rows.append((LABELS[kind], milliseconds(record), times(relative), f"{largest_error(record):.1e}"))
    return table(("rows", "cut-cross-entropy, ms", "× our dense", "gradient error"), rows)


def ways(records: Sequence[Record]) -> Iterator[str]:
    """A table per kind of inputs; errors where the weight's rows have no common mean, and where they do."""
    shape = records[0]["shape"]
    for kind in dict.fromkeys(record["inputs"] for record in records):
        plain, shared = (
            {r["way"]: r for r in records if r["inputs"] == kind and r["common_mean"] is common}
            for common in (False, True)
        )
        size = "T={tokens} H={hidden} V={vocab}".format(**shape)
        yield f"{LABELS[kind]}, {size}, τ = {records[0]['tolerance']}:"
        yield ""
        rows = []
        for way, label in WAYS.items():
            record = plain[way]
            tokens = NOTHING if "entries" not in record else f"{record['entries']:.0f}"
            if "blocks" in record:
                label += f" ({record['blocks']:.0%} of the blocks kept)"
            errors = [f"{record['errors'][quantity]:.2%}" for quantity in QUANTITIES]
            rows.append((label, tokens, *errors, f"{shared[way]['errors']['hidden']:.2%}"))
        header = ("what is left out is", "tokens per row", *QUANTITIES.values(), "dX where rows of W share a mean")
        yield table(header, rows)
        yield ""


def regimes(records: Sequence[Record]) -> Iterator[str]:
    """Errors over τ: the larger of dX's and dW's, each beside what rounding dlogits to bf16 makes of the same."""
    tolerances = list(records[0]["over_tolerance"])
    rows = []
    for record in records:
        found = [record["over_tolerance"][tolerance] for tolerance in tolerances]
        cells = (f"{_worst(f['errors'])} ({f['drpo/sparse_share']:.0%})" for f in found)
        rows.append((record["label"], record["dtype"], _worst(record["rounded"]), *cells))
    yield table(("regime", "inputs", "bf16 dlogits", *(f"τ = {tolerance}" for tolerance in tolerances)), rows, left=2)


def _worst(errors: dict[str, float]) -> str:
    return f"{max(errors.values()):.2%}"


def within(record: Record, tolerance: str, times: float = 1.0) -> bool:
    """Whether dX and dW are no further off than `times` what rounding dlogits to bf16 does."""
    errors = record["over_tolerance"][tolerance]["errors"]
    return all(error <= times * record["rounded"][name] for name, error in errors.items())


def demo(records: Sequence[Record]) -> Iterator[str]:
    """A sentence and a table over τ."""
    (record,) = records
    median, most, largest = record["entropy_quantiles"]
    yield "T={tokens} H={hidden} V={vocab}, ".format(**record["shape"]) + (
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
    seeds = dict.fromkeys(record["seed"] for record in records)
    tolerance = max(record["sparse_grad"] for record in records)
    rows = []
    for name in ("sampled", "greedy"):
        exact, sparse = (
            [100 * next(r[name] for r in records if (r["seed"], r["sparse_grad"]) == (seed, t)) for seed in seeds]
            for t in (0.0, tolerance)
        )
        paired = [b - a for a, b in zip(exact, sparse, strict=True)]
        error = statistics.stdev(paired) / len(paired) ** 0.5
        means = (f"{statistics.mean(values):.1f} %" for values in (exact, sparse))
        rows.append((f"{name}, {len(seeds)} seeds", *means, f"{statistics.mean(paired):+.1f} ± {error:.1f}"))
    header = ("reward on held-out problems", "exact", f"`sparse_grad={tolerance:g}`", "paired difference, points")
    yield table(header, rows)


RUNS = {
    "sparse": "`sparse_grad={tau:g}`",
    "slower": "exact, learning rate lower by {tau:.0%}: **the bound**",
    "bf16": "exact, hidden states and head in bf16",
    "noise": "exact, dX and dW with random noise of 0.18 %",
}


def longrun(records: Sequence[Record]) -> Iterator[str]:
    """A row per run, and how much of the sparse one was sparse."""
    by_name = {record["run"]: record for record in records}
    sparse = by_name["sparse"]
    shares = sparse["sparse_share"]
    yield (
        "{steps} steps, V={vocab} H={hidden}, ".format(**sparse["size"])
        + f"a mean |loss| of {sparse['loss_scale']:.2f}; {sum(shares) / len(shares):.0%} of the rows were sparse, "
        f"{shares[0]:.0%} at the beginning and {shares[-1]:.0%} at the end."
    )
    yield ""
    rows = []
    for name, label in RUNS.items():
        record = by_name[name]
        error = f"{record['gradient_error_mean']:.2%} ({record['gradient_error_max']:.2%})"
        gaps = f"{record['smoothed_gap_max']:.1e}", f"{record['weight_gap']:.2%}"
        rows.append((label.format(tau=record["sparse_grad"]), error, *gaps))
    header = ("run", "gradient error, mean (max)", "furthest from the exact loss", "weights: distance over way")
    yield table(header, rows)


def render_speed(records: Sequence[Record]) -> str:
    records = of_part(records, "speed")
    if not by_kind(records):
        return NOT_YET
    return "\n".join([*speed(records), "", cce(records), "", origin_with_samples(records)])


def render_part(part: str, lines: Callable[[Sequence[Record]], Iterator[str]], records: Sequence[Record]) -> str:
    records = of_part(records, part)
    return "\n".join([*lines(records), "", origin(records[:1])]) if records else NOT_YET


def render_longrun(records: Sequence[Record]) -> str:
    return "\n".join([*longrun(records), "", origin(records[:1])])


PARTS = {"ways": ways, "regimes": regimes, "demo": demo, "learning": learning}
RESULTS, PAGE = "sparsity.jsonl", "docs/sparse.md"
BLOCKS = (
    Block("sparse-speed", "sparsity", RESULTS, PAGE, render_speed, plots="benchmarks.sparsity.plots"),
    *(
        Block(f"sparse-{part}", "sparsity", RESULTS, PAGE, partial(render_part, part, lines))
        for part, lines in PARTS.items()
    ),
    Block("sparse-longrun", "longrun_sparse", "longrun_sparse.jsonl", PAGE, render_longrun),
)
