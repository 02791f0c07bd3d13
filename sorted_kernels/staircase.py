"""Staircase: a union of origin-anchored rectangles, what a step has touched of a matrix."""

from __future__ import annotations

from collections.abc import Iterable

Band = tuple[int, int, int]
"""``(row_begin, row_end, cols)``: rows ``row_begin:row_end`` are covered up to column ``cols``."""


class Staircase:
    """A Young diagram in a ``rows`` x ``cols`` matrix: row ``r`` is covered up to ``extents()[r]``.

    Parameters of more than two axes count their trailing axes as one with the columns' element
    (they are always covered whole); one-dimensional ones are a column of width 1.

    The diagram is kept as its outer corners ``(m, k)``, rows falling and columns rising, so a
    training window that draws *n* sub-models costs at most *n* entries however big the matrix is.

    Args:
        rows: Height of the whole matrix.
        cols: Width of the whole matrix.
    """

    __slots__ = ("rows", "cols", "corners")

    def __init__(self, rows: int, cols: int) -> None:
        self.rows, self.cols = rows, cols
        self.corners: list[tuple[int, int]] = []

    def add(self, m: int, k: int) -> None:
        """Cover the rectangle ``[:m, :k]`` (counts that callers have checked)."""
        corners = self.corners
        if not corners:
            corners.append((m, k))
            return
        for rows, cols in corners:
            if rows >= m and cols >= k:
                return
        kept = [corner for corner in corners if corner[0] > m or corner[1] > k]
        kept.append((m, k))
        kept.sort(reverse=True)
        self.corners = kept

    def update(self, corners: Iterable[tuple[int, int]]) -> None:
        """Cover each rectangle of another staircase's ``corners``."""
        for m, k in corners:
            self.add(m, k)

    def cover_all(self) -> None:
        """Cover the whole matrix."""
        self.corners = [(self.rows, self.cols)]

    def clear(self) -> None:
        """Cover nothing."""
        self.corners = []

    def covers(self, m: int, k: int) -> bool:
        """Whether every element of ``[:m, :k]`` is covered."""
        return any(rows >= m and cols >= k for rows, cols in self.corners)

    def within(self, m: int, k: int) -> bool:
        """Whether nothing outside ``[:m, :k]`` is covered."""
        return all(rows <= m and cols <= k for rows, cols in self.corners)

    def bands(self) -> list[Band]:
        """Disjoint row bands, top to bottom, that together are the diagram."""
        result, begin = [], 0
        for rows, cols in reversed(self.corners):
            result.append((begin, rows, cols))
            begin = rows
        return result

    def extents(self) -> list[int]:
        """Number of covered columns of each row."""
        result = [0] * self.rows
        for begin, end, cols in self.bands():
            result[begin:end] = [cols] * (end - begin)
        return result

    @property
    def area(self) -> int:
        """Number of covered elements."""
        return sum((end - begin) * cols for begin, end, cols in self.bands())

    def __bool__(self) -> bool:
        return bool(self.corners)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Staircase):
            return NotImplemented
        return (self.rows, self.cols, self.corners) == (other.rows, other.cols, other.corners)

    __hash__ = None  # type: ignore[assignment]  # it changes as a step goes on

    def __repr__(self) -> str:
        return f"Staircase({self.rows}x{self.cols}, corners={self.corners})"
