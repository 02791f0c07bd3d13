"""Sums over rows, in an order that does not depend on timing: the last stage of many gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sorted_kernels.triton.device import known_multiple, narrow
from sorted_kernels.triton.launch import device_limits, is_aligned, launch

_BLOCK_ROWS, _BLOCK_COLS = 32, 64
_MIN_ROWS_PER_SPLIT = 512


@triton.jit(do_not_specialize=["n_rows", "n_cols", "rows_per_split"])
def _column_sum_kernel(
    src_ptr,
    out_ptr,
    limits_ptr,
    n_rows,
    n_cols,
    rows_per_split,
    src_stride,
    ACCUMULATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Sum one split's rows: ``out[split] (+)= sum``; out (splits, n_cols) is dense.

    With ``limits_ptr`` each column has its own number of leading rows, which never rises.
    """
    n_cols = known_multiple(n_cols, ALIGNED)
    split = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, n_rows)
    if limits_ptr is not None:
        limits = tl.load(limits_ptr + cols, mask=cols < n_cols, other=0)
        last = tl.minimum(last, tl.load(limits_ptr + tl.program_id(0) * BLOCK_COLS))
    partial = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        offsets = rows[:, None] * tl.cast(src_stride, tl.int64) + cols[None, :]
        mask = (rows < last)[:, None] & (cols < n_cols)[None, :]
        if limits_ptr is not None:
            mask = mask & (rows[:, None] < limits[None, :])
        # Read once and never again: leave L2 to the tensors that are.
        values = tl.load(src_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        partial += values.to(tl.float32)
    total = tl.sum(partial, axis=0)
    out_ptrs = out_ptr + split * tl.cast(n_cols, tl.int64) + cols
    if ACCUMULATE:
        total += tl.load(out_ptrs, mask=cols < n_cols, other=0.0).to(tl.float32)
    tl.store(out_ptrs, narrow(total, out_ptr), mask=cols < n_cols)


def _sum_splits(
    src: Tensor, out: Tensor, limits: Tensor | None, splits: int, rows: int, accumulate: bool
) -> None:
    n_rows, n_cols = src.shape
    launch(
        _column_sum_kernel,
        (triton.cdiv(n_cols, _BLOCK_COLS), splits),
        src,
        out,
        limits,
        n_rows,
        n_cols,
        rows,
        src.stride(0),
        device=src.device,
        ACCUMULATE=accumulate,
        ALIGNED=is_aligned(n_cols),
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_COLS=_BLOCK_COLS,
        num_warps=4,
    )


def column_sum_into(
    src: Tensor, out: Tensor, accumulate: bool, limits: Tensor | None = None
) -> None:
    """``out (+)= src.sum(0)``: src (N, m) with unit inner stride, out (m,) dense.

    With ``limits`` (m,), int32 and never rising, column j has ``limits[j]`` rows.

    Many rows are first summed in splits, so that a narrow matrix keeps the whole GPU busy.
    """
    n_rows, n_cols = src.shape
    blocks = triton.cdiv(n_cols, _BLOCK_COLS)
    wanted = triton.cdiv(2 * device_limits(src.device).multiprocessors, blocks)
    rows = max(triton.cdiv(n_rows, wanted), _MIN_ROWS_PER_SPLIT)
    splits = triton.cdiv(n_rows, rows)
    if splits > 1:
        partials = torch.empty((splits, n_cols), dtype=torch.float32, device=src.device)
        _sum_splits(src, partials, limits, splits, rows, accumulate=False)
        src, rows, limits = partials, splits, None
    _sum_splits(src, out, limits, 1, rows, accumulate)
