"""The CSV row of a measurement, and the file it goes to."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measured quantity of one contestant on one problem.

    Attributes:
        kernel: What was timed: ``linear_step``, ``model_step``, ``anytime``, ``host``...
        provider: Who ran it: ``B0``, ``B1``, ``B2``, ``ours``, ``triton``, ``cuda``, ...
        mode: Part of the work: ``train``, ``forward``, ``dgrad``, ``wgrad``, ``step``, ...
        sizes: The problem, as ``name=count`` words: ``N=32 M=2048 K=2048 m=256 k=256``.
        dtype: Element type of the operands.
        cache: ``hot`` (the call repeats on its own buffers) or ``cold`` (caches flushed before it).
        metric: Unit of the percentiles: ``ms``, ``us``, ``GB/s``, ``TFLOP/s``.
        p20: 20th percentile over the samples.
        p50: Median.
        p80: 80th percentile.
        samples: Number of samples.
        flops: Least floating-point operations that the problem needs.
        bytes: Least bytes of memory traffic that the problem needs.
        device: Name of the processor.
        threads: CPU threads of PyTorch.
        torch: PyTorch's version.
        commit: Git commit, ``-dirty`` appended when tracked files differ from it.
        date: Day of the run, ISO.
    """

    kernel: str
    provider: str
    mode: str
    sizes: str
    dtype: str
    cache: str
    metric: str
    p20: float
    p50: float
    p80: float
    samples: int
    flops: int
    bytes: int
    device: str
    threads: int
    torch: str
    commit: str
    date: str

    def size(self, name: str) -> int:
        """One count out of ``sizes``."""
        return parse_sizes(self.sizes)[name]


COLUMNS = tuple(field.name for field in fields(Row))
_CONVERTERS = {
    field.name: {"float": float, "int": int}.get(str(field.type), str) for field in fields(Row)
}


def format_sizes(**sizes: int) -> str:
    """``name=count`` words in the order given."""
    return " ".join(f"{name}={count}" for name, count in sizes.items())


def parse_sizes(text: str) -> dict[str, int]:
    """Inverse of :func:`format_sizes`."""
    return {name: int(count) for name, count in (word.split("=") for word in text.split())}


def replace_file(path: Path, text: str) -> None:
    """Write a file beside its place and rename it: who is killed leaves the old one or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a CSV file, with the header if it is new.

    Raises:
        ValueError: The file has other columns.
    """
    text = path.read_text() if path.exists() else ",".join(COLUMNS) + "\n"
    header = tuple(text.split("\n", 1)[0].split(","))
    if header != COLUMNS:
        raise ValueError(f"{path} has the columns {header}; expected {COLUMNS}")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        values = asdict(row).values()
        writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text + buffer.getvalue())


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """All rows of some CSV files, in order."""
    result = []
    for path in paths:
        with path.open(newline="") as file:
            for record in csv.DictReader(file):
                result.append(Row(**{name: _CONVERTERS[name](record[name]) for name in COLUMNS}))
    return result
