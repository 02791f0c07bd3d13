"""2-D convolution with an active weight view. Shapes: N batch, C channels, H x W pixels.

x is (N, Ci, H, W), contiguous or channels-last; w is the active view (Co, Ci/groups, KH, KW) of a
larger parent: leading channels, centre of the kernel. y and dx take x's memory format. Nothing
outside the view is read.

oneDNN and cuDNN take no strided weight: PyTorch's convolutions make the view contiguous inside.
What they copy is the active weight alone, small beside the activations that it meets.
Pointwise products on CPUs need no copy: see :func:`is_product`.
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
    "conv2d_backward",
    "conv2d_dgrad",
    "conv2d_wgrad_into",
    "is_channels_last",
    "is_product",
    "kept_weight",
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

    @property
    def visits_each_pixel(self) -> bool:
        """Whether a 1x1 kernel multiplies every pixel once, and all channels with each other."""
        return self.groups == 1 and self.stride == (1, 1) and self.padding == (0, 0)


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
    if is_product(x, w, g):
        z = _product(x, w[:, :, 0, 0], bias)
    else:
        z = torch.conv2d(x, w, bias, g.stride, g.padding, g.dilation, g.groups)
    if activation == "none":
        return z, x.new_empty(0)
    return activate(z, activation), z if save and activation != "relu" else x.new_empty(0)


def conv2d_dgrad(dy: Tensor, w: Tensor, input_size: tuple[int, int], geometry: Geometry) -> Tensor:
    """Gradient of x: dy (N, Co, OH, OW), w (Co, Ci/groups, KH, KW) -> (N, Ci, *input_size).

    dx has dy's memory format.
    """
    if is_product(dy, w, geometry):
        return _product(dy, w[:, :, 0, 0].t(), None)
    shape = (dy.shape[0], w.shape[1] * geometry.groups, *input_size)
    if is_channels_last(dy):  # of x only the shape and the memory format are read
        x = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    else:
        x = dy.new_empty(1).expand(shape)
    return conv2d_backward(dy, x, w, geometry, True, False, False)[0]


def conv2d_wgrad_into(
    dy: Tensor, x: Tensor, out: Tensor, geometry: Geometry, accumulate: bool
) -> None:
    """``out (+)=`` gradient of w: dy (N, Co, OH, OW), x (N, Ci, H, W), out of w's shape, a view."""
    if is_product(x, out, geometry):
        rows, cols = dy.flatten(2), x.flatten(2).transpose(1, 2)
        out[:, :, 0, 0].addbmm_(rows, cols, beta=int(accumulate))
        return
    shape_only = dy.new_empty(1).expand(out.shape)
    gradient = conv2d_backward(dy, x, shape_only, geometry, False, True, False)[1]
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


def conv2d_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    geometry: Geometry,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and bias in one call of PyTorch's; undefined where not needed.

    Of x and w only the shape is read where the other's gradient is not needed.
    """
    g = geometry
    return _backward(
        dy, x, w, w.shape[:1] if need_bias else None, g.stride, g.padding, g.dilation, False,
        (0, 0), g.groups, (need_x, need_w, need_bias),
    )  # fmt: skip


def kept_weight(x: Tensor, w: Tensor) -> Tensor:
    """The view as a training step wants it: forward and backward read the same copy of it.

    Not for a convolution that :func:`is_product`, which needs no copy.

    PyTorch would copy the view in each of them. One copy for both takes 1-3% off a step of a 3x3
    convolution on a CPU, and 10% where the kernel is cropped (``bench_conv`` has the whole step).
    """
    if w.is_contiguous():
        return w
    form = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return w.clone(memory_format=form)


def is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch computes a convolution of x, and answers it, in channels-last memory.

    The rule of ``c10/core/MemoryFormat.h``: strides in the order N, H, W, C, where axes of size 1
    may be ambiguous.
    """
    least = 1
    for axis in (1, 3, 2, 0):
        size, stride = x.shape[axis], x.stride(axis)
        if size == 0 or stride < least or (axis == 0 and least == x.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def is_product(x: Tensor, w: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution is computed as one matrix product an image, on w as it lies.

    Contiguous activations on a CPU: oneDNN's 1x1 convolution takes 1.1 to 6 times as long there,
    for it wants pixels, not channels, apart. In channels-last memory it is as fast as the product
    of rows, and halves would be rounded after each image.
    """
    return (
        w.shape[2:] == (1, 1)
        and geometry.visits_each_pixel
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.is_contiguous()
    )


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """``matrix @ x[n] + bias`` for each image: x (N, C, H, W), matrix (M, C) -> (N, M, H, W)."""
    n, channels, height, width = x.shape
    pixels = x.view(n, channels, height * width)
    stacked = matrix.expand(n, *matrix.shape)
    if bias is None:
        product = torch.bmm(stacked, pixels)
    else:
        product = torch.baddbmm(bias[:, None], stacked, pixels)
    return product.view(n, matrix.shape[0], height, width)
