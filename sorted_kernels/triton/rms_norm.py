"""RMS norm whose scale is read up to the width of its input. x (..., k).

Twin of :mod:`sorted_kernels.reference.rms_norm`, where arguments and results are described.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sorted_kernels.reference import rms_norm as reference
from sorted_kernels.triton.norm import MAX_FEATURES, norm_backward, norm_forward
from sorted_kernels.triton.row_sizes import Runs, row_sizes, row_spans


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return y (..., k) and rstd (..., 1), in float32.

    Rows longer than :data:`sorted_kernels.triton.norm.MAX_FEATURES` take the reference.
    """
    if x.shape[-1] > MAX_FEATURES:
        return reference.rms_norm(x, weight, eps)
    y, _, rstd = norm_forward(x, weight, None, eps, centred=False)
    return y, rstd


def rms_norm_backward_into(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    weight_out: Tensor | None,
    accumulate: bool,
    need_dx: bool = True,
) -> Tensor | None:
    """Input gradient returned; gradient of the scale written into a k-sized view."""
    if x.shape[-1] > MAX_FEATURES:
        return reference.rms_norm_backward_into(
            dy, x, rstd, weight, weight_out, accumulate, need_dx
        )
    return norm_backward(
        dy, x, None, rstd, weight, (weight_out, None), (accumulate, False), need_dx
    )


def ragged_rms_norm(
    x: Tensor, weight: Tensor | None, runs: Runs, eps: float
) -> tuple[Tensor, Tensor]:
    """RMS norm of rows of different widths.

    Args:
        x: (N, >= k), unit inner stride; what it holds past a row's width does not matter.
        weight: (K,) parent or None.
        runs: ``(rows, out_features, in_features)`` triples, sorted largest first; N rows in all. A
            row's width is its in_features, k the first run's.
        eps: Added to the mean square.

    Returns:
        y (N, k), zero past a row's width; rstd (N, 1), in float32.
    """
    n_rows, k = x.shape[0], runs[0][2]
    if k > MAX_FEATURES:
        y, rstd = x.new_zeros((n_rows, k)), x.new_empty((n_rows, 1), dtype=torch.float32)
        for rows, _, width in row_spans(runs):
            y[rows, :width], rstd[rows] = rms_norm(x[rows, :width], weight, eps)
        return y, rstd
    y, _, rstd = norm_forward(x, weight, None, eps, False, row_sizes(runs, x.device))
    return y, rstd


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
    """Input gradient (N, k) returned, zero past a row's width; the scale's first k written.

    Arguments are those of :func:`ragged_rms_norm` and :func:`rms_norm_backward_into`; what dy
    (N, >= k) holds past a row's width does not matter.
    """
    k = runs[0][2]
    if k <= MAX_FEATURES:
        outs, add = (weight_out, None), (accumulate, False)
        sizes = row_sizes(runs, x.device)
        return norm_backward(dy, x, None, rstd, weight, outs, add, need_dx, sizes)
    dx = x.new_zeros((x.shape[0], k)) if need_dx else None
    for rows, _, width in row_spans(runs):
        part = rms_norm_backward_into(
            dy[rows, :width], x[rows, :width], rstd[rows], weight,
            None if weight_out is None else weight_out[:width], accumulate, need_dx,
        )  # fmt: skip
        accumulate = True  # the first run is the widest
        if dx is not None and part is not None:
            dx[rows, :width] = part
    return dx
