"""Cross-entropy of a linear head that never has the logits of more than a chunk of rows.

Shapes: R rows, V words, k features; several exits under one head are rows like any other. Gradients
need no more than the forward pass has: from the same chunk of logits come the losses and, in its
place, the logits' gradient, which two products turn into the gradients of the rows and of the head
(as in Liger Kernel's fused linear cross-entropy). So whoever knows the rows' upstream gradients
beforehand has all gradients for three products; otherwise the logits are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Protocol

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Largest chunk. On a GPU the weight's gradient must be read and written for every chunk, in a time
that shall be short beside that of a chunk's products: a few thousand rows."""
MIN_ROWS = 64
CACHED_ELEMENTS = 1 << 19
"""Of what a CPU computes in half precision and adds to, or turns into, float32: part of a core's
second-level cache. Larger temporaries cost more than the products that they are of."""

_HALF_ROWS = 256
"""Of a product in half precision over all words: oneDNN takes a third longer a row for more."""


class CrossEntropyStage(Protocol):
    """What a back end does to a chunk of logits; see :func:`cross_entropy_`."""

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        scale: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        gradient: bool,
    ) -> Tensor:
        """Losses of a chunk (r, V)."""
        ...


class AddNarrowProduct(Protocol):
    """How a CPU adds a half-precision product in float32; see :func:`add_narrow_product`."""

    def __call__(self, total: Tensor, dz: Tensor, x: Tensor, accumulate: bool) -> None:
        """``total (+)= dz.T @ x``."""
        ...


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses and sums are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def rows_of_chunk(rows: int, row_bytes: int, device_type: str) -> int:
    """Rows of a chunk: as many as memory allows, so that more rows do not make chunks larger."""
    most = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // max(row_bytes, 1)
    return min(rows, max(MIN_ROWS, most))


