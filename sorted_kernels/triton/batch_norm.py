"""Batch norm whose parameters and running statistics are used up to the channels of its input.

Twin of :mod:`sorted_kernels.reference.batch_norm`, where arguments and results are described.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sorted_kernels.reference import batch_norm as reference
from sorted_kernels.reference.affine import prefix_of
from sorted_kernels.triton.channel_sums import gradient_sums, moments
from sorted_kernels.triton.channels import dense_layout, input_gradient, like_layout, normalize
from sorted_kernels.triton.column_sum import column_sum_into


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
    """Return y like x, mean (c,) and rstd (c,), the statistics in float32.

    An input without elements takes the reference.
    """
    if x.numel() == 0:
        return reference.batch_norm(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
    x, layout = dense_layout(x, pooled=True)
    running = prefix_of(running_mean, x.shape[1]), prefix_of(running_var, x.shape[1])
    if training:
        mean, rstd = moments(x, layout, eps, running, momentum)
    else:
        assert running[0] is not None and running[1] is not None  # callers have looked
        mean = running[0].to(torch.float32, copy=True)
        rstd = torch.rsqrt(running[1].float() + eps)
    return normalize(x, mean, rstd, weight, bias, layout, 1), mean, rstd


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
    if x.numel() == 0:
        return reference.batch_norm_backward_into(
            dy, x, mean, rstd, weight, training, weight_out, bias_out,
            accumulate_weight, accumulate_bias, need_dx,
        )  # fmt: skip
    x, layout = dense_layout(x, pooled=True)
    dy = like_layout(dy, x)
    slope = shift = None
    if training or weight_out is not None or bias_out is not None:
        partials = gradient_sums(dy, x, mean, rstd, layout, 1)
        pairs = ((weight_out, accumulate_weight), (bias_out, accumulate_bias))
        for partial, (out, add) in zip(partials[:2], pairs, strict=True):
            if out is not None:
                column_sum_into(partial, out, add)
        if training and need_dx:
            slope, shift = (torch.empty_like(mean) for _ in range(2))
            for total, partial in zip((slope, shift), partials[:2], strict=True):
                column_sum_into(partial, total, False)
                scale = 1.0 if weight is None else weight[: x.shape[1]]
                total.mul_(scale).div_(layout.count)
    if not need_dx:
        return None
    return input_gradient(dy, x, mean, rstd, weight, slope, shift, layout, 1)
