"""Linear over a ragged batch: each row has its own prefix of the weight, in one launch.

Shapes: N rows, m and k the largest row's out and in features; row r has ``weight[:m_r, :k_r]``.
Rows are sorted largest first, so a tile's first row says how far the tile goes, and the tiles that
do work are a staircase. Loads past a row's sizes are masked; where sizes are not multiples of 16,
what a tile loads past them (inside ``x[:, :k]`` and ``dy[:, :m]``) is replaced by zero instead.

A row meets only the weights of its tile: if an active weight is NaN or infinite, so may be rows of
smaller sub-models up to a tile below the row that uses it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sorted_kernels.triton.column_sum import column_sum_into
from sorted_kernels.triton.decode import choose_splits, split_product
from sorted_kernels.triton.device import known_multiple, narrow
from sorted_kernels.triton.epilogue import store_activated, store_sums
from sorted_kernels.triton.gemm import multiply_tile, output_tile, tile_origin
from sorted_kernels.triton.gemm_config import GemmConfig
from sorted_kernels.triton.gemm_launch import launch_gemm, like_strided
from sorted_kernels.triton.row_sizes import Runs, row_sizes

_SIZES = ["n_rows", "out_features", "in_features"]


@triton.jit
def _tile_sizes(cols_ptr, reduction_ptr, row, col, ALIGNED: tl.constexpr):
    """Columns of the output and reduction indices of a tile's first row: no other row has more.

    There is nothing to multiply for a tile beyond its columns; it is only filled with zeros.
    """
    cols = known_multiple(tl.load(cols_ptr + row), ALIGNED)
    reduction = known_multiple(tl.load(reduction_ptr + row), ALIGNED)
    return cols, tl.where(col < cols, reduction, 0)


@triton.jit(do_not_specialize=_SIZES)
def _ragged_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
    row_out_ptr,
    row_in_ptr,
    n_rows,
    out_features,
    in_features,
    x_stride,
    weight_stride,
    ACTIVATION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dense y (N, m) = activation(x @ W.T + bias), zero past m_r; z, as the activation saw it."""
    m = known_multiple(out_features, ALIGNED)
    row, col = tile_origin(n_rows, m, BLOCK_M, BLOCK_N, GROUP_M)
    tile_out, depth = _tile_sizes(row_out_ptr, row_in_ptr, row, col, ALIGNED)
    z = multiply_tile(
        x_ptr, weight_ptr, x_stride, weight_stride, row, col, n_rows, tile_out, depth,
        True, True, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, a_limits_ptr=row_in_ptr,
    )  # fmt: skip
    store_activated(z, bias_ptr, y_ptr, z_ptr, row_out_ptr, row, col, n_rows, m, ACTIVATION)


