"""Linear layers that store (in, out) weights, several side by side: GPT-2's ``Conv1D``.

``y_p = x @ weight[:k, p M : p M + m] + bias[p M : p M + m]`` for each of the parts p. The products
are those of :mod:`sorted_kernels.ops.linear` with the roles of the operands changed: forward is its
dgrad, and the other way round. Nothing is copied: each part is read through its strides.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import GradientError, ShapeError
from sorted_kernels.ops.backend import linear_implementation
from sorted_kernels.ops.checks import (
    autocast,
    check_count,
    check_input,
    check_parameter,
    check_same_dtype,
)
from sorted_kernels.ops.gradient import ANCHOR, IN_PLACE_TWICE, GradientSlot, detached, lands
from sorted_kernels.ops.linear import _dgrad, _linear, _wgrad_into
from sorted_kernels.reference import linear as reference


class _TransposedLinear(Function):
    """Gradients in place; the weight's slot takes it for a (parts K, M) matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out_features: int,
        parts: int,
        weight_slot: GradientSlot | None,
        bias_slot: GradientSlot | None,
        anchor: Tensor,
    ) -> Tensor:
        need_dx = ctx.needs_input_grad[0]
        ctx.save_for_backward(x if weight_slot is not None else None, weight if need_dx else None)
        ctx.parts, ctx.slots = parts, (weight_slot, bias_slot)
        ctx.in_features, ctx.out_features = x.shape[-1], out_features
        return _forward(x, weight, bias, out_features, parts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        x, weight = ctx.saved_tensors
        weight_slot, bias_slot = ctx.slots
        parts, k, m = ctx.parts, ctx.in_features, ctx.out_features
        dys = dy.split(m, -1)
        dx = None
        if weight is not None:
            dx = _dx(dys[0], weight, k, 0, parts)
            for part in range(1, parts):
                dx = dx + _dx(dys[part], weight, k, part, parts)
        if lands(weight_slot):
            rows = [part.reshape(-1, m) for part in dys]
            _weight_gradient(x.reshape(-1, k), rows, weight_slot)
        if lands(bias_slot):
            _bias_gradient(dy.reshape(-1, parts * m), parts, bias_slot)
        return dx, *[None] * 7


def _part(weight: Tensor, part: int, parts: int) -> Tensor:
    """One part's (K, M) weight, or (M,) bias, as a view."""
    size = weight.shape[-1] // parts
    return weight[..., part * size : (part + 1) * size]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, m: int, parts: int) -> Tensor:
    outputs = [
        _product(
            x, _part(weight, part, parts), None if bias is None else _part(bias, part, parts), m
        )
        for part in range(parts)
    ]
    return outputs[0] if parts == 1 else torch.cat(outputs, -1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, m: int) -> Tensor:
    """``x @ weight[:k, :m] + bias[:m]``, rounded once where PyTorch does it."""
    k = x.shape[-1]
    if bias is not None and (is_compiling() or _in_plain_torch(x, weight, m)):
        block, shift = weight[:k, :m].to(x.dtype), bias[:m].to(x.dtype)
        return torch.addmm(shift, x.reshape(-1, k), block).view(*x.shape[:-1], m)
    run = torch.ops.sorted_kernels.linear_dgrad if is_compiling() else _dgrad
    y = run(x, weight, m)
    return y if bias is None else y.add_(bias[:m])


def _in_plain_torch(x: Tensor, weight: Tensor, m: int) -> bool:
    return linear_implementation("dgrad", (x, weight), x.shape[-1], m) is reference


def _dx(dy: Tensor, weight: Tensor, k: int, part: int, parts: int) -> Tensor:
    run = torch.ops.sorted_kernels.linear if is_compiling() else _linear
    return run(dy, _part(weight, part, parts), None, k, "none", False)[0]


def _weight_gradient(x: Tensor, dys: list[Tensor], slot: GradientSlot) -> None:
    """Every part's product into rows ``part, part + parts, ...`` of the slot's matrix."""
    parts, k, m = len(dys), x.shape[-1], dys[0].shape[-1]
    if is_compiling():
        gradient = torch.stack([x.t() @ dy for dy in dys], 1).reshape(parts * k, m)
        torch.ops.sorted_kernels.accumulate_prefix(gradient, slot.token, slot.handle)
        return
    block, accumulate = slot.prefix(parts * k, m)
    for part, dy in enumerate(dys):
        _wgrad_into(x, dy, block[part::parts], accumulate)


def _bias_gradient(dy: Tensor, parts: int, slot: GradientSlot) -> None:
    total = dy.sum(0)
    gradient = total if parts == 1 else total.view(parts, -1)
    if is_compiling():
        torch.ops.sorted_kernels.accumulate_prefix(gradient, slot.token, slot.handle)
    else:
        slot.add(gradient)


def run_transposed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    parts: int,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
    dense: bool,
) -> Tensor:
    """The products above, for layers, whose slots say where gradients land (``dense``: not there).

    Args:
        x: (..., k), k at most K.
        weight: (K, parts * M) with unit inner stride, x's dtype.
        bias: (parts * M,) or None.
        out_features: m of each part, from 1 to M.
        parts: How many weights lie side by side.
        weight_slot: Of the weight; its matrix is (parts * K, M) where there are several parts.
        bias_slot: Of the bias; its matrix is (parts, M) where there are several parts.
        dense: Whether full-size gradients go through autograd.

    Returns:
        (..., parts * m).
    """
    x = autocast(x)
    check_input(x)
    check_parameter(weight, x, "weight", 2)
    check_same_dtype(weight, x, "weight")
    check_count("out_features", out_features, weight.shape[1] // parts, "a part of the weight")
    if x.shape[-1] > weight.shape[0]:
        raise ShapeError(
            f"x has {x.shape[-1]} features; weight's first axis has {weight.shape[0]} at most"
        )
    if dense:
        return _differentiable(x, weight, bias, out_features, parts, weight_slot, bias_slot)
    if not is_compiling() and not torch.is_grad_enabled():
        return _forward(x, weight, bias, out_features, parts)
    return _TransposedLinear.apply(
        x, weight.detach(), detached(bias), out_features, parts, weight_slot, bias_slot, ANCHOR
    )


def _differentiable(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    m: int,
    parts: int,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
) -> Tensor:
    """PyTorch's own products on the views, whose gradients are full-size ones."""
    k = x.shape[-1]
    outputs = []
    for part in range(parts):
        block = _part(weight, part, parts)[:k, :m].to(x.dtype)
        shift = None if bias is None else _part(bias, part, parts)[:m].to(x.dtype)
        outputs.append(F.linear(x, block.t(), shift))
    y = outputs[0] if parts == 1 else torch.cat(outputs, -1)
    if y.requires_grad and not is_compiling():

        def announce(_: Tensor) -> None:
            if weight_slot is not None:
                weight_slot.expect(parts * k, m)
            if bias_slot is not None:
                bias_slot.expect(*((parts, m) if parts > 1 else (m,)))

        y.register_hook(announce)
    return y
