"""Cross-entropy of one or many exits under a linear head, without their logits ever being whole.

Gradients come with the forward pass where the loss is reduced: the rows' upstream gradients are
then known but for one factor an exit, and if the exits' factors turn out equal (the mean or sum of
their losses) nothing is computed twice. Otherwise the backward computes the logits again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import DTypeError, GradientError, OptionError, ShapeError
from sorted_kernels.ops.backend import implementation
from sorted_kernels.ops.checks import (
    autocast,
    check_input,
    check_parameter,
    check_same_dtype,
    embed_prefix,
)
from sorted_kernels.ops.gradient import ANCHOR, IN_PLACE_TWICE, GradientSlot, detached, lands
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.reference.linear_cross_entropy import Gradients, wide_dtype

REDUCTIONS = ("none", "mean", "sum")

LIBRARY.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target,"
    " SymInt ignore_index, float label_smoothing) -> Tensor"
)
LIBRARY.define(
    "linear_cross_entropy_backward(Tensor scale, Tensor hidden, Tensor weight, Tensor? bias,"
    " Tensor target, SymInt ignore_index, float label_smoothing,"
    " bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The weight as it is; under autocast its block in the hidden states' dtype."""
    if weight.dtype == hidden.dtype:
        return weight, bias
    block = weight[:, : hidden.shape[1]].to(hidden.dtype)
    return block, None if bias is None else bias.to(hidden.dtype)


def _losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Losses (R,) of rows (R, k)."""
    run = implementation("linear_cross_entropy", hidden).linear_cross_entropy
    head, shift = _head(hidden, weight, bias)
    return run(hidden, head, shift, target, None, ignore_index, label_smoothing, None)


def _backward(
    scale: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (R, k), weight's block (V, k) and bias (V,); empty where not needed."""
    words, k = weight.shape[0], hidden.shape[1]
    dx = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    dw = weight.new_empty((words, k) if need_weight else 0)
    db = weight.new_empty(words if need_bias else 0)
    places = Gradients(
        dx if need_hidden else None, dw if need_weight else None, db if need_bias else None
    )
    run = implementation("linear_cross_entropy", hidden).linear_cross_entropy
    head, shift = _head(hidden, weight, bias)
    run(hidden, head, shift, target, scale, ignore_index, label_smoothing, places)
    return dx, dw, db


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("linear_cross_entropy", _losses, _device)
    LIBRARY.impl("linear_cross_entropy_backward", _backward, _device)


@torch.library.register_fake("sorted_kernels::linear_cross_entropy", lib=LIBRARY)
def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    torch._check(hidden.shape[1] <= weight.shape[1])
    return hidden.new_empty(hidden.shape[0], dtype=wide_dtype(hidden.dtype))


@torch.library.register_fake("sorted_kernels::linear_cross_entropy_backward", lib=LIBRARY)
def _backward_fake(
    scale: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    words, k = weight.shape[0], hidden.shape[1]
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        weight.new_empty((words, k) if need_weight else 0),
        weight.new_empty(words if need_bias else 0),
    )


