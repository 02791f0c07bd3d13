"""Depthwise convolution: every channel has a window of its own, so memory is the limit.

A program holds a tile (pixels, channels) and walks over the taps, whose overlapping pixels it finds
in the L1 cache. Forward and dgrad are one kernel (see :mod:`sorted_kernels.triton.conv_taps`).
With dense channels (channels_last) a tile is a vector of them; otherwise it is pixels of one.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from sorted_kernels.reference.conv2d import Geometry
from sorted_kernels.triton.conv_config import is_dense_aligned, strides_of
from sorted_kernels.triton.conv_taps import channel_offsets, pixel_offsets, pixels, tap_axis
from sorted_kernels.triton.conv_wgrad import part_size, part_sum_into, parts_of
from sorted_kernels.triton.device import known_multiple, narrow
from sorted_kernels.triton.epilogue import store_both
from sorted_kernels.triton.launch import device_limits, is_aligned, launch

MIN_PIXELS = 256
"""Fewest pixels of a part of the weight's gradient."""

_TAPS = 4
"""Neighbouring taps of a window's row that one program of the weight's gradient sums."""

_NUMBERS = [
    "images", "channels", "source_height", "source_width", "target_height", "target_width",
    "kernel_height", "kernel_width", "stride_h", "stride_w", "padding_h", "padding_w",
    "dilation_h", "dilation_w", "period_h", "period_w", "source_n", "source_c", "source_h",
    "source_w", "target_n", "target_c", "target_h", "target_w", "w_c", "w_h", "w_w",
]  # fmt: skip
_WGRAD_NUMBERS = [
    "images", "channels", "pixels_per_part", "source_height", "source_width", "out_height",
    "out_width", "kernel_height", "kernel_width", "stride_h", "stride_w", "padding_h", "padding_w",
    "dilation_h", "dilation_w", "dy_n", "dy_c", "dy_h", "dy_w", "x_n", "x_c", "x_h", "x_w",
    "dw_part", "dw_row", "dw_h", "dw_w",
]  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def _depthwise_kernel(
    source_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
    images,
    channels,
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
    w_c,
    w_h,
    w_w,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DENSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of y = activation(conv(x, w) + bias), z what the activation saw; or of dx.

    Grid: tiles of the target (of its largest phase), channels fastest; phases.
    """
    channels = known_multiple(channels, ALIGNED)
    phase_h, phase_w = 0, 0
    apart_h, apart_w = 1, 1
    if TRANSPOSED:
        phase_h, phase_w = tl.program_id(1) // stride_w, tl.program_id(1) % stride_w
        apart_h, apart_w = stride_h, stride_w
    height, scale_h, top, hop_h, first_h, step_h, taps_h = tap_axis(
        target_height, kernel_height, stride_h, padding_h, dilation_h, period_h, phase_h, TRANSPOSED
    )  # fmt: skip
    width, scale_w, left, hop_w, first_w, step_w, taps_w = tap_axis(
        target_width, kernel_width, stride_w, padding_w, dilation_w, period_w, phase_w, TRANSPOSED
    )  # fmt: skip
    blocks = tl.cdiv(channels, BLOCK_C)
    start = tl.program_id(0) // blocks * BLOCK_P
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = channel < channels
    image, i, j, row_mask = pixels(start, images, height, width, BLOCK_P)
    taps = tl.where(start < images * height * width, taps_h * taps_w, 0)
    top = i * scale_h + top
    left = j * scale_w + left
    rows = pixel_offsets(image, top, left, (source_n, source_c, source_h, source_w), ALIGNED)
    cols = channel_offsets(channel, source_c, DENSE)
    w_ptrs = w_ptr + channel * tl.cast(w_c, tl.int64)
    z = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in range(taps):
        tap_h, tap_w = tap // taps_w, tap % taps_w
        row, col = top + tap_h * hop_h, left + tap_w * hop_w
        inside = (row >= 0) & (row < source_height) & (col >= 0) & (col < source_width) & row_mask
        shift = tap_h * hop_h * known_multiple(source_h, ALIGNED).to(tl.int64)
        shift += tap_w * hop_w * known_multiple(source_w, ALIGNED).to(tl.int64)
        mask = inside[:, None] & col_mask[None, :]
        values = tl.load(
            source_ptr + ((rows + shift)[:, None] + cols[None, :]), mask=mask, other=0.0
        )
        window = (first_h + tap_h * step_h) * w_h + (first_w + tap_w * step_w) * w_w
        weight = tl.load(w_ptrs + window, mask=col_mask, other=0.0)
        z += values.to(tl.float32) * weight.to(tl.float32)[None, :]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + channel, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    offsets = pixel_offsets(
        image, i * apart_h + phase_h, j * apart_w + phase_w,
        (target_n, target_c, target_h, target_w), ALIGNED,
    )[:, None] + channel_offsets(channel, target_c, DENSE)[None, :]  # fmt: skip
    store_both(z, y_ptr, z_ptr, offsets, row_mask[:, None] & col_mask[None, :], ACTIVATION)


@triton.jit(do_not_specialize=_WGRAD_NUMBERS)
def _depthwise_wgrad_kernel(
    dy_ptr,
    x_ptr,
    dw_ptr,
    images,
    channels,
    pixels_per_part,
    source_height,
    source_width,
    out_height,
    out_width,
    kernel_height,
    kernel_width,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    dy_n,
    dy_c,
    dy_h,
    dy_w,
    x_n,
    x_c,
    x_h,
    x_w,
    dw_part,
    dw_row,
    dw_h,
    dw_w,
    ACCUMULATE: tl.constexpr,
    DENSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write up to TAPS taps of one part: ``dw[part] (+)=`` its pixels' products.

    Grid: blocks of channels, runs of taps within a row of the window, parts.
    """
    channels = known_multiple(channels, ALIGNED)
    runs = tl.cdiv(kernel_width, TAPS)
    tap_h = tl.program_id(1) // runs
    tap_w = tl.program_id(1) % runs * TAPS + tl.arange(0, TAPS)
    part = tl.program_id(2)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask, tap_mask = channel < channels, tap_w < kernel_width
    down, right = tap_h * dilation_h - padding_h, tap_w * dilation_w - padding_w
    dy_cols, x_cols = channel_offsets(channel, dy_c, DENSE), channel_offsets(channel, x_c, DENSE)
    shift = down * known_multiple(x_h, ALIGNED).to(tl.int64)
    shift += right * known_multiple(x_w, ALIGNED).to(tl.int64)
    first = part * pixels_per_part
    last = tl.minimum(first + pixels_per_part, images * out_height * out_width)
    sums = tl.zeros((BLOCK_P, TAPS, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_P):
        image, i, j, row_mask = pixels(start, images, out_height, out_width, BLOCK_P)
        rows = pixel_offsets(image, i, j, (dy_n, dy_c, dy_h, dy_w), ALIGNED)
        mask = row_mask[:, None] & col_mask[None, :]
        dy = tl.load(dy_ptr + (rows[:, None] + dy_cols[None, :]), mask=mask, other=0.0)
        top, left = i * stride_h, j * stride_w
        row, col = top + down, left[:, None] + right[None, :]
        inside = (row_mask & (row >= 0) & (row < source_height))[:, None] & tap_mask[None, :]
        inside = inside & (col >= 0) & (col < source_width)
        rows = pixel_offsets(image, top, left, (x_n, x_c, x_h, x_w), ALIGNED)
        places = (rows[:, None] + shift[None, :])[:, :, None] + x_cols[None, None, :]
        mask = inside[:, :, None] & col_mask[None, None, :]
        x = tl.load(x_ptr + places, mask=mask, other=0.0)
        sums += x.to(tl.float32) * dy.to(tl.float32)[:, None, :]
    total = tl.sum(sums, axis=0)
    offsets = (tap_h * dw_h + tap_w * dw_w)[:, None] + channel * tl.cast(dw_row, tl.int64)[None, :]
    places = dw_ptr + part * tl.cast(dw_part, tl.int64) + offsets
    mask = tap_mask[:, None] & col_mask[None, :]
    if ACCUMULATE:
        total += tl.load(places, mask=mask, other=0.0).to(tl.float32)
    tl.store(places, narrow(total, dw_ptr), mask=mask)


def _tile(elements: int, channels: int, dense: bool) -> tuple[int, int]:
    """Pixels and channels of a tile of so many elements."""
    cols = min(max(triton.next_power_of_2(channels), 16), 64) if dense else 1
    return elements // cols, cols


def _is_dense(*tensors: Tensor) -> bool:
    return all(tensor.stride(1) == 1 for tensor in tensors)


def depthwise(
    source: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    geometry: Geometry,
    transposed: bool,
    activation: str = "none",
) -> None:
    """Write a depthwise convolution, or with ``transposed`` the gradient of its input.

    Arguments are those of :func:`~sorted_kernels.triton.conv_gemm.conv_gemm`; w is (C, 1, KH, KW).
    """
    g = geometry
    images, channels, height, width = y.shape
    apart = g.stride if transposed else (1, 1)
    rows = images * triton.cdiv(height, apart[0]) * triton.cdiv(width, apart[1])
    if rows == 0:
        return
    dense = _is_dense(source, y)
    block_p, block_c = _tile(1024, channels, dense)
    periods = [s // math.gcd(s, d) for s, d in zip(g.stride, g.dilation, strict=True)]
    launch(
        _depthwise_kernel,
        (triton.cdiv(rows, block_p) * triton.cdiv(channels, block_c), apart[0] * apart[1]),
        source, w, bias, y, z, images, channels, *source.shape[2:], height, width, *w.shape[2:],
        *g.stride, *g.padding, *g.dilation, *periods, *strides_of(source), *strides_of(y),
        w.stride(0), w.stride(2), w.stride(3),
        device=source.device, TRANSPOSED=transposed, ACTIVATION=activation, DENSE=dense,
        ALIGNED=is_aligned(channels) and is_dense_aligned(source, y),
        BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def depthwise_wgrad_into(
    dy: Tensor, x: Tensor, out: Tensor, geometry: Geometry, accumulate: bool
) -> None:
    """``out (+)=`` the weight's gradient: dy and x any strides, out (C, 1, KH, KW) a view."""
    g = geometry
    images, channels, out_height, out_width = dy.shape
    pixels_, dense = images * out_height * out_width, _is_dense(dy, x)
    block_p, block_c = _tile(512, channels, dense)
    grid = (triton.cdiv(channels, block_c), out.shape[2] * triton.cdiv(out.shape[3], _TAPS))
    multiprocessors = device_limits(dy.device).multiprocessors
    size = part_size(pixels_, grid[0] * grid[1], MIN_PIXELS, multiprocessors)
    size = triton.cdiv(size, block_p) * block_p
    count = max(triton.cdiv(pixels_, size), 1)
    dw = out if count == 1 else parts_of(out, count)
    part, row, _, *window = (0, *out.stride()) if count == 1 else dw.stride()
    launch(
        _depthwise_wgrad_kernel, (*grid, count),
        dy, x, dw, images, channels, size, *x.shape[2:], out_height, out_width, *out.shape[2:],
        *g.stride, *g.padding, *g.dilation, *strides_of(dy), *strides_of(x), part, row, *window,
        device=dy.device, ACCUMULATE=accumulate and count == 1, DENSE=dense,
        ALIGNED=is_aligned(channels) and is_dense_aligned(dy, x),
        TAPS=_TAPS, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    if count > 1:
        part_sum_into(dw, out, accumulate)
