"""Ragged batches: rows of different sub-models, sorted largest first. Plain PyTorch on views.

``runs`` are ``(rows, out_features, in_features)`` triples (see ``sorted_kernels.RowWidths``), N
rows in all. A row's width in norms and embeddings is its in_features. What an argument holds past
a row's size is never read; what is returned is zero there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sorted_kernels.reference import embedding as embedding_of_one
from sorted_kernels.reference import layer_norm as layer_norm_of_one
from sorted_kernels.reference import rms_norm as rms_norm_of_one
from sorted_kernels.reference.linear import activate

Runs = Sequence[tuple[int, int, int]]
_HALF = (torch.bfloat16, torch.float16)


class Box(NamedTuple):
    """Part of the work of a ragged product: rows ``[:rows]`` of the batch by a block of the weight.

    ``first`` says that nothing was added to the box' outputs before.
    """

    rows: int
    out_begin: int
    out_end: int
    in_begin: int
    in_end: int
    first: bool


@functools.lru_cache(maxsize=256)
def _boxes(runs: tuple[tuple[int, int, int], ...], swapped: bool) -> list[Box]:
    """Boxes that are disjoint and together all of the work, innermost first.

    From one run to the next smaller one the prefix shrinks by an L-shaped frame, and the rows that
    use a frame are a prefix of the batch. The frame is cut so that the part with the features that
    the smaller prefix lacks comes whole: it is the first to write those outputs (of dgrad, with
    ``swapped``).
    """
    ends, row = [], 0
    for rows, m, k in runs:
        row += rows
        ends.append((row, k, m) if swapped else (row, m, k))
    boxes = []
    inner_m = inner_k = 0
    for row, m, k in reversed(ends):
        if m > inner_m:
            boxes.append((row, inner_m, m, 0, k, True))
        if k > inner_k and inner_m > 0:
            boxes.append((row, 0, inner_m, inner_k, k, False))
        inner_m, inner_k = m, k
    if swapped:
        return [Box(row, i0, i1, o0, o1, first) for row, o0, o1, i0, i1, first in boxes]
    return [Box(*box) for box in boxes]


def _by_boxes(runs: Runs, swapped: bool = False) -> list[Box]:
    return _boxes(tuple(tuple(run) for run in runs), swapped)  # type: ignore[misc]


def each_run(runs: Runs) -> Iterator[tuple[slice, int, int]]:
    """Rows of the batch, out_features and in_features of each run."""
    begin = 0
    for rows, m, k in runs:
        yield slice(begin, begin + rows), m, k
        begin += rows


def _zeros(like: Tensor, runs: Runs, axis: int) -> Tensor:
    """(N, largest size): one fill is cheaper than one of each run's tail."""
    return like.new_zeros((sum(run[0] for run in runs), runs[0][axis]))


def _blocks_of(matrix: Tensor, transposed: bool = False) -> Callable[[int, int, int, int], Tensor]:
    """What cuts ``matrix[i0:i1, j0:j1]``, or its transpose, in one call.

    Boxes of a few rows are over so soon that slicing an axis at a time is a tenth of the time. The
    matrix has unit inner stride.
    """
    view, stride, offset = matrix.as_strided, matrix.stride(0), matrix.storage_offset()

    def block(i0: int, i1: int, j0: int, j1: int) -> Tensor:
        start = offset + i0 * stride + j0
        if transposed:
            return view((j1 - j0, i1 - i0), (1, stride), start)
        return view((i1 - i0, j1 - j0), (stride, 1), start)

    return block


