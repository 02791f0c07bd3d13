"""Batch norm over the leading channels: schemas, fake kernel, autograd, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import OptionError, ShapeError
from sorted_kernels.ops.affine import (
    Gradients,
    backward_tensors,
    check_channel_parameters,
    check_channels,
    differentiable,
    expect,
    fake_gradients,
    full_size,
    land,
)
from sorted_kernels.ops.backend import implementation
from sorted_kernels.ops.blocks import Blocks
from sorted_kernels.ops.gradient import (
    ANCHOR,
    GradientSlot,
    detached,
)
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.reference.affine import in_one_piece, prefix_of

# Running statistics go in and come out, so that the op is a function: whoever calls it in a
# compiled graph writes them back. Eager code moves them in place.
LIBRARY.define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var,"
    " bool training, float momentum, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight,"
    " bool training, bool need_dx, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)


def _run(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return implementation("batch_norm", x).batch_norm(x, *args)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if running_mean is None or running_var is None or not training:
        found = _run(x, weight, bias, running_mean, running_var, training, momentum, eps)
        return (*found, x.new_empty(0), x.new_empty(0))
    moved = running_mean[: x.shape[1]].clone(), running_var[: x.shape[1]].clone()
    return (*_run(x, weight, bias, *moved, True, momentum, eps), *moved)


def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    training: bool,
    need_dx: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight (c,) and bias (c,); empty where not needed."""
    args, needs = (dy, x, mean, rstd, weight, training), (need_dx, need_weight, need_bias)
    return backward_tensors("batch_norm", args, x.shape[1], weight, needs)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("batch_norm", _batch_norm, _device)
    LIBRARY.impl("batch_norm_backward", _backward, _device)


@torch.library.register_fake("sorted_kernels::batch_norm", lib=LIBRARY)
def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty(x.shape[1], dtype=wide) for _ in range(2))
    moved = running_mean if training and running_var is not None else None
    count, kind = (0, x.dtype) if moved is None else (x.shape[1], moved.dtype)
    new = [x.new_empty(count, dtype=kind) for _ in range(2)]
    return torch.empty_like(x, memory_format=suggest_memory_format(x)), mean, rstd, new[0], new[1]


@torch.library.register_fake("sorted_kernels::batch_norm_backward", lib=LIBRARY)
def _backward_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    training: bool,
    need_dx: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=suggest_memory_format(x))
    return fake_gradients(dx, x.shape[1], weight, (need_dx, need_weight, need_bias))


