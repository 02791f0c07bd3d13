"""Two pictures of an evaluation: the heat map of the sub-models, and metric over cost."""

from __future__ import annotations

import math
import os
from typing import Any

from sorted_kernels.errors import OptionError, require
from sorted_kernels.inference.files import replacing
from sorted_kernels.inference.results import Results, Row
from sorted_kernels.submodel import Submodel, size_order

_INK, _MUTED, _FRONT, _CHOSEN = "#1f2933", "#9aa5b1", "#1f5fa8", "#c2410c"
_COST_LABELS = {
    "flops": "FLOPs of one forward",
    "parameters": "parameters",
    "latency_ms": "latency (ms)",
}


def heat_map(
    results: Results,
    path: str | os.PathLike[str],
    rows: str | None = None,
    cols: str | None = None,
    title: str | None = None,
) -> None:
    """Draw the metric of every sub-model, with its recovery in percent under it.

    The picture of SortedNet, Figure 2: darker is better. Where there are more than two dimensions a
    cell shows the best over the others, and the title says so.

    Args:
        results: What ``evaluate`` gave.
        path: File to write; its suffix is the format (png, svg, pdf).
        rows: Dimension of the rows; ``"depth"`` if there is one, otherwise the first.
        cols: Dimension of the columns; ``"width"`` if there is one, otherwise the next. Results
            with one dimension have one row or column.
        title: Above the picture.

    Raises:
        OptionError: A dimension is unknown, or both are the same; or the format is unknown.
        CheckpointError: The file cannot be written.
        DependencyError: matplotlib is not installed.
    """
    rows, cols = _choose_axes(results, rows, cols)
    cells = _best_of_cells(results, rows, cols)
    row_sizes = sorted({row for row, _ in cells}, key=_order)
    col_sizes = sorted({col for _, col in cells}, key=_order)
    grid = [[cells.get((r, c)) for c in col_sizes] for r in row_sizes]
    width = max(0.72 * len(col_sizes) + 2.4, 4.4)
    figure, axes = _figure(width, max(0.5 * len(row_sizes) + 1.5, 2.4))
    image = _draw_cells(axes, results, grid)
    axes.set_xticks(range(len(col_sizes)), [str(size) for size in col_sizes if size is not None])
    axes.set_yticks(range(len(row_sizes)), [str(size) for size in row_sizes if size is not None])
    axes.set_xlabel(cols or "")
    axes.set_ylabel(rows or "")
    hidden = [name for name in results.dimensions if name not in (rows, cols)]
    heading = title or f"{results.metric} of {len(results)} sub-models, recovery in % under it"
    if hidden:
        heading += f"\n(best over {', '.join(hidden)})"
    axes.set_title(heading, fontsize=11, color=_INK, pad=10)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(results.metric_label, color=_INK)
    bar.outline.set_visible(False)
    _save(figure, path)


def cost_plot(
    results: Results,
    path: str | os.PathLike[str],
    cost: str = "flops",
    select: Row | Submodel | None = None,
) -> None:
    """Draw metric over cost of every sub-model, the Pareto front marked.

    Args:
        results: What ``evaluate`` gave.
        path: File to write; its suffix is the format (png, svg, pdf).
        cost: ``"flops"``, ``"parameters"`` or ``"latency_ms"``; its axis is logarithmic where the
            costs span more than a factor of 20.
        select: The sub-model to point at.

    Raises:
        OptionError: The cost is unknown or was not measured; the sub-model to point at is not among
            the results; or the format is unknown.
        CheckpointError: The file cannot be written.
        DependencyError: matplotlib is not installed.
    """
    front = results.pareto(cost)
    inside = [row for row in results if row not in front and math.isfinite(row.metric)]
    chosen = _find(results, select)
    figure, axes = _figure(7.2, 4.6)
    scale = 100.0 if results.metric == "accuracy" else 1.0

    def points(of: Any) -> tuple[list[float], list[float]]:
        return [row.cost(cost) for row in of], [scale * row.metric for row in of]

    axes.scatter(*points(inside), s=22, color=_MUTED, linewidths=0, label="sub-models", zorder=2)
    axes.plot(
        *points(front), color=_FRONT, marker="o", ms=7, lw=1.6, label="Pareto front", zorder=3
    )
    costs = [row.cost(cost) for row in results]
    if min(costs) > 0 and max(costs) > 20 * min(costs):
        axes.set_xscale("log")
    if chosen is not None:
        ((x,), (y,)) = points([chosen])
        scattered = [points([row]) for row in inside]
        _point_at(axes, results, chosen, (x, y), [points(front), *scattered])
    ticker: Any = require("matplotlib.ticker", "plot")
    if cost != "latency_ms":
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(color="#e4e7eb", lw=0.7, zorder=0)
    axes.set_xlabel(_COST_LABELS[cost])
    axes.set_ylabel(results.metric_label)
    axes.set_title(f"{results.metric} and cost of {len(results)} sub-models", fontsize=11)
    axes.legend(frameon=False, loc="lower right" if results.higher_is_better else "upper right")
    _save(figure, path)