@triton.jit(do_not_specialize=_SIZES)
def _ragged_linear_dgrad_kernel(
    dy_ptr,
    weight_ptr,
    dx_ptr,
    row_out_ptr,
    row_in_ptr,
    n_rows,
    out_features,
    in_features,
    dy_stride,
    weight_stride,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dense dx (N, k) = dy @ W, zero past k_r."""
    k = known_multiple(in_features, ALIGNED)
    row, col = tile_origin(n_rows, k, BLOCK_M, BLOCK_N, GROUP_M)
    tile_in, depth = _tile_sizes(row_in_ptr, row_out_ptr, row, col, ALIGNED)
    dx = multiply_tile(
        dy_ptr, weight_ptr, dy_stride, weight_stride, row, col, n_rows, tile_in, depth,
        True, False, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, a_limits_ptr=row_out_ptr,
    )  # fmt: skip
    i = row + tl.arange(0, BLOCK_M)
    j = col + tl.arange(0, BLOCK_N)
    widths = tl.load(row_in_ptr + i, mask=i < n_rows, other=0)
    dx = tl.where(j[None, :] < widths[:, None], dx, 0.0)
    offsets, mask = output_tile(k, row, col, n_rows, k, BLOCK_M, BLOCK_N)
    tl.store(dx_ptr + offsets, narrow(dx, dx_ptr), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _ragged_linear_wgrad_kernel(
    dy_ptr,
    x_ptr,
    out_ptr,
    out_rows_ptr,
    in_rows_ptr,
    n_rows,
    out_features,
    in_features,
    dy_stride,
    x_stride,
    out_stride,
    ACCUMULATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the view out (m, k) (+)= dy.T @ x, each element over the rows that use it.

    Both sizes fall from row to row, so those rows are a prefix, and a tile's longest is that of its
    first element. One program writes a tile: no atomics.
    """
    m = known_multiple(out_features, ALIGNED)
    k = known_multiple(in_features, ALIGNED)
    row, col = tile_origin(m, k, BLOCK_M, BLOCK_N, GROUP_M)
    depth = tl.minimum(tl.load(out_rows_ptr + row), tl.load(in_rows_ptr + col))
    total = multiply_tile(
        dy_ptr, x_ptr, dy_stride, x_stride, row, col, m, k, depth,
        False, False, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        a_limits_ptr=out_rows_ptr, b_limits_ptr=in_rows_ptr,
    )  # fmt: skip
    HALVES: tl.constexpr = dy_ptr.dtype.element_ty.primitive_bitwidth < 32
    store_sums(total, out_ptr, out_stride, row, col, m, k, ACCUMULATE, HALVES)


def _max_registers(x: Tensor, aligned: bool) -> int | None:
    """A bound for the compiler, which else stops at 128 registers and spills 8 bytes."""
    return 168 if x.dtype == torch.float32 and aligned else None


def ragged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    runs: Runs,
    activation: str,
    save: bool,
    *,
    config: GemmConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``activation(x[r, :k_r] @ weight[:m_r, :k_r].T + bias[:m_r])`` for each row r.

    Args:
        x: (N, >= k), unit inner stride; what it holds past k_r does not matter.
        weight: (M, K) parent, M >= m and K >= k, unit inner stride.
        bias: (M,) parent or None.
        runs: ``(rows, out_features, in_features)`` triples, sorted largest first; N rows in all.
        activation: ``none``, ``relu``, ``gelu`` or ``silu``; fused.
        save: Also return the pre-activation of gelu and silu.
        config: Tiling, instead of the one chosen for the shape.

    Returns:
        y (N, m), zero past m_r, and the pre-activation (N, m), likewise, or an empty tensor.
    """
    sizes = row_sizes(runs, x.device)
    output = (sizes.n_rows, sizes.out_features)
    y = x.new_empty(output)
    keeps_input = save and activation in ("gelu", "silu")
    z = torch.empty_like(y) if keeps_input else None
    splits = 1 if config is not None else choose_splits(*output, sizes.in_features, x)
    if splits > 1:
        split_product(
            x, weight, y, splits, reduction=sizes.in_features, bias=bias, z=z,
            activation=activation, limits=sizes.row_in, widths=sizes.row_out,
            aligned=sizes.aligned,
        )  # fmt: skip
        return y, x.new_empty(0) if z is None else z
    args = (
        x, weight, bias, y, z, sizes.row_out, sizes.row_in, *output, sizes.in_features,
        x.stride(0), weight.stride(0),
    )  # fmt: skip
    launch_gemm(
        _ragged_linear_kernel, args, output, sizes.in_features, x, config, sizes.aligned,
        ACTIVATION=activation, maxnreg=_max_registers(x, sizes.aligned),
    )  # fmt: skip
    return y, x.new_empty(0) if z is None else z


def ragged_dgrad(
    dy: Tensor, weight: Tensor, runs: Runs, *, config: GemmConfig | None = None
) -> Tensor:
    """``dy[r, :m_r] @ weight[:m_r, :k_r]`` for each row r: dy (N, >= m) -> (N, k), zero past k_r.

    What dy holds past m_r does not matter. Arguments are those of :func:`ragged_linear`.
    """
    sizes = row_sizes(runs, dy.device)
    dx = dy.new_empty((sizes.n_rows, sizes.in_features))
    splits = (
        1
        if config is not None
        else choose_splits(sizes.n_rows, sizes.in_features, sizes.out_features, dy)
    )
    if splits > 1:
        split_product(
            dy, weight, dx, splits, reduction=sizes.out_features, transposed=False,
            limits=sizes.row_out, widths=sizes.row_in, aligned=sizes.aligned,
        )  # fmt: skip
        return dx
    args = (
        dy, weight, dx, sizes.row_out, sizes.row_in,
        sizes.n_rows, sizes.out_features, sizes.in_features, dy.stride(0), weight.stride(0),
    )  # fmt: skip
    launch_gemm(
        _ragged_linear_dgrad_kernel, args, (sizes.n_rows, sizes.in_features), sizes.out_features,
        dy, config, sizes.aligned,
    )  # fmt: skip
    return dx


def ragged_wgrad_into(
    dy: Tensor,
    x: Tensor,
    runs: Runs,
    out: Tensor,
    accumulate: bool,
    *,
    config: GemmConfig | None = None,
) -> None:
    """``out[:m_r, :k_r] += dy[r, :m_r].T @ x[r, :k_r]`` over all rows r.

    Args:
        dy: (N, >= m), unit inner stride; what it holds past m_r does not matter.
        x: (N, >= k), unit inner stride; what it holds past k_r does not matter.
        runs: ``(rows, out_features, in_features)`` triples, sorted largest first; N rows in all.
        out: (>= m, >= k), unit inner stride; nothing past (m, k), the largest row's, is touched.
        accumulate: Whether to add to what ``out[:m, :k]`` holds, or to overwrite it.
        config: Tiling, instead of the one chosen for the shape.
    """
    sizes = row_sizes(runs, dy.device)

    def args(out: Tensor) -> tuple:
        return (
            dy, x, out, sizes.out_rows, sizes.in_rows,
            sizes.n_rows, sizes.out_features, sizes.in_features,
            dy.stride(0), x.stride(0), out.stride(0),
        )  # fmt: skip

    launch_gemm(
        _ragged_linear_wgrad_kernel, args(out), (sizes.out_features, sizes.in_features),
        sizes.n_rows, dy, config, sizes.aligned,
        rehearsal=lambda: args(like_strided(out)), ACCUMULATE=accumulate,
    )  # fmt: skip


def ragged_bias_grad_into(dy: Tensor, runs: Runs, out: Tensor, accumulate: bool) -> None:
    """``out[:m_r] += dy[r, :m_r]`` over all rows r: dy (N, >= m), out (>= m,), to m and no further.

    Arguments are those of :func:`ragged_wgrad_into`.
    """
    sizes = row_sizes(runs, dy.device)
    m = sizes.out_features
    column_sum_into(dy[:, :m], out[:m], accumulate, sizes.out_rows)