def ragged_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, runs: Runs, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """``activation(x[r, :k_r] @ weight[:m_r, :k_r].T + bias[:m_r])`` for each row r.

    Args:
        x: (N, at least the largest k).
        weight: (M, K) parent, unit inner stride.
        bias: (M,) parent or None.
        runs: See the module.
        activation: One of :data:`sorted_kernels.reference.linear.ACTIVATIONS`.
        save: Also return what ``activation_backward`` needs.

    Returns:
        y (N, largest m), and the pre-activation if ``save`` and the activation is gelu or silu,
        else an empty tensor.
    """
    z = _zeros(x, runs, 1)
    if x.dtype in _HALF:  # sums of several products would be rounded several times
        for part, m, k in each_run(runs):
            _product(z[part, :m], _padded(x[part, :k]), weight[:m, :k].t(), bias, 0, m)
    else:
        outs, lefts, rights = _blocks_of(z), _blocks_of(x), _blocks_of(weight, transposed=True)
        for rows, m0, m, k0, k, first in _by_boxes(runs):
            out, left, right = outs(0, rows, m0, m), lefts(0, rows, k0, k), rights(m0, m, k0, k)
            if first:
                _product(out, left, right, bias, m0, m)
            else:
                out.addmm_(left, right)
    saved = z if save and activation in ("gelu", "silu") else x.new_empty(0)
    return activate(z, activation), saved


def _padded(rows: Tensor) -> Tensor:
    """Rows of half precision that may be read past their ends.

    PyTorch's matrix product on CPUs with AMX reads rows in steps of 32 elements and multiplies what
    is past their ends by zero, which does not stop a NaN there.
    """
    size = rows.shape[1]
    if rows.is_cuda or size % 32 == 0:
        return rows
    return torch.nn.functional.pad(rows, (0, -size % 32))[:, :size]


def _product(
    out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, begin: int, end: int
) -> None:
    if bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias[begin:end], left, right, out=out)


