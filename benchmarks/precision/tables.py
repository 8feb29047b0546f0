"""The precision study in Markdown: what `benchmarks.report` writes into docs/precision.md, from the records alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.harness.blocks import NOT_YET, Block, origin
from benchmarks.harness.records import Record
from benchmarks.harness.tables import NOTHING, table, two_figures
from benchmarks.precision.mismatch import BOUND
from benchmarks.precision.recipes import RECIPES

# What pages call the bars. The last two compare fp16 with bf16 and have no column in the table.
BARS = {
    "logprob": "log π", "ratio": "ratio", "hidden": "dX", "weight": "dW", "GPU hidden": "dX on a GPU",
    "GPU weight": "dW on a GPU", "fp16 hidden": "fp16's dX over bf16's", "fp16 weight": "fp16's dW over bf16's",
}  # fmt: skip
TABULATED = tuple(BARS)[:6]
QUANTITIES = {
    "logprob": "log π", "ratio": "ratio", "prob_shift": "π - μ", "weight_0.2": "w, δ = 0.2",
    "weight_12.5": "w, δ = 12.5", "loss": "loss", "hidden": "dX", "weight": "dW",
}  # fmt: skip
HEADLINES = ("real", "moderate")  # tables of a single regime show the first of these that was run
P99, NORMWISE = 1, 2  # places in [max, p99, norm-wise relative]
STATISTIC = dict.fromkeys(QUANTITIES, P99) | {"hidden": NORMWISE, "weight": NORMWISE}  # what pages show
RARE, LIKELY = 0.1, 0.7  # probabilities under and over which a token is called so
MOVES = {"ratio": "|r - 1|", "prob_shift": "|π - μ|"}
HEADS = {"nothing": "bf16", "weight": "fp8 weight", "hidden": "fp8 hidden", "both": "fp8 weight and hidden"}


def of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def labels_of(records: Sequence[Record]) -> dict[str, str]:
    """Return {regime: its label}, in the order of the run."""
    return {record["regime"]: record["label"] for record in of_kind(records, "regime")}


def by_recipe(records: Sequence[Record], quantity: str) -> dict[str, dict[str, float]]:
    """Return {recipe: {regime: error}} with the errors that pages show, the rounding of the operands included."""
    found: dict[str, dict[str, float]] = {}
    for record in of_kind(records, "errors"):
        errors = record["total"] or record["errors"] or {}
        if quantity in errors:
            found.setdefault(record["recipe"], {})[record["regime"]] = errors[quantity][STATISTIC[quantity]]
    return found


def headline(records: Sequence[Record]) -> str:
    """Return the regime that tables of a single regime show."""
    return next((name for name in HEADLINES if name in labels_of(records)), NOTHING)


def render_choices(records: Sequence[Record]) -> str:
    """Render all quantities on the headline regime, and where the run comes from."""
    chosen = headline(records)
    values = {quantity: by_recipe(records, quantity) for quantity in QUANTITIES}
    rows = []
    for record in of_kind(records, "errors"):
        if record["regime"] == chosen:
            found = [values[quantity].get(record["recipe"], {}).get(chosen) for quantity in QUANTITIES]
            cells = [NOTHING if value is None else two_figures(value) for value in found]
            if record["status"] != "ok":
                cells[0] = record["status"]
            rows.append((RECIPES[record["recipe"]].label, *cells))
    return table(("recipe", *QUANTITIES.values()), rows) + "\n\n" + origin(records[:1])


def render_bars(records: Sequence[Record]) -> str:
    """Render value ≤ bound for each bar of the default path, with a row per regime."""
    found = {(record["regime"], record["bar"]): _bar(record) for record in of_kind(records, "bar")}
    rows = []
    for facts in of_kind(records, "regime"):
        # A run that ended early has regimes without bars.
        cells = [found.get((facts["regime"], bar), NOTHING) for bar in TABULATED]
        if set(cells) != {NOTHING}:
            shape = "{tokens} × {hidden} × {vocab}".format(**facts["shape"])
            rows.append((facts["label"], shape, two_figures(facts["largest_logit"]), *cells))
    header = ("regime", "T × H × V", "max abs logit", *(BARS[bar] for bar in TABULATED))
    regime, where = ("real", "") if ("real", "fp16 hidden") in found else ("V151936", " at V = 151936")
    half = [found.get((regime, f"fp16 {name}")) for name in ("hidden", "weight")]
    note = f"\n\nfp16 gradients against bf16's{where}: dX {half[0]}, dW {half[1]}." if all(half) else ""
    return table(header, rows) + note


def _bar(record: Record) -> str:
    text = f"{two_figures(record['value'])} ≤ {two_figures(record['bound'])}"
    return text if record["met"] else f"**{text.replace('≤', '>')}**"


def render_rounding(records: Sequence[Record]) -> str:
    """Render errors with and without the rounding of the operands, for recipes that round them."""
    rows, chosen = [], headline(records)
    for record in of_kind(records, "errors"):
        if record["regime"] == chosen and record["total"]:
            pairs = ((name, record[key]) for name in ("ratio", "weight") for key in ("total", "errors"))
            cells = (two_figures(errors[name][STATISTIC[name]]) for name, errors in pairs)
            rows.append((RECIPES[record["recipe"]].label, *cells))
    header = ("recipe", "ratio, against the bf16 model", "ratio, arithmetic alone", "dW, against the bf16 model",
              "dW, arithmetic alone")  # fmt: skip
    return table(header, rows)


def render_mismatch(records: Sequence[Record]) -> str:
    """Render mean and p99 of |r - 1| on the headline regime: a row per engine, a column per trainer."""
    regime = headline(records)
    chosen = [record for record in of_kind(records, "mismatch") if record["regime"] == regime]
    rows = []
    for record in chosen:
        cells = [f"{two_figures(mean)} ({two_figures(p99)})" for _, p99, mean, _ in record["ratio"].values()]
        rows.append((f"{HEADS[record['engine']]}, {record['engine_logits']} logits", *cells))
    return table(("engine", *(f"trainer: {name}" for name in chosen[0]["ratio"])), rows) if chosen else NOTHING


def render_real(records: Sequence[Record]) -> str:
    """Render what came out on real rows in words, the errors of every recipe, and the bars."""
    bars = of_kind(records, "bar")
    if not bars:
        return NOT_YET
    ratio = {name: errors["real"] for name, errors in by_recipe(records, "ratio").items()}
    facts = of_kind(records, "regime")[0]
    words = (
        "On {tokens} tokens of a real model (entropy {entropy} nat, logits up to {logit}) "
        "the ratio is off by {default} with float32 logits, the default, by {rounded} with bf16 logits, and by {fp8} "
        "with an fp8 head (99th percentiles). Of the default path, {missed}"
    ).format(
        tokens=facts["shape"]["tokens"], entropy=two_figures(facts["entropy_nats"]),
        logit=two_figures(facts["largest_logit"]), default=two_figures(ratio["bf16"]),
        rounded=f"{ratio['bf16-logits']:.1%}", fp8=f"{ratio['fp8_e4m3-row']:.0%}",
        missed=_missed(bars, labels_of(records)),
    )  # fmt: skip
    return "\n\n".join([f"**{words}**", render_choices(records), render_bars(records)])


def render_engines(records: Sequence[Record]) -> str:
    """Render how many tokens each engine moves beyond a bound, by the probability of the token."""
    found = {record["engine"]: record for record in of_kind(records, "engine")}
    if not found:
        return NOT_YET
    rows = []
    for edges in dict.fromkeys((b["from"], b["to"]) for record in found.values() for b in record["bins"]):
        bins = [next((b for b in record["bins"] if (b["from"], b["to"]) == edges), None) for record in found.values()]
        cells = [NOTHING if b is None else _percent(b["beyond"][name]) for name in MOVES for b in bins]
        count = sum(b["tokens"] for b in bins if b) / sum(record["all"]["tokens"] for record in found.values())
        rows.append((_between(*edges), f"{count:.1%}", *cells))
    cells = [_percent(record["all"]["beyond"][name]) for name in MOVES for record in found.values()]
    rows.append(("all", "100%", *cells))
    names = [f"{move} > {BOUND}, {engine}" for move in MOVES.values() for engine in found]
    text = [_rare_and_likely(record) for record in found.values()]
    body = table(("μ of the token", "tokens", *names), rows)
    return "\n\n".join(["\n".join(text), body, origin(of_kind(records, "run"))])


def _percent(share: float) -> str:
    if 0 < share < 1e-3:
        return "< 0.1%"
    return "0" if share == 0 else f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def _between(low: float, high: float) -> str:
    if low == 0:
        return f"under {two_figures(high)}"
    return f"over {two_figures(low)}" if high > 1 else f"{two_figures(low)} to {two_figures(high)}"


def _rare_and_likely(record: Record) -> str:
    """Return a sentence that compares the tokens of μ under RARE with those over LIKELY."""
    shares = {}
    for name in MOVES:
        for word, bins in (("rare", [b for b in record["bins"] if b["to"] <= RARE]),
                           ("likely", [b for b in record["bins"] if b["from"] >= LIKELY])):  # fmt: skip
            moved = sum(b["beyond"][name] * b["tokens"] for b in bins)
            shares[name, word] = _percent(moved / sum(b["tokens"] for b in bins))
    return (
        f"* **{record['engine']}**: |r - 1| exceeds {BOUND} on {shares['ratio', 'rare']} of the tokens of μ under "
        f"{RARE} and on {shares['ratio', 'likely']} of those over {LIKELY}; |π - μ| on "
        f"{shares['prob_shift', 'rare']} and {shares['prob_shift', 'likely']}."
    )


def render_gpu(records: Sequence[Record]) -> str:
    """Render the bars of the default path, and the mismatch with an engine that has an fp8 head, from a GPU's run."""
    bars, labels = of_kind(records, "bar"), labels_of(records)
    if not bars:
        return NOT_YET
    done = {record["regime"] for record in bars}
    cut = [label for name, label in labels.items() if name not in done]
    return "\n\n".join([
        f"Of the default path, {_missed(bars, labels)}",
        *([f"The run ended before: {', '.join(cut)}."] if cut else []),
        render_bars(records),
        "Mismatch between engines and trainers, mean (99th percentile) of |r - 1|:",
        render_mismatch(records),
        origin(of_kind(records, "run")),
    ])  # fmt: skip


