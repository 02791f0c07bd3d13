"""The table that an evaluation gives: one row a sub-model, its metric and its costs."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from sorted_kernels.errors import CheckpointError, OptionError, SortedKernelsError
from sorted_kernels.inference.files import replacing
from sorted_kernels.submodel import Submodel, parse_size, size_order

COSTS = ("flops", "parameters", "latency_ms")
_FORMAT = "sorted_kernels.results"
# Columns of the CSV file after those of the dimensions.
_CSV_COLUMNS = ["metric", "higher_is_better", "value", "parameters", "flops", "latency_ms"]


@dataclass(frozen=True)
class Row:
    """One sub-model's result.

    Args:
        submodel: The sub-model.
        metric: Its metric over the whole data set.
        parameters: How many parameters it uses.
        flops: Floating-point operations of one forward; a multiply-add counts as two.
        latency_ms: Milliseconds of one forward, where it was measured.
    """

    submodel: Submodel
    metric: float
    parameters: int
    flops: int
    latency_ms: float | None = None

    def cost(self, name: str) -> float:
        """The cost of that name: ``"flops"``, ``"parameters"`` or ``"latency_ms"``.

        Raises:
            OptionError: No such cost, or the latency was not measured.
        """
        if name not in COSTS:
            raise OptionError(f"cost {name!r} is unknown; allowed are {', '.join(COSTS)}")
        value = getattr(self, name)
        if value is None:
            raise OptionError(
                f"cost {name!r} was not measured for {self.submodel}; evaluate with latency=True"
            )
        return float(value)


class Results:
    """Rows of an evaluation, sorted by the sizes of their sub-models.

    ``results[0]`` is a row, and so is ``results[Submodel(depth=4, width=64)]``; ``print(results)``
    shows the table.

    Args:
        rows: One row a sub-model; all have the same dimensions.
        metric: Name of the metric, e.g. ``"accuracy"`` (a fraction, shown in percent).
        higher_is_better: Whether more of the metric is better.

    Raises:
        OptionError: No row, a sub-model twice, or rows with different dimensions.
    """

    def __init__(
        self, rows: Iterable[Row], *, metric: str = "accuracy", higher_is_better: bool = True
    ) -> None:
        given = list(rows)
        if not given:
            raise OptionError("rows is empty; results need at least one sub-model")
        self.dimensions = names = tuple(given[0].submodel)
        self._index = {row.submodel: row for row in given}
        if len(self._index) != len(given):
            raise OptionError("rows has a sub-model twice")
        for row in given:
            if set(row.submodel) != set(names):
                raise OptionError(f"rows mix dimensions: {row.submodel!r} is among {list(names)}")
        self.rows = tuple(
            sorted(given, key=lambda row: [size_order(row.submodel[name]) for name in names])
        )
        self.metric = metric
        self.higher_is_better = higher_is_better

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @overload
    def __getitem__(self, key: int | Submodel) -> Row: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, key: int | slice | Submodel) -> Row | tuple[Row, ...]:
        return self._index[key] if isinstance(key, Submodel) else self.rows[key]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Results):
            return NotImplemented
        mine = (self.rows, self.metric, self.higher_is_better)
        return mine == (other.rows, other.metric, other.higher_is_better)

    __hash__ = None  # type: ignore[assignment]

    def goodness(self, row: Row) -> float:
        """The metric turned so that more is better; minus infinity where it is not a number."""
        if math.isnan(row.metric):
            return -math.inf
        return row.metric if self.higher_is_better else -row.metric

    @property
    def best(self) -> Row:
        """The row with the best metric; the cheapest of them where several share it."""
        return max(self.rows, key=lambda r: (self.goodness(r), -r.flops, -r.parameters))

    def recovery(self, row: Row) -> float:
        """The row's metric in percent of the best one (SortedNet, Figure 2).

        Where less is better it is the best in percent of the row's; not a number where the metric's
        sign leaves no meaning to a percentage.
        """
        value, best = row.metric, self.best.metric
        if value == best:
            return 100.0
        if not best > 0:
            return 0.0 if best == 0 and not self.higher_is_better else math.nan
        return 100.0 * (value / best if self.higher_is_better else best / value)

    def pareto(self, cost: str = "flops") -> tuple[Row, ...]:
        """Rows that no other row beats in both cost and metric, cheapest first.

        Args:
            cost: ``"flops"``, ``"parameters"`` or ``"latency_ms"``.

        Raises:
            OptionError: No such cost, or the latency was not measured.
        """
        front: list[Row] = []
        for row in sorted(self.rows, key=lambda r: (r.cost(cost), -self.goodness(r))):
            if self.goodness(row) > (self.goodness(front[-1]) if front else -math.inf):
                front.append(row)
        return tuple(front)

    def format_metric(self, row: Row) -> str:
        """The metric for people: an accuracy in percent, anything else to four digits."""
        if self.metric == "accuracy":
            return f"{100 * row.metric:.2f}"
        return f"{row.metric:#.4g}".rstrip(".")

    @property
    def metric_label(self) -> str:
        """The metric's name with its unit, as it stands over a column or beside an axis."""
        return "accuracy (%)" if self.metric == "accuracy" else self.metric

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Column titles and the formatted cells of each row, for any printer of tables."""
        titles = [*self.dimensions, self.metric_label, "recovery (%)", "parameters", "FLOPs"]
        timed = any(row.latency_ms is not None for row in self.rows)
        lines = []
        for row in self.rows:
            line = [str(row.submodel[name]) for name in self.dimensions]
            line += [self.format_metric(row), f"{self.recovery(row):.1f}"]
            line += [f"{row.parameters:,}", f"{row.flops:,}"]
            if timed:
                line.append("" if row.latency_ms is None else f"{row.latency_ms:.3f}")
            lines.append(line)
        return [*titles, "latency (ms)"] if timed else titles, lines

    def __str__(self) -> str:
        titles, lines = self.table()
        widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in [titles, *lines]
        )

    def __repr__(self) -> str:
        return f"<Results: {self.metric} of {len(self)} sub-models over {list(self.dimensions)}>"

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to a JSON file, whole or not at all; a NaN or infinity becomes null.

        Raises:
            CheckpointError: The file cannot be written.
        """
        rows = [
            {
                "submodel": dict(row.submodel),
                "value": row.metric if math.isfinite(row.metric) else None,
                "parameters": row.parameters,
                "flops": row.flops,
                "latency_ms": row.latency_ms,
            }
            for row in self.rows
        ]
        head = {"format": _FORMAT, "version": 1, "metric": self.metric}
        content = {**head, "higher_is_better": self.higher_is_better, "rows": rows}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Results:
        """Read what :meth:`to_json` wrote.

        Raises:
            CheckpointError: The file is missing, unreadable, or holds something else.
        """
        return _read(path, _parse_json)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV file, whole or not at all: the dimensions' columns, then the metric's.

        Raises:
            CheckpointError: The file cannot be written.
        """
        with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f)
            writer.writerow([*self.dimensions, *_CSV_COLUMNS])
            for row in self.rows:
                sizes = [row.submodel[name] for name in self.dimensions]
                latency = "" if row.latency_ms is None else row.latency_ms
                named = [self.metric, self.higher_is_better, row.metric]
                writer.writerow([*sizes, *named, row.parameters, row.flops, latency])

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> Results:
        """Read what :meth:`to_csv` wrote.

        Raises:
            CheckpointError: The file is missing, unreadable, or holds something else.
        """
        return _read(path, _parse_csv)


def _read(path: str | os.PathLike[str], parse: Callable[[str], Results]) -> Results:
    """Read and parse a file; whatever is wrong becomes an error that names the file."""
    name = str(Path(path))
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"results file {name!r} cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise CheckpointError(f"results file {name!r} has no field {error}") from error
    except (ValueError, TypeError, AttributeError, csv.Error, SortedKernelsError) as error:
        raise CheckpointError(f"results file {name!r} is damaged or foreign: {error}") from error


def _parse_json(text: str) -> Results:
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"its field 'format' is not {_FORMAT!r}")
    if content["version"] != 1:
        raise ValueError(f"its version is {content['version']!r}; allowed is 1")
    metric, higher = content["metric"], content["higher_is_better"]
    if not isinstance(metric, str) or not isinstance(higher, bool):
        raise ValueError(f"metric {metric!r} must be a text, higher_is_better {higher!r} a boolean")
    rows = [
        Row(
            Submodel(**row["submodel"]),
            math.nan if row["value"] is None else float(row["value"]),
            int(row["parameters"]),
            int(row["flops"]),
            None if row["latency_ms"] is None else float(row["latency_ms"]),
        )
        for row in content["rows"]
    ]
    return Results(rows, metric=metric, higher_is_better=higher)


def _parse_csv(text: str) -> Results:
    header, *lines = list(csv.reader(text.splitlines())) or [[]]
    count = len(header) - len(_CSV_COLUMNS)
    if count < 1 or header[count:] != _CSV_COLUMNS:
        raise ValueError(f"its header is {header}; it must end in {_CSV_COLUMNS}")
    rows, kinds = [], set()
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise ValueError(f"line {number} has {len(line)} fields, the header {len(header)}")
        sizes = {name: parse_size(size) for name, size in zip(header, line[:count], strict=False)}
        metric, higher, value, parameters, flops, latency = line[count:]
        kinds.add((metric, higher))
        milliseconds = float(latency) if latency else None
        rows.append(Row(Submodel(**sizes), float(value), int(parameters), int(flops), milliseconds))
    if len(kinds) != 1 or {higher for _, higher in kinds} - {"True", "False"}:
        raise ValueError(f"it must name one metric and True or False for its sense, not {kinds}")
    ((metric, higher),) = kinds
    return Results(rows, metric=metric, higher_is_better=higher == "True")
