"""Cross-entropy of a linear head: one kernel turns a chunk of logits into losses and gradients.

Twin of :mod:`sorted_kernels.reference.linear_cross_entropy`, where arguments and results are
described, and whose chunks it walks. The three products stay with the vendor's library, on the
strided weight, in chunks of thousands of rows: with logits that are never written, each gradient
would need a product more, which costs more than a chunk's way to memory and back as soon as k is a
few hundred. What is left is memory-bound: this kernel reads a row twice (the second time from L2)
and writes it once, where PyTorch's operators read and write it five times and need float32 copies.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from sorted_kernels.reference import linear_cross_entropy as reference
from sorted_kernels.reference.linear_cross_entropy import Gradients
from sorted_kernels.triton.device import narrow
from sorted_kernels.triton.launch import launch

__all__ = ["Gradients", "cross_entropy_", "linear_cross_entropy"]

_BLOCK = 4096
ROW_MULTIPLE = 64
"""Logits are so many elements apart, or a multiple: odd vocabularies keep the library's products on
16-byte accesses, and this kernel's."""


@triton.jit
def _words(row_ptr, start, n_words, width, BLOCK: tl.constexpr):
    """A block of logits in float32, -inf past the vocabulary; where it stands, and its mask."""
    cols = start + tl.arange(0, BLOCK)
    # Up to the end of the row's memory, so that the mask splits no vector.
    mask = cols < width
    z = tl.load(row_ptr + cols, mask=mask, other=float("-inf")).to(tl.float32)
    return tl.where(cols < n_words, z, float("-inf")), cols, mask


@triton.jit(do_not_specialize=["n_words", "ignore_index", "label_smoothing"])
def _cross_entropy_kernel(
    logits_ptr,
    target_ptr,
    scale_ptr,
    losses_ptr,
    n_words,
    ignore_index,
    label_smoothing,
    logits_stride,
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its loss, and in place of its logits their gradient."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    target = tl.load(target_ptr + row).to(tl.int64)
    kept = target != ignore_index
    width = (n_words + 15) // 16 * 16
    # Online softmax in each lane. The floor is finite: -inf less itself would be NaN.
    top = tl.full((BLOCK,), -3e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_words, BLOCK):
        z, cols, _ = _words(row_ptr, start, n_words, width, BLOCK)
        higher = tl.maximum(top, z)
        total = total * tl.exp(top - higher) + tl.exp(z - higher)
        top = higher
        if SMOOTH:
            plain += tl.where(cols < n_words, z, 0.0)
    highest = tl.max(top, axis=0)
    # Not added to the highest, which may be so far from zero that it would be lost.
    log_sum = tl.log(tl.sum(total * tl.exp(top - highest), axis=0))
    # A target outside the vocabulary reads no memory and shows as NaN; a check would cost a sync.
    known = (target >= 0) & (target < n_words)
    at_target = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    loss = (highest - at_target) + log_sum
    share = 0.0
    if SMOOTH:
        share = label_smoothing / n_words
        average = tl.sum(plain, axis=0) / n_words
        loss = (1.0 - label_smoothing) * loss + label_smoothing * ((highest - average) + log_sum)
    tl.store(losses_ptr + row, tl.where(kept, loss, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # one thread has read the target's logit, another writes its gradient
        scale = 1.0
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + row).to(tl.float32)
        for start in range(0, n_words, BLOCK):
            z, cols, mask = _words(row_ptr, start, n_words, width, BLOCK)
            hit = tl.where(cols == target, 1.0 - label_smoothing, 0.0)
            dz = scale * (tl.exp((z - highest) - log_sum) - share - hit)
            dz = tl.where(kept, tl.where(known, dz, float("nan")), 0.0)
            tl.store(row_ptr + cols, narrow(dz, logits_ptr), mask=mask)


def cross_entropy_(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
) -> Tensor:
    """Losses of a chunk, and in place of its logits their gradient; see the reference.

    Args:
        logits: (r, V) with unit inner stride; its rows have memory up to a multiple of 16.
        target: (r,) integers; one outside the vocabulary makes loss and gradient NaN.
        scale: (r,), or None for ones.
        ignore_index: Target of rows that have no loss and no gradient.
        label_smoothing: From 0 to 1.
        gradient: Whether the gradient is wanted; the logits stay as they are if not.

    Returns:
        (r,) losses in float32.
    """
    rows, words = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    target, scale = target.contiguous(), None if scale is None else scale.contiguous()
    if rows > 0:
        launch(
            _cross_entropy_kernel, (rows,),
            logits, target, scale, losses, words, ignore_index, float(label_smoothing),
            logits.stride(0),
            device=logits.device, SMOOTH=label_smoothing > 0, GRADIENT=gradient,
            BLOCK=min(_BLOCK, triton.next_power_of_2(words)), num_warps=8,
        )  # fmt: skip
    return losses


linear_cross_entropy = functools.partial(
    reference.linear_cross_entropy, stage=cross_entropy_, row_multiple=ROW_MULTIPLE
)
