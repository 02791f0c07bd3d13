"""Group norm whose affine parameters are read up to the channels of its input. x (N, c, *).

Twin of :mod:`sorted_kernels.reference.group_norm`, where arguments and results are described.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sorted_kernels.reference import group_norm as reference
from sorted_kernels.triton.channel_sums import gradient_sums, moments
from sorted_kernels.triton.channels import dense_layout, input_gradient, like_layout, normalize
from sorted_kernels.triton.column_sum import column_sum_into


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y like x, mean (N * G,) and rstd (N * G,), the statistics in float32.

    An input without elements takes the reference.
    """
    if x.numel() == 0:
        return reference.group_norm(x, weight, bias, num_groups, eps)
    x, layout = dense_layout(x, pooled=False)
    if num_groups == layout.channels:
        mean, rstd = moments(x, layout, eps)
    else:  # channels of equally many elements: what remains is tiny
        means, variances = (
            each.view(layout.samples * num_groups, -1) for each in moments(x, layout, None)
        )
        mean = means.mean(1)
        var = variances.mean(1) + (means - mean[:, None]).square().mean(1)
        rstd = torch.rsqrt(var + eps)
    return normalize(x, mean, rstd, weight, bias, layout, num_groups), mean, rstd


def group_norm_backward_into(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    num_groups: int,
    weight_out: Tensor | None,
    bias_out: Tensor | None,
    accumulate_weight: bool,
    accumulate_bias: bool,
    need_dx: bool = True,
) -> Tensor | None:
    """Input gradient returned; gradients of the affine parameters written into c-sized views."""
    if x.numel() == 0:
        return reference.group_norm_backward_into(
            dy, x, mean, rstd, weight, num_groups, weight_out, bias_out,
            accumulate_weight, accumulate_bias, need_dx,
        )  # fmt: skip
    x, layout = dense_layout(x, pooled=False)
    dy = like_layout(dy, x)
    *partials, splits = gradient_sums(dy, x, mean, rstd, layout, num_groups)
    pairs = ((weight_out, accumulate_weight), (bias_out, accumulate_bias))
    for partial, (out, add) in zip(partials, pairs, strict=True):
        if out is not None:
            column_sum_into(partial, out, add)
    if not need_dx:
        return None
    per_group = layout.channels // num_groups * layout.space
    sums = []
    for partial in partials:
        of_sample = partial.view(layout.samples, splits, -1).sum(1)
        scaled = of_sample if weight is None else of_sample * weight[: x.shape[1]]
        sums.append(scaled.view(layout.samples * num_groups, -1).sum(1) / per_group)
    return input_gradient(dy, x, mean, rstd, weight, sums[0], sums[1], layout, num_groups)
