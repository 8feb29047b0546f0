"""The picture of docs/roofline.md: where the predicted time goes, and what a method takes of its floor over T."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.harness.pictures import COLOURS, PALE, plt, save
from benchmarks.roofline.bars import GIB, LINEAR
from benchmarks.roofline.chips import CHIPS
from benchmarks.roofline.methods import METHODS
from benchmarks.roofline.ours import sweep_plan
from benchmarks.roofline.predict import predict
from benchmarks.roofline.tables import CHIP, MODEL, headline

NAME = "roofline.png"
# kinds of work and the names of their stages
KINDS = {
    "logits (2F)": ("logits", "logits and statistics"),
    "logits again (2F)": ("logits again", "dlogits"),
    "dX and dW (2F each)": ("dX", "dW"),
    "row kernels, softmax": (
        "rows", "rows again", "statistics", "gradient", "log_softmax", "gather backward", "log_softmax backward",
    ),
    "all in one kernel (6F)": ("all in one kernel",),
}  # fmt: skip
LEFT_OUT = ("copy", "policy_loss", "policy_loss_inplace")
REST = "casts, sums, scaling, copies, launches"
LIMIT = 70.0  # milliseconds; what is longer is cut off and labelled
TOKENS = tuple(1024 * count for count in (1, 2, 4, 6, 8, 9, 12, 16, 24, 32, 48, 64))


def draw(folder: Path) -> None:
    figure, (times, shares) = plt.subplots(2, 1, figsize=(10, 11.5), layout="constrained", height_ratios=(1.25, 1))
    _stacks(times)
    _over_tokens(shares)
    save(figure, folder / NAME)


def _stacks(axes) -> None:
    """The least times in stages, and a whisker to the most."""
    methods = [name for name in METHODS if name not in LEFT_OUT]
    kinds = [*KINDS, REST]
    for y, name in enumerate(methods):
        found = predict(CHIPS[CHIP], name, headline())
        start = 0.0
        for kind, colour in zip(kinds, COLOURS, strict=False):
            width = sum(stage.least for stage in found.stages if _kind(stage.name) == kind) * 1e3
            axes.barh(y, width, left=start, color=colour, height=0.62, label=kind if y == 0 else None)
            start += width
        if start > LIMIT or found.most * 1e3 > LIMIT:
            text = f"{found.least * 1e3:.0f}–{found.most * 1e3:.0f} ms ▸"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axes.text(LIMIT - 0.7, y, text, ha="right", va="center", fontsize=8, bbox=box)
        if start < LIMIT:
            axes.plot([start, min(found.most * 1e3, LIMIT)], [y, y], color="black", linewidth=1.2)
    axes.set_xlim(0, LIMIT)
    axes.set_yticks(range(len(methods)), [METHODS[name].label.replace("`", "") for name in methods], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("predicted ms (bar: everything overlaps that can; line: nothing does)")
    problem = headline()
    shape = f"T={problem.tokens} H={problem.hidden} V={problem.vocab}"
    axes.set_title(f"PREDICTED, not measured: {CHIP}, {MODEL}, {shape}, bf16", fontsize=11, loc="left")
    axes.legend(fontsize=8.5, frameon=False, loc="lower left", bbox_to_anchor=(0, -0.24), ncols=3)
    axes.grid(axis="x", color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)


def _kind(name: str) -> str:
    return next((kind for kind, names in KINDS.items() if name in names), REST)


def _over_tokens(axes) -> None:
    problem = replace(headline(), workspace=GIB)
    for (name, chip), colour in zip(CHIPS.items(), COLOURS, strict=False):
        found = [predict(chip, LINEAR, replace(problem, tokens=tokens)).times_floor for tokens in TOKENS]
        axes.plot(TOKENS, [low for low, _ in found], color=colour, marker="o", markersize=3.5, label=name)
        axes.plot(TOKENS, [high for _, high in found], color=colour, linestyle=":", linewidth=1.3)
    counts = {t: len(sweep_plan(replace(problem, tokens=t), t).windows) for t in range(TOKENS[0], TOKENS[-1], 128)}
    most = max(tokens for tokens, windows in counts.items() if windows == 1)
    axes.axvline(most, color="grey", linewidth=1)
    style = {"ha": "right", "va": "top", "fontsize": 9, "color": "grey", "transform": axes.get_xaxis_transform()}
    axes.text(most * 0.97, 0.97, f"one dW product up to T = {most}", **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(TOKENS, ["" if tokens == 9216 else f"{tokens // 1024}k" for tokens in TOKENS])
    axes.minorticks_off()
    axes.set_xlabel("T (solid: everything overlaps that can; dotted: nothing does)")
    axes.set_ylabel("times the three bare products")
    axes.set_title(f"PREDICTED, not measured: linear_policy_loss, {MODEL}, 1 GiB", fontsize=11, loc="left")
    axes.grid(color=PALE, linewidth=0.7)
    axes.legend(fontsize=9, frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, -0.27))
