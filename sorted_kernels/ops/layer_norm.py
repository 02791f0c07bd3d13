"""Layer norm over the leading features: schemas, fake kernels, autograd, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import GradientError
from sorted_kernels.ops.affine import (
    Gradients,
    backward_tensors,
    differentiable,
    expect,
    fake_gradients,
    full_size,
    land,
)
from sorted_kernels.ops.backend import implementation
from sorted_kernels.ops.blocks import Blocks, lean_apply
from sorted_kernels.ops.checks import autocast_wide, check_affine, check_input
from sorted_kernels.ops.gradient import (
    ANCHOR,
    IN_PLACE_TWICE,
    GradientSlot,
    detached,
    parameters_wanted,
)
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.ops.ragged_norm import run_ragged_norm
from sorted_kernels.reference.affine import prefix_of
from sorted_kernels.row_widths import RowWidths

LIBRARY.define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight,"
    " bool need_dx, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation("layer_norm", x).layer_norm(x, weight, bias, eps)


def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    need_dx: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (..., k), weight (k,) and bias (k,); empty where not needed."""
    args, needs = (dy, x, mean, rstd, weight), (need_dx, need_weight, need_bias)
    return backward_tensors("layer_norm", args, x.shape[-1], weight, needs)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("layer_norm", _layer_norm, _device)
    LIBRARY.impl("layer_norm_backward", _backward, _device)


@torch.library.register_fake("sorted_kernels::layer_norm", lib=LIBRARY)
def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    statistics = x.new_empty((*x.shape[:-1], 1), dtype=wide)
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


@torch.library.register_fake("sorted_kernels::layer_norm_backward", lib=LIBRARY)
def _backward_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    need_dx: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = need_dx, need_weight, need_bias
    return fake_gradients(torch.empty_like(x), x.shape[-1], weight, needs)


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        weight_slot: GradientSlot | None,
        bias_slot: GradientSlot | None,
        dense: bool,
        anchor: Tensor | None,
    ) -> Tensor:
        run = torch.ops.sorted_kernels.layer_norm if is_compiling() else _layer_norm
        y, mean, rstd = run(x, weight, bias, eps)
        _save(ctx, x, weight, bias, eps, mean, rstd)
        ctx.slots, ctx.dense = (weight_slot, bias_slot), dense
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.dense:
            expect(ctx.slots, dy.shape[-1])
            return (*_dense_backward(ctx, dy), *[None] * 5)
        x, weight, _, mean, rstd = ctx.saved_tensors
        args, op = (dy, x, mean, rstd, weight), _backward_op()
        dx = land("layer_norm", args, x.shape[-1], ctx.slots, ctx.needs_input_grad[0], op)
        return dx, *[None] * 7


def _backward_op() -> Any:
    return torch.ops.sorted_kernels.layer_norm_backward


class _LayerNormOnBlocks(Function):
    """In-place gradients in plain PyTorch: as little Python as can be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Blocks, eps: float, anchor: Tensor) -> Tensor:
        weight = blocks.weight
        y, mean, rstd = torch.native_layer_norm(x, blocks.sizes, weight, blocks.bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.blocks = blocks
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        x, mean, rstd, weight = ctx.saved_tensors
        blocks, need_dx, wanted = ctx.blocks, ctx.needs_input_grad[0], parameters_wanted()
        weight_slot = blocks.weight_slot if wanted else None
        bias_slot = blocks.bias_slot if wanted else None
        wants = [need_dx, weight_slot is not None, bias_slot is not None]
        dx, dw, db = _native_backward(dy, x, blocks.sizes, mean, rstd, weight, blocks.bias, wants)
        if weight_slot is not None:
            weight_slot.add(dw)
        if bias_slot is not None:
            bias_slot.add(db)
        return dx if need_dx else None, None, None, None


_native_backward = torch.ops.aten.native_layer_norm_backward.default
_apply_on_blocks = lean_apply(_LayerNormOnBlocks)


def layer_norm_on_blocks(x: Tensor, blocks: Blocks, eps: float) -> Tensor:
    """:func:`layer_norm` for layers that have their blocks at hand.

    Raises:
        RuntimeError: PyTorch's own error; :func:`check_norm` says what was wrong.
    """
    if blocks.train and torch.is_grad_enabled():
        return _apply_on_blocks(x, blocks, eps, ANCHOR)
    return torch.nn.functional.layer_norm(x, blocks.sizes, blocks.weight, blocks.bias, eps)


def _save(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.eps = eps
    ctx.shapes = tuple(None if p is None else p.shape for p in (weight, bias))


def _dense_backward(ctx: Any, dy: Tensor) -> Gradients:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if not torch.is_grad_enabled():
        found = _backward_op()(dy, x, mean, rstd, weight, *needs)
        return full_size(found, needs, ctx.shapes)

    def again(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        k = x.shape[-1]
        return torch.layer_norm(x, (k,), prefix_of(weight, k), prefix_of(bias, k), ctx.eps)

    return differentiable(again, (x, weight, bias), needs, dy)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, eps = inputs
    _save(ctx, x, weight, bias, eps, output[1], output[2])


def _op_backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return (*_dense_backward(ctx, dy), None)


torch.library.register_autograd(
    "sorted_kernels::layer_norm", _op_backward, setup_context=_setup, lib=LIBRARY
)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    features: RowWidths | None = None,
) -> Tensor:
    """Layer norm over the last axis with the first k elements of shared affine parameters.

    Args:
        x: (..., k). float32, bfloat16, float16 or float64.
        weight: (K,) with K at least k, or None.
        bias: (K,) with K at least k, or None.
        eps: Added to the variance.
        features: RowWidths for rows of different sub-models: x is (N, at least the largest k), and
            each row is normalised over its own in_features. The output is zero past them.

    Returns:
        (..., k); (N, largest k) with RowWidths.

    Raises:
        ShapeError: k is 0 or above K, or a parameter is not one-dimensional.
        DTypeError: An unsupported dtype, or two that differ outside autocast.
        DeviceError: Tensors on different devices.
        StrideError: A parameter has no unit stride.
    """
    if features is not None:
        return run_ragged_norm("layer_norm", x, weight, bias, features, eps, None, None, True)
    return run_layer_norm(x, weight, bias, eps, None, None, True)


def check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise what :func:`layer_norm` documents."""
    check_input(x)
    check_affine(x, weight, "weight")
    check_affine(x, bias, "bias")


def run_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
    dense: bool,
) -> Tensor:
    """:func:`layer_norm` for layers, whose slots say where gradients land."""
    x = autocast_wide(x, weight)
    check_norm(x, weight, bias)
    if is_compiling():
        if dense:
            return torch.ops.sorted_kernels.layer_norm(x, weight, bias, eps)[0]
    elif not torch.is_grad_enabled():
        return _layer_norm(x, weight, bias, eps)[0]
    anchor = None
    if not dense:
        weight, bias, anchor = detached(weight), detached(bias), ANCHOR
    return _LayerNorm.apply(x, weight, bias, eps, weight_slot, bias_slot, dense, anchor)