def cross_entropy_(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
) -> Tensor:
    """Losses of a chunk, and in place of its logits their gradient.

    Args:
        logits: (r, V); left with anything at all unless ``gradient``.
        target: (r,) integers.
        scale: (r,) upstream gradients, or None for ones.
        ignore_index: Rows with this target have no loss and no gradient.
        label_smoothing: Share of the target's probability that all V words have in equal parts.
        gradient: Whether to turn the logits into ``scale`` times the gradient of the losses.

    Returns:
        (r,) losses, float32 for half precision.
    """
    wide, options = wide_dtype(logits.dtype), (ignore_index, label_smoothing, gradient)
    if logits.dtype == wide or logits.device.type != "cpu":
        return _cross_entropy_(logits, logits.to(wide), target, scale, *options)
    rows = max(1, CACHED_ELEMENTS // logits.shape[1])
    widened = logits.new_empty(min(rows, logits.shape[0]), logits.shape[1], dtype=wide)
    scales = repeat(None) if scale is None else scale.split(rows)
    parts = [
        _cross_entropy_(z, widened[: z.shape[0]].copy_(z), words, factors, *options)
        for z, words, factors in zip(logits.split(rows), target.split(rows), scales, strict=False)
    ]
    return torch.cat(parts)


def _cross_entropy_(
    logits: Tensor,
    widened: Tensor,
    target: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
) -> Tensor:
    """:func:`cross_entropy_`; ``widened`` is the logits in float32, themselves or a copy to use."""
    words, on_cpu = logits.shape[1], logits.device.type == "cpu"
    kept = target != ignore_index
    index = torch.where(kept, target, 0).long().unsqueeze(1)
    # On a CPU each row is read before it is written: no second chunk.
    log_p = torch.log_softmax(widened, 1, out=widened if on_cpu else None)
    losses = log_p.gather(1, index).squeeze(1).neg_()
    if label_smoothing:
        losses = torch.lerp(losses, -log_p.mean(1), label_smoothing)
    if gradient:
        share = log_p.exp_()
        if label_smoothing:
            share.sub_(label_smoothing / words)
        share.scatter_add_(1, index, share.new_full(index.shape, label_smoothing - 1))
        if scale is not None or not on_cpu:  # on the CPU no row is ignored
            factors = torch.where(kept, 1 if scale is None else scale, 0)
            share.mul_(factors.to(share.dtype).unsqueeze(1))
        if share is not logits:
            logits.copy_(share)
    return torch.where(kept, losses, 0)


def _times_head(dz: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = dz @ weight``; on a CPU oneDNN is fastest at some half-precision rows at a time."""
    whole = dz.is_cuda or dz.dtype == wide_dtype(dz.dtype)
    rows = max(1, dz.shape[0]) if whole else _HALF_ROWS
    for part, place in zip(dz.split(rows), out.split(rows), strict=True):
        torch.mm(part, weight, out=place)


def add_narrow_product(total: Tensor, dz: Tensor, x: Tensor, accumulate: bool) -> None:
    """``total (+)= dz.T @ x``, a few rows at a time: what is added need not leave the cache.

    Args:
        total: (V, k) in float32.
        dz: (r, V) in half precision.
        x: (r, k), dz's dtype.
        accumulate: Whether to add to what ``total`` holds.
    """
    rows = max(1, CACHED_ELEMENTS // x.shape[1])
    product = x.new_empty(min(rows, dz.shape[1]), x.shape[1])
    for begin in range(0, dz.shape[1], rows):
        part = dz[:, begin : begin + rows].t()
        place, product_part = total[begin : begin + rows], product[: part.shape[0]]
        torch.mm(part, x, out=product_part)
        (place.add_ if accumulate else place.copy_)(product_part)


class _Rows:
    """The rows that have a target, a chunk at a time.

    On the CPU ignored rows are left out. On a GPU one would have to wait for their number; there
    they are computed, and have no loss and no gradient.
    """

    def __init__(self, target: Tensor, ignore_index: int) -> None:
        self.picked: Tensor | None = None
        self.count = target.shape[0]
        if target.device.type == "cpu":
            picked = (target != ignore_index).nonzero().squeeze(1)
            if picked.shape[0] < self.count:
                self.picked, self.count = picked, picked.shape[0]

    def chunks(self, size: int) -> Iterator[slice | Tensor]:
        """What picks the rows of each chunk."""
        for start in range(0, self.count, max(size, 1)):
            part = slice(start, min(start + size, self.count))
            yield part if self.picked is None else self.picked[part]


class _Sum:
    """A gradient that chunks add to, in float32 whatever the dtype of its place."""

    def __init__(self, out: Tensor, accumulate: bool) -> None:
        self.out, self.accumulate = out, accumulate
        narrow = out.dtype != wide_dtype(out.dtype)
        self.total = torch.empty_like(out, dtype=torch.float32) if narrow else out
        self.started = accumulate and not narrow

    def add(self, value: Tensor) -> None:
        """Add a gradient of the same shape."""
        self.total.add_(value) if self.started else self.total.copy_(value)
        self.started = True

    def add_product(self, dz: Tensor, x: Tensor, add_narrow: AddNarrowProduct) -> None:
        """Add ``dz.T @ x``."""
        total = self.total
        if x.dtype == total.dtype:
            total.addmm_(dz.t(), x) if self.started else torch.mm(dz.t(), x, out=total)
        elif not x.is_cuda:
            add_narrow(total, dz, x, self.started)
        else:  # half-precision operands, a float32 result: cuBLAS
            beta = 1 if self.started else 0
            torch.addmm(total, dz.t(), x, out_dtype=total.dtype, beta=beta, out=total)
        self.started = True

    def finish(self) -> None:
        """Bring the sum to its place."""
        if not self.started:
            self.total.zero_()
        if self.total is not self.out:
            self.out.add_(self.total) if self.accumulate else self.out.copy_(self.total)


class Gradients:
    """The places that gradients are written to; what is not wanted is None.

    Args:
        hidden: (R, k), overwritten.
        weight: (V, k), a view with unit inner stride, of any dtype.
        bias: (V,).
        accumulate: Whether to add to what ``weight`` and ``bias`` hold.
    """

    def __init__(
        self,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        accumulate: tuple[bool, bool] = (False, False),
    ) -> None:
        self.hidden = hidden
        self.weight = None if weight is None else _Sum(weight, accumulate[0])
        self.bias = None if bias is None else _Sum(bias, accumulate[1])

    def add(
        self,
        rows: slice | Tensor,
        dz: Tensor,
        x: Tensor,
        weight: Tensor,
        add_narrow: AddNarrowProduct,
    ) -> None:
        """Add what a chunk's logit gradients dz (r, V) bring."""
        if self.hidden is not None:
            place = self.hidden[rows]  # a view, or where rows are left out a copy
            _times_head(dz, weight, place)
            if not isinstance(rows, slice):
                self.hidden[rows] = place
        if self.weight is not None:
            self.weight.add_product(dz, x, add_narrow)
        if self.bias is not None:
            self.bias.add(dz.sum(0, dtype=wide_dtype(dz.dtype)))

    def finish(self) -> None:
        """Bring all sums to their places."""
        for total in (self.weight, self.bias):
            if total is not None:
                total.finish()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    gradients: Gradients | None,
    *,
    stage: CrossEntropyStage = cross_entropy_,
    add_narrow_product: AddNarrowProduct = add_narrow_product,
    row_multiple: int = 1,
) -> Tensor:
    """Cross-entropy of each row under a head, and the gradients that are wanted.

    Args:
        hidden: (R, k).
        weight: (V, K) parent, K at least k, unit inner stride.
        bias: (V,) or None.
        target: (R,) integers.
        scale: (R,) upstream gradients of the losses, or None for ones.
        ignore_index: Target of rows that do not count.
        label_smoothing: From 0 to 1.
        gradients: Where gradients go; None for the losses alone.
        stage: What a back end does to a chunk of logits.
        add_narrow_product: How it adds to the weight's gradient in half precision on a CPU.
        row_multiple: Logits are this many elements, or a multiple of them, from row to row.

    Returns:
        (R,) losses in float32 (float64 for float64), zero for ignored rows.
    """
    words, k = weight.shape[0], hidden.shape[1]
    head, wide = weight[:, :k], wide_dtype(hidden.dtype)
    losses = hidden.new_zeros(hidden.shape[0], dtype=wide)
    if gradients is not None and gradients.hidden is not None:
        gradients.hidden.zero_()  # of rows that are left out
    width = -(-words // row_multiple) * row_multiple
    row_bytes = width * hidden.dtype.itemsize
    if hidden.is_cuda and hidden.dtype != wide:  # elsewhere few rows at a time are widened
        row_bytes += width * wide.itemsize
    rows = _Rows(target, ignore_index)
    size = rows_of_chunk(rows.count, row_bytes, hidden.device.type)
    buffer = hidden.new_empty(size, width)
    for part in rows.chunks(size):
        x, scaled_by = hidden[part], None if scale is None else scale[part]
        z = buffer[: x.shape[0], :words]
        if bias is None:
            torch.mm(x, head.t(), out=z)
        else:
            torch.addmm(bias, x, head.t(), out=z)
        losses[part] = stage(
            z, target[part], scaled_by, ignore_index, label_smoothing, gradients is not None
        )
        if gradients is not None:
            gradients.add(part, z, x, head, add_narrow_product)
    if gradients is not None:
        gradients.finish()
    return losses
