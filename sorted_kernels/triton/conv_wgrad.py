"""The weight's gradient of a convolution as a matrix product that is never laid out in memory.

Rows are output channels, columns are (tap, input channel) pairs, and the reduction runs over the
pixels of y. A small weight has few tiles, so pixels are cut into parts, which are summed in a fixed
order (no atomics, so the result does not depend on timing).
"""

from __future__ import annotations

import torch
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
    tap_channels,
    tap_steps,
)
from sorted_kernels.triton.device import known_multiple, multiply_add, narrow
from sorted_kernels.triton.gemm import tile_origin
from sorted_kernels.triton.gemm_config import GemmConfig
from sorted_kernels.triton.gemm_launch import launch_tiles, like_strided
from sorted_kernels.triton.launch import device_limits, is_aligned, launch

MIN_PIXELS = 1024
"""Fewest pixels of a part: its float32 tile is written and read once more."""

_SUM_BLOCK = 256
_NUMBERS = [
    "images", "rows", "channels", "chunk", "pixels_per_part",
    "source_height", "source_width", "out_height", "out_width", "kernel_height", "kernel_width",
    "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w",
    "dy_n", "dy_c", "dy_h", "dy_w", "x_n", "x_c", "x_h", "x_w",
    "dw_part", "dw_row", "dw_channel", "dw_h", "dw_w",
]  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def _conv_wgrad_kernel(
    dy_ptr,
    x_ptr,
    dw_ptr,
    images,
    rows,
    channels,
    chunk,
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
    dw_channel,
    dw_h,
    dw_w,
    ACCUMULATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a tile of one part: ``dw[part] (+)=`` its pixels' products.

    Grid: tiles of a group's weight, groups, parts. One program writes a tile.
    """
    rows = known_multiple(rows, ALIGNED)
    channels = known_multiple(channels, ALIGNED)
    group, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    taps = kernel_height * kernel_width
    steps = tap_steps(channels, taps, BLOCK_N, ALIGNED)
    row, col = tile_origin(rows, steps * BLOCK_N, BLOCK_M, BLOCK_N, GROUP_M)
    channel, tap, col_mask = tap_channels(
        col // BLOCK_N, channels, taps, chunk, BLOCK_N, ALIGNED
    )  # fmt: skip
    tap_h, tap_w = tap // kernel_width, tap % kernel_width
    down, right = tap_h * dilation_h - padding_h, tap_w * dilation_w - padding_w
    index = row + tl.arange(0, BLOCK_M)
    row_mask = index < rows
    dy_strides, x_strides = (dy_n, dy_c, dy_h, dy_w), (x_n, x_c, x_h, x_w)
    shift = down * known_multiple(x_h, ALIGNED).to(tl.int64)
    shift += right * known_multiple(x_w, ALIGNED).to(tl.int64)
    x_cols = shift + channel_offsets(group * channels + channel, x_c, ALIGNED)
    dy_rows = channel_offsets(group * rows + index, dy_c, ALIGNED)
    first = part * pixels_per_part
    last = tl.minimum(first + pixels_per_part, images * out_height * out_width)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(first, last, BLOCK_K):
        image, i, j, pixel_mask = pixels(start, images, out_height, out_width, BLOCK_K)
        top, left = i * stride_h, j * stride_w
        dy_offsets = pixel_offsets(image, i, j, dy_strides, ALIGNED)
        dy = load_tile(dy_ptr, dy_rows, dy_offsets, row_mask, pixel_mask, not ALIGNED)
        y, x = expand(top, 1) + expand(down, 0), expand(left, 1) + expand(right, 0)
        inside = (y >= 0) & (y < source_height) & (x >= 0) & (x < source_width)
        values = tl.load(
            x_ptr
            + (pixel_offsets(image, top, left, x_strides, ALIGNED)[:, None] + x_cols[None, :]),
            mask=(inside & pixel_mask[:, None]) & col_mask[None, :],
            other=0.0,
        )
        acc = multiply_add(acc, dy, values, PRECISION)
    offsets = ((group * rows + index) * dw_row)[:, None] + (
        channel * tl.cast(dw_channel, tl.int64) + (tap_h * dw_h + tap_w * dw_w)
    )[None, :]
    places = dw_ptr + part * tl.cast(dw_part, tl.int64) + offsets
    mask = row_mask[:, None] & col_mask[None, :]
    if ACCUMULATE:
        acc += tl.load(places, mask=mask, other=0.0).to(tl.float32)
    tl.store(places, narrow(acc, dw_ptr), mask=mask)


@triton.jit(
    do_not_specialize=[
        "count", "parts", "channels", "height", "width", "dw_row", "dw_channel", "dw_h", "dw_w",
    ]
)  # fmt: skip
def _part_sum_kernel(
    parts_ptr,
    dw_ptr,
    count,
    parts,
    channels,
    height,
    width,
    dw_row,
    dw_channel,
    dw_h,
    dw_w,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Strided dw (+)= the sum of dense parts (parts, rows, channels, height, width), in order."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(
            parts_ptr + (part * tl.cast(count, tl.int64) + index), mask=mask, other=0.0
        )
    area = height * width
    offsets = index // (channels * area) * tl.cast(dw_row, tl.int64)
    offsets += index // area % channels * tl.cast(dw_channel, tl.int64)
    offsets += index // width % height * tl.cast(dw_h, tl.int64) + index % width * dw_w
    if ACCUMULATE:
        total += tl.load(dw_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(dw_ptr + offsets, narrow(total, dw_ptr), mask=mask)


def part_size(pixels: int, programs: int, least: int, multiprocessors: int) -> int:
    """Pixels of a part, so that all parts of so many programs keep the GPU busy."""
    wanted = max(1, 2 * multiprocessors // programs)
    return max(triton.cdiv(pixels, wanted), least)


def parts_of(out: Tensor, count: int) -> Tensor:
    """Workspace (count, *out.shape) in float32."""
    return torch.empty((count, *out.shape), dtype=torch.float32, device=out.device)


def part_sum_into(parts: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out (+)= parts.sum(0)``: parts (P, *out.shape) dense, out of four axes, any strides."""
    count = out.numel()
    launch(
        _part_sum_kernel, (triton.cdiv(count, _SUM_BLOCK),),
        parts, out, count, parts.shape[0], *out.shape[1:], *out.stride(),
        device=out.device, ACCUMULATE=accumulate, BLOCK=_SUM_BLOCK, num_warps=4,
    )  # fmt: skip


def conv_wgrad_into(
    dy: Tensor,
    x: Tensor,
    out: Tensor,
    geometry: Geometry,
    accumulate: bool,
    config: GemmConfig | None = None,
) -> None:
    """``out (+)=`` the weight's gradient.

    Args:
        dy: (N, Co, OH, OW), any strides.
        x: (N, Ci, H, W), any strides.
        out: (Co, Ci/groups, KH, KW), a view, any strides.
        geometry: Of the convolution.
        accumulate: Whether to add to what ``out`` holds.
        config: Tiling, instead of the one tuned or chosen for the shape.
    """
    g = geometry
    rows, channels, height, width = out.shape[0] // g.groups, *out.shape[1:]
    images, (out_height, out_width) = dy.shape[0], dy.shape[2:]
    pixels_, taps = images * out_height * out_width, height * width
    aligned = is_aligned(rows, channels) and is_dense_aligned(dy, x)
    limits = device_limits(dy.device)

    def run(config: GemmConfig, out: Tensor = out) -> None:
        steps = tap_cols(channels, taps, config, aligned)
        tiles = triton.cdiv(rows, config.block_m) * steps
        size = part_size(pixels_, tiles * g.groups, MIN_PIXELS, limits.multiprocessors)
        size = triton.cdiv(size, config.block_k) * config.block_k
        count = max(triton.cdiv(pixels_, size), 1)
        dw = out if count == 1 else parts_of(out, count)
        strides = (0, *out.stride()) if count == 1 else dw.stride()
        args = (
            dy, x, dw, images, rows, channels, chunk_of(x, channels), size, *x.shape[2:],
            out_height, out_width, height, width, *g.stride, *g.padding, *g.dilation,
            *strides_of(dy), *strides_of(x), *strides,
        )  # fmt: skip
        launch_tiles(
            _conv_wgrad_kernel, (tiles, g.groups, count), args, config, aligned, dy.device,
            ACCUMULATE=accumulate and count == 1,
        )  # fmt: skip
        if count > 1:
            part_sum_into(dw, out, accumulate)

    if config is None:
        parts = g.groups * max(pixels_ // MIN_PIXELS, 1)
        wide, batch = (channels, parts * taps) if aligned else (channels * taps, parts)
        config = tuned_or_chosen(
            _conv_wgrad_kernel, (rows, wide, pixels_), batch, dy, aligned,
            lambda config: run(config, like_strided(out)),
        )  # fmt: skip
    run(config)


def tap_cols(channels: int, taps: int, config: GemmConfig, aligned: bool) -> int:
    """How many column tiles all taps of the input channels take."""
    if aligned:  # a tile has one tap
        return triton.cdiv(channels, config.block_n) * taps
    return triton.cdiv(channels * taps, config.block_n)
