"""RowWidths: how much of a weight each row of a ragged batch uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sorted_kernels.errors import ShapeError


class Run(NamedTuple):
    """Neighbouring rows that use the same prefix ``[:out_features, :in_features]`` of a weight."""

    rows: int
    out_features: int
    in_features: int


class RowWidths:
    """The sizes of a ragged batch: rows of different sub-models, sorted largest first.

    Sorted so, the rows that use any one element of the weight are a prefix of the batch, and the
    batch is a staircase: one launch does exactly the work that the rows need.

    Args:
        runs: ``(rows, out_features, in_features)`` triples. Neither size may rise from one run to
            the next; equal neighbours become one run.

    Raises:
        ShapeError: No run, a count below 1, or sizes that are not sorted.
    """

    __slots__ = ("runs",)
    runs: tuple[Run, ...]

    def __init__(self, runs: Iterable[tuple[int, int, int]]) -> None:
        merged: list[Run] = []
        for index, given in enumerate(runs):
            run = _checked(index, given)
            if merged and run[1:] == merged[-1][1:]:
                merged[-1] = merged[-1]._replace(rows=merged[-1].rows + run.rows)
                continue
            for name in ("out_features", "in_features") if merged else ():
                size, before = getattr(run, name), getattr(merged[-1], name)
                if size > before:
                    raise ShapeError(
                        f"runs[{index}] has {name}={size}, more than the {before} of the run "
                        "before it; rows are sorted largest first, in both sizes"
                    )
            merged.append(run)
        if not merged:
            raise ShapeError("RowWidths has no runs; give at least one (rows, out, in) triple")
        object.__setattr__(self, "runs", tuple(merged))

    @classmethod
    def of_rows(cls, out_features: Sequence[int], in_features: Sequence[int]) -> RowWidths:
        """One pair of sizes a row.

        Raises:
            ShapeError: Different lengths, and what the constructor raises.
        """
        if len(out_features) != len(in_features):
            raise ShapeError(
                f"out_features has {len(out_features)} entries, in_features {len(in_features)}; "
                "each row has one of both"
            )
        return cls((1, m, k) for m, k in zip(out_features, in_features, strict=True))

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return sum(run.rows for run in self.runs)

    @property
    def out_features(self) -> int:
        """The largest row's output features."""
        return self.runs[0].out_features

    @property
    def in_features(self) -> int:
        """The largest row's input features."""
        return self.runs[0].in_features

    @property
    def flops(self) -> int:
        """Operations of one matrix product: two for each row and element of its prefix."""
        return sum(2 * rows * m * k for rows, m, k in self.runs)

    def flat(self) -> list[int]:
        """The runs as one list of integers, as the ops' schemas take them."""
        return [size for run in self.runs for size in run]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("RowWidths is frozen; make another one")

    def __reduce__(self) -> tuple[type[RowWidths], tuple[tuple[Run, ...]]]:
        return RowWidths, (self.runs,)

    def __len__(self) -> int:
        return self.rows

    def __eq__(self, other: object) -> bool:
        return self.runs == other.runs if isinstance(other, RowWidths) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.runs)

    def __repr__(self) -> str:
        return f"RowWidths({[tuple(run) for run in self.runs]})"


def _checked(index: int, given: tuple[int, int, int]) -> Run:
    run = Run(*given)
    for name, value in zip(Run._fields, run, strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ShapeError(
                f"runs[{index}] has {name}={value!r}; allowed are integers of at least 1"
            )
    return run
