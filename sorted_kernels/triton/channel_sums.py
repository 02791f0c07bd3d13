"""Statistics and gradient sums of channels; :mod:`sorted_kernels.triton.channels` has the rest.

Both have two stages. In the first, a program reduces a stretch of rows; in the second, the
stretches are merged in an order that does not depend on timing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sorted_kernels.triton.channels import Layout, tile_of
from sorted_kernels.triton.device import known_multiple, narrow
from sorted_kernels.triton.launch import device_limits, is_aligned, launch

_MERGE_ROWS, _MERGE_COLS = 16, 64


@triton.jit
def _stretch(
    n_rows, rows_per_split, splits, channels, space, INNER: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """Where a reducing program's rows begin and end, its columns, and what lies between rows."""
    part = tl.program_id(0)
    first = (part % splits) * rows_per_split
    last = tl.minimum(first + rows_per_split, n_rows)
    wide_set = (part // splits).to(tl.int64)
    channel = tl.program_id(1)
    if INNER:
        base = wide_set * n_rows * channels
        begin = channel * BLOCK_COLS
        end = tl.minimum(begin + BLOCK_COLS, channels)
        stride = channels
    else:
        base = (wide_set * n_rows * channels + channel) * space
        begin = 0
        end = space
        stride = channels * space
    return base, stride, first, last, begin, end


@triton.jit(do_not_specialize=["n_rows", "rows_per_split", "splits", "channels", "space"])
def _moments_kernel(
    x_ptr,
    mean_ptr,
    square_ptr,
    n_rows,
    rows_per_split,
    splits,
    channels,
    space,
    INNER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Mean and sum of squared distances from it of each channel in a stretch: (parts, c) each.

    Each place of the tile keeps Welford's running mean of what it has seen; the places are merged
    at the end, so that no large mean is ever squared.
    """
    if INNER:
        channels = known_multiple(channels, ALIGNED)
    else:
        space = known_multiple(space, ALIGNED)
    base, stride, first, last, begin, end = _stretch(
        n_rows, rows_per_split, splits, channels, space, INNER, BLOCK_COLS
    )
    count = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    mean = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    square = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        row_ptrs = x_ptr + base + rows.to(tl.int64)[:, None] * stride
        for col in range(begin, end, BLOCK_COLS):
            cols = col + tl.arange(0, BLOCK_COLS)
            mask = (rows < last)[:, None] & (cols < end)[None, :]
            x = tl.load(row_ptrs + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            count += tl.where(mask, 1.0, 0.0)
            delta = tl.where(mask, x - mean, 0.0)
            mean += delta / tl.maximum(count, 1.0)
            square += delta * tl.where(mask, x - mean, 0.0)
    part = tl.program_id(0) * tl.cast(channels, tl.int64)
    if INNER:
        total = tl.maximum(tl.sum(count, axis=0), 1.0)
        merged = tl.sum(count * mean, axis=0) / total
        apart = mean - merged[None, :]
        squares = tl.sum(square + count * apart * apart, axis=0)
        cols = begin + tl.arange(0, BLOCK_COLS)
        tl.store(mean_ptr + part + cols, merged, mask=cols < end)
        tl.store(square_ptr + part + cols, squares, mask=cols < end)
    else:
        total = tl.maximum(tl.sum(count), 1.0)
        merged = tl.sum(count * mean) / total
        apart = mean - merged
        squares = tl.sum(square + count * apart * apart)
        tl.store(mean_ptr + part + tl.program_id(1), merged)
        tl.store(square_ptr + part + tl.program_id(1), squares)


@triton.jit(do_not_specialize=["n_rows", "rows_per_split", "splits", "channels", "count"])
def _merge_moments_kernel(
    mean_ptr,
    square_ptr,
    out_mean_ptr,
    out_var_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    n_rows,
    rows_per_split,
    splits,
    channels,
    count,
    per_row,
    momentum,
    eps,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Merge the stretches of a set: mean and variance, or rstd, (sets, c).

    With running statistics (one set), their first c move, by the unbiased variance.
    """
    channels = known_multiple(channels, ALIGNED)
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_row = cols < channels
    base = tl.program_id(1).to(tl.int64) * splits
    mean = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, splits, BLOCK_ROWS):
        parts = start + tl.arange(0, BLOCK_ROWS)
        mask = (parts < splits)[:, None] & in_row[None, :]
        offsets = (base + parts)[:, None] * channels + cols[None, :]
        left = tl.minimum(n_rows - parts * rows_per_split, rows_per_split).to(tl.float32)
        weight = left * per_row / count
        mean += tl.load(mean_ptr + offsets, mask=mask, other=0.0) * weight[:, None]
    merged = tl.sum(mean, axis=0)
    square = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, splits, BLOCK_ROWS):
        parts = start + tl.arange(0, BLOCK_ROWS)
        mask = (parts < splits)[:, None] & in_row[None, :]
        offsets = (base + parts)[:, None] * channels + cols[None, :]
        left = tl.minimum(n_rows - parts * rows_per_split, rows_per_split).to(tl.float32)
        apart = tl.load(mean_ptr + offsets, mask=mask, other=0.0) - merged[None, :]
        apart = tl.where(mask, apart, 0.0)
        square += tl.load(square_ptr + offsets, mask=mask, other=0.0)
        square += apart * apart * (left * per_row)[:, None]
    squares = tl.sum(square, axis=0)
    var = squares / count
    out = tl.program_id(1).to(tl.int64) * channels + cols
    tl.store(out_mean_ptr + out, merged, mask=in_row)
    if out_var_ptr is not None:
        tl.store(out_var_ptr + out, var, mask=in_row)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + out, 1.0 / tl.sqrt_rn(var + eps), mask=in_row)
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
        new = (1.0 - momentum) * old + momentum * merged
        tl.store(running_mean_ptr + cols, narrow(new, running_mean_ptr), mask=in_row)
        old = tl.load(running_var_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
        new = (1.0 - momentum) * old + momentum * (squares / (count - 1.0))
        tl.store(running_var_ptr + cols, narrow(new, running_var_ptr), mask=in_row)


@triton.jit(do_not_specialize=["n_rows", "rows_per_split", "splits", "channels", "space", "groups"])
def _gradient_sums_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_sum_ptr,
    bias_sum_ptr,
    n_rows,
    rows_per_split,
    splits,
    channels,
    space,
    groups,
    INNER: tl.constexpr,
    POOLED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Sums of dy * normalised x, and of dy, of each channel in a stretch: (parts, c) each."""
    if INNER:
        channels = known_multiple(channels, ALIGNED)
    else:
        space = known_multiple(space, ALIGNED)
    base, stride, first, last, begin, end = _stretch(
        n_rows, rows_per_split, splits, channels, space, INNER, BLOCK_COLS
    )
    own = tl.program_id(1)
    if INNER:
        own = begin + tl.arange(0, BLOCK_COLS)
    place = own
    if not POOLED:
        place = tl.program_id(0) // splits * groups + own // (channels // groups)
    if INNER:
        mean = tl.load(mean_ptr + place, mask=own < end, other=0.0)[None, :]
    else:
        mean = tl.load(mean_ptr + place)
    weight_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    bias_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        row_offsets = base + rows.to(tl.int64)[:, None] * stride
        for col in range(begin, end, BLOCK_COLS):
            cols = col + tl.arange(0, BLOCK_COLS)
            mask = (rows < last)[:, None] & (cols < end)[None, :]
            dy = tl.load(dy_ptr + row_offsets + cols[None, :], mask=mask, other=0.0)
            x = tl.load(x_ptr + row_offsets + cols[None, :], mask=mask, other=0.0)
            dy = dy.to(tl.float32)
            weight_sum += dy * (x.to(tl.float32) - mean)
            bias_sum += dy
    part = tl.program_id(0) * tl.cast(channels, tl.int64)
    if INNER:
        rstd = tl.load(rstd_ptr + place, mask=own < end, other=0.0)
        tl.store(weight_sum_ptr + part + own, tl.sum(weight_sum, axis=0) * rstd, mask=own < end)
        tl.store(bias_sum_ptr + part + own, tl.sum(bias_sum, axis=0), mask=own < end)
    else:
        tl.store(weight_sum_ptr + part + own, tl.sum(weight_sum) * tl.load(rstd_ptr + place))
        tl.store(bias_sum_ptr + part + own, tl.sum(bias_sum))


@dataclass(frozen=True)
class _Reduction:
    """Grid and tile of a first stage."""

    grid: tuple[int, int]
    splits: int
    rows_per_split: int
    block_rows: int
    block_cols: int


def _plan(layout: Layout, device: torch.device) -> _Reduction:
    """Enough programs for the GPU, each with as many rows as that leaves it."""
    block_rows, block_cols = tile_of(layout.rows, layout.cols)
    across = triton.cdiv(layout.channels, block_cols) if layout.inner else layout.channels
    wanted = triton.cdiv(4 * device_limits(device).multiprocessors, across * layout.sets)
    tiles = triton.cdiv(layout.rows, block_rows)
    rows_per_split = triton.cdiv(tiles, min(wanted, tiles)) * block_rows
    splits = triton.cdiv(layout.rows, rows_per_split)
    grid = (layout.sets * splits, across)
    return _Reduction(grid, splits, rows_per_split, block_rows, block_cols)


def moments(
    x: Tensor,
    layout: Layout,
    eps: float | None,
    running: tuple[Tensor | None, Tensor | None] = (None, None),
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean and rstd (variance where ``eps`` is None) of each set and channel, (sets * c,).

    Args:
        x: Without gaps.
        layout: How it lies.
        eps: Added to the variance.
        running: Views (c,) of running mean and variance, which move; or None.
        momentum: The weight of x in them.
    """
    plan, c = _plan(layout, x.device), layout.channels
    means, squares = (
        torch.empty((plan.grid[0], c), dtype=torch.float32, device=x.device) for _ in range(2)
    )
    launch(
        _moments_kernel, plan.grid, x, means, squares, layout.rows, plan.rows_per_split,
        plan.splits, c, layout.space, device=x.device, INNER=layout.inner,
        ALIGNED=is_aligned(layout.cols), BLOCK_ROWS=plan.block_rows, BLOCK_COLS=plan.block_cols,
        num_warps=4,
    )  # fmt: skip
    mean, other = (
        torch.empty(layout.sets * c, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    var, rstd = (other, None) if eps is None else (None, other)
    launch(
        _merge_moments_kernel, (triton.cdiv(c, _MERGE_COLS), layout.sets), means, squares, mean,
        var, rstd, *running, layout.rows, plan.rows_per_split, plan.splits, c, layout.count,
        float(layout.count // layout.rows), momentum, 0.0 if eps is None else eps,
        device=x.device, ALIGNED=is_aligned(c), BLOCK_ROWS=_MERGE_ROWS, BLOCK_COLS=_MERGE_COLS,
        num_warps=4,
    )  # fmt: skip
    return mean, other


def gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, layout: Layout, groups: int
) -> tuple[Tensor, Tensor, int]:
    """Partial sums of each channel's weight and bias gradient, (parts, c), and parts of a set."""
    plan, c = _plan(layout, x.device), layout.channels
    weight_sum, bias_sum = (
        torch.empty((plan.grid[0], c), dtype=torch.float32, device=x.device) for _ in range(2)
    )
    launch(
        _gradient_sums_kernel, plan.grid, dy, x, mean, rstd, weight_sum, bias_sum, layout.rows,
        plan.rows_per_split, plan.splits, c, layout.space, groups, device=x.device,
        INNER=layout.inner, POOLED=layout.pooled, ALIGNED=is_aligned(layout.cols),
        BLOCK_ROWS=plan.block_rows, BLOCK_COLS=plan.block_cols, num_warps=4,
    )  # fmt: skip
    return weight_sum, bias_sum, plan.splits
