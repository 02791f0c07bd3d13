"""Cross-entropy of one or many exits under a linear head, without their logits ever being whole.

Gradients come with the forward pass where the loss is reduced: the rows' upstream gradients are
then known but for one factor an exit, and if the exits' factors turn out equal (the mean or sum of
their losses, which may be weighed) nothing is computed twice. Otherwise the backward computes the
logits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import DeviceError, DTypeError, GradientError, OptionError, ShapeError
from sorted_kernels.ops.checks import (
    autocast,
    check_input,
    check_parameter,
    check_same_dtype,
    embed_prefix,
)
from sorted_kernels.ops.gradient import ANCHOR, IN_PLACE_TWICE, GradientSlot, detached, lands
from sorted_kernels.ops.linear_cross_entropy_ops import losses_of, run_with
from sorted_kernels.reference.linear_cross_entropy import Gradients, wide_dtype

REDUCTIONS = ("none", "mean", "sum")
Unit = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of hidden, weight and bias for an upstream gradient of one."""


class _LinearCrossEntropy(Function):
    """Losses of E exits of N rows each, (E,) reduced or (E N,) not.

    ``factor`` is what the reduction multiplies a row's loss by, or None where it does not reduce;
    ``exit_weights`` (E,) is what the losses of each exit are multiplied by, or None for ones;
    ``ahead`` says that a backward can be expected, so that the forward has its gradients ready.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        exits: int,
        factor: Tensor | None,
        exit_weights: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        weight_slot: GradientSlot | None,
        bias_slot: GradientSlot | None,
        dense: bool,
        ahead: bool,
        anchor: Tensor | None,
    ) -> Tensor:
        ctx.exits, ctx.options = exits, (ignore_index, label_smoothing)
        ctx.slots, ctx.dense = (weight_slot, bias_slot), dense
        ctx.wants = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1] or weight_slot is not None,
            bias is not None and (ctx.needs_input_grad[2] or bias_slot is not None),
        )
        ctx.unit = None
        if ahead and factor is not None and any(ctx.wants):
            ctx.unit = _unit_gradients(hidden, weight, bias, ctx.wants)
            scale = None if exit_weights is None else _of_rows(exit_weights, target)
            places = Gradients(*ctx.unit)
            losses = run_with(
                hidden, weight, bias, target, scale, ignore_index, label_smoothing, places
            )
        else:
            run = torch.ops.sorted_kernels.linear_cross_entropy if is_compiling() else losses_of
            losses = run(hidden, weight, bias, target, *ctx.options)
        ctx.save_for_backward(hidden, weight, bias, target, factor, exit_weights)
        return _reduced(losses, exits, factor, exit_weights)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            if not ctx.dense:
                raise GradientError(IN_PLACE_TWICE)
            return (*_differentiable(ctx, dy), *[None] * 11)
        hidden, weight, bias, target, factor, exit_weights = ctx.saved_tensors
        scale = dy if factor is None else dy * factor.masked_fill(factor.isinf(), 0)
        unit = _handed_over(ctx)
        if unit is not None and ctx.exits > 1 and dy.stride(0) and not bool((dy == dy[0]).all()):
            unit = None  # the exits' factors differ
        if unit is None:
            scale = scale if factor is None else _of_rows(scale, target)
            if exit_weights is not None:
                scale = scale * _of_rows(exit_weights, target)
        if not ctx.dense and not is_compiling():
            return _land(ctx, scale, unit), *[None] * 13
        if unit is not None:
            dx, dw, db = (
                None if part is None else _times(part, scale, like)
                for part, like in zip(unit, (hidden, weight, bias), strict=True)
            )
        else:
            run = torch.ops.sorted_kernels.linear_cross_entropy_backward
            every = run(scale, hidden, weight, bias, target, *ctx.options, *ctx.wants)
            dx, dw, db = (
                part if wanted else None for part, wanted in zip(every, ctx.wants, strict=True)
            )
        if not ctx.dense:
            for slot, part in zip(ctx.slots, (dw, db), strict=True):
                if lands(slot) and part is not None:
                    torch.ops.sorted_kernels.accumulate_prefix(part, slot.token, slot.handle)
            return dx, *[None] * 13
        weight_slot, bias_slot = (None, None) if is_compiling() else ctx.slots
        if weight_slot is not None:
            weight_slot.expect(weight.shape[0], hidden.shape[1])
        if bias_slot is not None:
            bias_slot.expect(weight.shape[0])
        if dw is not None and (is_compiling() or dw.shape != weight.shape):
            dw = embed_prefix(dw, weight.shape)
        return dx, dw, db, *[None] * 11


def _of_rows(of_exits: Tensor, target: Tensor) -> Tensor:
    """What each exit has (E,), for each of its rows (E N,)."""
    rows = target.shape[0] // of_exits.shape[0]
    return of_exits.unsqueeze(1).expand(-1, rows).reshape(-1)


def _reduced(
    losses: Tensor, exits: int, factor: Tensor | None, exit_weights: Tensor | None
) -> Tensor:
    """Losses (E N,) as the function gives them."""
    if factor is not None:
        losses = losses.view(exits, -1).sum(1) * factor
    if exit_weights is None:
        return losses
    return (losses.view(exits, -1) * exit_weights.unsqueeze(1)).view_as(losses)


def _unit_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: tuple[bool, bool, bool]
) -> Unit:
    """Places for the gradients of the sum of all losses, times the weights of their exits.

    What the sum is to be multiplied by is known in the backward: in half precision, neither its
    smallness (a mean) nor its size (a loss scale) can then push single gradients out of range. The
    sums over rows stay in float32 until then.
    """
    words, k, wide = weight.shape[0], hidden.shape[1], wide_dtype(weight.dtype)
    return (
        torch.empty_like(hidden) if wants[0] else None,
        weight.new_empty(words, k, dtype=wide) if wants[1] else None,
        weight.new_empty(words, dtype=wide) if wants[2] else None,
    )


def _handed_over(ctx: Any) -> Unit | None:
    """The gradients that the forward has ready, which are then the backward's own.

    It may write on them, so that a hidden state costs its gradient and not two of them, and they
    are gone after it, whoever keeps the loss. A second backward over the graph computes its own.
    """
    unit = ctx.unit
    if unit is not None:
        ctx.unit = None
    return unit


def _times(part: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """A unit gradient, which is lost, times the first of the scales in the dtype of ``like``."""
    if part.dtype == like.dtype:
        # In half precision on a CPU, a factor with an axis would bring a float32 copy of the rest;
        # on a GPU one without an axis would be rounded first.
        return part.mul_(scale[:1] if part.is_cuda else scale[0])
    return torch.mul(part, scale[:1], out=torch.empty_like(part, dtype=like.dtype))


def _land(ctx: Any, scale: Tensor, unit: Unit | None) -> Tensor | None:
    """Gradients of weight and bias straight into their parameters'; returns that of hidden.

    Args:
        ctx: Of the forward.
        scale: What the gradients in ``found`` are multiplied by (its first element), or else the
            upstream gradients (R,) of the rows.
        unit: Gradients for an upstream gradient of one, if the forward has them; they are lost.
    """
    hidden, weight, bias, target, *_ = ctx.saved_tensors
    sizes = ((weight.shape[0], hidden.shape[1]), (weight.shape[0], 1))
    (dw, add_dw), (db, add_db) = (
        slot.prefix(*size) if lands(slot) else (None, False)
        for slot, size in zip(ctx.slots, sizes, strict=True)
    )
    if unit is None:
        dx = torch.empty_like(hidden) if ctx.wants[0] else None
        places = Gradients(dx, dw, db, (add_dw, add_db))
        ignore_index, label_smoothing = ctx.options
        run_with(hidden, weight, bias, target, scale, ignore_index, label_smoothing, places)
        return dx
    for view, accumulate, part in ((dw, add_dw, unit[1]), (db, add_db, unit[2])):
        if view is not None and accumulate:
            view.addcmul_(part, scale[:1])  # type: ignore[arg-type]
        elif view is not None:
            torch.mul(part, scale[:1], out=view)  # type: ignore[arg-type]
    return None if unit[0] is None else _times(unit[0], scale, hidden)


def _differentiable(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """Gradients in PyTorch operations that can be differentiated again; logits are whole here."""
    hidden, weight, bias, target, factor, exit_weights = ctx.saved_tensors
    ignore_index, label_smoothing = ctx.options
    block = weight[:, : hidden.shape[1]].to(hidden.dtype)
    shift = None if bias is None else bias.to(hidden.dtype)
    losses = F.cross_entropy(
        F.linear(hidden, block, shift).to(wide_dtype(hidden.dtype)), target.long(),
        ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing,
    )  # fmt: skip
    total = _reduced(losses, ctx.exits, factor, exit_weights)
    inputs = (hidden, weight, bias)
    asked = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(total, asked, dy, create_graph=True))
    return [next(found) if need else None for need in ctx.needs_input_grad[:3]]


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int
) -> None:
    check_input(hidden, "hidden")
    check_parameter(weight, hidden, "weight", 2)
    check_same_dtype(weight, hidden, "weight")
    if hidden.shape[-1] > weight.shape[1]:
        raise ShapeError(
            f"hidden has {hidden.shape[-1]} features; weight's second axis has {weight.shape[1]} "
            "at most"
        )
    if bias is not None:
        check_parameter(bias, hidden, "bias", 1)
        check_same_dtype(bias, hidden, "bias")
        if bias.shape[0] != weight.shape[0]:
            raise ShapeError(f"bias has {bias.shape[0]} elements, weight {weight.shape[0]} rows")
    if target.device != hidden.device:
        raise DeviceError(f"target is on {target.device}, hidden on {hidden.device}")
    if target.dtype not in (torch.int64, torch.int32):
        raise DTypeError(f"target has dtype {target.dtype}; allowed are int64 and int32")
    if target.shape not in (hidden.shape[:-1], hidden.shape[1:-1]):
        raise ShapeError(
            f"target has shape {tuple(target.shape)} and hidden {tuple(hidden.shape)}; allowed are "
            "hidden (..., k), or (E, ..., k) for E exits, with target (...)"
        )
    if target.shape != hidden.shape[:-1] and hidden.shape[0] < 1:
        raise ShapeError(f"hidden has shape {tuple(hidden.shape)}; it needs at least one exit")
    if target.device.type == "cpu" and not is_compiling():  # on a GPU it would have to be awaited
        wrong = (target != ignore_index) & ((target < 0) | (target >= weight.shape[0]))
        if wrong.any():
            raise OptionError(
                f"target has {int(target[wrong][0])}; allowed are 0..{weight.shape[0] - 1} and "
                f"ignore_index={ignore_index}"
            )


def run_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    exit_weights: Sequence[float] | Tensor | None,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
    dense: bool,
) -> Tensor:
    """:func:`linear_cross_entropy` for layers, whose slots say where gradients land."""
    hidden = autocast(hidden)
    _check(hidden, weight, bias, target, ignore_index)
    if reduction not in REDUCTIONS:
        raise OptionError(f"reduction={reduction!r}; allowed are {', '.join(REDUCTIONS)}")
    if not 0 <= label_smoothing <= 1:
        raise OptionError(f"label_smoothing={label_smoothing!r}; allowed are 0 to 1")
    shape = hidden.shape[:-1]
    many = target.shape != shape
    exits = hidden.shape[0] if many else 1
    rows = hidden.reshape(-1, hidden.shape[-1])
    words = target.reshape(-1)
    words = words.repeat(exits) if many else words
    factor, wide = None, wide_dtype(hidden.dtype)
    if exit_weights is not None:
        exit_weights = torch.as_tensor(exit_weights, dtype=wide, device=hidden.device).detach()
        if not many or exit_weights.shape != (exits,):
            raise ShapeError(
                f"exit_weights has shape {tuple(exit_weights.shape)}; allowed is one weight for "
                f"each exit of hidden (E, ..., k), here {(exits,) if many else 'no exits'}"
            )
    if reduction != "none":
        factor = torch.ones((), dtype=wide, device=hidden.device)
        if reduction == "mean":
            factor = 1 / (target != ignore_index).sum().to(wide)
    anchor = None
    if not dense:
        weight, bias, anchor = weight.detach(), detached(bias), ANCHOR
    losses = _LinearCrossEntropy.apply(
        rows, weight, bias, words, exits, factor, exit_weights, ignore_index, label_smoothing,
        weight_slot, bias_slot, dense, torch.is_grad_enabled() and not is_compiling(), anchor,
    )  # fmt: skip
    if factor is None:
        return losses.view(shape)
    return losses if many else losses[0]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    exit_weights: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of ``hidden @ weight[:, :k].T + bias``, whose logits are never whole.

    Several exits of a model share the head: they are rows like any other, and the head's gradient
    is written once for all. An exit costs its hidden states, and no more memory. With a reduction
    and equal upstream gradients of the exits (their mean or sum) nothing is computed twice; else
    the backward computes the logits again: what makes exits count for more are ``exit_weights``. As
    Liger Kernel's fused linear cross-entropy and Apple's cut cross-entropy, of one exit.

    Args:
        hidden: (..., k), or (E, ..., k) for E exits, k at most K.
        weight: (V, K) with unit inner stride, hidden's dtype.
        target: (...), int64 or int32 classes below V.
        bias: (V,) or None.
        ignore_index: Targets that do not count.
        label_smoothing: As in torch, from 0 to 1.
        reduction: ``"mean"`` over the targets that count (NaN if there is none, as in torch),
            ``"sum"``, or ``"none"``.
        exit_weights: (E,) constants that the losses of each exit are multiplied by; None for ones.

    Returns:
        A scalar, or (E,) for E exits; with ``"none"`` (...) or (E, ...). In half precision,
        float32.

    Raises:
        ShapeError: Shapes do not fit, or there are ``exit_weights`` where there are no exits.
        StrideError: ``weight`` has no unit inner stride.
        DTypeError: An unsupported dtype, or two that differ outside autocast.
        DeviceError: Tensors on different devices.
        OptionError: An unknown reduction, smoothing out of range, or (on the CPU) a target outside
            the vocabulary.
    """
    return run_linear_cross_entropy(
        hidden, weight, bias, target, ignore_index, label_smoothing, reduction, exit_weights,
        None, None, True,
    )  # fmt: skip
