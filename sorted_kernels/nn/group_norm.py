"""Group norm and instance norm over channels that follow a dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sorted_kernels.errors import OptionError, ShapeError
from sorted_kernels.nn.axis import AxisSpec, ElasticAxis
from sorted_kernels.nn.layers import ElasticModule, check_width
from sorted_kernels.ops.group_norm import (
    check_group_norm,
    check_instances,
    group_norm_on_blocks,
    run_group_norm,
)


class _GroupNorm(ElasticModule):
    """What norms over groups of each sample's channels share."""

    OP = "group_norm"
    AXES = ("features",)
    features_axis: ElasticAxis
    weight: Any
    bias: Any
    eps: float

    def _normalise(self, x: Tensor, num_groups: int) -> Tensor:
        weight, bias = self.weight, self.bias
        check_group_norm(x, num_groups, None, None)
        blocks = self._plain_blocks(self.features_axis.active)
        if blocks is not None and not x.is_cuda:
            try:
                return group_norm_on_blocks(x, blocks, num_groups, self.eps)
            except RuntimeError:
                check_group_norm(x, num_groups, weight, bias)
                raise
        path = self._gradient_path(weight, bias)
        return run_group_norm(x, num_groups, weight, bias, self.eps, *path)

    def active_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight and bias (c,)."""
        return dict.fromkeys(("weight", "bias"), (self.features_axis.active,))


class GroupNorm(_GroupNorm, torch.nn.GroupNorm):
    """``torch.nn.GroupNorm`` whose channels follow a dimension, in whole groups.

    A group keeps its C // num_groups channels; a narrower sub-model has fewer groups. Its channels
    are whole groups where the axis' ``multiple_of`` is: ``dim=("width", C // num_groups)``.

    Args:
        num_groups: Groups of the stored channels.
        num_channels: C, the stored channels.
        eps: Added to the variance.
        affine: Whether there are scale and shift.
        device: As in torch.
        dtype: As in torch.
        dim: Dimension of the channels.
        grad_mode: See :meth:`ElasticModule.make_elastic`.

    Shape:
        (N, active channels, ...) -> the same.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        dim: AxisSpec = None,
        grad_mode: str = "inplace",
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.make_elastic(grad_mode, features=ElasticAxis(dim, num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the active groups of channels."""
        check_width(x, self.features_axis, "GroupNorm", 1)
        return self._normalise(x, self._groups(x.shape[1]))

    def _groups(self, channels: int) -> int:
        size = self.num_channels // self.num_groups
        if channels % size != 0:
            raise ShapeError(
                f"GroupNorm has {channels} channels active and groups of {size}; only whole groups "
                f"can be active: give its axis multiple_of={size}"
            )
        return channels // size

    def stock(self) -> torch.nn.Module:
        """A ``torch.nn.GroupNorm`` of the active groups."""
        c = self.features_axis.active
        return torch.nn.GroupNorm(self._groups(c), c, self.eps, self.affine, device="meta")


class InstanceNorm2d(_GroupNorm, torch.nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` whose channels follow a dimension; no running statistics.

    Args:
        num_features: C, the stored channels.
        eps: Added to the variance.
        momentum: As in torch, where it is for running statistics alone.
        affine: Whether there are scale and shift.
        track_running_stats: False; they make it a batch norm when it is evaluated.
        device: As in torch.
        dtype: As in torch.
        dim: Dimension of the channels.
        grad_mode: See :meth:`ElasticModule.make_elastic`.

    Shape:
        (N, active channels, H, W) or (active channels, H, W) -> the same.

    Raises:
        OptionError: ``track_running_stats`` is True.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        dim: AxisSpec = None,
        grad_mode: str = "inplace",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.make_elastic(grad_mode, features=ElasticAxis(dim, num_features))

    def make_elastic(self, grad_mode: str = "inplace", **axes: ElasticAxis) -> None:
        """Give the module its axis."""
        if self.track_running_stats:
            raise OptionError(
                "track_running_stats=True; an elastic InstanceNorm2d has no running statistics: "
                "leave them out, or use BatchNorm2d"
            )
        super().make_elastic(grad_mode, **axes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each active channel of each sample."""
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if x.dim() != 4:
            raise ShapeError(f"InstanceNorm2d got x of shape {tuple(x.shape)}; 3 or 4 axes wanted")
        check_width(x, self.features_axis, "InstanceNorm2d", 1)
        check_instances(x)
        return self._normalise(x, x.shape[1])

    def stock(self) -> torch.nn.Module:
        """A ``torch.nn.InstanceNorm2d`` of the active channels."""
        return torch.nn.InstanceNorm2d(
            self.features_axis.active, self.eps, affine=self.affine, device="meta"
        )
