"""Draw measured rows: speed-up and share of the limit against size, step time against cost.

``python -m bench.plot [--only NAME ...] OUT_FOLDER FILE.csv [FILE.csv ...]``
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bench.rows import Row, parse_sizes, read_rows
from bench.table import SECONDS, limit_share, limits_for

NAMES = {
    "B0": "B0: slicing in plain PyTorch",
    "B1": "B1: views and in-place gradients by hand",
    "B2": "B2: stand-alone layer of that size",
    "ours": "sorted_kernels",
}
STYLES = {
    "B0": {"color": "#999999", "marker": "o"},
    "B1": {"color": "#E69F00", "marker": "s"},
    "B2": {"color": "#0072B2", "marker": "^"},
    "ours": {"color": "#D55E00", "marker": "D", "linewidth": 2.2},
}
Point = tuple[float, float]


def _curves(rows: Iterable[Row], x: Callable[[Row], float]) -> dict[str, list[Point]]:
    """Median against ``x`` for each provider; a row replaces an earlier one of the same x."""
    curves: dict[str, dict[float, float]] = {}
    for row in rows:
        curves.setdefault(row.provider, {})[x(row)] = row.p50
    order = [name for name in NAMES if name in curves]
    return {name: sorted(curves[name].items()) for name in order}


def fraction(row: Row) -> float:
    """Active part of a layer's parameters."""
    sizes = parse_sizes(row.sizes)
    return sizes["m"] * sizes["k"] / (sizes["M"] * sizes["K"])


def group_of(row: Row) -> tuple[str, ...]:
    """What stays the same along a curve of layer steps: full size, rows, dtype, cache, device."""
    sizes = parse_sizes(row.sizes)
    layer = f"{sizes['M']}x{sizes['K']} layer, {sizes['N']} rows, {row.dtype}"
    return layer, row.cache, row.device


def _grouped(rows: Iterable[Row], baseline: str) -> dict[tuple[str, ...], list[Row]]:
    """The groups that have a curve of the baseline: those measured at more than one fraction."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    return {
        key: group
        for key, group in groups.items()
        if len({fraction(row) for row in group if row.provider == baseline}) > 1
    }


def _figure(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    columns = min(panels, 3)
    lines = -(-panels // columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * lines + 0.9), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for unused in axes[panels:]:
        unused.set_axis_off()
    return figure, axes[:panels]


def _label_decades(axis: Axis, form: str) -> None:
    """Labels at 1, 2 and 5 of every decade; the decades alone where there are many."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter(form)
    axis.set_minor_formatter("")


