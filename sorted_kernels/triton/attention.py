"""Attention that never writes the scores. Shapes: q (B, H, S, D); k and v (B, Hkv, T, D).

Twin of :mod:`sorted_kernels.reference.attention`, where arguments and results are described. The
programs of a launch are the tiles of the active heads, one after another; a sample's number of
heads is read from the device's memory, so the grid has room for all heads, and programs past the
last active one end at once. All sizes and strides are runtime arguments; a kernel is compiled once
for a dtype, a head's features, the kind of mask, causal or not, and the alignment of addresses and
strides. Online softmax: FlashAttention-2 (Dao, 2023), algorithm 1. Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sorted_kernels.reference.attention import heads_last
from sorted_kernels.triton.attention_backward import has_rows, launch_backward
from sorted_kernels.triton.attention_config import AttentionConfigs, block_of, choose_configs
from sorted_kernels.triton.attention_tile import (
    head_start,
    head_tile,
    key_range,
    load_rows,
    scores,
    store_rows,
)
from sorted_kernels.triton.device import multiply_add, narrow
from sorted_kernels.triton.launch import device_limits, launch

__all__ = ["attention", "attention_backward"]

SIZES = ["batch", "kv_heads", "group", "n_queries", "n_keys"]
MASK_STRIDES = ["mask_sample", "mask_head", "mask_row"]


@triton.jit
def _attend_range(
    acc,
    total,
    highest,
    q,
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
    """Go on over the keys from ``first`` to ``last``; nothing is done where there are none."""
    i = tl.arange(0, q.shape[0])[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    for start in range(first, last, BLOCK_N):
        k = load_rows(k_ptr, start, n_keys, k_row, HEAD_DIM, BLOCK_N, BLOCK_D, BOUNDED)
        s = scores(
            q, k, mask_ptr, row, start, i, j, n_queries, n_keys, mask_row, mask_col, scale,
            MASK_ROWS, CAUSAL, BOUNDED, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(highest, tl.max(s, 1))
        level = higher
        if mask_ptr is not None:  # else every row has attended to something in its first tile
            level = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(s - level[:, None])
        decay = tl.exp2(highest - level)
        total = total * decay + tl.sum(p, 1)
        v = load_rows(v_ptr, start, n_keys, v_row, HEAD_DIM, BLOCK_N, BLOCK_D, BOUNDED)
        acc = multiply_add(acc * decay[:, None], narrow(p, v_ptr), v, PRECISION)
        highest = higher
    return acc, total, highest


@triton.jit(do_not_specialize=SIZES + MASK_STRIDES)
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    counts_ptr,
    batch,
    kv_heads,
    group,
    n_queries,
    n_keys,
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
    """Rows of out, and of lse (B, H, S), the natural logarithms of the sums of exponentials."""
    sample, head, row = head_tile(counts_ptr, batch, kv_heads, group, n_queries, BLOCK_M, CAUSAL)
    if sample >= batch:
        return
    q_ptr = head_start(q_ptr, sample, head, q_sample, q_head)
    k_ptr = head_start(k_ptr, sample, head // group, k_sample, k_head)
    v_ptr = head_start(v_ptr, sample, head // group, v_sample, v_head)
    if mask_ptr is not None:
        mask_ptr = head_start(mask_ptr, sample, head, mask_sample, mask_head)
    q = load_rows(q_ptr, row, n_queries, q_row, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    i = row + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    whole, last = key_range(row, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
    acc, total, highest = _attend_range(
        acc, total, highest, q, k_ptr, v_ptr, mask_ptr, row, 0, whole, n_queries, n_keys,
        k_row, v_row, mask_row, mask_col, scale,
        MASK_ROWS, False, False, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc, total, highest = _attend_range(
        acc, total, highest, q, k_ptr, v_ptr, mask_ptr, row, whole, last, n_queries, n_keys,
        k_row, v_row, mask_row, mask_col, scale,
        MASK_ROWS, CAUSAL, True, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # of a row that attends to nothing
    acc = acc / total[:, None]
    out_ptr = head_start(out_ptr, sample, head, out_sample, out_head)
    store_rows(out_ptr, narrow(acc, out_ptr), row, n_queries, out_row, HEAD_DIM, BLOCK_M, BLOCK_D)
    lse_ptr = head_start(lse_ptr, sample, head, kv_heads * group * n_queries, n_queries)
    lse = (highest + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + i, lse, mask=i < n_queries)


def precision_of(x: Tensor) -> str:
    """How float32 products are computed.

    On tensor cores, as three products of TF32 parts that keep float32's accuracy; as one, where
    PyTorch may do so too.
    """
    fast = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if fast else "tf32x3"


def _mask_arguments(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int, int]]:
    """The mask as the kernels read it, and its strides, 0 along axes that it broadcasts over."""
    if mask is None:
        return None, (0, 0, 0, 0)
    strides = [0 if n == 1 else stride for n, stride in zip(mask.shape, mask.stride(), strict=True)]
    readable = mask.view(torch.uint8) if mask.dtype is torch.bool else mask
    return readable, (strides[0], strides[1], strides[2], strides[3])


def _configs_for(q: Tensor, mask: Tensor | None) -> AttentionConfigs:
    return choose_configs(q.shape[3], q.dtype, has_rows(mask), device_limits(q.device))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    counts: Tensor | None,
    causal: bool,
    scale: float,
    *,
    configs: AttentionConfigs | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward; q, k and v have unit inner strides, counts are int32 or int64 on their device."""
    out = heads_last(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if counts is not None:
        out.zero_()
        lse.fill_(-torch.inf)
    batch, heads, n_queries, head_dim = q.shape
    kv_heads, n_keys = k.shape[1:3]
    configs = configs or _configs_for(q, mask)
    config = configs.forward
    tiles = batch * heads * triton.cdiv(n_queries, config.block_m)
    if tiles == 0:
        return out, lse
    mask, mask_strides = _mask_arguments(mask)
    launch(
        _attention_kernel, (tiles,), q, k, v, mask, out, lse, counts,
        batch, kv_heads, heads // kv_heads, n_queries, n_keys,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *mask_strides, scale,
        MASK_ROWS=has_rows(mask), CAUSAL=causal,
        HEAD_DIM=head_dim, BLOCK_D=block_of(head_dim),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, PRECISION=precision_of(q),
        device=q.device, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    counts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    *,
    configs: AttentionConfigs | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Of dout only one without a unit inner stride is copied."""
    if dout.stride(3) != 1:
        dout = dout.contiguous()
    gradients = heads_last(q), heads_last(k), heads_last(v)
    if counts is not None or k.shape[2] == 0 or q.shape[2] == 0:
        for gradient in gradients:
            gradient.zero_()
    configs = configs or _configs_for(q, mask)
    mask, mask_strides = _mask_arguments(mask)
    launch_backward(
        dout, q, k, v, mask, mask_strides, counts, out, lse, gradients, causal, scale, configs,
        precision_of(q),
    )  # fmt: skip
    return gradients