class _LinearCrossEntropy(Function):
    """Losses of E exits of N rows each, (E,) reduced or (E N,) not.

    ``factor`` is what the reduction multiplies a row's loss by, or None where it does not reduce.
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
        ignore_index: int,
        label_smoothing: float,
        weight_slot: GradientSlot | None,
        bias_slot: GradientSlot | None,
        dense: bool,
        anchor: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, target, factor)
        ctx.exits, ctx.options = exits, (ignore_index, label_smoothing)
        ctx.slots, ctx.dense = (weight_slot, bias_slot), dense
        ctx.gradients = None
        wants = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1] or weight_slot is not None,
            bias is not None and (ctx.needs_input_grad[2] or bias_slot is not None),
        )
        ctx.wants = wants
        if factor is None or is_compiling() or not any(wants):
            run = torch.ops.sorted_kernels.linear_cross_entropy if is_compiling() else _losses
            losses = run(hidden, weight, bias, target, ignore_index, label_smoothing)
        else:
            losses = _with_gradients(ctx, hidden, weight, bias, target, factor)
        return losses if factor is None else losses.view(exits, -1).sum(1) * factor

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            if not ctx.dense:
                raise GradientError(IN_PLACE_TWICE)
            return (*_differentiable(ctx, dy), *[None] * 9)
        hidden, weight, bias, target, factor = ctx.saved_tensors
        words, k = weight.shape[0], hidden.shape[1]
        # One factor for all rows, if the forward has gone ahead and the exits' factors agree.
        ahead = ctx.gradients
        if ahead is not None and ctx.exits > 1 and not bool((dy == dy[0]).all()):
            ahead = None
        if not ctx.dense and not is_compiling():
            return _land(ctx, dy, ahead), *[None] * 11
        if ahead is None:
            run = torch.ops.sorted_kernels.linear_cross_entropy_backward
            scale = _scale_of_rows(dy, factor, ctx.exits, hidden)
            dx, dw, db = run(scale, hidden, weight, bias, target, *ctx.options, *ctx.wants)
        else:
            dx, dw, db = (None if part is None else part * dy[0].to(part.dtype) for part in ahead)
        dx, dw, db = (
            part if wanted else None for part, wanted in zip((dx, dw, db), ctx.wants, strict=True)
        )
        if not ctx.dense:
            for slot, part in zip(ctx.slots, (dw, db), strict=True):
                if lands(slot) and part is not None:
                    torch.ops.sorted_kernels.accumulate_prefix(part, slot.token, slot.handle)
            return dx, *[None] * 11
        weight_slot, bias_slot = ctx.slots
        if weight_slot is not None:
            weight_slot.expect(words, k)
        if bias_slot is not None:
            bias_slot.expect(words)
        return dx, None if dw is None else embed_prefix(dw, weight.shape), db, *[None] * 9


def _with_gradients(
    ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, factor: Tensor
) -> Tensor:
    """Losses (R,), and the gradients of their reduction for an upstream gradient of one."""
    words, k = weight.shape[0], hidden.shape[1]
    wants_hidden, wants_weight, wants_bias = ctx.wants
    ctx.gradients = (
        torch.empty_like(hidden) if wants_hidden else None,
        weight.new_empty(words, k) if wants_weight else None,
        weight.new_empty(words) if wants_bias else None,
    )
    run = implementation("linear_cross_entropy", hidden).linear_cross_entropy
    head, shift = _head(hidden, weight, bias)
    scale = factor.to(wide_dtype(hidden.dtype)).expand(hidden.shape[0])
    return run(
        hidden, head, shift, target, scale.contiguous(), *ctx.options, Gradients(*ctx.gradients)
    )


def _scale_of_rows(dy: Tensor, factor: Tensor | None, exits: int, hidden: Tensor) -> Tensor:
    """Upstream gradients (R,) of the rows' losses."""
    if factor is None:
        return dy.contiguous()
    rows = hidden.shape[0] // exits
    return (dy * factor).repeat_interleave(rows).to(wide_dtype(hidden.dtype))