def ragged_dgrad(dy: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    """``dy[r, :m_r] @ weight[:m_r, :k_r]``: dy (N, at least the largest m) -> (N, largest k)."""
    dx = _zeros(dy, runs, 2)
    if dy.dtype in _HALF:
        for part, m, k in each_run(runs):
            torch.mm(_padded(dy[part, :m]), weight[:m, :k], out=dx[part, :k])
        return dx
    outs, lefts, rights = _blocks_of(dx), _blocks_of(dy), _blocks_of(weight)
    for rows, m0, m, k0, k, first in _by_boxes(runs, swapped=True):
        out, left, right = outs(0, rows, k0, k), lefts(0, rows, m0, m), rights(m0, m, k0, k)
        torch.mm(left, right, out=out) if first else out.addmm_(left, right)
    return dx


def ragged_wgrad_into(dy: Tensor, x: Tensor, runs: Runs, out: Tensor, accumulate: bool) -> None:
    """``out[:m_r, :k_r] (+)= dy[r, :m_r].T x[r, :k_r]``, summed over the rows r.

    Each element of ``out`` is one sum over the rows that use it. ``out`` is a view of at least
    (largest m, largest k), and nothing past that is touched.
    """
    outs, lefts, rights = _blocks_of(out), _blocks_of(dy, transposed=True), _blocks_of(x)
    for rows, m0, m, k0, k, _ in _by_boxes(runs):
        block, left, right = outs(m0, m, k0, k), lefts(0, rows, m0, m), rights(0, rows, k0, k)
        block.addmm_(left, right) if accumulate else torch.mm(left, right, out=block)


def ragged_bias_grad_into(dy: Tensor, runs: Runs, out: Tensor, accumulate: bool) -> None:
    """``out[:m_r] (+)= dy[r, :m_r]``, summed over the rows r; out (at least the largest m,)."""
    for rows, m0, m, _, _, first in _by_boxes(runs):
        if first:
            part, columns = out[m0:m], dy[:rows, m0:m]
            part.add_(columns.sum(0)) if accumulate else torch.sum(columns, 0, out=part)


def ragged_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, runs: Runs, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of each row over its own width.

    Args:
        x: (N, at least the largest k).
        weight: (K,) parent or None.
        bias: (K,) parent or None.
        runs: See the module.
        eps: Added to the variance.

    Returns:
        y (N, largest k), mean (N, 1), rstd (N, 1); the statistics in float32 for half precision.
    """
    y, statistics = _zeros(x, runs, 2), []
    for part, _, k in each_run(runs):
        y[part, :k], mean, rstd = layer_norm_of_one.layer_norm(x[part, :k], weight, bias, eps)
        statistics.append((mean, rstd))
    means, rstds = zip(*statistics, strict=True)
    return y, torch.cat(means), torch.cat(rstds)


def ragged_layer_norm_backward_into(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    runs: Runs,
    weight_out: Tensor | None,
    bias_out: Tensor | None,
    accumulate_weight: bool,
    accumulate_bias: bool,
    need_dx: bool = True,
) -> Tensor | None:
    """Input gradient (N, largest k) returned; gradients of scale and shift written into views."""

    def one(part: slice, k: int, dw: Tensor | None, db: Tensor | None) -> Tensor | None:
        return layer_norm_of_one.layer_norm_backward_into(
            dy[part, :k], x[part, :k], mean[part], rstd[part], weight, dw, db, False, False, need_dx
        )

    outs = ((weight_out, accumulate_weight), (bias_out, accumulate_bias))
    return _norm_backward(x, runs, outs, one, need_dx)


def ragged_rms_norm(
    x: Tensor, weight: Tensor | None, runs: Runs, eps: float
) -> tuple[Tensor, Tensor]:
    """RMS norm of each row over its own width: y (N, largest k), rstd (N, 1)."""
    y, statistics = _zeros(x, runs, 2), []
    for part, _, k in each_run(runs):
        y[part, :k], rstd = rms_norm_of_one.rms_norm(x[part, :k], weight, eps)
        statistics.append(rstd)
    return y, torch.cat(statistics)


def ragged_rms_norm_backward_into(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    runs: Runs,
    weight_out: Tensor | None,
    accumulate: bool,
    need_dx: bool = True,
) -> Tensor | None:
    """Input gradient (N, largest k) returned; gradient of the scale written into a view."""

    def one(part: slice, k: int, dw: Tensor | None, _: Tensor | None) -> Tensor | None:
        return rms_norm_of_one.rms_norm_backward_into(
            dy[part, :k], x[part, :k], rstd[part], weight, dw, False, need_dx
        )

    return _norm_backward(x, runs, ((weight_out, accumulate), (None, False)), one, need_dx)


def _norm_backward(
    x: Tensor,
    runs: Runs,
    outs: tuple[tuple[Tensor | None, bool], tuple[Tensor | None, bool]],
    one: Callable[[slice, int, Tensor | None, Tensor | None], Tensor | None],
    need_dx: bool,
) -> Tensor | None:
    """Run a norm's backward run by run; what the runs give is summed in at least float32."""
    widest = runs[0][2]
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = x.new_zeros((2, widest), dtype=wide)
    dx = _zeros(x, runs, 2) if need_dx else None
    for part, _, k in each_run(runs):
        parts = x.new_empty((2, k))
        wanted = [None if out is None else parts[i] for i, (out, _) in enumerate(outs)]
        found = one(part, k, wanted[0], wanted[1])
        if dx is not None and found is not None:
            dx[part, :k] = found
        sums[:, :k] += parts  # what nobody wants is garbage, and stays unread
    for total, (out, accumulate) in zip(sums, outs, strict=True):
        if out is not None:
            out[:widest].add_(total) if accumulate else out[:widest].copy_(total)
    return dx


def ragged_embedding(indices: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    """``weight[indices[r], :k_r]`` for each r: indices (N,) -> (N, largest k)."""
    y = _zeros(weight, runs, 2)
    for part, _, k in each_run(runs):
        y[part, :k] = embedding_of_one.embedding(indices[part], weight, k)
    return y


def ragged_embedding_backward_into(
    dy: Tensor, indices: Tensor, runs: Runs, out: Tensor, accumulate: bool, padding_idx: int = -1
) -> None:
    """``out[indices[r], :k_r] (+)= dy[r, :k_r]``; nothing of out past the largest k is touched.

    Rows that no index names get zero when ``accumulate`` is false; ``padding_idx`` gets nothing.
    """
    if not accumulate:
        out[:, : runs[0][2]].zero_()
    for part, _, k in each_run(runs):
        embedding_of_one.embedding_backward_into(
            dy[part, :k], indices[part], out[:, :k], True, padding_idx
        )
