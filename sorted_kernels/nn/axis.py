"""Elastic axes: one axis of one parameter, the dimension it follows, and its active size."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch.compiler import is_compiling

from sorted_kernels.errors import ShapeError

AxisSpec = str | tuple[str, int] | None
"""A dimension's name, or ``(name, multiple_of)``, or None for an axis that never changes."""


class ElasticAxis:
    """One axis of a layer and how much of it is active.

    Args:
        spec: Name of the dimension, ``(name, multiple_of)``, or None.
        full: Size of the axis in the stored parameter.

    Raises:
        ShapeError: ``multiple_of`` is below 1 or above the full size.
    """

    __slots__ = ("dimension", "full", "multiple_of", "active", "probe")

    def __init__(self, spec: AxisSpec, full: int) -> None:
        name, multiple_of = spec if isinstance(spec, tuple) else (spec, 1)
        if multiple_of < 1 or multiple_of > full:
            raise ShapeError(f"multiple_of={multiple_of} is not in 1..{full}, the axis' full size")
        self.dimension, self.full, self.multiple_of = name, full, multiple_of
        self.set(full)

    def set(self, size: int) -> None:
        """Make ``size`` the active count (the caller has checked it)."""
        self.active = size
        self.probe = self.probe_of(size)

    def size(self) -> int:
        """The active count; symbolic while torch.compile traces, so a new size is no new graph."""
        return self.probe.shape[0] if self.dimension is not None and is_compiling() else self.active

    @staticmethod
    def probe_of(size: int) -> torch.Tensor:
        """The shared empty tensor whose shape is a size."""
        return _probe(size)

    def scaled(self, count: int, of: int) -> int:
        """This axis' size where the dimension has ``count`` out of ``of``, rounded up."""
        step = self.multiple_of
        exact = -(-self.full * count // of)
        return min(-(-exact // step) * step, self.full)

    def __repr__(self) -> str:
        return f"{self.dimension}: {self.active} of {self.full}" if self.dimension else "fixed"


class Following:
    """What a layer reads that keeps something for each sub-model: which one is active.

    Attributes:
        key: The counts of the dimensions below their full size, in the order of their names, as in
            ``"depth=8,width=4"``; ``"full"`` if there is none.
    """

    __slots__ = ("key",)

    def __init__(self) -> None:
        self.key = self.key_of({}, {})

    @staticmethod
    def key_of(submodel: Mapping[str, int], full: Mapping[str, int]) -> str:
        """The key of a sub-model, given the full size of each dimension."""
        below = [f"{name}={size}" for name, size in sorted(submodel.items()) if size < full[name]]
        return ",".join(below) or "full"


@functools.cache
def _probe(size: int) -> torch.Tensor:
    """An empty tensor whose shape holds a size.

    torch.compile makes an integer attribute of a module a constant of the graph, but a tensor's
    shape a variable of it from its second value on.
    """
    return torch.empty(size, 0)
