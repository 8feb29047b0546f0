"""The pictures of a run of `benchmarks.device`, drawn from its records alone by `python -m benchmarks.report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.device import bars
from benchmarks.device.findings import compared_heads, small_shapes
from benchmarks.device.plan import LOGPROBS, LOSS, SMALL, WHOLE
from benchmarks.harness.measure import largest_error
from benchmarks.harness.pictures import GREY, ORANGE, STYLES, frame, plt, save
from benchmarks.harness.records import Record
from benchmarks.harness.runs import Run
from benchmarks.harness.speed_tables import plain
from benchmarks.harness.workloads import Workload

OURS, OTHER = STYLES[LOSS][0], STYLES["eager"][0]
SMALL_LOOKS = {name: STYLES[name] for name in (WHOLE, "eager", LOSS)} | {"eager_compiled": (ORANGE, "D")}


def draw(run: Run, folder: Path, stem: str) -> None:
    """Write {stem}_small.png and {stem}_peers.png into `folder`, each where there is something to show."""
    small, heads = small_shapes(run), compared_heads(run)[::-1]
    if any(workload in small for workload in SMALL):
        records = [record for methods in small.values() for record in methods.values()]
        save(small_figure(small), folder / f"{stem}_small.png", records)
    if len(heads) > 1:
        save(peers_figure(heads), folder / f"{stem}_peers.png", [{**record, "seconds": None} for record in heads[::-1]])


def small_figure(found: dict[Workload, dict[str, Record]]) -> Figure:
    """Draw a column per model with several T: time of a token above, share of the floor below."""
    models = list(dict.fromkeys(workload.model for workload in SMALL if workload in found))
    figure, panels = plt.subplots(
        2, len(models), figsize=(5.4 * len(models), 7), sharex="col", sharey="row", layout="constrained", squeeze=False
    )
    for model, (upper, lower) in zip(models, panels.T, strict=True):
        groups = {workload.tokens: methods for workload, methods in found.items() if workload.model == model}
        for name, (colour, marker) in SMALL_LOOKS.items():
            here = {tokens: methods[name] for tokens, methods in groups.items() if name in methods}
            look = {"color": colour, "marker": marker, "label": plain(name)}
            look |= {"linewidth": 2.6 if name == LOSS else 1.6, "linestyle": "--" if name == WHOLE else "-"}
            upper.plot(list(here), [1e6 * r["median_s"] / t for t, r in here.items()], **look)
            shares = {t: 100 * r["floor_median_s"] / r["median_s"] for t, r in here.items() if r["floor_median_s"]}
            lower.plot(list(shares), list(shares.values()), **look)
        shape = next(iter(groups.values()))[LOSS]["shape"]
        upper.set_title(f"{model}, H={shape['hidden']}", fontsize=11, loc="left")
        lower.axhline(100, color=GREY, linewidth=1.4, linestyle="--")
        lower.set_xscale("log", base=2)
        lower.set_xticks(list(groups), [f"{tokens:,}" for tokens in groups])
        lower.xaxis.set_minor_locator(NullLocator())
        lower.set_xlabel("tokens T in the batch (log scale)")
    for axes in panels.flat:
        axes.set_ylim(0, None)
        frame(axes)
    panels[0][0].set_ylabel("µs per token, forward and backward")
    panels[1][0].set_ylabel("three bare products' time in % of its own")
    panels[0][-1].legend(fontsize=9.5, frameon=False, loc="upper right")
    figure.suptitle(f"What does a token of a small model cost? V={shape['vocab']}, bf16", fontsize=12)
    return figure


def peers_figure(heads: Sequence[Record]) -> Figure:
    """Draw a row per head: time in floors on the left, peak memory on the right."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11.5, 1.7 + 0.42 * len(heads)), sharey=True, layout="constrained", width_ratios=(1.5, 1)
    )
    colours = [OURS if record["method"] in (LOSS, LOGPROBS) else OTHER for record in heads]
    _bars(left, [bars.in_floors(record) for record in heads], colours)
    left.axvline(1, color=GREY, linewidth=1.4, linestyle="--")
    left.set_xlabel("time of forward and backward; three bare products = 1 (dashed)")
    _bars(right, [(record["peak_beyond_gradients_bytes"] or 0) / bars.GIB for record in heads], colours)
    right.set_xlabel("peak memory beyond the gradients, GiB")
    left.set_yticks(range(len(heads)), [_head(record) for record in heads], fontsize=9.5)
    shape = "T={tokens} H={hidden} V={vocab}".format(**heads[0]["shape"])
    figure.suptitle(f"What does a fused head cost? {shape}, bf16 (ours in blue)", fontsize=12)
    return figure


def _head(record: Record) -> str:
    notes = [] if record["same_loss"] else ["other loss"]
    error = largest_error(record)
    notes += [f"gradient {error:.1%} off"] if error is not None and record["status"] != "ok" else []
    return plain(record["method"]) + (f"\n({', '.join(notes)})" if notes else "")


def _bars(axes: Axes, values: Sequence[float], colours: Sequence[str]) -> None:
    """Draw bars. A bar more than twice as long as the next is cut off, and says so."""
    *_, second, longest = sorted(values)
    end = 1.12 * (1.25 * second if longest > 2 * second else longest)
    axes.barh(range(len(values)), values, 0.62, color=colours, zorder=2)
    for y, value in enumerate(values):
        look = {"textcoords": "offset points", "va": "center", "fontsize": 9.5}
        if value > end:
            axes.annotate(f"{value:.2f}, beyond the axis ▸", (end, y), (-6, 0), ha="right", color="white", **look)
        else:
            axes.annotate(f"{value:.2f}", (value, y), (4, 0), **look)
    axes.set_xlim(0, end)
    frame(axes, "x")