class _BatchNorm(Function):
    """y; and in compiled graphs the moved running statistics, for the caller to write back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        weight_slot: GradientSlot | None,
        bias_slot: GradientSlot | None,
        dense: bool,
        anchor: Tensor | None,
    ) -> Any:
        args = (x, weight, bias, running_mean, running_var, training, momentum, eps)
        ctx.slots, ctx.dense = (weight_slot, bias_slot), dense
        if is_compiling():
            y, mean, rstd, new_mean, new_var = torch.ops.sorted_kernels.batch_norm(*args)
            ctx.mark_non_differentiable(new_mean, new_var)
            _save(ctx, x, weight, bias, mean, rstd, training, eps)
            return y, new_mean, new_var
        y, mean, rstd = _run(*args)
        _save(ctx, x, weight, bias, mean, rstd, training, eps)
        return y, None, None

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.dense:
            expect(ctx.slots, dy.shape[1])
            return (*_dense_backward(ctx, dy), *[None] * 9)
        x, weight, _, mean, rstd = ctx.saved_tensors
        args, op = (dy, x, mean, rstd, weight, ctx.training), _backward_op()
        dx = land("batch_norm", args, x.shape[1], ctx.slots, ctx.needs_input_grad[0], op)
        return dx, *[None] * 11


def _backward_op() -> Any:
    return torch.ops.sorted_kernels.batch_norm_backward


def batch_norm_on_blocks(
    x: Tensor,
    blocks: Blocks,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """:func:`batch_norm` for layers that have their blocks at hand.

    Raises:
        RuntimeError: PyTorch's own error; :func:`check_batch_norm` says what was wrong.
    """
    c, x = x.shape[1], in_one_piece(x)
    if blocks.train and torch.is_grad_enabled():
        weight, bias = blocks.leaves
        means, variances = blocks.views((running_mean, running_var), c)
    else:
        weight, bias = blocks.weight, blocks.bias
        means, variances = prefix_of(running_mean, c), prefix_of(running_var, c)
    return torch.batch_norm(x, weight, bias, means, variances, training, momentum, eps, True)


def _save(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    eps: float,
) -> None:
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.training, ctx.eps = training, eps
    ctx.shapes = tuple(None if p is None else p.shape for p in (weight, bias))


def _dense_backward(ctx: Any, dy: Tensor) -> Gradients:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if not torch.is_grad_enabled():
        found = _backward_op()(dy, x, mean, rstd, weight, ctx.training, *needs)
        return full_size(found, needs, ctx.shapes)
    fixed = None if ctx.training else (mean, rstd)

    def again(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _formula(x, weight, bias, fixed, ctx.eps)

    return differentiable(again, (x, weight, bias), needs, dy)


def _formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fixed: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """Return y in PyTorch's own differentiable operations."""
    c = x.shape[1]
    affine = prefix_of(weight, c), prefix_of(bias, c)
    if fixed is None:
        return torch.native_batch_norm(x, *affine, None, None, True, 0.0, eps)[0]
    shape = (1, c, *[1] * (x.dim() - 2))
    y = (x - fixed[0].view(shape)) * fixed[1].view(shape)
    y = y if affine[0] is None else y * affine[0].view(shape)
    return (y if affine[1] is None else y + affine[1].view(shape)).to(x.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, training, _, eps = inputs
    _save(ctx, x, weight, bias, output[1], output[2], training, eps)


def _op_backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return (*_dense_backward(ctx, dy), *[None] * 5)


torch.library.register_autograd(
    "sorted_kernels::batch_norm", _op_backward, setup_context=_setup, lib=LIBRARY
)


def check_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
) -> None:
    """Raise what :func:`batch_norm` documents."""
    check_channels(x)
    check_channel_parameters(
        x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    if (running_mean is None) != (running_var is None):
        raise OptionError("running_mean and running_var are given both or not at all")
    if not training and running_mean is None:
        raise OptionError("training=False needs running_mean and running_var")
    if training:
        check_several(x)


def check_several(x: Tensor) -> None:
    """A batch from which a channel's variance can be taken, as torch has it."""
    if x.numel() == x.shape[1]:
        raise ShapeError(
            f"expected more than 1 value per channel when training, got x of shape {tuple(x.shape)}"
        )


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm of c channels with the first c elements of shared parameters and statistics.

    Differentiable twice. The statistics are those of x's channels alone, so that a sub-model is
    normalised as the stand-alone network of its size would be.

    Args:
        x: (N, c) or (N, c, *spatial), c at most C, in any memory format, which y has too. float32,
            bfloat16, float16 or float64.
        running_mean: (C,) or None. When training, the first c move, in place; what is past them is
            neither read nor written.
        running_var: (C,) or None; likewise.
        weight: (C,) or None. Parameters and statistics are of x's dtype, or all of float32 with an
            x of half precision.
        bias: (C,) or None.
        training: Whether to normalise with the batch's own statistics, or with the running ones.
        momentum: The weight of the batch in the running statistics.
        eps: Added to the variance.

    Returns:
        Like x.

    Raises:
        ShapeError: No channel, more than a parameter has, or one value a channel when training.
        DTypeError: An unsupported dtype, or a mixture other than those allowed.
        DeviceError: Tensors on different devices.
        StrideError: A parameter has no unit stride.
        OptionError: Only one of the running statistics, or none when not training.

    Source: Ioffe and Szegedy, 2015.
    """
    return run_batch_norm(
        x, weight, bias, running_mean, running_var, training, momentum, eps, None, None, True
    )


def run_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
    dense: bool,
) -> Tensor:
    """:func:`batch_norm` for layers, whose slots say where gradients land."""
    check_batch_norm(x, weight, bias, running_mean, running_var, training)
    options = running_mean, running_var, training, momentum, eps
    if not is_compiling() and not torch.is_grad_enabled():
        return _run(x, weight, bias, *options)[0]
    if dense and is_compiling():
        y, _, _, *moved = torch.ops.sorted_kernels.batch_norm(x, weight, bias, *options)
    else:
        anchor = None
        if not dense:
            weight, bias, anchor = detached(weight), detached(bias), ANCHOR
        y, *moved = _BatchNorm.apply(
            x, weight, bias, *options, weight_slot, bias_slot, dense, anchor
        )
    if is_compiling() and training and running_mean is not None and running_var is not None:
        running_mean[: x.shape[1]].copy_(moved[0].detach())
        running_var[: x.shape[1]].copy_(moved[1].detach())
    return y