def _choose_axes(results: Results, rows: str | None, cols: str | None) -> tuple[str | None, ...]:
    names = results.dimensions
    for option, value in (("rows", rows), ("cols", cols)):
        if value is not None and value not in names:
            raise OptionError(f"{option}={value!r}; the results have dimensions {list(names)}")
    if rows is not None and rows == cols:
        raise OptionError(f"rows and cols are both {rows!r}; they must differ")

    def pick(preferred: str, taken: str | None) -> str | None:
        free = [name for name in names if name != taken]
        return preferred if preferred in free else next(iter(free), None)

    if rows is None and (len(names) > 1 or cols is None) and names != ("width",):
        other = cols or ("width" if "width" in names else None)
        rows = pick("depth", other)
    return rows, cols or pick("width", rows)


def _best_of_cells(
    results: Results, rows: str | None, cols: str | None
) -> dict[tuple[int | None, int | None], Row]:
    """The best row of each cell; None stands for the size of a dimension that is not there."""
    cells: dict[tuple[int | None, int | None], Row] = {}
    for row in results:
        cell = (row.submodel[rows] if rows else None, row.submodel[cols] if cols else None)
        if cell not in cells or results.goodness(row) > results.goodness(cells[cell]):
            cells[cell] = row
    return cells


def _order(size: Any) -> Any:
    return size_order(0 if size is None else size)


def _draw_cells(axes: Any, results: Results, grid: list[list[Row | None]]) -> Any:
    """Colour the cells and write into them; returns the image for the colour bar."""
    scale = 100.0 if results.metric == "accuracy" else 1.0
    values = [[scale * row.metric if row else math.nan for row in line] for line in grid]
    image = axes.imshow(values, cmap=_colours(results.higher_is_better), aspect="auto")
    finite = [value for line in values for value in line if math.isfinite(value)]
    if finite and min(finite) == max(finite):  # one colour, the middle one
        image.set_clim(finite[0] - 1, finite[0] + 1)
    for i, line in enumerate(grid):
        for j, row in enumerate(line):
            if row is None:
                continue
            ink = _ink_on(image.cmap(image.norm(values[i][j])))
            under = _percent(results.recovery(row))
            for text, size, up in ((results.format_metric(row), 9.5, 5), (under, 7.5, -8)):
                axes.annotate(text, (j, i), xytext=(0, up), textcoords="offset points",
                              color=ink, fontsize=size, **_CENTRE)  # fmt: skip
    for edge in axes.spines.values():
        edge.set_visible(False)
    axes.set_xticks([j + 0.5 for j in range(len(grid[0]) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(grid) - 1)], minor=True)
    axes.grid(which="minor", color="white", lw=1.5)
    axes.tick_params(which="both", length=0)
    return image


def _percent(recovery: float) -> str:
    """In whole percents, of which only the best itself has 100."""
    if not math.isfinite(recovery):
        return "-"
    return f"{min(round(recovery), 99 if recovery < 100 else 100)}%"


