"""Embedding that reads the leading features of its rows. Shapes: n indices, V rows, k features.

Twin of :mod:`sorted_kernels.reference.embedding`, where arguments and results are described.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sorted_kernels.triton.device import known_multiple, narrow, within_widths
from sorted_kernels.triton.launch import as_rows, is_aligned, launch
from sorted_kernels.triton.row_sizes import Runs, row_sizes

_BLOCK_ROWS, _MAX_BLOCK_COLS = 16, 256


@triton.jit(do_not_specialize=["n_indices", "vocabulary", "features"])
def _embedding_kernel(
    indices_ptr,
    weight_ptr,
    y_ptr,
    widths_ptr,
    n_indices,
    vocabulary,
    features,
    weight_stride,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Gather ``y = weight[indices, :k]``; y (n, k) is dense, and zero past a place's width."""
    features = known_multiple(features, ALIGNED)
    places = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    active = places < n_indices
    index = tl.load(indices_ptr + places, mask=active, other=0).to(tl.int64)
    mask = active[:, None] & (cols < features)[None, :]
    # An index outside the table reads no memory and shows as NaN; a check would cost a sync.
    known = ((index >= 0) & (index < vocabulary))[:, None]
    row_ptrs = weight_ptr + (index[:, None] * weight_stride + cols[None, :])
    _, wanted = within_widths(widths_ptr, places, n_indices, cols, features, mask, ALIGNED)
    values = tl.load(row_ptrs, mask=wanted & known, other=float("nan"))
    if widths_ptr is not None:
        values = tl.where(wanted, values, 0.0)
    y_offsets = places.to(tl.int64)[:, None] * features + cols[None, :]
    tl.store(y_ptr + y_offsets, values, mask=mask)