def _label_fractions(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at the measured fractions, written as a part of the width."""
    axes.set_xticks(values, [f"{value**0.5:.3g}" for value in values])
    axes.minorticks_off()


def _legend_below(figure: Figure, panels: Iterable[Axes]) -> None:
    named = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True)) | named
    order = sorted(named, key=[*NAMES.values(), *named].index)
    figure.legend(
        [named[label] for label in order], order, loc="outside lower center", ncols=3, frameon=False
    )


def draw_speedup(rows: Iterable[Row]) -> Figure | None:
    """Speed-up over B0 of a layer's training step against the active width, one panel a problem."""
    groups = _grouped((row for row in rows if row.kernel == "linear_step"), "B0")
    if not groups:
        return None
    figure, panels = _figure(len(groups), "Training step of one layer: speed-up over B0")
    for axes, ((layer, cache, device), group) in zip(panels, groups.items(), strict=True):
        curves = _curves(group, fraction)
        naive = dict(curves["B0"])
        for name, points in curves.items():
            speedups = [(x, naive[x] / y) for x, y in points if x in naive]
            if speedups:
                axes.plot(*zip(*speedups, strict=True), label=NAMES[name], **STYLES[name])
        axes.set(xscale="log", yscale="log", title=f"{layer}\n{device}, {cache}")
        axes.set(xlabel="active part of each axis", ylabel="times faster than B0")
        _label_decades(axes.yaxis, "{x:g}x")
        axes.grid(alpha=0.3)
        _label_fractions(axes, sorted(naive))
    _legend_below(figure, panels)
    return figure


def _draw_against_cost(axes: Axes, rows: list[Row]) -> None:
    """Step time against operations, and the line on which a part costs its part of the whole."""
    curves = _curves(rows, lambda row: row.flops / 1e6)
    for name, points in curves.items():
        linestyle = "" if rows[0].kernel == "model_step" else "-"
        style = {**STYLES[name], "linestyle": linestyle}
        axes.plot(*zip(*points, strict=True), label=NAMES[name], **style)
    largest, time = curves["B2"][-1]
    smallest = curves["B2"][0][0]
    axes.plot(
        [smallest, largest],
        [time * smallest / largest, time],
        color="black",
        linestyle=":",
        label="ideal: time in proportion to cost",
    )
    axes.set(xscale="log", yscale="log", xlabel="MFLOP a step", ylabel="step time, ms (median)")
    for axis in (axes.xaxis, axes.yaxis):
        _label_decades(axis, "{x:g}")
    axes.grid(alpha=0.3)
    if rows[0].kernel == "model_step":
        for row in {row.flops: row for row in sorted(rows, key=lambda row: row.p50)}.values():
            name = f"{row.size('depth')} x {row.size('width')}"
            at = row.flops / 1e6, row.p50
            axes.annotate(name, at, (0, 8), textcoords="offset points", ha="center")
        axes.margins(0.12)


def draw_step_time(rows: Iterable[Row]) -> Figure | None:
    """Step time against a sub-model's cost: the demo's model and the layers, and the ideal line."""
    rows = [row for row in rows if row.kernel in ("linear_step", "model_step")]
    panels: dict[str, list[Row]] = {}
    for key, group in _grouped((r for r in rows if r.kernel == "linear_step"), "B2").items():
        panels["\n".join((key[0], f"{key[2]}, {key[1]}"))] = group
    for row in rows:
        if row.kernel == "model_step":
            title = (
                f"residual MLP, batch {row.size('batch')}, depth x width\n{row.device}, {row.cache}"
            )
            panels.setdefault(title, []).append(row)
    panels = {k: group for k, group in panels.items() if any(r.provider == "B2" for r in group)}
    if not panels:
        return None
    figure, all_axes = _figure(len(panels), "Training step: time against the sub-model's cost")
    for axes, (title, group) in zip(all_axes, panels.items(), strict=True):
        _draw_against_cost(axes, group)
        axes.set_title(title)
    _legend_below(figure, all_axes)
    return figure


def _share_panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows whose share of the limit is known: a panel a layer's step, and one a kernel and mode."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.metric not in SECONDS or row.provider not in NAMES or row.kernel == "limit":
            continue
        if limit_share(row, limits_for(row, rows)) is None:
            continue
        if row.kernel == "linear_step":
            layer, _, device = group_of(row)
            title = f"step, {layer}\n{device}"
        else:
            title = f"{row.kernel} {row.mode}, {row.dtype}\n{row.device}"
        panels.setdefault(title, []).append(row)
    return panels


def draw_limit_share(rows: Iterable[Row]) -> Figure | None:
    """Share of the device's measured limit against the size of the work, one panel a family."""
    rows = list(rows)
    panels = _share_panels(rows)
    if not panels:
        return None
    figure, all_axes = _figure(
        len(panels), "Share of the measured limit (filled: hot, hollow: cold)"
    )
    for axes, (title, group) in zip(all_axes, panels.items(), strict=True):
        by_flops = any(row.flops for row in group)
        line = "-" if group[0].kernel == "linear_step" else ""
        for cache in sorted({row.cache for row in group}, reverse=True):
            curves: dict[str, dict[float, float]] = {}
            for row in (row for row in group if row.cache == cache):
                share = limit_share(row, limits_for(row, rows)) or 0.0
                x = row.flops / 1e6 if by_flops else row.bytes / 1e6
                curves.setdefault(row.provider, {})[x] = 100 * share
            for name in (name for name in NAMES if name in curves):
                hollow = {} if cache == "hot" else {"markerfacecolor": "none"}
                label = NAMES[name] if cache == "hot" else None
                points = zip(*sorted(curves[name].items()), strict=True)
                axes.plot(*points, label=label, **{**STYLES[name], "linestyle": line, **hollow})
        axes.axhline(100, color="black", linestyle=":")
        axes.set(xscale="log", title=title, ylabel="percent of the limit")
        axes.set(xlabel="MFLOP" if by_flops else "MB that must move")
        axes.set_ylim(bottom=0)
        _label_decades(axes.xaxis, "{x:g}")
        axes.grid(alpha=0.3)
    _legend_below(figure, all_axes)
    return figure


PICTURES: dict[str, Callable[[Iterable[Row]], Figure | None]] = {
    "speedup": draw_speedup,
    "limit_share": draw_limit_share,
    "step_time": draw_step_time,
}


def source_of(files: Iterable[Path]) -> str:
    """What a picture says it was drawn from: the digest of its CSV files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def draw_all(out: Path, files: Sequence[Path], only: Iterable[str] = PICTURES) -> list[Path]:
    """Write the pictures that the rows of some files allow; returns them.

    Each carries :func:`source_of` its files as its ``Source``.
    """
    rows, written = read_rows(files), []
    out.mkdir(parents=True, exist_ok=True)
    for name in only:
        figure = PICTURES[name](rows)
        if figure is not None:
            path = out / f"{name}.png"
            figure.savefig(path, dpi=110, metadata={"Source": source_of(files)})
            written.append(path)
    return written


def main(arguments: list[str] | None = None) -> None:
    """Write ``speedup.png``, ``limit_share.png`` and ``step_time.png`` into the folder."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PICTURES), default=list(PICTURES))
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    written = draw_all(options.out, options.files, options.only)
    for name in options.only:
        path = options.out / f"{name}.png"
        print(path if path in written else f"{name}.png: no rows to draw")


if __name__ == "__main__":
    main()
