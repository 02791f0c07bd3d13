"""Group and instance norm over the leading channels: schemas, fakes, autograd, public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import GradientError, ShapeError
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
from sorted_kernels.ops.checks import autocast_wide, check_count
from sorted_kernels.ops.gradient import (
    ANCHOR,
    IN_PLACE_TWICE,
    GradientSlot,
    detached,
    parameters_wanted,
)
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.reference.affine import prefix_of
from sorted_kernels.reference.group_norm import dense_for_torch, sizes_for_torch, torch_wants

LIBRARY.define(
    "group_norm(Tensor x, Tensor? weight, Tensor? bias, SymInt num_groups, float eps)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "group_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight,"
    " SymInt num_groups, bool need_dx, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)"
)


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation("group_norm", x).group_norm(x, weight, bias, num_groups, eps)


def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    num_groups: int,
    need_dx: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight (c,) and bias (c,); empty where not needed."""
    args, needs = (dy, x, mean, rstd, weight, num_groups), (need_dx, need_weight, need_bias)
    return backward_tensors("group_norm", args, x.shape[1], weight, needs)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("group_norm", _group_norm, _device)
    LIBRARY.impl("group_norm_backward", _backward, _device)


@torch.library.register_fake("sorted_kernels::group_norm", lib=LIBRARY)
def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty(x.shape[0] * num_groups, dtype=wide) for _ in range(2))
    return torch.empty_like(x, memory_format=suggest_memory_format(x)), mean, rstd


@torch.library.register_fake("sorted_kernels::group_norm_backward", lib=LIBRARY)
def _backward_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    num_groups: int,
    need_dx: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=suggest_memory_format(x))
    return fake_gradients(dx, x.shape[1], weight, (need_dx, need_weight, need_bias))


class _GroupNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        num_groups: int,
        eps: float,
        weight_slot: GradientSlot | None,
        bias_slot: GradientSlot | None,
        dense: bool,
        anchor: Tensor | None,
    ) -> Tensor:
        run = torch.ops.sorted_kernels.group_norm if is_compiling() else _group_norm
        y, mean, rstd = run(x, weight, bias, num_groups, eps)
        _save(ctx, x, weight, bias, mean, rstd, num_groups, eps)
        ctx.slots, ctx.dense = (weight_slot, bias_slot), dense
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.dense:
            expect(ctx.slots, dy.shape[1])
            return (*_dense_backward(ctx, dy), *[None] * 6)
        x, weight, _, mean, rstd = ctx.saved_tensors
        args, op = (dy, x, mean, rstd, weight, ctx.num_groups), _backward_op()
        dx = land("group_norm", args, x.shape[1], ctx.slots, ctx.needs_input_grad[0], op)
        return dx, *[None] * 8


def _backward_op() -> Any:
    return torch.ops.sorted_kernels.group_norm_backward


