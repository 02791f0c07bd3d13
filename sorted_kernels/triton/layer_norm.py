"""Layer norm whose affine parameters are read up to the width of its input. x (..., k).

Twin of :mod:`sorted_kernels.reference.layer_norm`, where arguments and results are described.
"""

from __future__ import annotations

from torch import Tensor

from sorted_kernels.reference import layer_norm as reference
from sorted_kernels.triton.norm import MAX_FEATURES, norm_backward, norm_forward


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
