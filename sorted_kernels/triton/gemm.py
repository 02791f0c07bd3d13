"""Device functions of the matrix kernels: tile order, main loop, output tile.

Every product here is ``C[i, j] = sum over r of A(i, r) B(j, r)``, and each operand is one of two
kinds. *Reduction inner*: r is the dense axis in memory (x and W in the forward pass). *Outer inner*:
i or j is (W in dgrad; dy and x in wgrad). Nothing outside the operands' extents is ever read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sorted_kernels.triton.device import multiply_add


@triton.jit
def tile_origin(rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of this program's tile.

    Programs that run at the same time cover GROUP_M row tiles by few column tiles, so that both
    operands are found in L2 (as in Triton's matrix multiplication tutorial).
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(cols, BLOCK_N)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return (first_m + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _operand(
    ptr,
    stride,
    start,
    extent,
    REDUCTION_INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Pointers (BLOCK, BLOCK_K) of the first step, and the distance to the next step."""
    outer = start + tl.arange(0, BLOCK)
    reduction = tl.arange(0, BLOCK_K)
    wide_stride = tl.cast(stride, tl.int64)
    if REDUCTION_INNER:
        # Rows past the end repeat the last one; their results are not stored. No mask is needed.
        outer = tl.minimum(outer, extent - 1)
        ptrs = ptr + (outer[:, None] * wide_stride + reduction[None, :])
        step = tl.full((), BLOCK_K, tl.int64)
    else:
        ptrs = ptr + (reduction[None, :] * wide_stride + outer[:, None])
        step = wide_stride * BLOCK_K
    return ptrs, step


@triton.jit
def _load(ptrs, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ptrs, mask=mask, other=0.0)
    return tl.load(ptrs)


@triton.jit
def _accumulate(
    acc,
    a_ptrs,
    b_ptrs,
    a_step,
    b_step,
    a_mask,
    b_mask,
    reduction,
    MASK_A: tl.constexpr,
    MASK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The main loop: whole steps without a mask on the reduction axis, then what is left."""
    steps = reduction // BLOCK_K
    for _ in range(steps):
        a = _load(a_ptrs, a_mask, MASK_A)
        b = _load(b_ptrs, b_mask, MASK_B)
        acc = multiply_add(acc, a, b, PRECISION)
        a_ptrs += a_step
        b_ptrs += b_step
    left = reduction - steps * BLOCK_K
    if left > 0:
        rest = (tl.arange(0, BLOCK_K) < left)[None, :]
        a = tl.load(a_ptrs, mask=a_mask & rest, other=0.0)
        b = tl.load(b_ptrs, mask=b_mask & rest, other=0.0)
        acc = multiply_add(acc, a, b, PRECISION)
    return acc


@triton.jit
def multiply_tile(
    a_ptr,
    b_ptr,
    a_stride,
    b_stride,
    row_start,
    col_start,
    rows,
    cols,
    reduction,
    A_REDUCTION_INNER: tl.constexpr,
    B_REDUCTION_INNER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tile (BLOCK_M, BLOCK_N) of the product, in float32.

    Args:
        a_ptr: A, with a row stride ``a_stride`` along its axis that is not dense.
        b_ptr: B, likewise.
        a_stride: See ``a_ptr``.
        b_stride: See ``b_ptr``.
        row_start: First row of the tile.
        col_start: First column of the tile.
        rows: Extent of i.
        cols: Extent of j.
        reduction: Extent of r.
        A_REDUCTION_INNER: Whether r is A's dense axis.
        B_REDUCTION_INNER: Whether r is B's dense axis.
        ALIGNED: All sizes along dense axes are multiples of 16 (and marked so).
        BLOCK_M: Rows of the tile.
        BLOCK_N: Columns of the tile.
        BLOCK_K: Reduction steps a load.
        PRECISION: ``input_precision`` of the product.
    """
    a_ptrs, a_step = _operand(a_ptr, a_stride, row_start, rows, A_REDUCTION_INNER, BLOCK_M, BLOCK_K)
    b_ptrs, b_step = _operand(b_ptr, b_stride, col_start, cols, B_REDUCTION_INNER, BLOCK_N, BLOCK_K)
    if A_REDUCTION_INNER:
        a_mask = tl.full((BLOCK_M, 1), True, tl.int1)
    else:
        a_mask = (row_start + tl.arange(0, BLOCK_M) < rows)[:, None]
    if B_REDUCTION_INNER:
        b_mask = tl.full((BLOCK_N, 1), True, tl.int1)
    else:
        b_mask = (col_start + tl.arange(0, BLOCK_N) < cols)[:, None]
    MASK_A: tl.constexpr = not A_REDUCTION_INNER
    MASK_B: tl.constexpr = not B_REDUCTION_INNER

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ALIGNED or not (MASK_A or MASK_B):
        acc = _accumulate(
            acc, a_ptrs, b_ptrs, a_step, b_step, a_mask, b_mask, reduction,
            MASK_A, MASK_B, BLOCK_K, PRECISION,
        )  # fmt: skip
    # An odd extent along a dense axis makes masked loads one element wide and keeps them out of
    # the asynchronous pipeline, so tiles that lie inside run a loop without masks.
    elif (row_start + BLOCK_M <= rows) & (col_start + BLOCK_N <= cols):
        acc = _accumulate(
            acc, a_ptrs, b_ptrs, a_step, b_step, a_mask, b_mask, reduction,
            False, False, BLOCK_K, PRECISION,
        )  # fmt: skip
    else:
        acc = _accumulate(
            acc, a_ptrs, b_ptrs, a_step, b_step, a_mask, b_mask, reduction,
            MASK_A, MASK_B, BLOCK_K, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def output_tile(
    stride, row_start, col_start, rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Offsets and mask (BLOCK_M, BLOCK_N) of a tile of an output with a row stride."""
    i = row_start + tl.arange(0, BLOCK_M)
    j = col_start + tl.arange(0, BLOCK_N)
    offsets = i[:, None] * tl.cast(stride, tl.int64) + j[None, :]
    return offsets, (i < rows)[:, None] & (j < cols)[None, :]
