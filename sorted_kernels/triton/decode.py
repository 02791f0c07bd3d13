"""Linear of a few rows, as in decoding: the reduction is split to keep the whole GPU reading.

A weight's tiles alone are too few programs for short rows. Each split sums its part of the
reduction into a float32 workspace; a second kernel adds the parts in a fixed order (no atomics, so
the result does not depend on timing) and applies bias and activation.
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


def choose_splits(rows: int, out_features: int, in_features: int, like: Tensor) -> int:
    """Into how many parts the reduction is cut: a pure function of shape, dtype and device."""
    if not 0 < rows <= DECODE_ROWS:
        return 1
    multiprocessors = device_limits(like.device).multiprocessors
    return _splits(out_features, in_features, like.dtype, multiprocessors)


@functools.lru_cache(maxsize=1024)
def _splits(m: int, k: int, dtype: torch.dtype, multiprocessors: int) -> int:
    if m * k * dtype.itemsize > _MAX_SPLIT_BYTES:
        return 1
    tiles = triton.cdiv(m, decode_config(dtype).block_n)
    return max(1, min(2 * multiprocessors // tiles, k // _MIN_SPLIT))


@triton.jit(do_not_specialize=["n_rows", "out_features", "in_features", "steps"])
def _linear_split_kernel(
    x_ptr,
    weight_ptr,
    parts_ptr,
    n_rows,
    out_features,
    in_features,
    steps,
    x_stride,
    weight_stride,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dense parts (splits, N, m), float32: x @ W.T over ``steps`` blocks of the reduction each."""
    m = known_multiple(out_features, ALIGNED)
    k = known_multiple(in_features, ALIGNED)
    col = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    first = split * (steps * BLOCK_K)
    part = multiply_tile(
        x_ptr + first, weight_ptr + first, x_stride, weight_stride, 0, col, n_rows, m,
        tl.minimum(steps * BLOCK_K, k - first),
        True, True, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    offsets, mask = output_tile(m, 0, col, n_rows, m, BLOCK_M, BLOCK_N)
    tl.store(parts_ptr + split * tl.cast(n_rows * m, tl.int64) + offsets, part, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "out_features", "splits"])
def _split_sum_kernel(
    parts_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
    n_rows,
    out_features,
    splits,
    ACTIVATION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row's BLOCK_N columns of y (N, m): the parts added in order, bias, activation."""
    m = known_multiple(out_features, ALIGNED)
    row, col = tl.program_id(1), tl.program_id(0) * BLOCK_N
    offsets, mask = output_tile(m, row, col, n_rows, m, 1, BLOCK_N)
    z = tl.zeros((1, BLOCK_N), tl.float32)
    for split in range(splits):
        part = parts_ptr + split * tl.cast(n_rows * m, tl.int64) + offsets
        z += tl.load(part, mask=mask, other=0.0)
    store_activated(z, bias_ptr, y_ptr, z_ptr, None, row, col, n_rows, m, ACTIVATION)


def linear_split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    splits: int,
    activation: str,
) -> None:
    """Write ``y = activation(x @ weight[:m, :k].T + bias[:m])`` with a split reduction.

    Args:
        x: (N, k) with unit inner stride, N at most :data:`DECODE_ROWS`.
        weight: (M, K) parent, unit inner stride.
        bias: (M,) parent or None.
        y: (N, m), dense.
        z: (N, m), dense, for the pre-activation; or None.
        splits: How many parts to cut the reduction into, at most.
        activation: ``none``, ``relu``, ``gelu`` or ``silu``.
    """
    (n_rows, k), m = x.shape, y.shape[1]
    config, aligned = decode_config(x.dtype), is_aligned(m, k)
    steps = triton.cdiv(triton.cdiv(k, config.block_k), splits)
    splits = triton.cdiv(k, steps * config.block_k)  # no part is empty
    parts = torch.empty((splits, n_rows, m), dtype=torch.float32, device=x.device)
    launch(
        _linear_split_kernel, (triton.cdiv(m, config.block_n), splits),
        x, weight, parts, n_rows, m, k, steps, x.stride(0), weight.stride(0),
        device=x.device, ALIGNED=aligned, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, PRECISION=config.input_precision,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    launch(
        _split_sum_kernel, (triton.cdiv(m, _SUM_COLS), n_rows),
        parts, bias, y, z, n_rows, m, splits,
        device=x.device, ACTIVATION=activation, ALIGNED=aligned, BLOCK_N=_SUM_COLS, num_warps=2,
    )  # fmt: skip
