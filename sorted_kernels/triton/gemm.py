"""Device functions of the matrix kernels: tile order, main loop, output tile.

Every product here is ``C[i, j] = sum over r of A(i, r) B(j, r)``. An operand is *inner* when r is
its dense axis in memory (x and W in the forward pass, dy in dgrad), else its other axis is dense (W
in dgrad, dy and x in wgrad). Nothing outside the operands' extents is ever read.
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
    first,
    OUTER_AXIS: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Pointers and mask of an operand's tile at reduction index ``first``, and how far a step goes.

    The outer index (i or j) runs along OUTER_AXIS of the tile: 0 for A, 1 for B.
    """
    outer = tl.expand_dims(start + tl.arange(0, BLOCK), 1 - OUTER_AXIS)
    reduction = tl.expand_dims(first + tl.arange(0, STEP), OUTER_AXIS)
    wide_stride = tl.cast(stride, tl.int64)
    mask = outer < extent
    if INNER:
        # Rows past the end repeat the last one; their results are not stored. No mask is needed.
        ptrs = ptr + (tl.minimum(outer, extent - 1) * wide_stride + reduction)
        step = tl.full((), STEP, tl.int64)
    else:
        ptrs = ptr + (reduction * wide_stride + outer)
        step = wide_stride * STEP
    return ptrs, mask, step