class _GroupNormOnBlocks(Function):
    """In-place gradients in plain PyTorch: as little Python as can be."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, blocks: Blocks, num_groups: int, eps: float, anchor: Tensor
    ) -> Tensor:
        x, weight, sizes = dense_for_torch(x), blocks.weight, sizes_for_torch(x)
        y, mean, rstd = torch.native_group_norm(x, weight, blocks.bias, *sizes, num_groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.blocks, ctx.sizes = blocks, (*sizes, num_groups)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        x, weight, mean, rstd = ctx.saved_tensors
        blocks, need_dx, wanted = ctx.blocks, ctx.needs_input_grad[0], parameters_wanted()
        weight_slot = blocks.weight_slot if wanted else None
        bias_slot = blocks.bias_slot if wanted else None
        wants = torch_wants(x, need_dx, weight_slot is not None, bias_slot is not None)
        upstream = dense_for_torch(dy, like=x)
        dx, dw, db = _native_backward(upstream, x, mean, rstd, weight, *ctx.sizes, wants)
        if weight_slot is not None:
            weight_slot.add(dw)
        if bias_slot is not None:
            bias_slot.add(db)
        return dx if need_dx else None, *[None] * 4


_native_backward = torch.ops.aten.native_group_norm_backward.default
# Function.apply looks for functorch's wrappers first; whoever has blocks has done so.
_apply_on_blocks = super(Function, _GroupNormOnBlocks).apply


def group_norm_on_blocks(x: Tensor, blocks: Blocks, num_groups: int, eps: float) -> Tensor:
    """:func:`group_norm` for layers that have their blocks at hand, on the CPU.

    Raises:
        RuntimeError: PyTorch's own error; :func:`check_group_norm` says what was wrong.
    """
    if blocks.train and torch.is_grad_enabled():
        return _apply_on_blocks(x, blocks, num_groups, eps, ANCHOR)
    return torch.group_norm(x, num_groups, blocks.weight, blocks.bias, eps, True)


def _save(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    eps: float,
) -> None:
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.num_groups, ctx.eps = num_groups, eps
    ctx.shapes = tuple(None if p is None else p.shape for p in (weight, bias))


def _dense_backward(ctx: Any, dy: Tensor) -> Gradients:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if not torch.is_grad_enabled():
        found = _backward_op()(dy, x, mean, rstd, weight, ctx.num_groups, *needs)
        return full_size(found, needs, ctx.shapes)

    def again(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        affine = prefix_of(weight, x.shape[1]), prefix_of(bias, x.shape[1])
        return torch.group_norm(x, ctx.num_groups, *affine, ctx.eps, True)

    return differentiable(again, (x, weight, bias), needs, dy)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, num_groups, eps = inputs
    _save(ctx, x, weight, bias, output[1], output[2], num_groups, eps)


def _op_backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return (*_dense_backward(ctx, dy), None, None)


torch.library.register_autograd(
    "sorted_kernels::group_norm", _op_backward, setup_context=_setup, lib=LIBRARY
)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Group norm of c channels with the first c elements of shared affine parameters.

    A layer of G groups of C // G channels keeps the channels a group when its width changes: a
    sub-model has whole leading groups, ``num_groups`` of them, and each is normalised as in the
    full network. Differentiable twice.

    Args:
        x: (N, c, *spatial), c at most C, contiguous or channels_last (kept). float32, bfloat16,
            float16 or float64.
        num_groups: The groups of these c channels, a divisor of c.
        weight: (C,) or None, of x's dtype, or float32 with an x of half precision.
        bias: (C,) or None.
        eps: Added to the variance.

    Returns:
        Like x.

    Raises:
        ShapeError: No channel, more than a parameter has, groups that do not divide them, or a
            group of one value.
        DTypeError: An unsupported dtype, or a mixture other than those allowed.
        DeviceError: Tensors on different devices.
        StrideError: A parameter has no unit stride.

    Source: Wu and He, 2018.
    """
    return run_group_norm(x, num_groups, weight, bias, eps, None, None, True)


def instance_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Normalise each channel of each sample: group norm with one channel a group.

    Args:
        x: (N, c, *spatial), with more than one element a channel; otherwise as for
            :func:`group_norm`.
        weight: (C,) or None; the first c are used.
        bias: (C,) or None; the first c are used.
        eps: Added to the variance.

    Returns:
        Like x.

    Raises:
        ShapeError: As for :func:`group_norm`, or one element a channel.
        DTypeError: An unsupported dtype, or a mixture other than those allowed.
        DeviceError: Tensors on different devices.
        StrideError: A parameter has no unit stride.

    Source: Ulyanov, Vedaldi and Lempitsky, 2016.
    """
    check_instances(x)
    return run_group_norm(x, x.shape[1], weight, bias, eps, None, None, True)


def check_instances(x: Tensor) -> None:
    """Channels of more than one element, as torch has it."""
    check_channels(x)
    if x.shape[2:].numel() == 1:
        raise ShapeError(
            f"expected more than 1 spatial element a channel, got x of shape {tuple(x.shape)}"
        )


def check_group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None
) -> None:
    """Raise what :func:`group_norm` documents."""
    check_channels(x)
    check_count("num_groups", num_groups, x.shape[1], "x's channels")
    if x.shape[1] % num_groups != 0:
        raise ShapeError(
            f"num_groups={num_groups} does not divide x's {x.shape[1]} channels: groups are whole"
        )
    if x.shape[0] * (x.shape[1] // num_groups) * x.shape[2:].numel() == 1:
        raise ShapeError(f"expected more than 1 value a group, got x of shape {tuple(x.shape)}")
    check_channel_parameters(x, weight=weight, bias=bias)


def run_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
    dense: bool,
) -> Tensor:
    """:func:`group_norm` for layers, whose slots say where gradients land."""
    x = autocast_wide(x, weight) if x.is_cuda else x  # torch's own list differs by device
    check_group_norm(x, num_groups, weight, bias)
    if is_compiling():
        if dense:
            return torch.ops.sorted_kernels.group_norm(x, weight, bias, num_groups, eps)[0]
    elif not torch.is_grad_enabled():
        return _group_norm(x, weight, bias, num_groups, eps)[0]
    anchor = None
    if not dense:
        weight, bias, anchor = detached(weight), detached(bias), ANCHOR
    return _GroupNorm.apply(x, weight, bias, num_groups, eps, weight_slot, bias_slot, dense, anchor)