_CENTRE: dict[str, Any] = {"ha": "center", "va": "center"}


def _colours(higher_is_better: bool) -> Any:
    """Light to dark, dark being better; grey where there is no number."""
    matplotlib: Any = require("matplotlib", "plot")
    colours = matplotlib.colormaps["YlGnBu" if higher_is_better else "YlGnBu_r"]
    return colours.with_extremes(bad="#e4e7eb")


def _ink_on(background: tuple[float, float, float, float]) -> str:
    """Black or white, whichever has more contrast (relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return _INK if luminance > 0.22 else "white"  # where both have the same contrast


def _find(results: Results, select: Row | Submodel | None) -> Row | None:
    submodel = select.submodel if isinstance(select, Row) else select
    if submodel is None:
        return None
    if submodel not in {row.submodel for row in results}:
        raise OptionError(f"select is {submodel!r}, which is not among the results")
    return results[submodel]


def _point_at(
    axes: Any, results: Results, row: Row, at: tuple[float, float], drawn: list[Any]
) -> None:
    """Mark a sub-model and write its sizes, metric and recovery where nothing else is drawn."""
    axes.plot(*at, "*", ms=17, mfc=_CHOSEN, mec="white", mew=1.0, ls="", label="selected", zorder=5)
    recovery = results.recovery(row)
    unit = "%" if results.metric == "accuracy" else ""
    text = f"{row.submodel}\n{results.metric} {results.format_metric(row)}{unit}"
    text += f"\n{recovery:.1f}% of the best" if math.isfinite(recovery) else ""
    axes.annotate(
        text, at, xytext=_free_place(axes, at, drawn, results.higher_is_better),
        textcoords="axes fraction", color=_CHOSEN, fontsize=9.5,
        arrowprops={"arrowstyle": "-", "color": _CHOSEN, "lw": 1.0, "shrinkB": 9},
        bbox={"boxstyle": "round,pad=0.35", "fc": "white", "ec": _CHOSEN, "lw": 0.8}, zorder=6,
        **_CENTRE,
    )  # fmt: skip


def _free_place(
    axes: Any, at: tuple[float, float], drawn: list[Any], legend_is_below: bool
) -> tuple[float, float]:
    """Centre, in fractions of the axes, of a box near a point that covers the fewest others."""
    half_width, half_height = 0.17, 0.11
    axes.autoscale_view()
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    points = [tuple(p) for line in drawn for p in _along(to_axes(list(zip(*line, strict=True))))]
    x, y = to_axes(at)

    def badness(place: tuple[float, float]) -> tuple[int, float]:
        covered = sum(abs(px - place[0]) < half_width and abs(py - place[1]) < half_height
                      for px, py in points)  # fmt: skip
        return covered, math.hypot(place[0] - x, place[1] - y)

    places = [(0.2 + 0.05 * i, 0.15 + 0.05 * j) for i in range(13) for j in range(15)]
    corner = 0.0 if legend_is_below else 1.0
    clear = [p for p in places if p[0] < 0.55 or abs(p[1] - corner) > 0.38]
    return min(clear, key=badness)


def _along(points: Any) -> list[Any]:
    """Points along the line through some points, close enough to stand for it."""
    steps = [k / 8 for k in range(8)]
    pairs = zip(points[:-1], points[1:], strict=True)
    return [*points, *((1 - t) * a + t * b for a, b in pairs for t in steps)]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of its own, outside of pyplot's global state, and its axes."""
    module: Any = require("matplotlib.figure", "plot")
    figure = module.Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    suffix = os.path.splitext(os.fspath(path))[1].lstrip(".").lower()
    allowed = sorted(figure.canvas.get_supported_filetypes())
    if suffix not in allowed:
        raise OptionError(
            f"path {os.fspath(path)!r} ends in {suffix!r}; allowed are {', '.join(allowed)}"
        )
    with replacing(path) as temporary:
        figure.savefig(temporary)
