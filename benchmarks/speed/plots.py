"""The pictures of the speed benchmark, drawn from its records alone by `python -m benchmarks.report`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.harness.pictures import STYLES, finish, new_axes, save
from benchmarks.harness.records import Record
from benchmarks.harness.speed_tables import dense, plain, setting_of
from benchmarks.harness.workloads import KINDS
from benchmarks.speed.tables import pictures, swept


def draw(records: Sequence[Record], folder: Path, stem: str) -> None:
    """Write {stem}_time.png and {stem}_memory.png into `folder`, where several T were measured."""
    main, over_tokens, shape = setting_of(records[0]), swept(records), records[0]["shape"]
    where = f"{main.model} head, " if not main.model.startswith("cpu") else ""
    where += f"H={shape['hidden']} V={shape['vocab']}, {main.dtype}, {KINDS[main.inputs]}"
    figures = {"time": time_figure, "memory": memory_figure}
    for name in pictures(records):
        save(figures[name](over_tokens, where), folder / f"{stem}_{name}.png", records[:1])


def time_figure(groups: dict[int, list[Record]], where: str) -> Figure:
    figure, axes = new_axes(f"What does a token cost? Forward and backward, {where}")
    for method, points in _lines(groups, "median_s"):
        line(axes, method, [(tokens, 1e6 * seconds / tokens) for tokens, seconds in points])
    axes.set_ylim(0, None)
    finish(axes, list(groups), "µs per token")
    return figure


def memory_figure(groups: dict[int, list[Record]], where: str) -> Figure:
    figure, axes = new_axes(f"What does a step need beyond its inputs? Peak of forward and backward, {where}")
    for method, points in _lines(groups, "peak_extra_bytes"):
        line(axes, method, [(tokens, bytes_ / 2**20) for tokens, bytes_ in points])
    axes.set_yscale("log", base=2)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _mebibytes(value)))
    finish(axes, list(groups), "peak extra memory, gradients included (log scale)")
    return figure


def _lines(groups: dict[int, list[Record]], key: str) -> Iterable[tuple[str, list[tuple[int, float]]]]:
    """Yield (method, its (T, value) pairs) for every method with a look and values at two T or more."""
    for method in STYLES:
        found = [(tokens, r[key]) for tokens, group in groups.items() for r in dense(group) if r["method"] == method]
        points = [point for point in found if point[1]]  # 0 bytes have no place on a log scale
        if len(points) > 1:
            yield method, points


def line(axes: Axes, method: str, points: Sequence[tuple[float, float]]) -> None:
    colour, marker = STYLES[method]
    style = {"linestyle": "--"} if method == "gemms_whole" else {}
    width = 2.6 if method == "linear_policy_loss" else 1.5
    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=width, label=plain(method), **style)


def _mebibytes(value: float) -> str:
    return f"{value:g} MiB" if value < 1024 else f"{value / 1024:g} GiB"
