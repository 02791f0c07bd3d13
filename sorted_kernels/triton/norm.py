"""Kernels of layer norm and RMS norm, which differ in the centring. Shapes: N rows, k features.

A program keeps whole rows in registers. The backward kernel walks over the rows with a grid of
fixed size: each program sums the parameter gradients of its rows, and a second kernel adds those
partial sums in a fixed order, straight into the gradient's prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sorted_kernels.triton.column_sum import column_sum_into
from sorted_kernels.triton.device import known_multiple, narrow, within_widths
from sorted_kernels.triton.launch import as_rows, device_limits, is_aligned, launch
from sorted_kernels.triton.row_sizes import RowSizes

MAX_FEATURES = 16384
"""Longest row that fits the registers of one block."""

_MAX_FUSED_FEATURES = {True: 8192, False: 4096}
"""Longest row whose gradients and sums of gradients fit there too, if all rows are aligned and of
one width, or not: one-element loads need registers for many addresses, and widths take some."""

_SPLIT_COLS, _WIDE_COLS = 2048, 4096


@dataclass(frozen=True)
class NormConfig:
    """Rows and columns that a program holds, and the warps that share them."""

    block_rows: int
    block_cols: int
    num_warps: int


def choose_norm_config(features: int) -> NormConfig:
    """Whole rows, several when they are short: 8 to 16 elements a thread."""
    block_cols = max(16, triton.next_power_of_2(features))
    block_rows = max(1, min(32, 1024 // block_cols))
    num_warps = min(32, max(4, block_rows * block_cols // 512))
    return NormConfig(block_rows, block_cols, num_warps)


@triton.jit(do_not_specialize=["n_rows", "features"])
def _norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    widths_ptr,
    n_rows,
    features,
    x_stride,
    eps,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Dense y (N, k), and rstd (N,); with ``mean_ptr`` the rows are centred first."""
    features = known_multiple(features, ALIGNED)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    in_row = cols < features
    mask = (rows < n_rows)[:, None] & in_row[None, :]
    widths, active = within_widths(widths_ptr, rows, n_rows, cols, features, mask, ALIGNED)
    wide_rows = rows.to(tl.int64)[:, None]
    x = tl.load((x_ptr + wide_rows * x_stride) + cols[None, :], mask=active, other=0.0)
    x = x.to(tl.float32)
    if mean_ptr is not None:
        mean = tl.sum(x, axis=1) / widths
        tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
        # The second pass is over registers, so the variance is the accurate two-pass one.
        x = tl.where(active, x - mean[:, None], 0.0)
    variance = tl.sum(x * x, axis=1) / widths
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    y = x * rstd[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
        y *= weight[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
        y += bias[None, :]
    if widths_ptr is not None:
        y = tl.where(active, y, 0.0)
    y_ptrs = (y_ptr + wide_rows * features) + cols[None, :]
    tl.store(y_ptrs, narrow(y, y_ptr), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "features"])
def _norm_backward_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    weight_partial_ptr,
    bias_partial_ptr,
    widths_ptr,
    n_rows,
    features,
    dy_stride,
    x_stride,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Dense dx (N, k), and each program's sums for the parameters, (programs, k), float32.

    Every output is optional. Without dx there is no sum along a row, and the second grid axis
    may split the columns.
    """
    features = known_multiple(features, ALIGNED)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_row = cols < features
    weight_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    bias_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    step = tl.num_programs(0) * BLOCK_ROWS
    for start in range(tl.program_id(0) * BLOCK_ROWS, n_rows, step):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < n_rows)[:, None] & in_row[None, :]
        widths, active = within_widths(widths_ptr, rows, n_rows, cols, features, mask, ALIGNED)
        wide_rows = rows.to(tl.int64)[:, None]
        # The last use of both: leave L2 to dx, which the next kernel reads.
        dy_ptrs = (dy_ptr + wide_rows * dy_stride) + cols[None, :]
        dy = tl.load(dy_ptrs, mask=active, other=0.0, eviction_policy="evict_first").to(tl.float32)
        x_ptrs = (x_ptr + wide_rows * x_stride) + cols[None, :]
        x = tl.load(x_ptrs, mask=active, other=0.0, eviction_policy="evict_first")
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        normed = x.to(tl.float32)
        if mean_ptr is not None:
            normed -= tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        # Not zero outside the mask, where dy is: no sum below sees it.
        normed *= rstd
        if weight_partial_ptr is not None:
            weight_sum += dy * normed
        if bias_partial_ptr is not None:
            bias_sum += dy
        if dx_ptr is not None:
            if weight_ptr is not None:
                # Read again for every row, from L1 or L2: registers are scarcer than loads.
                weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
                dy *= weight[None, :]
            slope = tl.sum(dy * normed, axis=1) / widths
            if mean_ptr is not None:
                dy -= (tl.sum(dy, axis=1) / widths)[:, None]
            dx = dy - normed * slope[:, None]
            if widths_ptr is not None:
                dx = tl.where(active, dx, 0.0)
            dx_ptrs = (dx_ptr + wide_rows * features) + cols[None, :]
            tl.store(dx_ptrs, narrow(dx * rstd, dx_ptr), mask=mask)
    partial = tl.program_id(0) * tl.cast(features, tl.int64) + cols
    if weight_partial_ptr is not None:
        tl.store(weight_partial_ptr + partial, tl.sum(weight_sum, axis=0), mask=in_row)
    if bias_partial_ptr is not None:
        tl.store(bias_partial_ptr + partial, tl.sum(bias_sum, axis=0), mask=in_row)


@triton.jit
def _wide_block(dy_row, x_row, weight_ptr, mean, rstd, start, features, BLOCK_COLS: tl.constexpr):
    """One block of a row: gradient after the scale, normalised input, columns."""
    cols = start + tl.arange(0, BLOCK_COLS)
    dy = tl.load(dy_row + cols, mask=cols < features, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        dy *= tl.load(weight_ptr + cols, mask=cols < features, other=0.0).to(tl.float32)
    x = tl.load(x_row + cols, mask=cols < features, other=0.0).to(tl.float32)
    return dy, (x - mean) * rstd, cols


@triton.jit(do_not_specialize=["features"])
def _norm_dx_wide_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    widths_ptr,
    features,
    dy_stride,
    x_stride,
    ALIGNED: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Compute dx of a row too long for the registers: one pass for its sums, one for dx."""
    features = known_multiple(features, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    width = features
    if widths_ptr is not None:
        width = known_multiple(tl.load(widths_ptr + row), ALIGNED)
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    plain_sum = tl.zeros((BLOCK_COLS,), tl.float32)
    normed_sum = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in range(0, width, BLOCK_COLS):
        dy, normed, _ = _wide_block(
            dy_ptr + row * dy_stride, x_ptr + row * x_stride, weight_ptr, mean, rstd,
            start, width, BLOCK_COLS,
        )  # fmt: skip
        plain_sum += dy
        normed_sum += dy * normed
    shift = 0.0
    if mean_ptr is not None:
        shift = tl.sum(plain_sum, axis=0) / width
    slope = tl.sum(normed_sum, axis=0) / width
    for start in range(0, features, BLOCK_COLS):
        dy, normed, cols = _wide_block(
            dy_ptr + row * dy_stride, x_ptr + row * x_stride, weight_ptr, mean, rstd,
            start, width, BLOCK_COLS,
        )  # fmt: skip
        dx = (dy - shift - normed * slope) * rstd
        if widths_ptr is not None:
            dx = tl.where(cols < width, dx, 0.0)
        tl.store(dx_ptr + row * features + cols, narrow(dx, dx_ptr), mask=cols < features)


def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    sizes: RowSizes | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return y (..., k), mean (..., 1) or None, rstd (..., 1); k at most :data:`MAX_FEATURES`.

    With ``sizes`` row r of x (N, >= k) has a width of its own, past which y is zero.
    """
    rows, features = as_rows(x), x.shape[-1] if sizes is None else sizes.in_features
    y = x.new_empty((*x.shape[:-1], features))
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else None
    config = choose_norm_config(features)
    if rows.shape[0] > 0:
        launch(
            _norm_kernel,
            (triton.cdiv(rows.shape[0], config.block_rows),),
            rows, weight, bias, y, mean, rstd, None if sizes is None else sizes.row_in,
            rows.shape[0], features, rows.stride(0), eps,
            device=x.device, ALIGNED=_aligned(features, sizes),
            BLOCK_ROWS=config.block_rows, BLOCK_COLS=config.block_cols, num_warps=config.num_warps,
        )  # fmt: skip
    return y, mean, rstd


def _aligned(features: int, sizes: RowSizes | None) -> bool:
    return is_aligned(features) if sizes is None else sizes.in_aligned


def _launch_backward(
    tensors: tuple[Tensor | None, ...],
    shape: tuple[int, int],
    strides: tuple[int, int],
    dx: Tensor | None,
    partials: list[Tensor | None],
    sizes: RowSizes | None,
    programs: int,
    device: torch.device,
) -> None:
    """Launch what is wanted: one kernel, or for long rows one for dx and one for the sums."""
    (n_rows, features), aligned = shape, _aligned(shape[1], sizes)
    widths = None if sizes is None else sizes.row_in
    wants_sums = any(partial is not None for partial in partials)
    if dx is not None and features > _MAX_FUSED_FEATURES[aligned and widths is None]:
        block_cols = _WIDE_COLS if widths is None else _WIDE_COLS // 2
        launch(
            _norm_dx_wide_kernel, (n_rows,), *tensors, dx, widths, features, *strides,
            device=device, ALIGNED=aligned, BLOCK_COLS=block_cols, num_warps=8,
        )  # fmt: skip
        dx = None
    if dx is not None or wants_sums:
        config = choose_norm_config(features if dx is not None else min(features, _SPLIT_COLS))
        launch(
            _norm_backward_kernel, (programs, triton.cdiv(features, config.block_cols)),
            *tensors, dx, *partials, widths, n_rows, features, *strides,
            device=device, ALIGNED=aligned, BLOCK_ROWS=config.block_rows,
            BLOCK_COLS=config.block_cols, num_warps=config.num_warps,
        )  # fmt: skip


def norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    outs: tuple[Tensor | None, Tensor | None],
    accumulate: tuple[bool, bool],
    need_dx: bool,
    sizes: RowSizes | None = None,
) -> Tensor | None:
    """Input gradient, if needed; weight and bias gradients into ``outs`` where given.

    Args:
        dy: (..., k).
        x: (..., k).
        mean: (..., 1) float32, or None if the rows were not centred.
        rstd: (..., 1) float32.
        weight: (K,) parent or None.
        outs: Views (k,) of the gradients of weight and bias, each or None.
        accumulate: For each of ``outs``, whether to add.
        need_dx: Whether the input gradient is wanted.
        sizes: Of a ragged batch: dy and x are (N, >= k), and so are ``outs``, of which the first k
            are written.
    """
    dy_rows, rows = as_rows(dy), as_rows(x)
    features = x.shape[-1] if sizes is None else sizes.in_features
    n_rows = rows.shape[0]
    dx = x.new_empty((*x.shape[:-1], features)) if need_dx else None
    row_blocks = triton.cdiv(n_rows, choose_norm_config(features).block_rows)
    programs = min(2 * device_limits(x.device).multiprocessors, row_blocks)
    partials = [
        None if out is None else torch.empty((programs, features), device=x.device) for out in outs
    ]
    if n_rows > 0:
        _launch_backward(
            (dy_rows, rows, mean, rstd, weight),
            (n_rows, features),
            (dy_rows.stride(0), rows.stride(0)),
            dx,
            partials,
            sizes,
            programs,
            x.device,
        )
    for out, partial, add in zip(outs, partials, accumulate, strict=True):
        if out is not None and partial is not None:
            column_sum_into(partial, out[:features], add)
    return dx
