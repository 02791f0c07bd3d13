"""The leading part of a parameter along its first or last axis, whose gradient lands in place.

For parameters that a module uses by itself: a class token, position embeddings, the weight of a
layer that has no elastic form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import GradientError
from sorted_kernels.ops.gradient import ANCHOR, IN_PLACE_TWICE, GradientSlot, lands


class _Prefix(Function):
    @staticmethod
    def forward(
        ctx: Any, param: Tensor, axis: int, size: int, slot: GradientSlot, anchor: Tensor
    ) -> Tensor:
        ctx.axis, ctx.slot, ctx.dim = axis, slot, param.dim()
        return _view(param, axis, size)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        if lands(ctx.slot):
            gradient = dy
            if ctx.dim > 1:
                gradient = dy.reshape(dy.shape[0], -1) if ctx.axis == 0 else dy.flatten(0, -2)
            if is_compiling():
                token, handle = ctx.slot.token, ctx.slot.handle
                torch.ops.sorted_kernels.accumulate_prefix(gradient, token, handle)
            else:
                ctx.slot.add(gradient)
        return (None,) * 5


def _view(param: Tensor, axis: int, size: int) -> Tensor:
    return param.narrow(axis, 0, size)


def matrix_of(param: Tensor, axis: int) -> tuple[int, int] | None:
    """Rows and columns of the matrix whose leading block the leading part of an axis is."""
    if param.dim() < 2:
        return None
    fixed = param.numel() // param.shape[axis]
    return (param.shape[0], fixed) if axis == 0 else (fixed, param.shape[-1])


def run_prefix(
    param: Tensor, axis: int, size: int, slot: GradientSlot | None, dense: bool
) -> Tensor:
    """The first ``size`` places of an axis, as a view.

    Args:
        param: The parameter, contiguous.
        axis: 0 or -1.
        size: How many places.
        slot: Where the gradient lands; its matrix is :func:`matrix_of` the parameter.
        dense: Whether a full-size gradient goes through autograd.
    """
    if dense or slot is None:
        part = _view(param, axis, size)
        if slot is not None and part.requires_grad and not is_compiling():
            rows, cols = slot.staircase.rows, slot.staircase.cols
            block = (size, cols) if axis == 0 or param.dim() == 1 else (rows, size)
            part.register_hook(lambda _: slot.expect(*block))
        return part
    if not is_compiling() and not torch.is_grad_enabled():
        return _view(param, axis, size)
    return _Prefix.apply(param.detach(), axis, size, slot, ANCHOR)
