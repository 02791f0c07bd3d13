"""Containers with elastic depth: they yield the leading blocks and keep all of them stored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from sorted_kernels.nn.axis import AxisSpec, ElasticAxis


class DepthContainer(torch.nn.Module):
    """Iteration, length, and indexing over the active prefix of a list of blocks.

    Parameters, state_dict, ``.to`` and the like always see every block.
    """

    AXES = ("depth",)
    depth_axis: ElasticAxis | None = None
    _playing: list[torch.nn.Module] | None = None

    @property
    def axes(self) -> dict[str, ElasticAxis]:
        """The depth axis, by name."""
        return {} if self.depth_axis is None else {"depth": self.depth_axis}

    def make_elastic(self, depth: ElasticAxis) -> None:
        """Give the list its depth axis (the constructor and ``elasticize`` call this)."""
        self.depth_axis = depth

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
    def play(self, blocks: Iterable[torch.nn.Module]) -> Iterator[None]:
        """Within the block, yield exactly these modules instead."""
        before, self._playing = self._playing, list(blocks)
        try:
            yield
        finally:
            self._playing = before

    def __iter__(self) -> Iterator[Any]:
        return iter(self.active_blocks())

    def __len__(self) -> int:
        return len(self.active_blocks())

    def __getitem__(self, index: int | slice) -> Any:
        picked = self.active_blocks()[index]
        return torch.nn.ModuleList(picked) if isinstance(index, slice) else picked


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
        if self._modules:
            self.make_elastic(ElasticAxis(depth_dim, len(self._modules)))


class Sequential(DepthContainer, torch.nn.Sequential):
    """``torch.nn.Sequential`` whose length follows a dimension.

    Args:
        *modules: The blocks, each taking the one before's output.
        depth_dim: Dimension of the depth: a name, ``(name, multiple_of)`` or None.
    """

    def __init__(self, *modules: torch.nn.Module, depth_dim: AxisSpec = None) -> None:
        super().__init__(*modules)
        if self._modules:
            self.make_elastic(ElasticAxis(depth_dim, len(self._modules)))

    def forward(self, input: Tensor) -> Tensor:
        """Run the active blocks in order."""
        for block in self.active_blocks():
            input = block(input)
        return input
