"""Batch norm whose parameters and running statistics are used up to the channels of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from sorted_kernels.reference.affine import in_one_piece, place, prefix_of


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each channel.

    Args:
        x: (N, c) or (N, c, *spatial).
        weight: (C,) parent or None; the first c are used.
        bias: (C,) parent or None; the first c are used.
        running_mean: (C,) parent or None; when training, its first c move.
        running_var: (C,) parent or None; likewise, by the unbiased variance.
        training: Whether with the batch's own statistics, or with the running ones.
        momentum: The weight of the batch in the running statistics.
        eps: Added to the variance.

    Returns:
        y like x, and what it was normalised with: mean (c,) and rstd (c,), in float32 for half
        precision.
    """
    c = x.shape[1]
    means, variances = prefix_of(running_mean, c), prefix_of(running_var, c)
    y, mean, rstd = torch.native_batch_norm(
        in_one_piece(x),
        prefix_of(weight, c),
        prefix_of(bias, c),
        means,
        variances,
        training,
        momentum,
        eps,
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    if not training:
        assert means is not None and variances is not None  # callers have looked
        return y, means.to(wide, copy=True), torch.rsqrt(variances.to(wide) + eps)
    return y, mean.to(wide), rstd.to(wide)


def batch_norm_backward_into(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    training: bool,
    weight_out: Tensor | None,
    bias_out: Tensor | None,
    accumulate_weight: bool,
    accumulate_bias: bool,
    need_dx: bool = True,
) -> Tensor | None:
    """Input gradient returned; gradients of the affine parameters written into c-sized views."""
    c = x.shape[1]
    scale = prefix_of(weight, c)
    if mean.dtype != x.dtype:  # torch takes wide statistics with a wide scale only
        scale = torch.ones_like(mean) if scale is None else scale.to(mean.dtype)
    wants = [need_dx, weight_out is not None, bias_out is not None]
    # Fixed statistics are given as running ones, of which torch takes the root itself.
    running = (None, None) if training else (mean, rstd.pow(-2))
    dx, dw, db = torch.ops.aten.native_batch_norm_backward(
        in_one_piece(dy), in_one_piece(x), scale, *running, mean, rstd, training, 0.0, wants
    )
    place(weight_out, dw, accumulate_weight)
    place(bias_out, db, accumulate_bias)
    return dx if need_dx else None