@triton.jit(do_not_specialize=["vocabulary", "features", "padding_idx"])
def _embedding_backward_kernel(
    dy_ptr,
    sorted_ptr,
    order_ptr,
    run_end_ptr,
    out_ptr,
    widths_ptr,
    vocabulary,
    features,
    padding_idx,
    dy_stride,
    out_stride,
    ACCUMULATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Add up dy over one run of equal sorted indices i: ``out[i, :k] (+)= sum``.

    One program for each sorted place and column block; only those at the start of a run work, so
    one program writes a row and the order of its sum is fixed. Nothing is read back to the host.
    """
    features = known_multiple(features, ALIGNED)
    place = tl.program_id(0)
    index = tl.load(sorted_ptr + place).to(tl.int64)
    before = tl.load(sorted_ptr + place - 1, mask=place > 0, other=-1).to(tl.int64)
    wanted = (index >= 0) & (index < vocabulary) & (index != padding_idx)
    if (index != before) & wanted:
        cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        in_row = cols < features
        run_end = tl.load(run_end_ptr + place).to(tl.int32)
        partial = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for start in range(place, run_end, BLOCK_ROWS):
            places = start + tl.arange(0, BLOCK_ROWS)
            active = places < run_end
            rows = tl.load(order_ptr + places, mask=active, other=0)
            mask = active[:, None] & in_row[None, :]
            _, within = within_widths(
                widths_ptr, rows, tl.num_programs(0), cols, features, mask, ALIGNED
            )
            offsets = rows.to(tl.int64)[:, None] * dy_stride + cols[None, :]
            dy = tl.load(dy_ptr + offsets, mask=within, other=0.0)
            partial += dy.to(tl.float32)
        total = tl.sum(partial, axis=0)
        out_ptrs = out_ptr + (index * out_stride + cols)
        if ACCUMULATE:
            total += tl.load(out_ptrs, mask=in_row, other=0.0).to(tl.float32)
        tl.store(out_ptrs, narrow(total, out_ptr), mask=in_row)


def _block_cols(features: int) -> int:
    return min(_MAX_BLOCK_COLS, max(16, triton.next_power_of_2(features)))


def embedding(indices: Tensor, weight: Tensor, features: int) -> Tensor:
    """``weight[indices, :k]``; an index outside ``[0, V)`` gives a row of NaN.

    Args:
        indices: Integers of any shape.
        weight: (V, K) parent, unit inner stride.
        features: k.

    Returns:
        (*indices.shape, k).
    """
    return _gather(indices, weight, features, None, is_aligned(features))


def ragged_embedding(indices: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    """``weight[indices[i], :k_i]`` for each place i.

    Args:
        indices: (n,) integers; one outside ``[0, V)`` gives k_i times NaN.
        weight: (V, K) parent, unit inner stride.
        runs: ``(rows, out_features, in_features)`` triples, sorted largest first, n rows in all;
            k_i is the in_features of place i, k the first run's.

    Returns:
        (n, k), zero past k_i.
    """
    sizes = row_sizes(runs, weight.device)
    return _gather(indices, weight, sizes.in_features, sizes.row_in, sizes.in_aligned)


def _gather(
    indices: Tensor, weight: Tensor, features: int, widths: Tensor | None, aligned: bool
) -> Tensor:
    flat = indices.reshape(-1).contiguous()
    y = weight.new_empty((*indices.shape, features))
    block_cols = _block_cols(features)
    if flat.numel() > 0:
        launch(
            _embedding_kernel,
            (triton.cdiv(flat.numel(), _BLOCK_ROWS), triton.cdiv(features, block_cols)),
            flat, weight, y, widths, flat.numel(), weight.shape[0], features, weight.stride(0),
            device=weight.device, ALIGNED=aligned,
            BLOCK_ROWS=_BLOCK_ROWS, BLOCK_COLS=block_cols, num_warps=4,
        )  # fmt: skip
    return y


def embedding_backward_into(
    dy: Tensor, indices: Tensor, out: Tensor, accumulate: bool, padding_idx: int = -1
) -> None:
    """``out[i] (+)= sum of dy over the places where indices == i``; out (V, k) is a view.

    Rows that no index names get zero when ``accumulate`` is false; ``padding_idx`` gets nothing.
    Indices are sorted first, so the sums are deterministic.
    """
    _scatter(dy, indices, out, accumulate, padding_idx, None, is_aligned(out.shape[1]))


def ragged_embedding_backward_into(
    dy: Tensor,
    indices: Tensor,
    runs: Runs,
    out: Tensor,
    accumulate: bool,
    padding_idx: int = -1,
) -> None:
    """``out[i, :k_j] += dy[j, :k_j]`` over the places j where indices == i; out (V, >= k).

    What dy (n, >= k) holds past k_j does not matter, and nothing of out past k is touched. The rest
    is as in :func:`ragged_embedding` and :func:`embedding_backward_into`.
    """
    sizes = row_sizes(runs, dy.device)
    out = out[:, : sizes.in_features]
    _scatter(dy, indices, out, accumulate, padding_idx, sizes.row_in, sizes.in_aligned)


def _scatter(
    dy: Tensor,
    indices: Tensor,
    out: Tensor,
    accumulate: bool,
    padding_idx: int,
    widths: Tensor | None,
    aligned: bool,
) -> None:
    if not accumulate:
        out.zero_()
    rows, features = as_rows(dy), out.shape[1]
    in_order, order = torch.sort(indices.reshape(-1), stable=True)
    if in_order.numel() == 0:
        return
    run_end = torch.searchsorted(in_order, in_order, right=True)
    block_cols = _block_cols(features)
    launch(
        _embedding_backward_kernel,
        (in_order.numel(), triton.cdiv(features, block_cols)),
        rows, in_order, order, run_end, out, widths, out.shape[0], features, padding_idx,
        rows.stride(0), out.stride(0),
        device=dy.device, ACCUMULATE=accumulate, ALIGNED=aligned,
        BLOCK_ROWS=_BLOCK_ROWS, BLOCK_COLS=block_cols, num_warps=4,
    )  # fmt: skip
