"""RMS norm whose scale is read up to the width of its input. x (..., k)."""

from __future__ import annotations

import torch
from torch import Tensor

from sorted_kernels.reference.affine import place, prefix_of


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
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # one pass, without the squares
    rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = wide * rstd
    if weight is not None:
        y.mul_(prefix_of(weight, x.shape[-1]))
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
    """Input gradient returned; gradient of the scale written into a k-sized view.

    One buffer of the input's size serves all: a new one costs more than a pass over it.
    """
    k, wide_dy, wide = x.shape[-1], _wide(dy), _wide(x)
    scale = prefix_of(weight, k)
    work = (wide_dy * wide).mul_(rstd)  # dy * normed
    rows = work.reshape(-1, k)
    if weight_out is not None:
        place(weight_out, rows.sum(0), accumulate)
    if not need_dx:
        return None
    inner = rows.sum(-1) if scale is None else _times(rows, _wide(scale))
    pull = inner.view(rstd.shape).mul_(rstd.square()).div_(-k)
    dx = torch.mul(wide_dy, rstd, out=work)
    if scale is not None:
        dx.mul_(scale)
    return dx.addcmul_(wide, pull).to(x.dtype)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Their product in their own dtype, whatever ``torch.autocast`` says."""
    return torch.mv(matrix, vector, out=matrix.new_empty(matrix.shape[0]))
