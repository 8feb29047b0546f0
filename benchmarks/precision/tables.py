"""The precision study in Markdown: what `benchmarks.report` writes into docs/precision.md, from the records alone."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.blocks import Block, origin
from benchmarks.harness.records import Record
from benchmarks.harness.tables import NOTHING, table, two_figures
from benchmarks.precision.recipes import RECIPES

# of the default path's bars, as they are named in records and on pages
BARS = {
    "logprob": "log π", "ratio": "ratio", "hidden": "dX", "weight": "dW", "GPU hidden": "dX on a GPU",
    "GPU weight": "dW on a GPU", "fp16 hidden": "fp16's dX over bf16's", "fp16 weight": "fp16's dW over bf16's",
}  # fmt: skip
TABULATED = tuple(BARS)[:6]
# of the tables; the plots have all
COLUMNS = ("random", "moderate", "trained", "rare", "softcap", "temperature0.1", "H8192", "V151936")
QUANTITIES = {
    "logprob": "log π", "ratio": "ratio", "prob_shift": "π - μ", "weight_0.2": "w, δ = 0.2",
    "weight_12.5": "w, δ = 12.5", "loss": "loss", "hidden": "dX", "weight": "dW",
}  # fmt: skip
HEADLINE = "moderate"
NORMWISE = ("hidden", "weight")
ENGINES = {"nothing": "bf16", "weight": "fp8 weight", "hidden": "fp8 hidden", "both": "fp8 weight and hidden"}


def of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def labels_of(records: Sequence[Record]) -> dict[str, str]:
    """Regime -> its label, in the order of the run."""
    return {record["regime"]: record["label"] for record in of_kind(records, "regime")}


def plain_label(recipe: str) -> str:
    return RECIPES[recipe].label.replace("`", "")


def headline(record: Record) -> dict | None:
    """What a user gets: errors against the bf16 model, the rounding of the operands included."""
    return record["total"] or record["errors"]


def tabulated(
    records: Sequence[Record], quantity: str, statistic: int
) -> tuple[list[str], list[str], list[list[float | None]]]:
    """(labels of the regimes, labels of the recipes that report the quantity, values by recipe and regime)."""
    names, found = labels_of(records), {}
    for record in of_kind(records, "errors"):
        errors = headline(record) or {}
        found.setdefault(record["recipe"], {})[record["regime"]] = errors.get(quantity, [None] * 3)[statistic]
    found = {recipe: row for recipe, row in found.items() if any(v is not None for v in row.values())}
    values = [[row.get(name) for name in names] for row in found.values()]
    return list(names.values()), [plain_label(recipe) for recipe in found], values


def render_choices(records: Sequence[Record]) -> str:
    """All quantities on the headline regime, and where the run comes from."""
    header = ("recipe", *QUANTITIES.values())
    rows = []
    for record in of_kind(records, "errors"):
        if record["regime"] != HEADLINE:
            continue
        errors, label = headline(record), RECIPES[record["recipe"]].label
        if errors is None:
            rows.append((label, record["status"], *[NOTHING] * (len(QUANTITIES) - 1)))
        else:
            rows.append((label, *(_cell(errors, name, 2 if name in NORMWISE else 1) for name in QUANTITIES)))
    return table(header, rows) + "\n\n" + origin(records[:1])


def render_ratio(records: Sequence[Record]) -> str:
    return _by_regime(records, "ratio", 1)


def render_gradients(records: Sequence[Record]) -> str:
    return _by_regime(records, "weight", 2)


def _by_regime(records: Sequence[Record], quantity: str, statistic: int) -> str:
    names = {name: label for name, label in labels_of(records).items() if name in COLUMNS}
    by_recipe: dict[str, dict[str, Record]] = {}
    for record in of_kind(records, "errors"):
        by_recipe.setdefault(record["recipe"], {})[record["regime"]] = record
    rows = []
    for recipe, row in by_recipe.items():
        cells = [_cell(headline(row[name]) or {}, quantity, statistic) for name in names]
        if set(cells) != {NOTHING}:
            rows.append((RECIPES[recipe].label, *cells))
    return table(("recipe", *names.values()), rows)


def render_bars(records: Sequence[Record]) -> str:
    """The bars of the default path: value / bound of each, regime by regime."""
    by_regime: dict[str, dict[str, Record]] = {}
    for record in of_kind(records, "bar"):
        by_regime.setdefault(record["regime"], {})[record["bar"]] = record
    facts = {record["regime"]: record for record in of_kind(records, "regime")}
    rows = []
    for name, bars in by_regime.items():
        cells = [_bar(bars[bar]) if bar in bars else NOTHING for bar in TABULATED]  # a run may have ended here
        rows.append((facts[name]["label"], _shape(facts[name]), two_figures(facts[name]["largest_logit"]), *cells))
    half = by_regime.get("V151936", {})
    note = ""
    if "fp16 weight" in half:
        pairs = ", ".join(f"d{n} {_bar(half[f'fp16 {k}'])}" for n, k in (("X", "hidden"), ("W", "weight")))
        note = f"\n\nfp16 gradients against bf16's at V = 151936: {pairs}."
    header = ("regime", "T × H × V", "max abs logit", *(BARS[bar] for bar in TABULATED))
    return table(header, rows) + note


def _bar(record: Record) -> str:
    text = f"{two_figures(record['value'])} ≤ {two_figures(record['bound'])}"
    return text if record["met"] else f"**{text.replace('≤', '>')}**"


def render_rounding(records: Sequence[Record]) -> str:
    """Of the fp8 recipes, the rounding of the operands beside the arithmetic: p99 of the ratio's relative error."""
    rows = []
    for record in of_kind(records, "errors"):
        if record["regime"] == HEADLINE and record["total"]:
            cells = [_cell(record[key], "ratio", 1) for key in ("total", "errors")]
            rows.append((RECIPES[record["recipe"]].label, *cells, _cell(record["total"], "weight", 2),
                         _cell(record["errors"], "weight", 2)))  # fmt: skip
    header = ("recipe", "ratio, against the bf16 model", "ratio, arithmetic alone", "dW, against the bf16 model",
              "dW, arithmetic alone")  # fmt: skip
    return table(header, rows)


def render_mismatch(records: Sequence[Record]) -> str:
    """Engines down, trainers across, on the headline regime: mean and p99 of |r - 1|."""
    chosen = [record for record in of_kind(records, "mismatch") if record["regime"] == HEADLINE]
    rows = []
    for record in chosen:
        cells = [f"{two_figures(mean)} ({two_figures(p99)})" for _, p99, mean, _ in record["ratio"].values()]
        rows.append((f"{ENGINES[record['engine']]}, {record['engine_logits']} logits", *cells))
    return table(("engine", *(f"trainer: {name}" for name in chosen[0]["ratio"])), rows) if chosen else NOTHING


def _shape(facts: Record) -> str:
    return "{tokens} × {hidden} × {vocab}".format(**facts["shape"])


def _cell(errors: dict, quantity: str, statistic: int) -> str:
    return two_figures(errors[quantity][statistic]) if quantity in errors else NOTHING


RENDER = {
    "choices": render_choices,
    "bars": render_bars,
    "ratio": render_ratio,
    "gradients": render_gradients,
    "rounding": render_rounding,
    "mismatch": render_mismatch,
}
BLOCKS = tuple(
    Block(f"precision-{name}", "precision", "precision/precision.jsonl", "docs/precision.md", render)
    for name, render in RENDER.items()
)
