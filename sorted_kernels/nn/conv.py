"""Convolution whose channels and kernel follow named dimensions."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from sorted_kernels.errors import OptionError, ShapeError
from sorted_kernels.nn.axis import AxisSpec, ElasticAxis
from sorted_kernels.nn.layers import (
    ElasticModule,
    check_activation,
    check_width,
    with_activation,
)
from sorted_kernels.ops.conv2d import conv2d_on_blocks, run_conv2d
from sorted_kernels.ops.conv2d_checks import geometry_of
from sorted_kernels.reference.conv2d import Geometry


class TapAxis(ElasticAxis):
    """The height and width of a square kernel, of which the centre is active.

    Sizes differ from the full one by even numbers, or there would be no centre; others are rounded
    up.
    """

    __slots__ = ()

    def scaled(self, count: int, of: int) -> int:
        """This axis' size where the dimension has ``count`` out of ``of``, rounded up."""
        size = super().scaled(count, of)
        return size + (self.full - size) % 2


class Conv2d(ElasticModule, torch.nn.Conv2d):
    """``torch.nn.Conv2d`` whose channels and kernel size follow named dimensions.

    With groups, whole groups are active: ``in`` and ``out`` follow one dimension, which either may
    name, and a depthwise convolution has the leading channels.

    A smaller kernel is the centre of the stored one, and the padding shrinks with it, so that the
    output keeps its size (once-for-all, section 3): 7 taps with padding 3 become 5 with padding 2.
    That is the stored kernel with zeros around the centre.

    Args:
        in_channels: K, the stored input channels.
        out_channels: M, the stored output channels.
        kernel_size: Stored taps, one number or (height, width).
        stride: As in torch.
        padding: As in torch.
        dilation: As in torch.
        groups: The stored groups.
        bias: Whether there is a bias.
        padding_mode: ``"zeros"``.
        device: As in torch.
        dtype: As in torch.
        in_dim: Dimension of the input channels: a name, ``(name, multiple_of)`` or None.
        out_dim: Dimension of the output channels.
        kernel_size_dim: Dimension of the taps of a square kernel.
        activation: None, ``"relu"``, ``"gelu"`` or ``"silu"``, fused into the layer.
        grad_mode: See :meth:`ElasticModule.make_elastic`.

    Raises:
        OptionError: Another padding mode, or axes that cannot follow these dimensions.

    Shape:
        (N, active in_channels, H, W) -> (N, active out_channels, H', W'), or both without N.
    """

    OP = "conv2d"
    AXES = ("in", "out", "kernel_size")
    in_axis: ElasticAxis
    out_axis: ElasticAxis
    kernel_size_axis: ElasticAxis
    activation = "none"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        in_dim: AxisSpec = None,
        out_dim: AxisSpec = None,
        kernel_size_dim: AxisSpec = None,
        activation: str | None = None,
        grad_mode: str = "inplace",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self.activation = check_activation(activation)
        specs = {"in": in_dim, "out": out_dim, "kernel_size": kernel_size_dim}
        self.make_elastic(grad_mode, **conv_axes(self, specs))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the active block."""
        plan = None
        if x.dim() == 4 and not is_compiling():
            sizes = self.in_axis.active, self.out_axis.active, self.kernel_size_axis.active
            plan = _plan(
                *sizes, self.in_channels, self.kernel_size, self.groups, self.stride, self.padding,
                self.dilation,
            )  # fmt: skip
        blocks = None if plan is None else self._plain_blocks(*plan[0])
        if plan is None or blocks is None:
            return self._run(x)
        try:
            return conv2d_on_blocks(x, blocks, plan[1], self.activation)
        except RuntimeError:
            with torch.no_grad():
                self._run(x)  # says what was wrong with the input
            raise

    def _run(self, x: Tensor) -> Tensor:
        check_width(x, self.in_axis, "Conv2d", -3)
        weight, bias = self.weight, self.bias
        taps = self._taps()
        padding = _active_padding(self.padding, self.dilation, self.kernel_size, taps)
        out_channels = self.out_axis.size() if self.groups == 1 else None  # else it follows x
        return run_conv2d(
            x, weight, bias, out_channels, taps, self.stride, padding, self.dilation, self.groups,
            self.activation, *self._gradient_path(weight, bias),
        )  # fmt: skip

    def _taps(self) -> tuple[int, ...]:
        """Height and width of the active kernel."""
        if self.kernel_size_axis.dimension is None:
            return self.kernel_size
        size = self.kernel_size_axis.size()
        return size, size

    def active_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight (Co, Ci/groups, KH, KW), bias (Co,)."""
        per_group = self.in_axis.active if self.groups == 1 else self.in_channels // self.groups
        out = self.out_axis.active
        return {"weight": (out, per_group, *self._taps()), "bias": (out,)}

    def stock(self) -> torch.nn.Module:
        """A ``torch.nn.Conv2d`` of the active size, with the fused activation if there is one."""
        taps, channels = self._taps(), self.in_axis.active
        layer = torch.nn.Conv2d(
            channels, self.out_axis.active, taps, self.stride,  # type: ignore[arg-type]
            _active_padding(self.padding, self.dilation, self.kernel_size, taps),
            self.dilation,  # type: ignore[arg-type]
            channels * self.groups // self.in_channels if self.groups > 1 else 1,
            self.bias is not None, device="meta",
        )  # fmt: skip
        return with_activation(layer, self.activation)


