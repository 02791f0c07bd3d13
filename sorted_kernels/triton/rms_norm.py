"""RMS norm whose scale is read up to the width of its input. x (..., k).

Twin of :mod:`sorted_kernels.reference.rms_norm`, where arguments and results are described.
"""

from __future__ import annotations

from torch import Tensor

from sorted_kernels.reference import rms_norm as reference
from sorted_kernels.triton.norm import MAX_FEATURES, norm_backward, norm_forward


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
