"""Convolution as a matrix product that is never laid out in memory (implicit GEMM).

Rows are pixels of the target, columns its channels, and the reduction runs over taps and source
channels. Forward and dgrad are one kernel (see :mod:`sorted_kernels.triton.conv_taps`): it gathers
the source's pixels through four strides and reads the active weight in place through four more.
Groups are a grid axis.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from sorted_kernels.reference.conv2d import Geometry
from sorted_kernels.triton.conv_config import (
    chunk_of,
    is_dense_aligned,
    strides_of,
    tuned_or_chosen,
)
from sorted_kernels.triton.conv_taps import (
    channel_offsets,
    expand,
    load_tile,
    pixel_offsets,
    pixels,
    tap_axis,
    tap_channels,
    tap_steps,
)
from sorted_kernels.triton.device import known_multiple, multiply_add
from sorted_kernels.triton.epilogue import halves, store_both
from sorted_kernels.triton.gemm import tile_origin
from sorted_kernels.triton.gemm_config import GemmConfig
from sorted_kernels.triton.gemm_launch import launch_tiles
from sorted_kernels.triton.launch import is_aligned

_NUMBERS = [
    "images", "cols", "channels", "chunk",
    "source_height", "source_width", "target_height", "target_width", "kernel_height",
    "kernel_width", "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w",
    "period_h", "period_w", "source_n", "source_c", "source_h", "source_w", "target_n", "target_c",
    "target_h", "target_w", "w_group", "w_col", "w_channel", "w_h", "w_w",
]  # fmt: skip


@triton.jit
def _multiply_taps(
    source_ptr,
    w_ptr,
    row_offsets,
    top,
    left,
    row_mask,
    col_offsets,
    col_mask,
    channels,
    chunk,
    axis_h,
    axis_w,
    source_size,
    source_strides,
    w_strides,
    ALIGNED: tl.constexpr,
    W_DENSE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tile of the product, in float32, of rows of source pixels and columns of the weight.

    Args:
        source_ptr: First element of the group's first channel.
        w_ptr: First element of the group's weight.
        row_offsets: (BLOCK_M,) offsets of the pixels that the rows meet at their tap (0, 0).
        top: (BLOCK_M,) row of those pixels in their image; may be outside.
        left: (BLOCK_M,) column of those pixels.
        row_mask: (BLOCK_M,) which rows exist.
        col_offsets: (BLOCK_N,) offsets of the columns in the weight.
        col_mask: (BLOCK_N,) which columns exist.
        channels: Of the source, in a group.
        chunk: See :func:`~sorted_kernels.triton.conv_taps.tap_channels`.
        axis_h: ``(hop, first, step, taps)`` of the vertical axis.
        axis_w: The same of the horizontal axis.
        source_size: Height and width.
        source_strides: Of images, channels, rows and columns.
        w_strides: Of the reduced channel, the kernel's rows and its columns.
        ALIGNED: Channels and strides of source and target are multiples of 16, channels dense.
        W_DENSE: The weight's input channels are dense, its other strides multiples of 16.
        TRANSPOSED: dgrad: the columns are the weight's input channels.
        BLOCK_K: Reduction indices loaded at once.
        PRECISION: ``input_precision`` of the product.
    """
    hop_h, first_h, step_h, taps_h = axis_h
    hop_w, first_w, step_w, taps_w = axis_w
    height, width = source_size
    _, source_c, source_h, source_w = source_strides
    w_channel, w_h, w_w = w_strides
    taps = taps_h * taps_w
    acc = tl.zeros((row_offsets.shape[0], col_offsets.shape[0]), tl.float32)
    for step in tl.range(0, tap_steps(channels, taps, BLOCK_K, ALIGNED)):
        channel, tap, mask = tap_channels(step, channels, taps, chunk, BLOCK_K, ALIGNED)
        tap_h, tap_w = tap // taps_w, tap % taps_w
        down, right = tap_h * hop_h, tap_w * hop_w
        shift = down * known_multiple(source_h, ALIGNED).to(tl.int64)
        shift += right * known_multiple(source_w, ALIGNED).to(tl.int64)
        row, col = expand(top, 1) + expand(down, 0), expand(left, 1) + expand(right, 0)
        inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
        a_offsets = shift + channel_offsets(channel, source_c, ALIGNED)
        a = tl.load(
            source_ptr + (row_offsets[:, None] + a_offsets[None, :]),
            mask=inside & row_mask[:, None] & mask[None, :],
            other=0.0,
        )
        window = (first_h + tap_h * step_h) * known_multiple(w_h, W_DENSE).to(tl.int64)
        window += (first_w + tap_w * step_w) * known_multiple(w_w, W_DENSE).to(tl.int64)
        if TRANSPOSED:
            b_offsets = window + channel * known_multiple(w_channel, W_DENSE).to(tl.int64)
        else:
            b_offsets = window + channel_offsets(channel, w_channel, W_DENSE)
        along_channels: tl.constexpr = not (W_DENSE or TRANSPOSED)
        b = load_tile(w_ptr, b_offsets, col_offsets, mask, col_mask, along_channels)
        acc = multiply_add(acc, a, b, PRECISION)
    return acc