@triton.jit
def _limits(
    ptr,
    start,
    extent,
    OUTER_AXIS: tl.constexpr,
    INNER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many reduction indices each outer index of a tile has, along the tile's outer axis.

    If sizes are multiples of 16, say so where the compiler looks, so that masks split no vector: an
    inner operand's limits are features, else the outer index is one and its limits come in groups.
    """
    outer = start + tl.arange(0, BLOCK)
    if ALIGNED and not INNER:
        outer = outer // 16 * 16
    limits = tl.load(ptr + outer, mask=outer < extent, other=0)
    if ALIGNED and INNER:
        limits = limits // 16 * 16
    return tl.expand_dims(limits, 1 - OUTER_AXIS)


@triton.jit
def _load(
    ptrs,
    outer_mask,
    places,
    last,
    limits,
    MASK_OUTER: tl.constexpr,
    MASK_REDUCTION: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """An operand's tile at the reduction indices ``places``; zero where it has no element."""
    LIMITED: tl.constexpr = limits is not None
    NARROW: tl.constexpr = ptrs.dtype.element_ty.primitive_bitwidth < 32
    DROP: tl.constexpr = LIMITED and NARROW and not (ALIGNED or MASK_REDUCTION)
    mask = places < last if MASK_REDUCTION else None
    if MASK_OUTER:
        mask = outer_mask if mask is None else mask & outer_mask
    if LIMITED and not DROP:
        mask = places < limits if mask is None else mask & (places < limits)
    tile = tl.load(ptrs) if mask is None else tl.load(ptrs, mask=mask, other=0.0)
    if DROP:
        # Odd limits in the mask would make the loads one element wide, and less than 4 bytes are
        # not loaded asynchronously. What lies past the limits is the tensor's own memory: load it,
        # and put zero in its place.
        tile = tl.where(places < limits, tile, 0.0)
    return tile


@triton.jit
def _accumulate(
    acc,
    a_ptr,
    b_ptr,
    a_stride,
    b_stride,
    a_limits_ptr,
    b_limits_ptr,
    row,
    col,
    rows,
    cols,
    first,
    last,
    A_INNER: tl.constexpr,
    B_INNER: tl.constexpr,
    MASK_A: tl.constexpr,
    MASK_B: tl.constexpr,
    MASK_REDUCTION: tl.constexpr,
    ALIGNED: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The loop over reduction indices from ``first`` to ``last``, STEP at a time."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    a_ptrs, a_mask, a_step = _operand(a_ptr, a_stride, row, rows, first, 0, A_INNER, BLOCK_M, STEP)
    b_ptrs, b_mask, b_step = _operand(b_ptr, b_stride, col, cols, first, 1, B_INNER, BLOCK_N, STEP)
    # Loaded here and not once for all loops: most have none, and need the registers.
    a_limits = None
    b_limits = None
    if a_limits_ptr is not None:
        a_limits = _limits(a_limits_ptr, row, rows, 0, A_INNER, ALIGNED, BLOCK_M)
    if b_limits_ptr is not None:
        b_limits = _limits(b_limits_ptr, col, cols, 1, B_INNER, ALIGNED, BLOCK_N)
    for r in tl.range(first, last, STEP, num_stages=STAGES):
        places = r + tl.arange(0, STEP)
        a = _load(
            a_ptrs, a_mask, places[None, :], last, a_limits, MASK_A, MASK_REDUCTION, ALIGNED
        )  # fmt: skip
        b = _load(
            b_ptrs, b_mask, places[:, None], last, b_limits, MASK_B, MASK_REDUCTION, ALIGNED
        )  # fmt: skip
        acc = multiply_add(acc, a, b, PRECISION)
        a_ptrs += a_step
        b_ptrs += b_step
    return acc


@triton.jit
def _accumulate_steps(
    acc,
    a_ptr,
    b_ptr,
    a_stride,
    b_stride,
    a_limits_ptr,
    b_limits_ptr,
    row,
    col,
    rows,
    cols,
    first,
    last,
    A_INNER: tl.constexpr,
    B_INNER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The part of the loop that is whole steps of BLOCK_K."""
    MASK_A: tl.constexpr = not A_INNER
    MASK_B: tl.constexpr = not B_INNER
    if ALIGNED or not (MASK_A or MASK_B):
        acc = _accumulate(
            acc, a_ptr, b_ptr, a_stride, b_stride, a_limits_ptr, b_limits_ptr, row, col, rows, cols,
            first, last, A_INNER, B_INNER, MASK_A, MASK_B, False, ALIGNED, BLOCK_K, None, PRECISION,
        )  # fmt: skip
    # An odd extent along a dense axis makes masked loads one element wide and keeps them out of
    # the asynchronous pipeline, so tiles that lie inside run a loop without masks.
    elif (row + acc.shape[0] <= rows) & (col + acc.shape[1] <= cols):
        acc = _accumulate(
            acc, a_ptr, b_ptr, a_stride, b_stride, a_limits_ptr, b_limits_ptr, row, col, rows, cols,
            first, last, A_INNER, B_INNER, False, False, False, ALIGNED, BLOCK_K, None, PRECISION,
        )  # fmt: skip
    else:
        acc = _accumulate(
            acc, a_ptr, b_ptr, a_stride, b_stride, a_limits_ptr, b_limits_ptr, row, col, rows, cols,
            first, last, A_INNER, B_INNER, MASK_A, MASK_B, False, ALIGNED, BLOCK_K, None, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def multiply_tile(
    a_ptr,
    b_ptr,
    a_stride,
    b_stride,
    row,
    col,
    rows,
    cols,
    reduction,
    A_INNER: tl.constexpr,
    B_INNER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    a_limits_ptr=None,
    b_limits_ptr=None,
    first=None,
):
    """Tile (BLOCK_M, BLOCK_N) of the product, in float32.

    Args:
        a_ptr: A; ``a_stride`` is the stride of its axis that is not dense.
        b_ptr: B, likewise with ``b_stride``.
        a_stride: See ``a_ptr``.
        b_stride: See ``b_ptr``.
        row: First row of the tile.
        col: First column of the tile.
        rows: Extent of i.
        cols: Extent of j.
        reduction: Extent of r in this tile: what its first row and column have of it.
        A_INNER: Whether r is A's dense axis.
        B_INNER: Whether r is B's dense axis.
        ALIGNED: All extents along dense axes are multiples of 16, and the compiler knows.
        BLOCK_M: Rows of the tile.
        BLOCK_N: Columns of the tile.
        BLOCK_K: Reduction indices loaded at once.
        PRECISION: ``input_precision`` of the product.
        a_limits_ptr: (rows,) int32, the extent of r for each i, never rising; what A holds past it
            counts as zero. None if A is whole.
        b_limits_ptr: (cols,) int32, the same for each j and B.
        first: Where the reduction begins, a multiple of BLOCK_K; None is 0.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = 0 if first is None else first
    whole = reduction // BLOCK_K * BLOCK_K
    shared = reduction
    if a_limits_ptr is not None:
        last_row = tl.minimum(row + BLOCK_M, rows) - 1
        shared = tl.minimum(shared, tl.load(a_limits_ptr + last_row))
    if b_limits_ptr is not None:
        last_col = tl.minimum(col + BLOCK_N, cols) - 1
        shared = tl.minimum(shared, tl.load(b_limits_ptr + last_col))
    # What the whole tile has takes no limits: for most tiles of a ragged batch that is all.
    shared = shared // BLOCK_K * BLOCK_K
    if first is not None:
        whole = tl.maximum(whole, first)
        shared = tl.maximum(shared, first)
    acc = _accumulate_steps(
        acc, a_ptr, b_ptr, a_stride, b_stride, None, None, row, col, rows, cols,
        begin, shared, A_INNER, B_INNER, ALIGNED, BLOCK_K, PRECISION,
    )  # fmt: skip
    LIMITED: tl.constexpr = a_limits_ptr is not None or b_limits_ptr is not None
    SHORT: tl.constexpr = LIMITED and BLOCK_K == 16
    if SHORT:
        whole = shared  # the last loop has steps as long as these
    elif LIMITED:
        acc = _accumulate_steps(
            acc, a_ptr, b_ptr, a_stride, b_stride, a_limits_ptr, b_limits_ptr, row, col, rows, cols,
            shared, whole, A_INNER, B_INNER, ALIGNED, BLOCK_K, PRECISION,
        )  # fmt: skip
    # What is left is less than BLOCK_K. Short steps: their loads may be one element wide, and a
    # thread would need many registers for the addresses of a long one.
    return _accumulate(
        acc, a_ptr, b_ptr, a_stride, b_stride, a_limits_ptr, b_limits_ptr, row, col, rows, cols,
        whole, reduction, A_INNER, B_INNER, not A_INNER, not B_INNER, True, ALIGNED,
        16, None if SHORT else 1, PRECISION,
    )  # fmt: skip


@triton.jit
def output_tile(
    stride, row_start, col_start, rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Offsets and mask (BLOCK_M, BLOCK_N) of a tile of an output with a row stride."""
    i = row_start + tl.arange(0, BLOCK_M)
    j = col_start + tl.arange(0, BLOCK_N)
    offsets = i[:, None] * tl.cast(stride, tl.int64) + j[None, :]
    return offsets, (i < rows)[:, None] & (j < cols)[None, :]