def _missed(bars: Sequence[Record], labels: dict[str, str]) -> str:
    """Return a sentence about the bars that are not met."""
    missed: dict[str, list[str]] = {}
    for record in bars:
        if not record["met"]:
            numbers = f"{BARS[record['bar']]} {two_figures(record['value'])} > {two_figures(record['bound'])}"
            missed.setdefault(labels[record["regime"]], []).append(numbers)
    if not missed:
        return f"all {len(bars)} bars are met."
    regimes = "; ".join(f"{label}: {', '.join(numbers)}" for label, numbers in missed.items())
    return f"**{sum(map(len, missed.values()))} of {len(bars)} bars are not met**: {regimes}."


PAGE = "docs/precision.md"


def _block(name: str, render: Callable[[Sequence[Record]], str], plots: str | None = None) -> Block:
    return Block(f"precision-{name}", "precision", "precision/precision.jsonl", PAGE, render, plots=plots)


REAL = "smollm/precision.jsonl"
BLOCKS = (
    Block("precision-real", "precision", REAL, PAGE, render_real, NOT_YET),
    Block("precision-engines", "precision", REAL, PAGE, render_engines, NOT_YET, "benchmarks.precision.engine_plots"),
    _block("choices", render_choices, plots="benchmarks.precision.plots"),
    _block("bars", render_bars),
    _block("rounding", render_rounding),
    _block("mismatch", render_mismatch),
    Block("precision-gpu", "precision", "gpu/precision.jsonl", PAGE, render_gpu, NOT_YET),
)