@triton.jit
def _store_half(z, bias_ptr, y_ptr, z_ptr, offsets, mask, col, cols, stride, ALIGNED: tl.constexpr,
                ACTIVATION: tl.constexpr):  # fmt: skip
    j = col + tl.arange(0, z.shape[1])
    if bias_ptr is not None:
        z += tl.load(bias_ptr + j, mask=j < cols, other=0.0).to(tl.float32)[None, :]
    places = offsets[:, None] + channel_offsets(j, stride, ALIGNED)[None, :]
    store_both(z, y_ptr, z_ptr, places, mask[:, None] & (j < cols)[None, :], ACTIVATION)


@triton.jit(do_not_specialize=_NUMBERS)
def _conv_gemm_kernel(
    source_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
    images,
    cols,
    channels,
    chunk,
    source_height,
    source_width,
    target_height,
    target_width,
    kernel_height,
    kernel_width,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    period_h,
    period_w,
    source_n,
    source_c,
    source_h,
    source_w,
    target_n,
    target_c,
    target_h,
    target_w,
    w_group,
    w_col,
    w_channel,
    w_h,
    w_w,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    W_DENSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of y = activation(conv(x, w) + bias), z what the activation saw; or of dx.

    Grid: tiles of a group's target (of its largest phase), groups, phases.
    """
    cols = known_multiple(cols, ALIGNED)
    channels = known_multiple(channels, ALIGNED)
    group = tl.program_id(1).to(tl.int64)
    phase_h, phase_w = 0, 0
    apart_h, apart_w = 1, 1
    if TRANSPOSED:
        phase_h, phase_w = tl.program_id(2) // stride_w, tl.program_id(2) % stride_w
        apart_h, apart_w = stride_h, stride_w
    height, scale_h, top, hop_h, first_h, step_h, taps_h = tap_axis(
        target_height, kernel_height, stride_h, padding_h, dilation_h, period_h, phase_h, TRANSPOSED
    )  # fmt: skip
    width, scale_w, left, hop_w, first_w, step_w, taps_w = tap_axis(
        target_width, kernel_width, stride_w, padding_w, dilation_w, period_w, phase_w, TRANSPOSED
    )  # fmt: skip
    most = images * tl.cdiv(target_height, apart_h) * tl.cdiv(target_width, apart_w)
    start, col = tile_origin(most, cols, BLOCK_M, BLOCK_N, GROUP_M)
    image, i, j, row_mask = pixels(start, images, height, width, BLOCK_M)
    taps_h = tl.where(start < images * height * width, taps_h, 0)  # nothing to do past a phase
    top = i * scale_h + top
    left = j * scale_w + left
    col_index = col + tl.arange(0, BLOCK_N)
    source_strides = (source_n, source_c, source_h, source_w)
    channel_step = channel_offsets(group * channels, source_c, ALIGNED)
    if TRANSPOSED:
        col_offsets = channel_offsets(col_index, w_col, W_DENSE)
    else:
        col_offsets = col_index * known_multiple(w_col, W_DENSE).to(tl.int64)
    z = _multiply_taps(
        source_ptr + channel_step, w_ptr + group * known_multiple(w_group, W_DENSE),
        pixel_offsets(image, top, left, source_strides, ALIGNED), top, left, row_mask,
        col_offsets, col_index < cols, channels, chunk,
        (hop_h, first_h, step_h, taps_h), (hop_w, first_w, step_w, taps_w),
        (source_height, source_width), source_strides, (w_channel, w_h, w_w),
        ALIGNED, W_DENSE, TRANSPOSED, BLOCK_K, PRECISION,
    )  # fmt: skip
    offsets = pixel_offsets(
        image, i * apart_h + phase_h, j * apart_w + phase_w,
        (target_n, target_c, target_h, target_w), ALIGNED,
    )  # fmt: skip
    offsets += channel_offsets(group * cols, target_c, ALIGNED)
    if bias_ptr is not None:
        bias_ptr += group * cols
    first_half, second_half = halves(z)
    _store_half(first_half, bias_ptr, y_ptr, z_ptr, offsets, row_mask, col, cols, target_c,
                ALIGNED, ACTIVATION)  # fmt: skip
    _store_half(second_half, bias_ptr, y_ptr, z_ptr, offsets, row_mask, col + BLOCK_N // 2, cols,
                target_c, ALIGNED, ACTIVATION)  # fmt: skip


def is_weight_dense(w: Tensor) -> bool:
    """Whether input channels are dense and the weight's other steps multiples of 16 elements."""
    return w.stride(1) == 1 and is_aligned(*strides_of(w)[::2], strides_of(w)[3])


def conv_gemm(
    source: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    geometry: Geometry,
    transposed: bool,
    activation: str = "none",
    config: GemmConfig | None = None,
) -> None:
    """Write a convolution, or with ``transposed`` the gradient of its input.

    Args:
        source: x (N, Ci, H, W), or dy (N, Co, OH, OW); any strides.
        w: (Co, Ci/groups, KH, KW), any strides.
        bias: (Co,) or None.
        y: Takes the result: of y's shape, or dx; any strides.
        z: Takes the pre-activation, with y's strides; or None.
        geometry: Of the convolution.
        transposed: Whether ``source`` is dy and ``y`` dx.
        activation: ``none``, ``relu``, ``gelu`` or ``silu``.
        config: Tiling, instead of the one tuned or chosen for the shape.
    """
    g = geometry
    col_axis = 1 if transposed else 0
    cols = w.shape[1] if transposed else w.shape[0] // g.groups
    channels = source.shape[1] // g.groups
    apart = g.stride if transposed else (1, 1)
    images, (height, width) = y.shape[0], y.shape[2:]
    rows = images * triton.cdiv(height, apart[0]) * triton.cdiv(width, apart[1])
    if rows == 0 or cols == 0:
        return
    aligned = is_aligned(cols, channels) and is_dense_aligned(source, y)
    periods = [s // math.gcd(s, d) for s, d in zip(g.stride, g.dilation, strict=True)]
    args = (
        source, w, bias, y, z, images, cols, channels, chunk_of(source, channels),
        *source.shape[2:], height, width, *w.shape[2:], *g.stride, *g.padding, *g.dilation,
        *periods, *strides_of(source), *strides_of(y), w.shape[0] // g.groups * w.stride(0),
        w.stride(col_axis), w.stride(1 - col_axis), w.stride(2), w.stride(3),
    )  # fmt: skip
    phases = apart[0] * apart[1]

    def run(config: GemmConfig) -> None:
        tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n)
        launch_tiles(
            _conv_gemm_kernel, (tiles, g.groups, phases), args, config, aligned, source.device,
            TRANSPOSED=transposed, ACTIVATION=activation, W_DENSE=is_weight_dense(w),
        )  # fmt: skip

    if config is None:
        depth = channels if aligned else channels * w.shape[2] * w.shape[3]
        extents = (rows, cols, depth)
        config = tuned_or_chosen(
            _conv_gemm_kernel, extents, g.groups * phases, source, aligned, run
        )
    run(config)
