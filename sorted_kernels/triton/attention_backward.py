"""Gradients of attention without its scores: FlashAttention-2 (Dao, 2023), algorithm 2, in two.

The gradient of q has a program for each tile of queries, which goes over the keys; those of k and v
have one for each tile of keys, which goes over the queries of all heads of its group. So each tile
is written once, by one program: no atomics, and the same bits each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sorted_kernels.triton.attention_config import AttentionConfig, AttentionConfigs, block_of
from sorted_kernels.triton.attention_tile import (
    active_head,
    head_start,
    head_tile,
    key_range,
    load_rows,
    scores,
    store_rows,
)
from sorted_kernels.triton.device import multiply_add, narrow
from sorted_kernels.triton.launch import launch

_SIZES = ["batch", "kv_heads", "group", "n_queries", "n_keys"]
_MASK_STRIDES = ["mask_sample", "mask_head", "mask_row"]
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dq_range(
    dq,
    q,
    dout,
    level,
    delta,
    k_ptr,
    v_ptr,
    mask_ptr,
    row,
    first,
    last,
    n_queries,
    n_keys,
    k_row,
    v_row,
    mask_row,
    mask_col,
    scale,
    MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOUNDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Go on over the keys from ``first`` to ``last``."""
    i = tl.arange(0, q.shape[0])[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    for start in range(first, last, BLOCK_N):
        k = load_rows(k_ptr, start, n_keys, k_row, HEAD_DIM, BLOCK_N, BLOCK_D, BOUNDED)
        v = load_rows(v_ptr, start, n_keys, v_row, HEAD_DIM, BLOCK_N, BLOCK_D, BOUNDED)
        s = scores(
            q, k, mask_ptr, row, start, i, j, n_queries, n_keys, mask_row, mask_col, scale,
            MASK_ROWS, CAUSAL, BOUNDED, PRECISION,
        )  # fmt: skip
        p = tl.exp2(s - level[:, None])
        dp = multiply_add(tl.zeros_like(s), dout, tl.trans(v), PRECISION)
        ds = narrow(p * (dp - delta[:, None]), k_ptr)
        dq = multiply_add(dq, ds, k, PRECISION)
    return dq


@triton.jit(do_not_specialize=_SIZES + _MASK_STRIDES)
def _attention_dq_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    counts_ptr,
    batch,
    kv_heads,
    group,
    n_queries,
    n_keys,
    dout_sample,
    dout_head,
    dout_row,
    q_sample,
    q_head,
    q_row,
    k_sample,
    k_head,
    k_row,
    v_sample,
    v_head,
    v_row,
    out_sample,
    out_head,
    out_row,
    dq_sample,
    dq_head,
    dq_row,
    mask_sample,
    mask_head,
    mask_row,
    mask_col,
    scale,
    MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of dq, and of delta (B, H, S), the products of out and its gradient."""
    sample, head, row = head_tile(counts_ptr, batch, kv_heads, group, n_queries, BLOCK_M, CAUSAL)
    if sample >= batch:
        return
    dout_ptr = head_start(dout_ptr, sample, head, dout_sample, dout_head)
    q_ptr = head_start(q_ptr, sample, head, q_sample, q_head)
    k_ptr = head_start(k_ptr, sample, head // group, k_sample, k_head)
    v_ptr = head_start(v_ptr, sample, head // group, v_sample, v_head)
    out_ptr = head_start(out_ptr, sample, head, out_sample, out_head)
    if mask_ptr is not None:
        mask_ptr = head_start(mask_ptr, sample, head, mask_sample, mask_head)
    row_start = head_start(lse_ptr, sample, head, kv_heads * group * n_queries, n_queries)
    delta_ptr = head_start(delta_ptr, sample, head, kv_heads * group * n_queries, n_queries)
    i = row + tl.arange(0, BLOCK_M)
    dout = load_rows(dout_ptr, row, n_queries, dout_row, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    out = load_rows(out_ptr, row, n_queries, out_row, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + i, delta, mask=i < n_queries)
    level = tl.load(row_start + i, mask=i < n_queries, other=0.0) * _LOG2E
    level = tl.where(level == -float("inf"), 0.0, level)
    q = load_rows(q_ptr, row, n_queries, q_row, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole, last = key_range(row, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
    dq = _dq_range(
        dq, q, dout, level, delta, k_ptr, v_ptr, mask_ptr, row, 0, whole,
        n_queries, n_keys, k_row, v_row, mask_row, mask_col, scale,
        MASK_ROWS, False, False, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq = _dq_range(
        dq, q, dout, level, delta, k_ptr, v_ptr, mask_ptr, row, whole, last,
        n_queries, n_keys, k_row, v_row, mask_row, mask_col, scale,
        MASK_ROWS, CAUSAL, True, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq_ptr = head_start(dq_ptr, sample, head, dq_sample, dq_head)
    store_rows(
        dq_ptr, narrow(dq * scale, dq_ptr), row, n_queries, dq_row, HEAD_DIM, BLOCK_M, BLOCK_D
    )


@triton.jit
def _dkv_of_head(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    mask_ptr,
    lse_ptr,
    delta_ptr,
    col,
    first,
    n_queries,
    n_keys,
    q_row,
    dout_row,
    mask_row,
    mask_col,
    scale,
    MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Go on over a head's queries from ``first`` on.

    Keys past the last one need no care: what is computed for them stays in rows that are not
    stored.
    """
    rows = tl.arange(0, BLOCK_M)
    j = tl.arange(0, k.shape[0])[:, None]
    for start in range(first, n_queries, BLOCK_M):
        i = start + rows
        q = load_rows(q_ptr, start, n_queries, q_row, HEAD_DIM, BLOCK_M, BLOCK_D, True)
        dout = load_rows(dout_ptr, start, n_queries, dout_row, HEAD_DIM, BLOCK_M, BLOCK_D, True)
        # Queries past the last one, and those that attend to nothing, have no part.
        level = tl.load(lse_ptr + i, mask=i < n_queries, other=-float("inf")) * _LOG2E
        level = tl.where(level == -float("inf"), float("inf"), level)
        delta = tl.load(delta_ptr + i, mask=i < n_queries, other=0.0)
        s = scores(
            k, q, mask_ptr, start, col, rows[None, :], j, n_queries, n_keys,
            mask_row, mask_col, scale, MASK_ROWS, CAUSAL, False, PRECISION,
        )  # fmt: skip
        p = tl.exp2(s - level[None, :])
        dv = multiply_add(dv, narrow(p, q_ptr), dout, PRECISION)
        dp = multiply_add(tl.zeros_like(s), v, tl.trans(dout), PRECISION)
        ds = narrow(p * (dp - delta[None, :]), q_ptr)
        dk = multiply_add(dk, ds, q, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_SIZES + _MASK_STRIDES)
def _attention_dkv_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    counts_ptr,
    batch,
    kv_heads,
    group,
    n_queries,
    n_keys,
    dout_sample,
    dout_head,
    dout_row,
    q_sample,
    q_head,
    q_row,
    k_sample,
    k_head,
    k_row,
    v_sample,
    v_head,
    v_row,
    dk_sample,
    dk_head,
    dk_row,
    dv_sample,
    dv_head,
    dv_row,
    mask_sample,
    mask_head,
    mask_row,
    mask_col,
    scale,
    MASK_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of dk and dv: sums over the heads of q that share them."""
    tiles = tl.cdiv(n_keys, BLOCK_N)
    col = tl.program_id(0) % tiles * BLOCK_N
    sample, kv_head = active_head(counts_ptr, tl.program_id(0) // tiles, batch, kv_heads, group)
    if sample >= batch:
        return
    k_ptr = head_start(k_ptr, sample, kv_head, k_sample, k_head)
    v_ptr = head_start(v_ptr, sample, kv_head, v_sample, v_head)
    k = load_rows(k_ptr, col, n_keys, k_row, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v = load_rows(v_ptr, col, n_keys, v_row, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    rows = kv_heads * group * n_queries
    first = 0
    if CAUSAL:  # no query before the first key sees any
        first = col // BLOCK_M * BLOCK_M
    for head in range(kv_head * group, kv_head * group + group):
        q_of = head_start(q_ptr, sample, head, q_sample, q_head)
        dout_of = head_start(dout_ptr, sample, head, dout_sample, dout_head)
        lse_of = head_start(lse_ptr, sample, head, rows, n_queries)
        delta_of = head_start(delta_ptr, sample, head, rows, n_queries)
        mask_of = mask_ptr
        if mask_ptr is not None:
            mask_of = head_start(mask_ptr, sample, head, mask_sample, mask_head)
        dk, dv = _dkv_of_head(
            dk, dv, k, v, q_of, dout_of, mask_of, lse_of, delta_of, col, first,
            n_queries, n_keys, q_row, dout_row, mask_row, mask_col, scale,
            MASK_ROWS, CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION,
        )  # fmt: skip
    dk_ptr = head_start(dk_ptr, sample, kv_head, dk_sample, dk_head)
    dv_ptr = head_start(dv_ptr, sample, kv_head, dv_sample, dv_head)
    store_rows(dk_ptr, narrow(dk * scale, dk_ptr), col, n_keys, dk_row, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_rows(dv_ptr, narrow(dv, dv_ptr), col, n_keys, dv_row, HEAD_DIM, BLOCK_N, BLOCK_D)


def has_rows(mask: Tensor | None) -> bool:
    """Whether there is a mask whose rows differ, and not one row for all queries."""
    return mask is not None and mask.shape[2] > 1


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    mask_strides: tuple[int, int, int, int],
    counts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    causal: bool,
    scale: float,
    configs: AttentionConfigs,
    precision: str,
) -> None:
    """Write the gradients (dq, dk, dv) of the active heads."""
    batch, heads, n_queries, head_dim = q.shape
    kv_heads, n_keys = k.shape[1:3]
    if batch * n_queries * n_keys == 0:
        return
    delta = torch.empty_like(lse)
    sizes = (batch, kv_heads, heads // kv_heads, n_queries, n_keys)
    dq, dk, dv = gradients

    def run(kernel, tiles: int, tensors: tuple, strided: tuple, config: AttentionConfig) -> None:
        strides = [stride for tensor in strided for stride in tensor.stride()[:3]]
        launch(
            kernel, (tiles,), *tensors, counts, *sizes, *strides, *mask_strides, scale,
            MASK_ROWS=has_rows(mask), CAUSAL=causal,
            HEAD_DIM=head_dim, BLOCK_D=block_of(head_dim),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, PRECISION=precision,
            device=q.device, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    run(
        _attention_dq_kernel, batch * heads * triton.cdiv(n_queries, configs.queries.block_m),
        (dout, q, k, v, mask, out, lse, delta, dq), (dout, q, k, v, out, dq), configs.queries,
    )  # fmt: skip
    run(
        _attention_dkv_kernel, batch * kv_heads * triton.cdiv(n_keys, configs.keys.block_n),
        (dout, q, k, v, mask, lse, delta, dk, dv), (dout, q, k, v, dk, dv), configs.keys,
    )  # fmt: skip
