"""Cross-entropy under a linear head on the CPU, its element-wise part compiled.

Twin of :mod:`sorted_kernels.reference.linear_cross_entropy`, where arguments and results are
described. There a row of logits is read and written by one operation of PyTorch after the other;
here it is read twice and written once (``csrc/cpu/cross_entropy_cpu.h``). In half precision the
head's gradient comes transposed out of the product that oneDNN is fastest at, and is turned as it
is added.

The ops are private. ``add_transposed_`` is ``total (+)= part.T``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sorted_kernels.ops.library import LIBRARY, NAMESPACE, load_compiled
from sorted_kernels.reference import linear_cross_entropy as reference
from sorted_kernels.reference.linear_cross_entropy import Gradients

__all__ = ["DTYPES", "Gradients", "cross_entropy_", "linear_cross_entropy"]

LIBRARY.define(
    "cross_entropy_rows_(Tensor(a!) logits, Tensor target, Tensor? scale, SymInt ignore_index,"
    " float label_smoothing, bool gradient, Tensor(b!) losses) -> ()"
)
LIBRARY.define("add_transposed_(Tensor(a!) total, Tensor part, bool accumulate) -> ()")
for _name in ("cross_entropy_rows_", "add_transposed_"):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", lambda *args: None, lib=LIBRARY)
load_compiled()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 1 << 20  # elements of a product that is added while it is in a second-level cache


def cross_entropy_(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
) -> Tensor:
    """Losses of a chunk, and in place of its logits their gradient."""
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    words = torch.empty_like(losses, dtype=torch.int64).copy_(target)
    scales = None if scale is None else torch.empty_like(losses).copy_(scale)
    torch.ops.sorted_kernels.cross_entropy_rows_(
        logits, words, scales, ignore_index, label_smoothing, gradient, losses
    )
    return losses


def add_narrow_product(total: Tensor, dz: Tensor, x: Tensor, accumulate: bool) -> None:
    """``total (+)= dz.T @ x``, float32 of half precision."""
    rows = max(1, _BLOCK // x.shape[1])
    columns = x.new_empty(x.shape[1], x.shape[0]).copy_(x.t())
    product = x.new_empty(x.shape[1], min(rows, dz.shape[1]))
    for begin in range(0, dz.shape[1], rows):
        part = dz[:, begin : begin + rows]
        place = product[:, : part.shape[1]]
        torch.mm(columns, part, out=place)
        torch.ops.sorted_kernels.add_transposed_(total[begin : begin + rows], place, accumulate)


linear_cross_entropy = functools.partial(
    reference.linear_cross_entropy, stage=cross_entropy_, add_narrow_product=add_narrow_product
)
