"""Containers with elastic depth: they yield the leading blocks and keep all of them stored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from sorted_kernels.nn.axis import AxisSpec, ElasticAxis


class DepthContainer(torch.nn.Module):
    """Iteration, length, and indexing over the active prefix of a list of blocks.

    Parameters, state_dict, ``.to`` and the like always see every block, and so do ``append`` and
    the other methods that change the list: their indices count stored blocks.
    """

    AXES = ("depth",)
    depth_dim: AxisSpec = None
    depth_axis: ElasticAxis | None = None
    _playing: list[torch.nn.Module] | None = None

    @property
    def axes(self) -> dict[str, ElasticAxis]:
        """The depth axis, by name."""
        return {} if self.depth_axis is None else {"depth": self.depth_axis}

    def make_elastic(self, depth: ElasticAxis) -> None:
        """Give the list its depth axis (``elasticize`` and changes of the list call this)."""
        self.depth_axis = depth
        self.depth_dim = (depth.dimension, depth.multiple_of) if depth.dimension else None

    def _fit_axis(self) -> None:
        """Make the depth axis as long as the list."""
        step = self.depth_dim[1] if isinstance(self.depth_dim, tuple) else 1
        if isinstance(step, int) and len(self._modules) < step:
            self.depth_axis = None
        else:
            self.depth_axis = ElasticAxis(self.depth_dim, len(self._modules))

    def all_blocks(self) -> list[Any]:
        """Every stored block, active or not."""
        return list(self._modules.values())

    def active_blocks(self) -> list[Any]:
        """The blocks that a forward runs now."""
        if self._playing is not None:
            return self._playing
        blocks = self.all_blocks()
        return blocks if self.depth_axis is None else blocks[: self.depth_axis.active]

    @contextlib.contextmanager
    def play(self, blocks: list[torch.nn.Module]) -> Iterator[None]:
        """Within the block, yield exactly these modules instead."""
        attributes = self.__dict__  # which a module's own way of setting them looks through first
        before, attributes["_playing"] = self._playing, blocks
        try:
            yield
        finally:
            attributes["_playing"] = before

    def __iter__(self) -> Iterator[Any]:
        return iter(self.active_blocks())

    def __len__(self) -> int:
        return len(self.active_blocks())

    def __getitem__(self, index: int | slice) -> Any:
        picked = self.active_blocks()[index]
        if not isinstance(index, slice):
            return picked
        if isinstance(self, torch.nn.Sequential):
            return torch.nn.Sequential(*picked)
        return torch.nn.ModuleList(picked)


def _changing(name: str) -> Callable[..., Any]:
    """A method of torch's container that changes it, run with every block in sight."""

    def method(self: Any, *args: Any) -> Any:
        with self.play(self.all_blocks()):
            result = getattr(super(DepthContainer, self), name)(*args)
        self._fit_axis()
        return result

    return method


for _name in ("append", "extend", "insert", "pop", "__setitem__", "__delitem__", "__iadd__"):
    setattr(DepthContainer, _name, _changing(_name))


class ModuleList(DepthContainer, torch.nn.ModuleList):
    """``torch.nn.ModuleList`` whose length follows a dimension.

    Args:
        modules: The blocks.
        depth_dim: Dimension of the depth: a name, ``(name, multiple_of)`` or None.
    """

    def __init__(
        self, modules: Iterable[torch.nn.Module] | None = None, *, depth_dim: AxisSpec = None
    ) -> None:
        super().__init__(modules)
        self.depth_dim = depth_dim
        self._fit_axis()


class Sequential(DepthContainer, torch.nn.Sequential):
    """``torch.nn.Sequential`` whose length follows a dimension.

    Args:
        *modules: The blocks, each taking the one before's output.
        depth_dim: Dimension of the depth: a name, ``(name, multiple_of)`` or None.
    """

    def __init__(self, *modules: torch.nn.Module, depth_dim: AxisSpec = None) -> None:
        super().__init__(*modules)
        self.depth_dim = depth_dim
        self._fit_axis()

    def forward(self, input: Tensor) -> Tensor:
        """Run the active blocks in order."""
        for block in self.active_blocks():
            input = block(input)
        return input
