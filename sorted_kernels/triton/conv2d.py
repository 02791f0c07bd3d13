"""2-D convolution with an active weight view. Shapes: N images, C channels, H x W pixels.

Twin of :mod:`sorted_kernels.reference.conv2d`, where arguments and results are described. Kernels
read the weight in place through its four strides, and activations through theirs; nothing is
copied. The fast layout is channels_last with channel counts that are multiples of 16, and a weight
whose input channels are dense (its parent channels_last too); all else is loaded one element at a
time.

A depthwise convolution has kernels of its own; all others are implicit matrix products (the op
hands a pointwise one whose pixels are rows in memory to the linear layer's kernels). Sizes,
strides, padding and dilation are runtime arguments. Sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sorted_kernels.reference.conv2d import Geometry, activation_backward, is_channels_last
from sorted_kernels.triton.column_sum import column_sum_into
from sorted_kernels.triton.conv_bias_grad import channel_sum_into
from sorted_kernels.triton.conv_gemm import conv_gemm
from sorted_kernels.triton.conv_wgrad import conv_wgrad_into
from sorted_kernels.triton.depthwise import depthwise, depthwise_wgrad_into
from sorted_kernels.triton.gemm_config import GemmConfig

__all__ = [
    "Geometry",
    "activation_backward",
    "bias_grad_into",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad_into",
]


def conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: str,
    save: bool,
    *,
    config: GemmConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``activation(conv(x, w) + bias)``; see the reference.

    Args:
        x: (N, Ci, H, W), any strides.
        w: (Co, Ci/groups, KH, KW), any strides.
        bias: (Co,) or None.
        geometry: Stride, padding, dilation and groups.
        activation: ``none``, ``relu``, ``gelu`` or ``silu``; fused.
        save: Also return the pre-activation of gelu and silu.
        config: Tiling of the matrix product, instead of the one chosen for the shape.

    Returns:
        y (N, Co, OH, OW) in x's memory format, and the pre-activation or an empty tensor.
    """
    size = _output_size(x, w, geometry)
    y = _empty(x, w.shape[0], size)
    kept = torch.empty_like(y) if save and activation in ("gelu", "silu") else None
    if _is_depthwise(w, geometry):
        depthwise(x, w, bias, y, kept, geometry, False, activation)
    else:
        conv_gemm(x, w, bias, y, kept, geometry, False, activation, config)
    return y, x.new_empty(0) if kept is None else kept


def conv2d_dgrad(
    dy: Tensor,
    w: Tensor,
    input_size: tuple[int, int],
    geometry: Geometry,
    *,
    config: GemmConfig | None = None,
) -> Tensor:
    """Gradient of x, in dy's memory format: dy (N, Co, OH, OW) -> (N, Ci, *input_size)."""
    dx = _empty(dy, w.shape[1] * geometry.groups, input_size)
    if _is_depthwise(w, geometry):
        depthwise(dy, w, None, dx, None, geometry, True)
    else:
        conv_gemm(dy, w, None, dx, None, geometry, True, config=config)
    return dx


def conv2d_wgrad_into(
    dy: Tensor,
    x: Tensor,
    out: Tensor,
    geometry: Geometry,
    accumulate: bool,
    *,
    config: GemmConfig | None = None,
) -> None:
    """``out (+)=`` gradient of w: dy (N, Co, OH, OW), x (N, Ci, H, W), out of w's shape, a view."""
    if _is_depthwise(out, geometry):
        depthwise_wgrad_into(dy, x, out, geometry, accumulate)
    else:
        conv_wgrad_into(dy, x, out, geometry, accumulate, config)


def bias_grad_into(dy: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out (+)= dy.sum((0, 2, 3))``: dy (N, Co, OH, OW), out (Co,)."""
    rows = _pixel_rows(dy)
    if rows is not None:
        column_sum_into(rows, out, accumulate)
    else:
        channel_sum_into(dy, out, accumulate)


def _is_depthwise(w: Tensor, geometry: Geometry) -> bool:
    return w.shape[0] == geometry.groups and w.shape[1] == 1


def _pixel_rows(x: Tensor) -> Tensor | None:
    """The pixels of x as rows (N * H * W, C), if that is a view of it with dense rows."""
    _, channels, height, width = x.shape
    image_stride, channel_stride, row_stride, stride = x.stride()
    joined = (height == 1 or row_stride == width * stride) and (
        x.shape[0] == 1 or image_stride == height * width * stride
    )
    if not joined or channel_stride != 1 or (stride < channels and x.shape[0] * height * width > 1):
        return None
    return x.as_strided((x.shape[0] * height * width, channels), (stride, 1))


def _output_size(x: Tensor, w: Tensor, geometry: Geometry) -> tuple[int, int]:
    g = geometry
    height, width = (
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, pad, dilation in zip(
            x.shape[2:], w.shape[2:], g.stride, g.padding, g.dilation, strict=True
        )
    )
    return height, width


def _empty(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Images of another size in the memory format of ``like``."""
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    shape = (like.shape[0], channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
