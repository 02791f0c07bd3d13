"""RMS norm whose scale is read up to the width of its input. x (..., k)."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """Half precision is computed in float32, as the LLaMA models do; wider types as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x^2) + eps) * weight[:k]``.

    Args:
        x: (..., k).
        weight: (K,) parent or None; the first k are used.
        eps: Added to the mean square.

    Returns:
        y (..., k) in x's dtype, rstd (..., 1) (float32 for half precision).
    """
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    y = wide * rstd
    if weight is not None:
        y.mul_(weight[: x.shape[-1]])
    return y.to(x.dtype), rstd


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
    wide_dy, normed = _wide(dy), _wide(x) * rstd
    if weight_out is not None:
        dw = (wide_dy * normed).reshape(-1, x.shape[-1]).sum(0)
        weight_out.add_(dw) if accumulate else weight_out.copy_(dw)
    if not need_dx:
        return None
    scaled = wide_dy if weight is None else wide_dy * weight[: x.shape[-1]]
    inner = (scaled * normed).mean(-1, keepdim=True)
    return ((scaled - normed * inner) * rstd).to(x.dtype)
