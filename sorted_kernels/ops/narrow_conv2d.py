"""Convolutions of few channels on the CPU, compiled: float32, contiguous, weights read in place.

Twin of :mod:`sorted_kernels.reference.conv2d`, where arguments and results are described. There
oneDNN computes in blocks of 16 channels, for which it copies weights and activations: a slice of 4
channels takes it as long as 16. Here cost follows the slice (``csrc/cpu/conv_cpu.h``); gradients of
weights are written or added where they land.

The ops are private. ``walk`` is stride, padding, dilation and insert, height and width each:
between two pixels of x lie ``insert - 1`` zeros, as in the gradient of an input whose convolution
has a stride. ``mirrored`` takes the weight (Ci, Co, KH, KW) from its last tap to its first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sorted_kernels.ops.conv2d_checks import output_shape
from sorted_kernels.ops.library import LIBRARY, NAMESPACE, load_compiled
from sorted_kernels.reference.conv2d import Geometry, bias_grad_into
from sorted_kernels.reference.linear import activate

__all__ = ["bias_grad_into", "conv2d", "conv2d_dgrad", "conv2d_wgrad_into", "is_narrow"]

LIBRARY.define(
    "narrow_conv2d_(Tensor x, Tensor w, Tensor? bias, int[] walk, Tensor(a!) y, bool mirrored)"
    " -> ()"
)
LIBRARY.define(
    "narrow_conv2d_wgrad_(Tensor dy, Tensor x, int[] walk, Tensor(a!) out, bool accumulate) -> ()"
)
for _name in ("narrow_conv2d_", "narrow_conv2d_wgrad_"):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", lambda *args: None, lib=LIBRARY)
load_compiled()

_BLOCK = 16  # channels that oneDNN computes at once
_SHORT = 8  # pixels of a row, from which on oneDNN is as fast for a whole block
_MOST_CHANNELS = 64  # sums of a gradient take a vector a weight, which should stay in a cache
_MOST_TAPS = 64  # csrc/cpu/conv_cpu.h


def is_narrow(x: Tensor, w: Tensor, geometry: Geometry) -> bool:
    """Whether this is faster than PyTorch, for activations (x or dy) and a weight's block.

    Of 4 channels a step takes a fourth of PyTorch's time, of 16 about as much, of more it takes
    longer (``bench_resnet_step`` has networks of such layers). 1x1 kernels are products.
    """
    m, k, height, width = w.shape
    return (
        min(m, k) < _BLOCK + (x.shape[3] <= _SHORT)
        and max(m, k) <= _MOST_CHANNELS
        and height * width <= _MOST_TAPS
        and geometry.groups == 1
        and not (height == width == 1 and geometry.visits_each_pixel)
    )


def conv2d(
    x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """``activation(conv(x, w) + bias)``, and what its backward needs."""
    g = geometry
    walk = [*g.stride, *g.padding, *g.dilation, 1, 1]
    z = x.new_empty(output_shape(x, w.shape, walk))
    torch.ops.sorted_kernels.narrow_conv2d_(x, w, bias, walk, z, False)
    saved = z if save and activation in ("gelu", "silu") else x.new_empty(0)
    return activate(z, activation), saved


def conv2d_dgrad(dy: Tensor, w: Tensor, input_size: tuple[int, int], geometry: Geometry) -> Tensor:
    """Gradient of x: the convolution of dy, spread by the stride, with the mirrored kernel."""
    dx = dy.new_empty((dy.shape[0], w.shape[1], *input_size))
    g = geometry
    padding = [g.dilation[i] * (w.shape[2 + i] - 1) - g.padding[i] for i in (0, 1)]
    walk = [1, 1, *padding, *g.dilation, *g.stride]
    torch.ops.sorted_kernels.narrow_conv2d_(dy, w, None, walk, dx, True)
    return dx


def conv2d_wgrad_into(
    dy: Tensor, x: Tensor, out: Tensor, geometry: Geometry, accumulate: bool
) -> None:
    """``out (+)=`` gradient of w, a view."""
    g = geometry
    walk = [*g.stride, *g.padding, *g.dilation, 1, 1]
    torch.ops.sorted_kernels.narrow_conv2d_wgrad_(dy, x, walk, out, accumulate)
