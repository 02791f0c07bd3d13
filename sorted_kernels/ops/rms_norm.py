"""RMS norm over the leading features: schemas, fake kernels, autograd, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import GradientError
from sorted_kernels.ops.backend import implementation
from sorted_kernels.ops.blocks import Blocks, lean_apply
from sorted_kernels.ops.checks import autocast_wide, check_affine, check_input, embed_prefix
from sorted_kernels.ops.gradient import (
    ANCHOR,
    IN_PLACE_TWICE,
    GradientSlot,
    detached,
    lands,
    parameters_wanted,
)
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.ops.ragged_norm import run_ragged_norm
from sorted_kernels.reference import rms_norm as reference
from sorted_kernels.row_widths import RowWidths

LIBRARY.define("rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)")
LIBRARY.define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor? weight,"
    " bool need_dx, bool need_weight) -> (Tensor, Tensor)"
)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return implementation("rms_norm", x).rms_norm(x, weight, eps)


def _backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, need_dx: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., k) and weight (k,); empty where not needed."""
    dw = x.new_empty(x.shape[-1] if need_weight else 0)
    dx = implementation("rms_norm", x).rms_norm_backward_into(
        dy, x, rstd, weight, dw if need_weight else None, False, need_dx
    )
    return x.new_empty(0) if dx is None else dx, dw


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("rms_norm", _rms_norm, _device)
    LIBRARY.impl("rms_norm_backward", _backward, _device)


@torch.library.register_fake("sorted_kernels::rms_norm", lib=LIBRARY)
def _fake(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=wide)


@torch.library.register_fake("sorted_kernels::rms_norm_backward", lib=LIBRARY)
def _backward_fake(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, need_dx: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    return dx, x.new_empty(x.shape[-1] if need_weight else 0)


class _RMSNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        slot: GradientSlot | None,
        dense: bool,
        anchor: Tensor | None,
    ) -> Tensor:
        run = torch.ops.sorted_kernels.rms_norm if is_compiling() else _rms_norm
        y, rstd = run(x, weight, eps)
        _save(ctx, x, weight, eps, rstd)
        ctx.slot, ctx.dense = slot, dense
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        slot = ctx.slot
        if ctx.dense:
            if slot is not None:
                slot.expect(dy.shape[-1])
            return (*_dense_backward(ctx, dy), *[None] * 4)
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        x, weight, rstd = ctx.saved_tensors
        need_dx = ctx.needs_input_grad[0]
        if is_compiling():
            dx, dw = torch.ops.sorted_kernels.rms_norm_backward(dy, x, rstd, weight, need_dx, True)
            torch.ops.sorted_kernels.accumulate_prefix(dw, slot.token, slot.handle)
            return (dx if need_dx else None), *[None] * 5
        out, accumulate = slot.prefix(x.shape[-1]) if lands(slot) else (None, False)
        dx = implementation("rms_norm", x).rms_norm_backward_into(
            dy, x, rstd, weight, out, accumulate, need_dx
        )
        return dx, *[None] * 5


class _RMSNormOnBlocks(Function):
    """In-place gradients in plain PyTorch: as little Python as can be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Blocks, eps: float, anchor: Tensor) -> Tensor:
        y, rstd = reference.rms_norm(x, blocks.weight, eps)
        ctx.save_for_backward(x, rstd, blocks.weight)
        ctx.blocks = blocks
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        x, rstd, weight = ctx.saved_tensors
        blocks, out, accumulate = ctx.blocks, None, False
        if parameters_wanted():
            out, accumulate = blocks.weight_slot.prefix(*blocks.sizes)
        dx = reference.rms_norm_backward_into(
            dy, x, rstd, weight, out, accumulate, ctx.needs_input_grad[0]
        )
        return dx, None, None, None


_apply_on_blocks = lean_apply(_RMSNormOnBlocks)


def rms_norm_on_blocks(x: Tensor, blocks: Blocks, eps: float) -> Tensor:
    """:func:`rms_norm` for layers that have their blocks at hand; x is as wide as they are.

    Raises:
        RuntimeError: PyTorch's own error; :func:`check_rms_norm` says what was wrong.
    """
    if not torch.is_grad_enabled():
        return reference.rms_norm(x, blocks.weight, eps)[0]
    if blocks.train:
        return _apply_on_blocks(x, blocks, eps, ANCHOR)
    return torch.nn.functional.rms_norm(x, blocks.sizes, blocks.weight, eps)


def _save(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, rstd: Tensor) -> None:
    ctx.save_for_backward(x, weight, rstd)
    ctx.eps, ctx.shape = eps, None if weight is None else weight.shape


def _dense_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight, rstd = ctx.saved_tensors
    need_dx, need_weight = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled():
        dx, dw = _differentiable_backward(dy, x, weight, ctx.eps)
    else:
        dx, dw = torch.ops.sorted_kernels.rms_norm_backward(
            dy, x, rstd, weight, need_dx, need_weight
        )
    return dx if need_dx else None, embed_prefix(dw, ctx.shape) if need_weight else None


def _differentiable_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradient as differentiable PyTorch, for double backward: statistics are recomputed."""
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed = x * rstd
    scaled = dy if weight is None else dy * weight[: x.shape[-1]]
    dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd
    return dx, (dy * normed).reshape(-1, x.shape[-1]).sum(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, eps = inputs
    _save(ctx, x, weight, eps, output[1])


def _op_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_dense_backward(ctx, dy), None)


torch.library.register_autograd(
    "sorted_kernels::rms_norm", _op_backward, setup_context=_setup, lib=LIBRARY
)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    features: RowWidths | None = None,
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight[:k]`` with a shared scale.

    The mean runs over the k features that are there: masking a full-width norm gives another
    result. Half precision is computed in float32.

    Args:
        x: (..., k). float32, bfloat16, float16 or float64.
        weight: (K,) with K at least k, or None.
        eps: Added to the mean square.
        features: RowWidths for rows of different sub-models: x is (N, at least the largest k), and
            each row is normalised over its own in_features. The output is zero past them.

    Returns:
        (..., k); (N, largest k) with RowWidths.

    Raises:
        ShapeError: k is 0 or above K, or ``weight`` is not one-dimensional.
        DTypeError: An unsupported dtype, or two that differ outside autocast.
        DeviceError: Tensors on different devices.
        StrideError: ``weight`` has no unit stride.
    """
    if features is not None:
        return run_ragged_norm("rms_norm", x, weight, None, features, eps, None, None, True)
    return run_rms_norm(x, weight, eps, None, True)


def check_rms_norm(x: Tensor, weight: Tensor | None) -> None:
    """Raise what :func:`rms_norm` documents."""
    check_input(x)
    check_affine(x, weight, "weight")


def run_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, slot: GradientSlot | None, dense: bool
) -> Tensor:
    """:func:`rms_norm` for layers, whose slot says where the gradient lands."""
    x = autocast_wide(x, weight)
    check_rms_norm(x, weight)
    if is_compiling():
        if dense:
            return torch.ops.sorted_kernels.rms_norm(x, weight, eps)[0]
    elif not torch.is_grad_enabled():
        return _rms_norm(x, weight, eps)[0]
    anchor = None
    if not dense:
        weight, anchor = detached(weight), ANCHOR
    return _RMSNorm.apply(x, weight, eps, slot, dense, anchor)
