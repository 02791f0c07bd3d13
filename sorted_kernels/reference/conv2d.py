"""2-D convolution with an active weight view. Shapes: N batch, C channels, H x W pixels.

x is (N, Ci, H, W), contiguous or channels-last; w is the active view (Co, Ci/groups, KH, KW) of a
larger parent: leading channels, centre of the kernel. y and dx take x's memory format.

PyTorch's convolutions make a strided weight contiguous inside; the copy is small (the weight, not
the activations), and oneDNN and cuDNN have no other way in. It stays inside PyTorch: the parent is
never copied, and nothing outside the view is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sorted_kernels.reference.linear import activate, activation_backward

__all__ = [
    "Geometry",
    "activation_backward",
    "bias_grad_into",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad_into",
    "is_channels_last",
]

_backward = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a kernel walks over its input; pairs are (height, width).

    Attributes:
        stride: Pixels between two outputs.
        padding: Zeros on each side.
        dilation: Pixels between two taps.
        groups: Active groups; the channels of x and y split into them evenly.
    """

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def conv2d(
    x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """``activation(conv(x, w) + bias)``.

    Args:
        x: (N, Ci, H, W).
        w: (Co, Ci/groups, KH, KW), any strides.
        bias: (Co,) or None.
        geometry: Stride, padding, dilation and groups.
        activation: One of :data:`~sorted_kernels.reference.linear.ACTIVATIONS`.
        save: Also return what :func:`activation_backward` needs.

    Returns:
        y (N, Co, OH, OW), and the pre-activation of that shape if ``save`` and the activation is
        gelu or silu, else an empty tensor.
    """
    g = geometry
    z = torch.conv2d(x, w, bias, g.stride, g.padding, g.dilation, g.groups)
    if activation == "none":
        return z, x.new_empty(0)
    return activate(z, activation), z if save and activation != "relu" else x.new_empty(0)


def conv2d_dgrad(dy: Tensor, w: Tensor, input_size: tuple[int, int], geometry: Geometry) -> Tensor:
    """Gradient of x: dy (N, Co, OH, OW), w (Co, Ci/groups, KH, KW) -> (N, Ci, *input_size).

    dx has dy's memory format.
    """
    shape = (dy.shape[0], w.shape[1] * geometry.groups, *input_size)
    if is_channels_last(dy):  # of x only the shape and the memory format are read
        x = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    else:
        x = dy.new_empty(1).expand(shape)
    return _gradients(dy, x, w, geometry, [True, False, False])[0]


def conv2d_wgrad_into(
    dy: Tensor, x: Tensor, out: Tensor, geometry: Geometry, accumulate: bool
) -> None:
    """``out (+)=`` gradient of w: dy (N, Co, OH, OW), x (N, Ci, H, W), out of w's shape, a view."""
    shape_only = dy.new_empty(1).expand(out.shape)
    gradient = _gradients(dy, x, shape_only, geometry, [False, True, False])[1]
    if accumulate:
        out.add_(gradient)
    else:
        out.copy_(gradient)


def bias_grad_into(dy: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out (+)= dy.sum((0, 2, 3))``: dy (N, Co, OH, OW), out (Co,)."""
    if accumulate:
        out.add_(dy.sum((0, 2, 3)))
    else:
        torch.sum(dy, (0, 2, 3), out=out)


def is_channels_last(x: Tensor) -> bool:
    """Whether a convolution of x is computed, and answered, in channels-last memory."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _gradients(
    dy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, mask: list[bool]
) -> tuple[Tensor, ...]:
    g = geometry
    return _backward(dy, x, w, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups, mask)
