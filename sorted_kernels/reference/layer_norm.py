"""Layer norm whose affine parameters are read up to the width of its input. x (..., k)."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise over the last axis.

    Args:
        x: (..., k).
        weight: (K,) parent or None; the first k are used.
        bias: (K,) parent or None; the first k are used.
        eps: Added to the variance.

    Returns:
        y (..., k), mean (..., 1), rstd (..., 1); the statistics in float32 for half precision.
    """
    k = x.shape[-1]
    y, mean, rstd = torch.native_layer_norm(
        x, (k,), None if weight is None else weight[:k], None if bias is None else bias[:k], eps
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    return y, mean.to(wide), rstd.to(wide)


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
    k = x.shape[-1]
    view = None if weight is None else weight[:k]
    if x.device.type == "cpu":  # where torch has the statistics in the input's own dtype
        mean, rstd = mean.to(x.dtype), rstd.to(x.dtype)
    wants = [need_dx, weight_out is not None, bias_out is not None]
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy, x, (k,), mean, rstd, view, view if bias_out is None else bias_out, wants
    )
    if weight_out is not None:
        weight_out.add_(dw) if accumulate_weight else weight_out.copy_(dw)
    if bias_out is not None:
        bias_out.add_(db) if accumulate_bias else bias_out.copy_(db)
    return dx if need_dx else None
