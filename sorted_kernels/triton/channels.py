"""Kernels of norms over channels. x is (N, c, S): S spatial elements, 1 if there is no such axis.

They serve batch norm, whose statistics are over N and S, and group and instance norm, whose
statistics are of each sample; and both memory formats: *inner* channels (NHWC, or S = 1) and outer
ones (NCHW). What reduces is in :mod:`sorted_kernels.triton.channel_sums`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sorted_kernels.triton.device import known_multiple, narrow
from sorted_kernels.triton.launch import is_aligned, launch

_TILE = 1024
"""Elements that a program holds of each tensor."""


@dataclass(frozen=True)
class Layout:
    """How x lies in memory, and how many of its samples share statistics.

    Attributes:
        samples: N.
        channels: c.
        space: S.
        inner: Whether the channels are innermost.
        pooled: Whether statistics are over all samples (batch norm), or of each (group norm).
    """

    samples: int
    channels: int
    space: int
    inner: bool
    pooled: bool

    @property
    def sets(self) -> int:
        """Sets of per-channel statistics."""
        return 1 if self.pooled else self.samples

    @property
    def rows(self) -> int:
        """Rows that one set's reductions walk over."""
        pooled = self.samples if self.pooled else 1
        return pooled * self.space if self.inner else pooled

    @property
    def cols(self) -> int:
        """Length of a row."""
        return self.channels if self.inner else self.space

    @property
    def count(self) -> int:
        """Values that one channel's statistics are of."""
        return (self.samples if self.pooled else 1) * self.space


def dense_layout(x: Tensor, pooled: bool) -> tuple[Tensor, Layout]:
    """An activation without gaps (copied if it has some), and how it lies."""
    samples, channels, space = x.shape[0], x.shape[1], x.shape[2:].numel()
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not last and not x.is_contiguous():
        x = x.contiguous()
    inner = space == 1 or (last and not x.is_contiguous())
    return x, Layout(samples, channels, space, inner, pooled)


def like_layout(dy: Tensor, x: Tensor) -> Tensor:
    """An upstream gradient in the memory format of x, which has no gaps."""
    if dy.stride() == x.stride():
        return dy
    last = x.dim() == 4 and not x.is_contiguous()
    return dy.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def tile_of(rows: int, cols: int) -> tuple[int, int]:
    """Rows and columns of a program's tile: whole rows where they are short."""
    block_cols = min(triton.next_power_of_2(cols), 256 if rows > 1 else _TILE)
    return max(1, min(triton.next_power_of_2(rows), _TILE // block_cols)), block_cols


@triton.jit
def _places(rows, cols, channels, space, groups, INNER: tl.constexpr, POOLED: tl.constexpr):
    """Channel of each element of a tile, and where its statistics are.

    Rows are (N, S) and columns channels, or rows (N, c) and columns spatial elements.
    """
    if INNER:
        channel = cols[None, :]
        sample = (rows // space)[:, None]
    else:
        channel = (rows % channels)[:, None]
        sample = (rows // channels)[:, None]
    place = channel
    if not POOLED:
        place = sample * groups + channel // (channels // groups)
    return channel, place


@triton.jit(do_not_specialize=["n_rows", "n_cols", "channels", "space", "groups"])
def _normalize_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    n_rows,
    n_cols,
    channels,
    space,
    groups,
    INNER: tl.constexpr,
    POOLED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """``(x - mean) * rstd * weight + bias``, in the memory format of x."""
    n_cols = known_multiple(n_cols, ALIGNED)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_rows, in_cols = (rows < n_rows)[:, None], (cols < n_cols)[None, :]
    mask = in_rows & in_cols
    channel, place = _places(rows, cols, channels, space, groups, INNER, POOLED)
    of_channel = in_cols if INNER else in_rows
    of_place = of_channel if POOLED else mask
    offsets = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
    y = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y -= tl.load(mean_ptr + place, mask=of_place, other=0.0)
    y *= tl.load(rstd_ptr + place, mask=of_place, other=0.0)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + channel, mask=of_channel, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=of_channel, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, narrow(y, y_ptr), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "channels", "space", "groups"])
def _channels_dx_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    slope_ptr,
    shift_ptr,
    dx_ptr,
    n_rows,
    n_cols,
    channels,
    space,
    groups,
    INNER: tl.constexpr,
    POOLED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Compute dx: ``(dy * weight - shift - normalised x * slope) * rstd``.

    Without ``slope_ptr`` the statistics are constants, and only the first term is there.
    """
    n_cols = known_multiple(n_cols, ALIGNED)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_rows, in_cols = (rows < n_rows)[:, None], (cols < n_cols)[None, :]
    mask = in_rows & in_cols
    channel, place = _places(rows, cols, channels, space, groups, INNER, POOLED)
    of_channel = in_cols if INNER else in_rows
    of_place = of_channel if POOLED else mask
    offsets = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
    dx = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        dx *= tl.load(weight_ptr + channel, mask=of_channel, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + place, mask=of_place, other=0.0)
    if slope_ptr is not None:
        normed = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        normed = (normed - tl.load(mean_ptr + place, mask=of_place, other=0.0)) * rstd
        dx -= tl.load(shift_ptr + place, mask=of_place, other=0.0)
        dx -= normed * tl.load(slope_ptr + place, mask=of_place, other=0.0)
    tl.store(dx_ptr + offsets, narrow(dx * rstd, dx_ptr), mask=mask)


def _elementwise(layout: Layout) -> tuple[tuple[int, int], int, int, int]:
    """Grid, rows and tile of x as a matrix in the order of memory."""
    n_rows = layout.samples * (layout.space if layout.inner else layout.channels)
    block_rows, block_cols = tile_of(n_rows, layout.cols)
    grid = triton.cdiv(n_rows, block_rows), triton.cdiv(layout.cols, block_cols)
    return grid, n_rows, block_rows, block_cols


def normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
    groups: int,
) -> Tensor:
    """Return y like x, which has no gaps."""
    y = torch.empty_like(x)
    grid, n_rows, block_rows, block_cols = _elementwise(layout)
    launch(
        _normalize_kernel, grid, x, mean, rstd, weight, bias, y, n_rows, layout.cols,
        layout.channels, layout.space, groups, device=x.device, INNER=layout.inner,
        POOLED=layout.pooled, ALIGNED=is_aligned(layout.cols), BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols, num_warps=4,
    )  # fmt: skip
    return y


def input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    slope: Tensor | None,
    shift: Tensor | None,
    layout: Layout,
    groups: int,
) -> Tensor:
    """Return dx like x; without slope and shift, of constant statistics."""
    dx = torch.empty_like(x)
    grid, n_rows, block_rows, block_cols = _elementwise(layout)
    launch(
        _channels_dx_kernel, grid, dy, x, mean, rstd, weight, slope, shift, dx, n_rows,
        layout.cols, layout.channels, layout.space, groups, device=x.device, INNER=layout.inner,
        POOLED=layout.pooled, ALIGNED=is_aligned(layout.cols), BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols, num_warps=4,
    )  # fmt: skip
    return dx
