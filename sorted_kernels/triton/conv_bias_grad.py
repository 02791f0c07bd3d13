"""A convolution's bias gradient: sums over images and pixels, in an order free of timing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sorted_kernels.triton.column_sum import column_sum_into
from sorted_kernels.triton.conv_taps import pixel_offsets, pixels
from sorted_kernels.triton.device import narrow
from sorted_kernels.triton.launch import device_limits, launch

MIN_PIXELS = 4096
"""Fewest pixels of a part."""

_BLOCK = 1024


@triton.jit(
    do_not_specialize=[
        "images", "height", "width", "pixels_per_part", "dy_n", "dy_c", "dy_h", "dy_w",
    ]
)  # fmt: skip
def _channel_sum_kernel(
    dy_ptr,
    out_ptr,
    images,
    height,
    width,
    pixels_per_part,
    dy_n,
    dy_c,
    dy_h,
    dy_w,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum one channel's pixels in one part: ``out[part] (+)= sum``; out (parts, C) is dense."""
    channel, part = tl.program_id(0), tl.program_id(1)
    dy_ptr += channel * tl.cast(dy_c, tl.int64)
    first = part * pixels_per_part
    last = tl.minimum(first + pixels_per_part, images * height * width)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        image, row, col, mask = pixels(start, images, height, width, BLOCK)
        places = dy_ptr + pixel_offsets(image, row, col, (dy_n, dy_c, dy_h, dy_w), False)
        sums += tl.load(places, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    total = tl.sum(sums, axis=0)
    out_ptr += part * tl.num_programs(0) + channel
    if ACCUMULATE:
        total += tl.load(out_ptr).to(tl.float32)
    tl.store(out_ptr, narrow(total, out_ptr))


def channel_sum_into(dy: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out (+)= dy.sum((0, 2, 3))``: dy (N, C, H, W), any strides, out (C,) dense."""
    images, channels, height, width = dy.shape
    pixels_ = images * height * width
    wanted = max(1, 2 * device_limits(dy.device).multiprocessors // channels)
    size = max(triton.cdiv(pixels_, wanted), MIN_PIXELS)
    size = triton.cdiv(size, _BLOCK) * _BLOCK
    parts = max(triton.cdiv(pixels_, size), 1)
    sums = out
    if parts > 1:
        sums = torch.empty((parts, channels), dtype=torch.float32, device=dy.device)
    launch(
        _channel_sum_kernel, (channels, parts),
        dy, sums, images, height, width, size, *dy.stride(),
        device=dy.device, ACCUMULATE=accumulate and parts == 1, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    if parts > 1:
        column_sum_into(sums, out, accumulate)
