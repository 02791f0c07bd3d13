"""Linear over the leading ``[:m, :k]`` block of a weight. Shapes: N rows, m out, k in features.

Twin of :mod:`sorted_kernels.reference.linear`, where arguments and results are described. Kernels
read the parent weight in place through its row stride. Sizes are runtime arguments: a kernel is
compiled once for a dtype, a tiling, the alignment of the tensors' addresses and row strides (Triton
also sets a row stride of 1 apart), and whether m and k are multiples of 16. Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sorted_kernels.reference.linear import activate, activation_backward
from sorted_kernels.triton.column_sum import column_sum_into
from sorted_kernels.triton.decode import choose_splits, split_product
from sorted_kernels.triton.device import known_multiple, narrow
from sorted_kernels.triton.epilogue import store_activated, store_sums
from sorted_kernels.triton.gemm import multiply_tile, output_tile, tile_origin
from sorted_kernels.triton.gemm_config import GemmConfig
from sorted_kernels.triton.gemm_launch import launch_gemm, like_strided
from sorted_kernels.triton.launch import as_rows, is_aligned
from sorted_kernels.triton.ragged_linear import (
    ragged_bias_grad_into,
    ragged_dgrad,
    ragged_linear,
    ragged_wgrad_into,
)

__all__ = [
    "activate",
    "activation_backward",
    "bias_grad_into",
    "linear",
    "linear_dgrad",
    "linear_wgrad_into",
    "ragged_bias_grad_into",
    "ragged_dgrad",
    "ragged_linear",
    "ragged_wgrad_into",
]

_SIZES = ["n_rows", "out_features", "in_features"]


@triton.jit(do_not_specialize=_SIZES)
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
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
    """Dense y (N, m) = activation(x @ W.T + bias); z, if given, is what the activation saw."""
    m = known_multiple(out_features, ALIGNED)
    k = known_multiple(in_features, ALIGNED)
    row, col = tile_origin(n_rows, m, BLOCK_M, BLOCK_N, GROUP_M)
    z = multiply_tile(
        x_ptr, weight_ptr, x_stride, weight_stride, row, col, n_rows, m, k,
        True, True, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    store_activated(z, bias_ptr, y_ptr, z_ptr, None, row, col, n_rows, m, ACTIVATION)


@triton.jit(do_not_specialize=_SIZES)
def _linear_dgrad_kernel(
    dy_ptr,
    weight_ptr,
    dx_ptr,
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
    """Dense dx (N, k) = dy @ W."""
    m = known_multiple(out_features, ALIGNED)
    k = known_multiple(in_features, ALIGNED)
    row, col = tile_origin(n_rows, k, BLOCK_M, BLOCK_N, GROUP_M)
    dx = multiply_tile(
        dy_ptr, weight_ptr, dy_stride, weight_stride, row, col, n_rows, k, m,
        True, False, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    offsets, mask = output_tile(k, row, col, n_rows, k, BLOCK_M, BLOCK_N)
    tl.store(dx_ptr + offsets, narrow(dx, dx_ptr), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _linear_wgrad_kernel(
    dy_ptr,
    x_ptr,
    out_ptr,
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
    """Write the view out (m, k) (+)= dy.T @ x. One program writes a tile: no atomics."""
    m = known_multiple(out_features, ALIGNED)
    k = known_multiple(in_features, ALIGNED)
    row, col = tile_origin(m, k, BLOCK_M, BLOCK_N, GROUP_M)
    total = multiply_tile(
        dy_ptr, x_ptr, dy_stride, x_stride, row, col, m, k, n_rows,
        False, False, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    HALVES: tl.constexpr = dy_ptr.dtype.element_ty.primitive_bitwidth < 32
    store_sums(total, out_ptr, out_stride, row, col, m, k, ACCUMULATE, HALVES)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    save: bool,
    *,
    config: GemmConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``activation(x @ weight[:m, :k].T + bias[:m])``; see the reference.

    Args:
        x: (..., k).
        weight: (M, K) parent, M >= m and K >= k, unit inner stride.
        bias: (M,) parent or None.
        out_features: m.
        activation: ``none``, ``relu``, ``gelu`` or ``silu``; fused.
        save: Also return the pre-activation of gelu and silu.
        config: Tiling, instead of the one chosen for the shape.

    Returns:
        y (..., m), and the pre-activation (..., m) or an empty tensor.
    """
    rows, in_features = as_rows(x), x.shape[-1]
    y = x.new_empty((*x.shape[:-1], out_features))
    keeps_input = save and activation in ("gelu", "silu")
    z = torch.empty_like(y) if keeps_input else None
    args = (
        rows, weight, bias, y, z, rows.shape[0], out_features, in_features,
        rows.stride(0), weight.stride(0),
    )  # fmt: skip
    splits = 1 if config is not None else choose_splits(rows.shape[0], out_features, in_features, x)
    if splits > 1:
        flat = y.view(-1, out_features)
        split_product(rows, weight, flat, splits, bias=bias, z=z, activation=activation)
    else:
        launch_gemm(
            _linear_kernel, args, (rows.shape[0], out_features), in_features, x, config,
            is_aligned(out_features, in_features), ACTIVATION=activation,
        )  # fmt: skip
    return y, x.new_empty(0) if z is None else z


def linear_dgrad(
    dy: Tensor, weight: Tensor, in_features: int, *, config: GemmConfig | None = None
) -> Tensor:
    """``dy @ weight[:m, :k]``: dy (..., m), weight (M, K) -> (..., k)."""
    rows, out_features = as_rows(dy), dy.shape[-1]
    dx = dy.new_empty((*dy.shape[:-1], in_features))
    splits = 1 if config is not None else choose_splits(len(rows), in_features, out_features, dy)
    if splits > 1:
        split_product(rows, weight, dx.view(-1, in_features), splits, transposed=False)
        return dx
    args = (
        rows, weight, dx, rows.shape[0], out_features, in_features,
        rows.stride(0), weight.stride(0),
    )  # fmt: skip
    launch_gemm(
        _linear_dgrad_kernel, args, (rows.shape[0], in_features), out_features, dy, config,
        is_aligned(out_features, in_features),
    )  # fmt: skip
    return dx


def linear_wgrad_into(
    dy: Tensor, x: Tensor, out: Tensor, accumulate: bool, *, config: GemmConfig | None = None
) -> None:
    """``out (+)= dy.T @ x``: dy (N, m), x (N, k), out (m, k), a view with unit inner stride."""
    dy, x = as_rows(dy), as_rows(x)
    out_features, in_features = out.shape

    def args(out: Tensor) -> tuple:
        return (
            dy, x, out, dy.shape[0], out_features, in_features,
            dy.stride(0), x.stride(0), out.stride(0),
        )  # fmt: skip

    launch_gemm(
        _linear_wgrad_kernel, args(out), (out_features, in_features), dy.shape[0], dy, config,
        is_aligned(out_features, in_features), rehearsal=lambda: args(like_strided(out)),
        ACCUMULATE=accumulate,
    )  # fmt: skip


def bias_grad_into(dy: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out (+)= dy.sum(0)``: dy (N, m), out (m,)."""
    column_sum_into(as_rows(dy), out, accumulate)
