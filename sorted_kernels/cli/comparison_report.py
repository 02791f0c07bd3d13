"""What ``compare`` found, as a table like SortedNet's Table 2, CSV, JSON and a picture."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from sorted_kernels.cli.comparison import Comparison, Outcome, Run
from sorted_kernels.errors import require
from sorted_kernels.inference.files import replacing
from sorted_kernels.training.baselines import METHODS

WIDTHS_OF = 16
_GROUPS = {
    "IN": "instance norm",
    "BN": "batch norm",
    "BN recalibrated": "batch norm, statistics taken anew for each width after training",
}
_BUDGETS = {
    "steps": "equal optimizer steps",
    "passes": "equal forward/backward passes",
}
_COLOURS = ("#1f5fa8", "#c2410c", "#15803d", "#7c3aed", "#0e7490", "#475569", "#be185d")


@dataclass(frozen=True)
class Column:
    """One method of one table, over all seeds.

    Attributes:
        budget: What all columns of the table spent alike.
        group: The table: a key of the norms' groups.
        title: The method's name.
        accuracies: Fractions, one a seed, for each width.
        flops: Of one image, for each width.
        steps: Optimizer steps of each seed.
        passes: Forward/backward passes of each seed.
        seconds: Of training, of the seeds that were not interrupted.
    """

    budget: str
    group: str
    title: str
    accuracies: dict[int, list[float]]
    flops: dict[int, int]
    steps: list[int]
    passes: list[int]
    seconds: list[float]

    def mean(self, width: int) -> float:
        """Mean accuracy in percent."""
        return 100 * statistics.fmean(self.accuracies[width])

    def deviation(self, width: int) -> float:
        """Sample standard deviation in percent; 0 of one seed."""
        values = self.accuracies[width]
        return 100 * statistics.stdev(values) if len(values) > 1 else 0.0

    @property
    def average(self) -> float:
        """Mean over the widths, in percent."""
        return statistics.fmean(self.mean(width) for width in self.accuracies)


def columns(
    comparison: Comparison, outcomes: Mapping[str, Outcome], flops: dict[int, int]
) -> list[Column]:
    """Every column of every table whose runs are all there.

    Args:
        comparison: What was run.
        outcomes: By the run's name.
        flops: Of one image, at each width.
    """
    found = []
    for budget in comparison.budgets:
        for group in _GROUPS:
            for method in comparison.methods:
                for norm in comparison.norms:
                    column = _column(comparison, outcomes, flops, budget, group, method, norm)
                    if column is not None:
                        found.append(column)
    return found


def _column(
    comparison: Comparison,
    outcomes: Mapping[str, Outcome],
    flops: dict[int, int],
    budget: str,
    group: str,
    method: str,
    norm: str,
) -> Column | None:
    if (norm == "instance") != (group == "IN"):
        return None
    steps = comparison.steps_of(method, budget)
    runs = [Run(method, norm, steps, seed) for seed in comparison.seeds]
    if not all(run.name in outcomes for run in runs):
        return None
    done = [outcomes[run.name] for run in runs]
    measured = [o.recalibrated if group == "BN recalibrated" else o.accuracy for o in done]
    kept = [accuracy for accuracy in measured if accuracy is not None]
    if len(kept) != len(done):
        return None
    shared = method == "slimmable" and norm == "batch"
    return Column(
        budget,
        group,
        METHODS[method].title + (" (shared)" if shared else ""),
        {width: [accuracy[width] for accuracy in kept] for width in comparison.widths},
        flops,
        [outcome.steps for outcome in done],
        [outcome.passes for outcome in done],
        [outcome.seconds for outcome in done if outcome.seconds is not None],
    )


def tables(found: list[Column]) -> list[Table]:
    """One table a budget and group: a row a width, a column a method."""
    made = []
    for budget, group, part in _parts(found):
        table = Table(title=f"{_BUDGETS[budget]}; {_GROUPS[group]}", title_justify="left")
        for title in ("width", "MFLOPs", *(column.title for column in part)):
            table.add_column(title, justify="right")
        for width in sorted(part[0].accuracies, reverse=True):
            cells = [_cell(column, width) for column in part]
            flops = f"{part[0].flops[width] / 1e6:.2f}"
            table.add_row(f"{100 * width / WIDTHS_OF:g}%", flops, *cells)
        table.add_row("avg.", "", *(f"{column.average:.2f}" for column in part), end_section=True)
        for name in ("steps", "passes"):
            counts = (statistics.fmean(getattr(column, name)) for column in part)
            table.add_row(name, "", *(f"{count:,.0f}" for count in counts))
        seconds = [statistics.fmean(c.seconds) if c.seconds else None for c in part]
        table.add_row("seconds", "", *("" if s is None else f"{s:,.0f}" for s in seconds))
        made.append(table)
    return made


def _parts(found: list[Column]) -> list[tuple[str, str, list[Column]]]:
    """The columns of each table."""
    parts = []
    for budget in _BUDGETS:
        for group in _GROUPS:
            part = [c for c in found if (c.budget, c.group) == (budget, group)]
            if part:
                parts.append((budget, group, part))
    return parts


def _cell(column: Column, width: int) -> str:
    if len(column.accuracies[width]) == 1:
        return f"{column.mean(width):.2f}"
    return f"{column.mean(width):.2f} ± {column.deviation(width):.2f}"


def write(found: list[Column], out: Path) -> list[Path]:
    """Write ``comparison.csv``, ``comparison.json`` and, of several widths, ``comparison.png``.

    Returns:
        Their paths.
    """
    paths = [out / "comparison.csv", out / "comparison.json", out / "comparison.png"]
    with (
        replacing(paths[0]) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        names = ["budget", "norm", "method", "width", "flops", "mean", "deviation", "seeds"]
        writer.writerow([*names, "steps", "passes", "seconds"])
        for column in found:
            for width, values in column.accuracies.items():
                row = [column.budget, column.group, column.title, width, column.flops[width]]
                row += [f"{column.mean(width):.4f}", f"{column.deviation(width):.4f}", len(values)]
                costs = (column.steps, column.passes, column.seconds)
                row += [f"{statistics.fmean(cost):.1f}" if cost else "" for cost in costs]
                writer.writerow(row)
    with replacing(paths[1]) as temporary:
        content = [vars(column) for column in found]
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _draw(found, paths[2])
    return paths


def _draw(found: list[Column], path: Path) -> None:
    """Accuracy over width: a panel a table, a line a method, a band of one deviation."""
    module: Any = require("matplotlib.figure", "plot")
    budgets = [name for name in _BUDGETS if any(c.budget == name for c in found)]
    groups = [name for name in _GROUPS if any(c.group == name for c in found)]
    size = (4.4 * len(groups) + 1.8, 3.4 * len(budgets) + 0.4)
    figure = module.Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(len(budgets), len(groups), squeeze=False, sharey=True)
    titles = list(dict.fromkeys(column.title for column in found))
    lines: dict[str, Any] = {}
    for budget, group, part in _parts(found):
        axes = panels[budgets.index(budget)][groups.index(group)]
        for column in part:
            colour = _COLOURS[titles.index(column.title) % len(_COLOURS)]
            lines.setdefault(column.title, _line(axes, column, colour))
        axes.set_title(f"{group}, {_BUDGETS[budget]}", fontsize=10)
        axes.grid(color="#e4e7eb", lw=0.7)
        axes.set_xlabel("width (%)")
    for row in panels:
        row[0].set_ylabel("accuracy (%)")
    for axes in panels.flat:
        axes.set_visible(bool(axes.lines))
        for edge in ("top", "right"):
            axes.spines[edge].set_visible(False)
    names = [title for title in titles if title in lines]
    figure.legend([lines[n] for n in names], names, frameon=False, loc="outside right upper")
    with replacing(path) as temporary:
        figure.savefig(temporary)


def _line(axes: Any, column: Column, colour: str) -> Any:
    widths = sorted(column.accuracies)
    x = [100 * width / WIDTHS_OF for width in widths]
    means = [column.mean(width) for width in widths]
    deviations = [column.deviation(width) for width in widths]
    style = "--" if column.title == METHODS["alone"].title else "-"
    (line,) = axes.plot(x, means, color=colour, marker="o", ms=4, lw=1.6, ls=style)
    low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
    high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
    axes.fill_between(x, low, high, color=colour, alpha=0.14, lw=0)
    axes.set_xticks(x)
    return line
