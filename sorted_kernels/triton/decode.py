"""Products of a few rows with a weight, as in decoding: a split reduction keeps the GPU busy.

A weight's tiles alone are too few programs for short rows. Each split sums its part of the
reduction into a float32 workspace; a second kernel adds the parts in a fixed order (no atomics, so
the result does not depend on timing) and applies bias and activation.

Both products that read the weight are of this shape: forward reduces over the weight's dense axis,
dgrad over the other. So few rows of a ragged batch are one tile of rows, whose first has all of the
weight: only what a row does not have is masked.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from sorted_kernels.triton.device import known_multiple
from sorted_kernels.triton.epilogue import store_activated
from sorted_kernels.triton.gemm import multiply_tile, output_tile
from sorted_kernels.triton.gemm_config import DECODE_ROWS, decode_config
from sorted_kernels.triton.launch import device_limits, is_aligned, launch

_MAX_SPLIT_BYTES = 32 << 20
"""A weight's block above this has tiles enough, and the workspace would be traffic for nothing."""

_MIN_SPLIT = 512
"""Shortest part of a reduction: below it, a program's start costs more than its loads."""

_SUM_COLS = 128


def choose_splits(rows: int, cols: int, reduction: int, like: Tensor) -> int:
    """Into how many parts the reduction is cut: a pure function of shape, dtype and device."""
    if not 0 < rows <= DECODE_ROWS:
        return 1
    multiprocessors = device_limits(like.device).multiprocessors
    return _splits(cols, reduction, like.dtype, multiprocessors)


@functools.lru_cache(maxsize=1024)
def _splits(cols: int, reduction: int, dtype: torch.dtype, multiprocessors: int) -> int:
    if cols * reduction * dtype.itemsize > _MAX_SPLIT_BYTES:
        return 1
    tiles = triton.cdiv(cols, decode_config(dtype).block_n)
    return max(1, min(2 * multiprocessors // tiles, reduction // _MIN_SPLIT))


def split_steps(reduction: int, splits: int, block_k: int) -> tuple[int, int]:
    """Blocks of the reduction in a part, and how many parts that makes: none is empty.

    Args:
        reduction: Its length.
        splits: The most parts that are wanted.
        block_k: Length of a block.
    """
    steps = triton.cdiv(triton.cdiv(reduction, block_k), splits)
    return steps, triton.cdiv(reduction, steps * block_k)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "reduction", "steps"])
def _linear_split_kernel(
    a_ptr,
    weight_ptr,
    limits_ptr,
    parts_ptr,
    n_rows,
    n_cols,
    reduction,
    steps,
    a_stride,
    weight_stride,
    W_INNER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dense parts (splits, N, cols), float32, over ``steps`` blocks of the reduction each.

    ``a @ W.T`` if W_INNER, the weight's dense axis being the reduction, else ``a @ W``. With
    ``limits_ptr`` each row has its own reduction, which never rises.
    """
    n_cols = known_multiple(n_cols, ALIGNED)
    reduction = known_multiple(reduction, ALIGNED)
    col = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    first = split * (steps * BLOCK_K)
    part = multiply_tile(
        a_ptr, weight_ptr, a_stride, weight_stride, 0, col, n_rows, n_cols,
        tl.minimum(first + steps * BLOCK_K, reduction),
        True, W_INNER, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        a_limits_ptr=limits_ptr, first=first,
    )  # fmt: skip
    offsets, mask = output_tile(n_cols, 0, col, n_rows, n_cols, BLOCK_M, BLOCK_N)
    tl.store(parts_ptr + split * tl.cast(n_rows * n_cols, tl.int64) + offsets, part, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "n_cols", "splits"])
def _split_sum_kernel(
    parts_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
    widths_ptr,
    n_rows,
    n_cols,
    splits,
    ACTIVATION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row's BLOCK_N columns of y (N, cols): the parts added in order, bias, activation.

    With ``widths_ptr`` each row has its own width, past which it is zero.
    """
    n_cols = known_multiple(n_cols, ALIGNED)
    row, col = tl.program_id(1), tl.program_id(0) * BLOCK_N
    offsets, mask = output_tile(n_cols, row, col, n_rows, n_cols, 1, BLOCK_N)
    z = tl.zeros((1, BLOCK_N), tl.float32)
    for split in range(splits):
        part = parts_ptr + split * tl.cast(n_rows * n_cols, tl.int64) + offsets
        z += tl.load(part, mask=mask, other=0.0)
    store_activated(
        z, bias_ptr, y_ptr, z_ptr, widths_ptr, row, col, n_rows, n_cols, ACTIVATION
    )  # fmt: skip


def split_product(
    a: Tensor,
    weight: Tensor,
    y: Tensor,
    splits: int,
    *,
    reduction: int | None = None,
    transposed: bool = True,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    activation: str = "none",
    limits: Tensor | None = None,
    widths: Tensor | None = None,
    aligned: bool | None = None,
) -> None:
    """Write ``y = activation(a @ W.T + bias)``, or ``a @ W``, with a split reduction.

    Args:
        a: (N, at least r) with unit inner stride, N at most :data:`DECODE_ROWS`.
        weight: Parent with unit inner stride; its block is (cols, r), or (r, cols).
        y: (N, cols), dense.
        splits: How many parts to cut the reduction into, at most.
        reduction: r; all of a's columns when not given.
        transposed: Whether it is ``W.T`` that a is multiplied by.
        bias: (at least cols,) or None.
        z: (N, cols), dense, for what the activation sees; or None.
        activation: ``none``, ``relu``, ``gelu`` or ``silu``.
        limits: (N,) int32, never rising: how much of the reduction each row has.
        widths: (N,) int32: how many columns each row has; beyond them y is zero.
        aligned: Whether all sizes are multiples of 16, those of rows too.
    """
    (n_rows, cols), red = y.shape, a.shape[1] if reduction is None else reduction
    config = decode_config(a.dtype)
    aligned = is_aligned(cols, red) if aligned is None else aligned
    steps, splits = split_steps(red, splits, config.block_k)
    # A bound for the compiler, which else stops at 96 registers and spills 8 bytes.
    crowded = a.dtype != torch.float32 and limits is not None and not (aligned or transposed)
    parts = torch.empty((splits, n_rows, cols), dtype=torch.float32, device=a.device)
    launch(
        _linear_split_kernel, (triton.cdiv(cols, config.block_n), splits),
        a, weight, limits, parts, n_rows, cols, red, steps, a.stride(0), weight.stride(0),
        device=a.device, W_INNER=transposed, ALIGNED=aligned, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, PRECISION=config.input_precision,
        num_warps=config.num_warps, num_stages=config.num_stages,
        maxnreg=128 if crowded else None,
    )  # fmt: skip
    launch(
        _split_sum_kernel, (triton.cdiv(cols, _SUM_COLS), n_rows),
        parts, bias, y, z, widths, n_rows, cols, splits,
        device=a.device, ACTIVATION=activation, ALIGNED=aligned, BLOCK_N=_SUM_COLS, num_warps=2,
    )  # fmt: skip
