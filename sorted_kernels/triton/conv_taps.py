"""Device functions of convolution's geometry: which source pixel a target pixel meets at a tap.

A *tap* is one place of the kernel window. Forward, the target is y and the source x; the input's
gradient (dgrad) is the same gather with the target dx and the source dy. On one axis, target place
``i`` of ``count`` meets, at its tap ``t`` of ``taps``, the source place ``i * scale + origin +
t * hop`` and the window's place ``first + t * step``.

With stride S, dgrad has S *phases* an axis: target places h = i * S + phase, which meet the same
taps. So no tap is multiplied by the zeros that a strided gradient would be spread with.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sorted_kernels.triton.device import known_multiple


@triton.jit
def tap_axis(
    target, kernel, stride, padding, dilation, period, phase, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """``(count, scale, origin, hop, first, step, taps)`` of one axis; see the module.

    Args:
        target: Extent of the target.
        kernel: Extent of the window.
        stride: Of the convolution.
        padding: Of the convolution.
        dilation: Of the convolution.
        period: ``stride / gcd(stride, dilation)``: a phase meets every period-th tap, or none.
        phase: Of the target, below ``stride``; 0 forward.
        TRANSPOSED: Whether the target is dx.
    """
    if TRANSPOSED:
        first = tl.full((), -1, tl.int32)
        for tap in range(period):
            meets = (phase + padding - tap * dilation) % stride == 0
            first = tl.where((first < 0) & meets, tap, first)
        taps = tl.where(first < 0, 0, (tl.maximum(kernel - first, 0) + period - 1) // period)
        first = tl.maximum(first, 0)
        origin = (phase + padding - first * dilation) // stride  # no remainder, if there are taps
        count = (target - phase + stride - 1) // stride
        result = count, 1, origin, -(dilation * period // stride), first, period, taps
    else:
        result = target, stride, -padding, dilation, 0, 1, kernel
    return result


@triton.jit
def pixels(start, images, height, width, BLOCK: tl.constexpr):
    """Image, row, column and mask of BLOCK consecutive pixels of ``images`` (height, width)."""
    index = start + tl.arange(0, BLOCK)
    area = tl.maximum(height * width, 1)  # a phase may have no pixel
    width = tl.maximum(width, 1)
    within = index % area
    return index // area, within // width, within % width, index < images * height * width


@triton.jit
def pixel_offsets(image, row, col, strides, ALIGNED: tl.constexpr):
    """Offsets of pixels, in int64; ``strides`` are those of images, channels, rows and columns."""
    image_stride, _, row_stride, col_stride = strides
    return (
        image * known_multiple(image_stride, ALIGNED).to(tl.int64)
        + row * known_multiple(row_stride, ALIGNED).to(tl.int64)
        + col * known_multiple(col_stride, ALIGNED).to(tl.int64)
    )


@triton.jit
def channel_offsets(channel, stride, DENSE: tl.constexpr):
    """Offsets of channels, in int64 unless they are dense; then the compiler knows it."""
    if not DENSE:
        channel = channel * tl.cast(stride, tl.int64)
    return channel


@triton.jit
def tap_channels(step, channels, taps, chunk, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Channel, tap and mask (BLOCK,) of a step over all (channel, tap) pairs.

    ALIGNED, a step has one tap, a scalar, so that borders are a mask of rows; the taps of BLOCK
    channels follow one another, since they read nearly the same pixels. Otherwise pairs are packed
    without a gap, the channels of a chunk innermost; a chunk is all channels or one.
    """
    within = tl.arange(0, BLOCK)
    if ALIGNED:
        channel = step // taps * BLOCK + within
        tap = step % taps
        mask = channel < channels
    else:
        pair = step * BLOCK + within
        channel = pair // chunk // taps * chunk + pair % chunk
        tap = pair // chunk % taps
        mask = pair < channels * taps
    return channel, tap, mask


@triton.jit
def tap_steps(channels, taps, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """How many steps :func:`tap_channels` has."""
    return tl.cdiv(channels, BLOCK) * taps if ALIGNED else tl.cdiv(channels * taps, BLOCK)


@triton.jit
def expand(value, AXIS: tl.constexpr):
    """A vector with a new axis; a scalar as it is."""
    if value.type.is_block():
        value = tl.expand_dims(value, AXIS)
    return value


@triton.jit
def load_tile(ptr, rows, cols, row_mask, col_mask, ALONG_ROWS: tl.constexpr):
    """The tile at offsets ``rows[:, None] + cols[None, :]``; zero outside the masks.

    Where the compiler knows of no dense axis, neighbouring threads load along columns; or along
    rows, if those are closer to one another in memory.
    """
    if ALONG_ROWS:
        mask = col_mask[:, None] & row_mask[None, :]
        tile = tl.trans(tl.load(ptr + (cols[:, None] + rows[None, :]), mask=mask, other=0.0))
    else:
        mask = row_mask[:, None] & col_mask[None, :]
        tile = tl.load(ptr + (rows[:, None] + cols[None, :]), mask=mask, other=0.0)
    return tile