def _land(ctx: Any, dy: Tensor, ahead: tuple[Tensor | None, ...] | None) -> Tensor | None:
    """Gradients of weight and bias straight into their parameters'; returns that of hidden."""
    hidden, weight, bias, target, factor = ctx.saved_tensors
    sizes = ((weight.shape[0], hidden.shape[1]), (weight.shape[0], 1))
    wanted = [slot if lands(slot) else None for slot in ctx.slots]
    places = [None if s is None else s.prefix(*size) for s, size in zip(wanted, sizes, strict=True)]
    if ahead is not None:
        for place, part in zip(places, ahead[1:], strict=True):
            if place is not None and part is not None:
                view, accumulate = place
                if accumulate:
                    view.addcmul_(part, dy[0].to(part.dtype))
                else:
                    torch.mul(part, dy[0].to(part.dtype), out=view)
        return None if ahead[0] is None else ahead[0] * dy[0].to(ahead[0].dtype)
    dx = torch.empty_like(hidden) if ctx.wants[0] else None
    views = [None if place is None else place[0] for place in places]
    accumulate = [place is not None and place[1] for place in places]
    gradients = Gradients(dx, views[0], views[1], (accumulate[0], accumulate[1]))
    run = implementation("linear_cross_entropy", hidden).linear_cross_entropy
    head, shift = _head(hidden, weight, bias)
    scale = _scale_of_rows(dy, factor, ctx.exits, hidden)
    run(hidden, head, shift, target, scale, *ctx.options, gradients)
    return dx


def _differentiable(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """Gradients in PyTorch operations that can be differentiated again; logits are whole here."""
    hidden, weight, bias, target, factor = ctx.saved_tensors
    ignore_index, label_smoothing = ctx.options
    block = weight[:, : hidden.shape[1]].to(hidden.dtype)
    shift = None if bias is None else bias.to(hidden.dtype)
    losses = F.cross_entropy(
        F.linear(hidden, block, shift).to(wide_dtype(hidden.dtype)), target.long(),
        ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing,
    )  # fmt: skip
    total = losses if factor is None else losses.view(ctx.exits, -1).sum(1) * factor
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
    if target.dtype not in (torch.int64, torch.int32):
        raise DTypeError(f"target has dtype {target.dtype}; allowed are int64 and int32")
    if target.shape not in (hidden.shape[:-1], hidden.shape[1:-1]):
        raise ShapeError(
            f"target has shape {tuple(target.shape)} and hidden {tuple(hidden.shape)}; allowed are "
            "hidden (..., k), or (E, ..., k) for E exits, with target (...)"
        )
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
    factor = None
    if reduction != "none":
        wide = wide_dtype(hidden.dtype)
        factor = torch.ones((), dtype=wide, device=hidden.device)
        if reduction == "mean":
            factor = 1 / (target != ignore_index).sum().to(wide)
    anchor = None
    if not dense:
        weight, bias, anchor = weight.detach(), detached(bias), ANCHOR
    losses = _LinearCrossEntropy.apply(
        rows, weight, bias, words, exits, factor, ignore_index, label_smoothing,
        weight_slot, bias_slot, dense, anchor,
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
) -> Tensor:
    """Cross-entropy of ``hidden @ weight[:, :k].T + bias``, whose logits are never whole.

    Several exits of a model share the head: they are rows like any other, and the head's gradient
    is written once for all. An exit costs its hidden states, and no more memory. With a reduction
    and equal upstream gradients of the exits (their mean or sum) nothing is computed twice; else
    the backward computes the logits again. As Liger Kernel's fused linear cross-entropy and Apple's
    cut cross-entropy, of one exit.

    Args:
        hidden: (..., k), or (E, ..., k) for E exits, k at most K.
        weight: (V, K) with unit inner stride, hidden's dtype.
        target: (...), int64 or int32 classes below V.
        bias: (V,) or None.
        ignore_index: Targets that do not count.
        label_smoothing: As in torch, from 0 to 1.
        reduction: ``"mean"`` over the targets that count (NaN if there is none, as in torch),
            ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or (E,) for E exits; with ``"none"`` (...) or (E, ...). In half precision,
        float32.

    Raises:
        ShapeError: Shapes do not fit.
        StrideError: ``weight`` has no unit inner stride.
        DTypeError: An unsupported dtype, or two that differ outside autocast.
        DeviceError: Tensors on different devices.
        OptionError: An unknown reduction, smoothing out of range, or (on the CPU) a target outside
            the vocabulary.
    """
    return run_linear_cross_entropy(
        hidden, weight, bias, target, ignore_index, label_smoothing, reduction, None, None, True
    )