@functools.lru_cache(maxsize=4096)
def _plan(
    in_channels: int,
    out_channels: int,
    taps: int,
    full_in: int,
    kernel_size: tuple[int, ...],
    groups: int,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
) -> tuple[tuple[int, ...], Geometry] | None:
    """Block and geometry of an active size; None where they depend on more than sizes."""
    active = (taps, taps) if kernel_size[0] == kernel_size[1] else kernel_size
    try:
        zeros = _active_padding(padding, dilation, kernel_size, active)
    except ShapeError:
        return None
    if isinstance(zeros, str):
        total = [gap * (tap - 1) for gap, tap in zip(dilation, active, strict=True)]
        if any(zeros % 2 for zeros in total) or stride != (1, 1):
            return None
        zeros = total[0] // 2, total[1] // 2
    per_group = in_channels if groups == 1 else full_in // groups
    active_groups = in_channels // per_group if groups > 1 else 1
    geometry = geometry_of((*stride, *zeros, *dilation, active_groups))
    return (out_channels, per_group, *active), geometry


def _active_padding(
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    kernel_size: tuple[int, ...],
    taps: tuple[int, ...],
) -> Any:
    """The padding that keeps the output's size where the kernel is smaller than the stored one."""
    if padding == "same":
        return padding
    zeros = []
    for axis in range(2):
        full = 0 if isinstance(padding, str) else padding[axis]
        zeros.append(full - dilation[axis] * ((kernel_size[axis] - taps[axis]) // 2))
        if zeros[axis] < 0:
            raise ShapeError(
                f"kernel_size={tuple(taps)} of {kernel_size} needs more than padding={padding!r}: "
                "the padding shrinks with the kernel, so that the output keeps its size"
            )
    return tuple(zeros)


def conv_axes(conv: Any, specs: Mapping[str, AxisSpec]) -> dict[str, ElasticAxis]:
    """The axes of a convolution, and what keeps them together.

    Args:
        conv: A ``torch.nn.Conv2d``.
        specs: Dimensions by axis.

    Raises:
        OptionError: See :class:`Conv2d`.
        ShapeError: ``multiple_of`` is above an axis' full size.
    """
    if conv.padding_mode != "zeros":
        raise OptionError(f"padding_mode={conv.padding_mode!r}; elastic is 'zeros' alone")
    taps = specs.get("kernel_size")
    if taps is not None and conv.kernel_size[0] != conv.kernel_size[1]:
        raise OptionError(
            f"kernel_size={conv.kernel_size} is not square, so {taps!r} cannot cut it"
        )
    if isinstance(taps, tuple) and taps[1] != 1:
        raise OptionError(f"kernel_size follows {taps!r}; its sizes are odd or even, not multiples")
    inner, outer = specs.get("in"), specs.get("out")
    if conv.groups > 1:
        inner, outer = _whole_groups(conv, inner, outer)
    return {
        "in": ElasticAxis(inner, conv.in_channels),
        "out": ElasticAxis(outer, conv.out_channels),
        "kernel_size": TapAxis(taps, conv.kernel_size[0]),
    }


def _whole_groups(conv: Any, inner: AxisSpec, outer: AxisSpec) -> tuple[AxisSpec, AxisSpec]:
    """Channels in and out that grow by the same groups."""
    per_in, per_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    names, step = [], 1  # step: groups that become active together
    listed: list[list[float]] = []  # groups at each count
    for spec, per_group in ((inner, per_in), (outer, per_out)):
        if spec is not None:
            name, rule = spec if isinstance(spec, tuple) else (spec, 1)
            names.append(name)
            if isinstance(rule, tuple):
                listed.append([size / per_group for size in rule])
            else:
                step = math.lcm(step, rule // math.gcd(rule, per_group))
    if not names:
        return None, None
    if names[0] != names[-1]:
        raise OptionError(
            f"in follows {names[0]!r} and out {names[1]!r}; with {conv.groups} groups they are one "
            "dimension"
        )
    if not listed:
        return (names[0], step * per_in), (names[0], step * per_out)
    groups = [int(count) for count in listed[0]]
    if any(other != groups for other in listed) or step > 1:
        raise OptionError(
            f"in follows {inner!r} and out {outer!r}; with {conv.groups} groups both have the same "
            "whole groups at each count"
        )
    sizes_in, sizes_out = (tuple(n * per for n in groups) for per in (per_in, per_out))
    return (names[0], sizes_in), (names[0], sizes_out)
