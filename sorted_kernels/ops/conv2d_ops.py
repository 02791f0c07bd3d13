"""The ops of 2-D convolution over a weight's prefix: schemas, what runs them, fake kernels.

Ops take the stored weight, ``block``: [Co, Ci/groups, KH, KW], its active part (leading channels,
the kernel's centre), and ``geometry``: stride, padding and dilation, height and width each, and the
number of active groups. Back ends get the active view.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from sorted_kernels.ops import narrow_conv2d
from sorted_kernels.ops.backend import implementation, in_compiled_torch, linear_implementation
from sorted_kernels.ops.checks import active_block
from sorted_kernels.ops.conv2d_checks import Sizes, geometry_of, output_shape
from sorted_kernels.ops.gradient import GradientSlot
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.reference.conv2d import Geometry, is_channels_last

LIBRARY.define(
    "conv2d(Tensor x, Tensor weight, Tensor? bias, SymInt[] block, SymInt[] geometry,"
    " str activation, bool save) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "conv2d_dgrad(Tensor dy, Tensor weight, SymInt[] block, SymInt[] geometry,"
    " SymInt[] input_size) -> Tensor"
)
LIBRARY.define("conv2d_wgrad(Tensor dy, Tensor x, SymInt[] block, SymInt[] geometry) -> Tensor")
LIBRARY.define(
    "conv2d_accumulate(Tensor dy, Tensor x, SymInt[] block, SymInt[] geometry,"
    " Tensor(a!) token, SymInt handle) -> ()"
)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: Sizes,
    geometry: Sizes,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and what the activation's backward needs if ``save``."""
    w, g = active_block(weight, block), geometry_of(geometry)
    bias = None if bias is None else bias[: block[0]]
    if w.dtype != x.dtype:  # autocast casts the block, never the whole weight
        w, bias = w.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if _is_linear(x, w, g):
        rows = _rows(x)
        module = linear_implementation(
            "forward", (rows, w[:, :, 0, 0]), block[0], block[1], activation
        )
        y, saved = module.linear(rows, w[:, :, 0, 0], bias, block[0], activation, save)
        return _images(y), _images(saved) if saved.numel() else saved
    return module_of(w, g, x).conv2d(x, w, bias, g, activation, save)


def dgrad(dy: Tensor, weight: Tensor, block: Sizes, geometry: Sizes, input_size: Sizes) -> Tensor:
    """The input's gradient."""
    w, g = active_block(weight, block), geometry_of(geometry)
    if w.dtype != dy.dtype:
        w = w.to(dy.dtype)
    if _is_linear(dy, w, g):
        rows = _rows(dy)
        module = linear_implementation("dgrad", (rows, w[:, :, 0, 0]), block[0], block[1])
        return _images(module.linear_dgrad(rows, w[:, :, 0, 0], block[1]))
    return module_of(w, g, dy).conv2d_dgrad(dy, w, tuple(input_size), g)


def _wgrad(dy: Tensor, x: Tensor, block: Sizes, geometry: Sizes) -> Tensor:
    """The gradient of the block alone."""
    gradient = dy.new_empty(block)
    wgrad_into(dy, x, geometry_of(geometry), gradient, False)
    return gradient


def wgrad_into(dy: Tensor, x: Tensor, g: Geometry, out: Tensor, accumulate: bool) -> None:
    """Write the block's gradient into a view of its shape, or add it."""
    if dy.dtype != out.dtype:  # autocast: half-precision activations, float32 gradients
        gradient = torch.empty(out.shape, dtype=dy.dtype, device=dy.device)
        wgrad_into(dy, x, g, gradient, False)
        out.add_(gradient) if accumulate else out.copy_(gradient)
    elif _is_linear(dy, out, g) and _is_linear(x, out, g):
        matrix, pixels, inputs = out[:, :, 0, 0], _rows(dy).flatten(0, 2), _rows(x).flatten(0, 2)
        module = linear_implementation("wgrad", (pixels, inputs, matrix), *matrix.shape)
        module.linear_wgrad_into(pixels, inputs, matrix, accumulate)
    else:
        module_of(out, g, dy, x).conv2d_wgrad_into(dy, x, out, g, accumulate)


