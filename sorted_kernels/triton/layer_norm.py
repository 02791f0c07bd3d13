"""Layer norm whose affine parameters are read up to the width of its input. x (..., k).

Twin of :mod:`sorted_kernels.reference.layer_norm`, where arguments and results are described.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sorted_kernels.reference import layer_norm as reference
from sorted_kernels.triton.norm import MAX_FEATURES, norm_backward, norm_forward
from sorted_kernels.triton.row_sizes import Runs, row_sizes, row_spans


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (..., k), mean (..., 1) and rstd (..., 1), the statistics in float32.

    Rows longer than :data:`sorted_kernels.triton.norm.MAX_FEATURES` take the reference.
    """
    if x.shape[-1] > MAX_FEATURES:
        return reference.layer_norm(x, weight, bias, eps)
    y, mean, rstd = norm_forward(x, weight, bias, eps, centred=True)
    assert mean is not None  # it is centred
    return y, mean, rstd


def layer_norm_backward_into(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    weight_out: Tensor | None,
    bias_out: Tensor | None,
    accumulate_weight: bool,
    accumulate_bias: bool,
    need_dx: bool = True,
) -> Tensor | None:
    """Input gradient returned; gradients of the affine parameters written into k-sized views."""
    if x.shape[-1] > MAX_FEATURES:
        return reference.layer_norm_backward_into(
            dy, x, mean, rstd, weight, weight_out, bias_out,
            accumulate_weight, accumulate_bias, need_dx,
        )  # fmt: skip
    outs, accumulate = (weight_out, bias_out), (accumulate_weight, accumulate_bias)
    return norm_backward(dy, x, mean, rstd, weight, outs, accumulate, need_dx)


def ragged_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, runs: Runs, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of rows of different widths.

    Args:
        x: (N, >= k), unit inner stride; what it holds past a row's width does not matter.
        weight: (K,) parent or None.
        bias: (K,) parent or None.
        runs: ``(rows, out_features, in_features)`` triples, sorted largest first; N rows in all. A
            row's width is its in_features, k the first run's.
        eps: Added to the variance.

    Returns:
        y (N, k), zero past a row's width; mean (N, 1) and rstd (N, 1), in float32.
    """
    n_rows, k = x.shape[0], runs[0][2]
    if k > MAX_FEATURES:
        y, mean, rstd = x.new_zeros((n_rows, k)), *x.new_empty((2, n_rows, 1), dtype=torch.float32)
        for rows, _, width in row_spans(runs):
            parts = layer_norm(x[rows, :width], weight, bias, eps)
            y[rows, :width], mean[rows], rstd[rows] = parts
        return y, mean, rstd
    y, means, rstd = norm_forward(x, weight, bias, eps, True, row_sizes(runs, x.device))
    assert means is not None  # it is centred
    return y, means, rstd


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
    """Input gradient (N, k) returned, zero past a row's width; the others' first k written.

    Arguments are those of :func:`ragged_layer_norm` and :func:`layer_norm_backward_into`; what dy
    (N, >= k) holds past a row's width does not matter.
    """
    outs, accumulate = (weight_out, bias_out), (accumulate_weight, accumulate_bias)
    k = runs[0][2]
    if k <= MAX_FEATURES:
        sizes = row_sizes(runs, x.device)
        return norm_backward(dy, x, mean, rstd, weight, outs, accumulate, need_dx, sizes)
    dx = x.new_zeros((x.shape[0], k)) if need_dx else None
    for rows, _, width in row_spans(runs):
        part = layer_norm_backward_into(
            dy[rows, :width], x[rows, :width], mean[rows], rstd[rows], weight,
            None if weight_out is None else weight_out[:width],
            None if bias_out is None else bias_out[:width], *accumulate, need_dx,
        )  # fmt: skip
        accumulate = (True, True)  # the first run is the widest
        if dx is not None and part is not None:
            dx[rows, :width] = part
    return dx
