"""Device functions of the epilogue: bias, activation, and what a ragged row does not have."""

from __future__ import annotations

import triton
import triton.language as tl

from sorted_kernels.triton.device import narrow
from sorted_kernels.triton.gemm import output_tile


@triton.jit
def _activation(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        # Not tl.maximum, which would turn NaN into 0; torch keeps it.
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def store_both(z, y_ptr, z_ptr, offsets, mask, ACTIVATION: tl.constexpr):
    """Store a tile z at ``z_ptr``, if given, and what the activation makes of it at ``y_ptr``."""
    if z_ptr is not None:
        tl.store(z_ptr + offsets, narrow(z, z_ptr), mask=mask)
    tl.store(y_ptr + offsets, narrow(_activation(z, ACTIVATION), y_ptr), mask=mask)


@triton.jit
def halves(z):
    """The left and the right half of a tile.

    An epilogue of half a tile at a time takes fewer registers: erf and a second output would not
    fit beside a whole one.
    """
    half: tl.constexpr = z.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, half)), (0, 2, 1)))


@triton.jit
def _store_activated(
    z, bias_ptr, y_ptr, z_ptr, widths_ptr, row, col, n_rows, m, ACTIVATION: tl.constexpr
):
    """The epilogue of a tile z, whose first element is at (row, col) of the output (N, m).

    With ``widths_ptr`` each row has its own width, past which it is zero.
    """
    j = col + tl.arange(0, z.shape[1])
    if bias_ptr is not None:
        z += tl.load(bias_ptr + j, mask=j < m, other=0.0).to(tl.float32)[None, :]
    if widths_ptr is not None:
        i = row + tl.arange(0, z.shape[0])
        widths = tl.load(widths_ptr + i, mask=i < n_rows, other=0)
        z = tl.where(j[None, :] < widths[:, None], z, 0.0)  # all activations keep 0
    offsets, mask = output_tile(m, row, col, n_rows, m, z.shape[0], z.shape[1])
    store_both(z, y_ptr, z_ptr, offsets, mask, ACTIVATION)


@triton.jit
def store_activated(
    z, bias_ptr, y_ptr, z_ptr, widths_ptr, row, col, n_rows, m, ACTIVATION: tl.constexpr
):
    """Store a whole tile z; see :func:`_store_activated`."""
    left, right = halves(z)
    _store_activated(left, bias_ptr, y_ptr, z_ptr, widths_ptr, row, col, n_rows, m, ACTIVATION)
    col += left.shape[1]
    _store_activated(right, bias_ptr, y_ptr, z_ptr, widths_ptr, row, col, n_rows, m, ACTIVATION)


@triton.jit
def _store_sums(z, out_ptr, stride, row, col, rows, cols, ACCUMULATE: tl.constexpr):
    offsets, mask = output_tile(stride, row, col, rows, cols, z.shape[0], z.shape[1])
    if ACCUMULATE:
        z += tl.load(out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, narrow(z, out_ptr), mask=mask)


@triton.jit
def store_sums(
    z, out_ptr, stride, row, col, rows, cols, ACCUMULATE: tl.constexpr, HALVES: tl.constexpr
):
    """Write a tile z of a gradient (rows, cols) with a row stride, or add it to what is there.

    With HALVES, half a tile at a time: of the large tiles of half-precision operands, a whole one
    of a float32 gradient would not fit beside its sums.
    """
    if HALVES:
        left, right = halves(z)
        _store_sums(left, out_ptr, stride, row, col, rows, cols, ACCUMULATE)
        _store_sums(right, out_ptr, stride, row, col + left.shape[1], rows, cols, ACCUMULATE)
    else:
        _store_sums(z, out_ptr, stride, row, col, rows, cols, ACCUMULATE)