def bias_grad_into(dy: Tensor, out: Tensor, accumulate: bool) -> None:
    """Write the bias' gradient, or add it."""
    if dy.dtype != out.dtype:
        total = dy.sum((0, 2, 3))
        out.add_(total) if accumulate else out.copy_(total)
        return
    implementation("conv2d", dy).bias_grad_into(dy, out, accumulate)


def module_of(w: Tensor, geometry: Geometry, *activations: Tensor) -> ModuleType:
    """What runs a product: of a weight's block, or the view that takes its gradient, with these."""
    if (
        in_compiled_torch(activations[0])
        and narrow_conv2d.is_narrow(activations[0], w, geometry)
        and all(x.is_contiguous() for x in activations)
    ):
        return narrow_conv2d
    return implementation("conv2d", activations[0])


def _is_linear(x: Tensor, w: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution runs as the linear layer of each pixel: 1x1, channels-last, on CUDA.

    There the linear kernels read the weight in place, while cuDNN copies it. On a CPU neither is
    ahead (0.7 to 1.4 times), so that PyTorch's convolution stays.
    """
    return (
        x.is_cuda
        and w.shape[2:] == (1, 1)
        and (w.stride(1) == 1 or w.shape[1] == 1)  # not the centre of a larger kernel
        and geometry.visits_each_pixel
        and is_channels_last(x)
        and x.permute(0, 2, 3, 1).is_contiguous()
    )


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) in channels-last memory as (N, H, W, C); a view."""
    return x.permute(0, 2, 3, 1)


def _images(rows: Tensor) -> Tensor:
    return rows.permute(0, 3, 1, 2)


def _accumulate(
    dy: Tensor, x: Tensor, block: Sizes, geometry: Sizes, token: Tensor, handle: int
) -> None:
    out, accumulate = gradient_view(GradientSlot.by_handle(handle), block)
    wgrad_into(dy, x, geometry_of(geometry), out, accumulate)


def gradient_view(slot: GradientSlot, block: Sequence[int]) -> tuple[Tensor, bool]:
    """Where the gradient of a block lands, and whether to add to what is there."""
    return slot.prefix(block[0], block[1], tuple(block[2:]))


for _name, _function in {
    "conv2d": forward,
    "conv2d_dgrad": dgrad,
    "conv2d_wgrad": _wgrad,
}.items():
    LIBRARY.impl(_name, _function, "CPU")
    LIBRARY.impl(_name, _function, "CUDA")
LIBRARY.impl("conv2d_accumulate", _accumulate, "CompositeExplicitAutograd")


def _empty_images(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Activations of a shape in another's memory format."""
    form = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=form)


@torch.library.register_fake("sorted_kernels::conv2d", lib=LIBRARY)
def _conv2d_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: Sizes,
    geometry: Sizes,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    torch._check(block[0] <= weight.shape[0])
    torch._check(block[1] <= weight.shape[1])
    y = _empty_images(x, output_shape(x, block, geometry))
    saved = save and activation in ("gelu", "silu")
    return y, torch.empty_like(y) if saved else x.new_empty(0)


@torch.library.register_fake("sorted_kernels::conv2d_dgrad", lib=LIBRARY)
def _dgrad_fake(
    dy: Tensor, weight: Tensor, block: Sizes, geometry: Sizes, input_size: Sizes
) -> Tensor:
    return _empty_images(dy, (dy.shape[0], block[1] * geometry[6], *input_size))


@torch.library.register_fake("sorted_kernels::conv2d_wgrad", lib=LIBRARY)
def _wgrad_fake(dy: Tensor, x: Tensor, block: Sizes, geometry: Sizes) -> Tensor:
    return dy.new_empty(block)


@torch.library.register_fake("sorted_kernels::conv2d_accumulate", lib=LIBRARY)
def _accumulate_fake(
    dy: Tensor, x: Tensor, block: Sizes, geometry: Sizes, token: Tensor, handle: int
) -> None:
    return None
