"""Device functions of the attention kernels: which head a program has, rows, scores."""

from __future__ import annotations

import triton
import triton.language as tl

from sorted_kernels.triton.device import multiply_add

_LOG2E = tl.constexpr(1.4426950408889634)
_SAMPLES = tl.constexpr(128)


@triton.jit
def active_head(counts_ptr, index, batch, kv_heads, group):
    """Sample and KV head that stand at ``index`` in the list of all samples' active KV heads.

    The list is not in memory. Each program finds its own place in it from the samples' numbers of
    heads, which so stay on the device. Past the list's end the sample is ``batch``.
    """
    if counts_ptr is None:
        sample = index // kv_heads
        head = index % kv_heads
    else:
        sample = 0
        total = 0
        before = 0
        for first in range(0, batch, _SAMPLES):
            at = first + tl.arange(0, _SAMPLES)
            counts = tl.load(counts_ptr + at, mask=at < batch, other=0).to(tl.int32)
            counts = tl.minimum(tl.maximum(counts // group, 0), kv_heads)
            ends = total + tl.cumsum(counts, 0)
            passed = (ends <= index) & (at < batch)
            sample += tl.sum(passed.to(tl.int32), 0)
            before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
            total += tl.sum(counts, 0)
        head = index - before
    return sample, head


@triton.jit
def head_tile(
    counts_ptr, batch, kv_heads, group, rows, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr
):
    """Sample, query head and first row of this program's tile: a head's tiles are neighbours.

    Under a causal rule the last rows have the most to do, so they begin first.
    """
    tiles = tl.cdiv(rows, BLOCK)
    index = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    sample, kv_head = active_head(counts_ptr, index // group, batch, kv_heads, group)
    return sample, kv_head * group + index % group, tile * BLOCK


@triton.jit
def head_start(ptr, sample, head, sample_stride, head_stride):
    """Where a head's rows begin."""
    return ptr + (tl.cast(sample, tl.int64) * sample_stride + tl.cast(head, tl.int64) * head_stride)


@triton.jit
def row_pointers(
    ptr, first, stride, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Pointers of BLOCK rows of a head, and which columns there are (None: all)."""
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    pointers = ptr + tl.cast(first, tl.int64) * stride + (rows * stride + cols)
    return pointers, rows, cols


@triton.jit
def load_rows(
    ptr,
    first,
    n_rows,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Rows of a head (BLOCK, BLOCK_D), zero past ``n_rows`` and past its features."""
    pointers, rows, cols = row_pointers(ptr, first, stride, HEAD_DIM, BLOCK, BLOCK_D)
    if HEAD_DIM < BLOCK_D:
        inside = cols < HEAD_DIM
        if BOUNDED:
            inside = inside & (first + rows < n_rows)
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif BOUNDED:
        tile = tl.load(pointers, mask=first + rows < n_rows, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(
    ptr,
    tile,
    first,
    n_rows,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write rows of a head."""
    pointers, rows, cols = row_pointers(ptr, first, stride, HEAD_DIM, BLOCK, BLOCK_D)
    tl.store(pointers, tile, mask=(first + rows < n_rows) & (cols < HEAD_DIM))


@triton.jit
def scores(
    a,
    b,
    mask_ptr,
    row,
    col,
    i,
    j,
    n_queries,
    n_keys,
    mask_row,
    mask_col,
    scale,
    MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``scale * a @ b.T + mask`` in units of log 2, -inf where nothing is attended to.

    Args:
        a: Queries, or keys.
        b: Keys, or queries.
        mask_ptr: The head's mask; uint8 is boolean. None: no mask.
        row: First query.
        col: First key.
        i: The queries counted from there, as a column (or, if ``b`` has them, as a row).
        j: The keys counted from there, likewise.
        n_queries: S.
        n_keys: T.
        mask_row: Stride of the mask's rows.
        mask_col: Stride of its columns.
        scale: Of the scores.
        MASK_ROWS: Whether the mask has more rows than one.
        CAUSAL: Whether keys after the query do not count.
        BOUNDED: Whether the tile may reach past the last key.
        PRECISION: Of float32 products.
    """
    zero = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    s = multiply_add(zero, a, tl.trans(b), PRECISION) * (scale * _LOG2E)
    if mask_ptr is not None:
        pointers = mask_ptr + tl.cast(col, tl.int64) * mask_col + j * mask_col
        inside = j < n_keys - col
        if MASK_ROWS:
            pointers = pointers + tl.cast(row, tl.int64) * mask_row + i * mask_row
            inside = inside & (i < n_queries - row)
        if mask_ptr.dtype.element_ty == tl.uint8:
            s = tl.where(tl.load(pointers, mask=inside, other=0) != 0, s, -float("inf"))
        else:
            s += tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * _LOG2E
    if BOUNDED:
        s = tl.where(j < n_keys - col, s, -float("inf"))
    if CAUSAL:
        s = tl.where(j - i <= row - col, s, -float("inf"))
    return s


@triton.jit
def key_range(row, n_keys, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the keys end that all queries of a tile see (whole tiles), and that any sees."""
    if CAUSAL:
        whole = tl.minimum(row + 1, n_keys) // BLOCK_N * BLOCK_N
        last = tl.minimum(row + BLOCK_M, n_keys)
    else:
        whole = n_keys // BLOCK_N * BLOCK_N
        last = n_keys
    return whole, last
