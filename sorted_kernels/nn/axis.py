"""Elastic axes: one axis of one parameter, the dimension it follows, and its active size."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.compiler import is_compiling

from sorted_kernels.errors import DimensionError, ShapeError

AxisSpec = str | tuple[str, int] | tuple[str, tuple[int, ...]] | None
"""A dimension's name, ``(name, multiple_of)``, ``(name, sizes)`` with the axis' size for each count
of the dimension from 1 on, or None for an axis that never changes."""


class ElasticAxis:
    """One axis of a layer and how much of it is active.

    Args:
        spec: Name of the dimension, ``(name, multiple_of)``, ``(name, sizes)``, or None.
        full: Size of the axis in the stored parameter.

    Raises:
        ShapeError: ``multiple_of`` is below 1 or above the full size, or ``sizes`` do not rise to
            the full size.
    """

    __slots__ = ("dimension", "full", "multiple_of", "sizes", "active", "probe")

    def __init__(self, spec: AxisSpec, full: int) -> None:
        name, step = spec if isinstance(spec, tuple) else (spec, 1)
        self.sizes = step if isinstance(step, tuple) else None
        multiple_of = step if isinstance(step, int) else 1
        if multiple_of < 1 or multiple_of > full:
            raise ShapeError(f"multiple_of={multiple_of} is not in 1..{full}, the axis' full size")
        if self.sizes is not None and (
            list(self.sizes) != sorted(self.sizes) or self.sizes[0] < 1 or self.sizes[-1] != full
        ):
            raise ShapeError(
                f"sizes={self.sizes}; allowed are sizes that rise to {full}, the axis' full size"
            )
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
        if self.sizes is not None:
            if len(self.sizes) != of:
                raise DimensionError(
                    f"an axis of dimension {self.dimension!r} lists {len(self.sizes)} sizes; "
                    f"the dimension's full size is {of}, and each count has one"
                )
            return self.sizes[count - 1]
        step = self.multiple_of
        exact = -(-self.full * count // of)
        return min(-(-exact // step) * step, self.full)

    def __repr__(self) -> str:
        return f"{self.dimension}: {self.active} of {self.full}" if self.dimension else "fixed"


class AttributeAxis(ElasticAxis):
    """A size that a module keeps as an integer attribute and computes with.

    Args:
        spec: As for :class:`ElasticAxis`.
        module: The module.
        name: The attribute, at its full size now.
    """

    __slots__ = ("_module", "_name", "_size")

    def __init__(self, spec: AxisSpec, module: torch.nn.Module, name: str) -> None:
        self._module, self._name = module, name
        super().__init__(spec, getattr(module, name))

    @property
    def active(self) -> int:  # type: ignore[override]
        """The active count."""
        return self._size

    @active.setter
    def active(self, size: int) -> None:
        self._size = self._module.__dict__[self._name] = size


def forget_attributes(module: torch.nn.Module) -> None:
    """Leave the sizes that a module keeps as they are now."""
    axes = module.__dict__.get("axes")
    if isinstance(axes, dict) and any(isinstance(axis, AttributeAxis) for axis in axes.values()):
        del module.__dict__["axes"]


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
    def key_of(submodel: Mapping[str, Any], full: Mapping[str, int]) -> str:
        """The key of a sub-model, given the full size of each dimension."""
        below = [
            f"{name}={size}"
            for name, size in sorted(submodel.items())
            if (min(size) if isinstance(size, tuple) else size) < full[name]
        ]
        return ",".join(below) or "full"


@functools.cache
def _probe(size: int) -> torch.Tensor:
    """An empty tensor whose shape holds a size.

    torch.compile makes an integer attribute of a module a constant of the graph, but a tensor's
    shape a variable of it from its second value on.
    """
    return torch.empty(size, 0)
