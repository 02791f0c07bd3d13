"""What the autograd nodes of norms with scale and shift share: where affine gradients go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from sorted_kernels.errors import DTypeError, GradientError, ShapeError
from sorted_kernels.ops.backend import implementation
from sorted_kernels.ops.checks import FLOATS, check_parameter, embed_prefix
from sorted_kernels.ops.gradient import IN_PLACE_TWICE, GradientSlot, lands

_HALF = (torch.bfloat16, torch.float16)
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Slots = tuple[GradientSlot | None, GradientSlot | None]


def check_channels(x: Tensor) -> None:
    """An activation with channels: (N, c) or (N, c, *spatial), floating."""
    if x.dim() < 2 or x.shape[1] < 1:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}; it needs two axes at least, and a channel: (N, c, ...)"
        )
    if x.dtype not in FLOATS:
        raise DTypeError(f"x has dtype {x.dtype}; allowed are float32, bfloat16, float16, float64")


def check_channel_parameters(x: Tensor, **params: Tensor | None) -> None:
    """Parameters (C,) of at least x's channels, all of x's dtype, or all float32 for half x."""
    kind = None
    for name, param in params.items():
        if param is None:
            continue
        check_parameter(param, x, name, 1)
        if param.dtype != x.dtype and not (param.dtype is torch.float32 and x.dtype in _HALF):
            raise DTypeError(
                f"{name} has dtype {param.dtype}, the input {x.dtype}; allowed is the same, or "
                "float32 with an input of half precision"
            )
        kind = kind or (name, param.dtype)
        if param.dtype != kind[1]:
            raise DTypeError(
                f"{name} has dtype {param.dtype}, {kind[0]} {kind[1]}; they have one dtype"
            )
        if x.shape[1] > param.shape[0]:
            raise ShapeError(
                f"x has {x.shape[1]} channels; {name} has {param.shape[0]} elements at most"
            )


def backward_tensors(
    name: str,
    args: tuple[Any, ...],
    size: int,
    weight_like: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The body of a ``<name>_backward`` op: gradients of the prefix, empty where not needed.

    Args:
        name: The op family.
        args: dy, x and whatever else ``<name>_backward_into`` takes before its outputs.
        size: The active elements of the parameters.
        weight_like: Has the parameters' dtype; None: x's.
        needs: Which of the gradients of x, weight and bias are wanted.
    """
    x: Tensor = args[1]
    kind = x.dtype if weight_like is None else weight_like.dtype
    dw, db = (x.new_empty(size if need else 0, dtype=kind) for need in needs[1:])
    into = getattr(implementation(name, x), f"{name}_backward_into")
    dx = into(*args, dw if needs[1] else None, db if needs[2] else None, False, False, needs[0])
    return x.new_empty(0) if dx is None else dx, dw, db


def fake_gradients(
    dx: Tensor, size: int, weight: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`backward_tensors` returns, without contents; ``dx`` if it is needed."""
    kind = dx.dtype if weight is None else weight.dtype
    dw, db = (dx.new_empty(size if need else 0, dtype=kind) for need in needs[1:])
    return dx if needs[0] else dx.new_empty(0), dw, db


def expect(slots: Slots, size: int) -> None:
    """Announce the dense gradients of the first ``size`` elements."""
    for slot in slots:
        if slot is not None:
            slot.expect(size)


def land(
    name: str,
    args: tuple[Any, ...],
    size: int,
    slots: Slots,
    need_dx: bool,
    op: Callable[..., Any],
) -> Tensor | None:
    """Input gradient returned; the affine gradients written straight into their prefixes.

    Args:
        name: The op family.
        args: As for :func:`backward_tensors`.
        size: As there.
        slots: Where the gradients of weight and bias land.
        need_dx: Whether x's is wanted.
        op: The ``<name>_backward`` op, which compiled graphs call.

    Raises:
        GradientError: A double backward was asked for.
    """
    if torch.is_grad_enabled():
        raise GradientError(IN_PLACE_TWICE)
    weight_slot, bias_slot = (slot if lands(slot) else None for slot in slots)
    if is_compiling():
        dx, dw, db = op(*args, need_dx, weight_slot is not None, bias_slot is not None)
        for slot, gradient in ((weight_slot, dw), (bias_slot, db)):
            if slot is not None:
                torch.ops.sorted_kernels.accumulate_prefix(gradient, slot.token, slot.handle)
        return dx if need_dx else None
    weight_out, add_weight = (None, False) if weight_slot is None else weight_slot.prefix(size)
    bias_out, add_bias = (None, False) if bias_slot is None else bias_slot.prefix(size)
    into = getattr(implementation(name, args[1]), f"{name}_backward_into")
    return into(*args, weight_out, bias_out, add_weight, add_bias, need_dx)


def full_size(
    gradients: tuple[Tensor, Tensor, Tensor],
    needs: tuple[bool, bool, bool],
    shapes: tuple[torch.Size | None, torch.Size | None],
) -> Gradients:
    """Gradients of x and of the whole parameters, zero past the active elements."""
    dx, dw, db = gradients
    return (
        dx if needs[0] else None,
        embed_prefix(dw, shapes[0]) if needs[1] and shapes[0] is not None else None,
        embed_prefix(db, shapes[1]) if needs[2] and shapes[1] is not None else None,
    )


def differentiable(
    function: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    inputs: Gradients,
    needs: tuple[bool, bool, bool],
    dy: Tensor,
) -> Gradients:
    """Gradients that can be differentiated again: PyTorch's own, of PyTorch's own op.

    Args:
        function: y of x, weight and bias.
        inputs: x, weight and bias.
        needs: Which of their gradients are wanted.
        dy: The upstream gradient.
    """
    wanted = [value for value, need in zip(inputs, needs, strict=True) if need]
    y = function(*inputs)  # type: ignore[arg-type]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))  # type: ignore[arg-type]
    dx, dw, db = (next(found) if need else None for need in needs)
    return dx, dw, db
