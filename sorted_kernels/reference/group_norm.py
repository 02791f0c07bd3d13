"""Group norm whose affine parameters are read up to the channels of its input. x (N, c, *)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from sorted_kernels.reference.affine import dense, place, prefix_of


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each group of channels of each sample.

    Args:
        x: (N, c, *spatial).
        weight: (C,) parent or None; the first c are used.
        bias: (C,) parent or None; the first c are used.
        num_groups: G, a divisor of c.
        eps: Added to the variance.

    Returns:
        y like x; mean (N * G,) and rstd (N * G,), in float32 for half precision.
    """
    kept, c = suggest_memory_format(x), x.shape[1]
    given, scale = _in_torchs_dtype(x, prefix_of(weight, c))
    shift = prefix_of(bias, c)
    y, mean, rstd = torch.native_group_norm(
        dense_for_torch(given), scale, shift, *sizes_for_torch(x), num_groups, eps
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    return dense(y.to(x.dtype), kept), mean.flatten().to(wide), rstd.flatten().to(wide)


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
    kept = suggest_memory_format(x)
    given, scale = _in_torchs_dtype(x, prefix_of(weight, x.shape[1]))
    given = dense_for_torch(given)
    upstream = dense_for_torch(dy.to(given.dtype), like=given)
    kind = given.dtype if scale is None else scale.dtype
    wants = torch_wants(given, need_dx, weight_out is not None, bias_out is not None)
    dx, dw, db = torch.ops.aten.native_group_norm_backward(
        upstream, given, mean.to(kind), rstd.to(kind), scale, *sizes_for_torch(x), num_groups,
        wants,
    )  # fmt: skip
    place(weight_out, dw, accumulate_weight)
    place(bias_out, db, accumulate_bias)
    return dense(dx.to(x.dtype), kept) if need_dx else None


def sizes_for_torch(x: Tensor) -> tuple[int, int, int]:
    """Samples, channels, and elements of a channel."""
    return x.shape[0], x.shape[1], x.shape[2:].numel()


def dense_for_torch(x: Tensor, like: Tensor | None = None) -> Tensor:
    """An activation, never a weight, in the layout that torch's kernels have (of ``like``)."""
    if x.is_contiguous() and (like is None or like.is_contiguous()):
        return x
    if x.device.type != "cpu":
        return dense(x, torch.contiguous_format)
    return dense(x, suggest_memory_format(x if like is None else like))


def torch_wants(x: Tensor, need_dx: bool, need_weight: bool, need_bias: bool) -> list[bool]:
    """Which gradients to ask torch for: in channels_last its CPU kernel fails without x's."""
    return [need_dx or not x.is_contiguous(), need_weight, need_bias]


def _in_torchs_dtype(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """On a GPU torch's kernel has one dtype for all; on the CPU, parameters may be wider."""
    if scale is not None and x.device.type != "cpu":
        x = x.to(scale.dtype)
    return x, scale
