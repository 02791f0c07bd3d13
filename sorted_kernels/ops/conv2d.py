"""2-D convolution over a weight's prefix: autograd and the public function."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import GradientError
from sorted_kernels.ops import conv2d_ops as ops
from sorted_kernels.ops.blocks import Blocks, leaf_of, lean_apply
from sorted_kernels.ops.checks import active_block, autocast, embed_prefix
from sorted_kernels.ops.conv2d_checks import Pair, Sizes, check_rest, geometry_of, resolve
from sorted_kernels.ops.gradient import (
    ANCHOR,
    IN_PLACE_TWICE,
    GradientSlot,
    detached,
    lands,
    parameters_wanted,
)
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.reference import conv2d as reference
from sorted_kernels.reference.conv2d import Geometry
from sorted_kernels.reference.linear import activate, activation_backward


class _Conv2d(Function):
    """The one autograd node of convolution: dense gradients, or in place where a slot is given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        block: Sizes,
        geometry: Sizes,
        activation: str,
        weight_slot: GradientSlot | None,
        bias_slot: GradientSlot | None,
        dense: bool,
        anchor: Tensor | None,
    ) -> Tensor:
        run = torch.ops.sorted_kernels.conv2d if is_compiling() else ops.forward
        y, saved = run(x, weight, bias, block, geometry, activation, activation != "none")
        in_place = weight_slot is not None
        _save(ctx, (x, weight, bias), (block, geometry), activation, (y, saved), dense, in_place)
        ctx.slots, ctx.dense = (weight_slot, bias_slot), dense
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight_slot, bias_slot = ctx.slots
        if ctx.dense:
            gradients = _dense_backward(ctx, dy)
            if weight_slot is not None:
                weight_slot.expect(*ctx.block[:2])
            if bias_slot is not None:
                bias_slot.expect(ctx.block[0])
            return (*gradients, *[None] * 7)
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        x, weight, _, saved = ctx.saved_tensors
        dz = dy if saved is None else activation_backward(dy, saved, ctx.activation)
        dx = None
        if ctx.needs_input_grad[0]:
            run = torch.ops.sorted_kernels.conv2d_dgrad if is_compiling() else ops.dgrad
            dx = run(dz, weight, ctx.block, ctx.geometry, ctx.x_shape[2:])
        _land(ctx, dz, x, weight_slot, bias_slot)
        return dx, *[None] * 9


def _land(
    ctx: Any,
    dz: Tensor,
    x: Tensor,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
) -> None:
    """Add the gradients of weight and bias where their slots say."""
    block, compiling = ctx.block, is_compiling()
    if weight_slot is not None and lands(weight_slot):
        if compiling:
            torch.ops.sorted_kernels.conv2d_accumulate(
                dz, x, block, ctx.geometry, weight_slot.token, weight_slot.handle
            )
        else:
            ops.wgrad_into(dz, x, geometry_of(ctx.geometry), *ops.gradient_view(weight_slot, block))
    if bias_slot is not None and lands(bias_slot):
        if compiling:
            torch.ops.sorted_kernels.accumulate_prefix(
                dz.sum((0, 2, 3)), bias_slot.token, bias_slot.handle
            )
        else:
            ops.bias_grad_into(dz, *bias_slot.prefix(block[0]))


class _Conv2dOnBlocks(Function):
    """In-place gradients where PyTorch's own convolution is the slower one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, blocks: Blocks, geometry: Geometry, module: ModuleType, anchor: Tensor
    ) -> Tensor:
        needs_x, needs_w = blocks.weight_slot is not None, x.requires_grad
        ctx.save_for_backward(x if needs_x else None, blocks.weight if needs_w else None)
        ctx.blocks, ctx.geometry, ctx.input_size = blocks, geometry, x.shape[2:]
        return _on_blocks(x, blocks, geometry, module)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        x, w = ctx.saved_tensors
        blocks, g = ctx.blocks, ctx.geometry
        dx = None
        if w is not None:
            dx = ops.module_of(w, g, dy).conv2d_dgrad(dy, w, ctx.input_size, g)
        if parameters_wanted():
            if blocks.weight_slot is not None:
                out, accumulate = ops.gradient_view(blocks.weight_slot, blocks.sizes)
                ops.module_of(out, g, dy, x).conv2d_wgrad_into(dy, x, out, g, accumulate)
            if blocks.bias_slot is not None:
                reference.bias_grad_into(dy, *blocks.bias_slot.prefix(blocks.sizes[0]))
        return dx, None, None, None, None


_apply_on_blocks = lean_apply(_Conv2dOnBlocks)


def conv2d_on_blocks(x: Tensor, blocks: Blocks, geometry: Geometry, activation: str) -> Tensor:
    """:func:`conv2d` for layers that have their blocks at hand; x (N, C, H, W).

    Raises:
        RuntimeError: PyTorch's own error; :func:`run_conv2d` says what was wrong.
    """
    w = blocks.weight
    module = ops.module_of(w, geometry, x)
    if not torch.is_grad_enabled() or not (blocks.train or x.requires_grad):
        z = _on_blocks(x, blocks, geometry, module)
    elif module is not reference or reference.is_product(x, w, geometry):
        z = _apply_on_blocks(x, blocks, geometry, module, ANCHOR)
    else:
        leaf, bias = blocks.leaves
        kept = reference.kept_weight(x, w)
        if kept is not w:
            leaf = leaf_of(kept, blocks.weight_slot)
        g = geometry
        z = torch.conv2d(x, leaf, bias, g.stride, g.padding, g.dilation, g.groups)
    return z if activation == "none" else activate(z, activation)


def _on_blocks(x: Tensor, blocks: Blocks, geometry: Geometry, module: ModuleType) -> Tensor:
    z: Tensor = module.conv2d(x, blocks.weight, blocks.bias, geometry, "none", False)[0]
    return z


def _save(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    sizes: tuple[Sizes, Sizes],
    activation: str,
    output: tuple[Tensor, Tensor],
    dense: bool,
    in_place: bool,
) -> None:
    """Keep what the wanted gradients need, and nothing else.

    The dense path can be differentiated twice, for which the activation's input is computed again
    from x, weight and bias.
    """
    (x, weight, bias), (y, saved) = inputs, output
    again = dense and activation != "none"
    ctx.save_for_backward(
        x if in_place or ctx.needs_input_grad[1] or again else None,
        weight if ctx.needs_input_grad[0] or again else None,
        bias if again else None,
        None if activation == "none" else y if activation == "relu" else saved,
    )
    ctx.block, ctx.geometry = sizes
    ctx.activation, ctx.x_shape = activation, x.shape
    ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
    ctx.bias_shape = None if bias is None else bias.shape


def _dense_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Full-size gradients, in differentiable PyTorch where a double backward was asked for."""
    x, weight, _, saved = ctx.saved_tensors
    need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
    sizes = ctx.block, ctx.geometry
    dx: Tensor | None = None
    dw: Any = None
    db = None
    if torch.is_grad_enabled():
        dz, dx, dw = _differentiable_backward(ctx, dy)
    else:
        dz = dy if saved is None else activation_backward(dy, saved, ctx.activation)
        if need_dx:
            dx = torch.ops.sorted_kernels.conv2d_dgrad(dz, weight, *sizes, ctx.x_shape[2:])
        if need_dw:
            dw = torch.ops.sorted_kernels.conv2d_wgrad(dz, x, *sizes)
    if need_dw:
        dw = embed_prefix(dw, ctx.weight_shape).to(ctx.weight_dtype)
    if need_db:
        db = embed_prefix(dz.sum((0, 2, 3)), ctx.bias_shape).to(ctx.weight_dtype)
    return dx if need_dx else None, dw, db


def _differentiable_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients before the activation, of x, and of the block, in PyTorch's own operations."""
    x, weight, bias, _ = ctx.saved_tensors
    geometry, dz = geometry_of(ctx.geometry), dy
    if x is None:  # only its shape is asked for
        x = dy.new_empty(1).expand(ctx.x_shape)
    w = dy.new_empty(1).expand(ctx.block)
    if weight is not None:
        w = active_block(weight, ctx.block).to(dy.dtype)
    if ctx.activation != "none":
        bias = None if bias is None else bias[: ctx.block[0]].to(dy.dtype)
        z = reference.conv2d(x, w, bias, geometry, "none", False)[0]
        (dz,) = torch.autograd.grad(activate(z, ctx.activation), z, dy, create_graph=True)
    need_dx, need_dw = ctx.needs_input_grad[:2]
    dx, dw, _ = reference.conv2d_backward(dz, x, w, geometry, need_dx, need_dw, False)
    return dz, dx, dw


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, block, geometry, activation, _ = inputs
    sizes = block, geometry
    _save(ctx, (x, weight, bias), sizes, activation, output, dense=True, in_place=False)


def _op_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_dense_backward(ctx, dy), None, None, None, None)


torch.library.register_autograd(
    "sorted_kernels::conv2d", _op_backward, setup_context=_setup, lib=LIBRARY
)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_channels: int | None = None,
    kernel_size: Pair | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """``activation(conv(x, weight[:Co, :Ci]) + bias[:Co])`` on the leading channels of a weight.

    What is outside the active block is neither read nor written. The gradient of ``weight`` is the
    ordinary full-size one, zero outside the block (layers of ``sk.nn`` write only the block).
    Differentiable twice. The output has x's memory format: channels-last in, channels-last out.

    With ``groups``, the leading groups are active, each whole, as many as x has channels for; so a
    depthwise convolution uses the leading channels.

    Args:
        x: (N, Ci, H, W) or (Ci, H, W). float32, bfloat16, float16 or float64.
        weight: (M, K/groups, KH, KW) with unit inner stride or in channels-last memory, x's dtype;
            Ci is at most K.
        bias: (M,) or None.
        out_channels: Co, a count from 1 to M; M when not given. With groups it follows from x.
        kernel_size: Active taps, one number or (height, width): the centre of the stored kernel, so
            it differs from KH and KW by even numbers. All when not given.
        stride: Pixels between two outputs, one number or (height, width).
        padding: Zeros on each side, ``"valid"`` for none, or ``"same"`` for x's size (stride 1).
        dilation: Pixels between two taps.
        groups: Groups that the stored weight has.
        activation: None, ``"relu"``, ``"gelu"`` (exact) or ``"silu"``.

    Returns:
        (N, Co, OH, OW), or (Co, OH, OW).

    Raises:
        ShapeError: A size below 1 or above the weight's, part of a group, a kernel that is not a
            centre or reaches beyond x, or a wrong rank.
        StrideError: ``weight`` lies otherwise.
        DTypeError: An unsupported dtype, or two that differ outside autocast.
        DeviceError: Tensors on different devices.
        OptionError: An unknown activation or padding.
    """
    return run_conv2d(
        x, weight, bias, out_channels, kernel_size, stride, padding, dilation, groups,
        activation or "none", None, None, True,
    )  # fmt: skip


def run_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_channels: int | None,
    kernel_size: Pair | None,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
    activation: str,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
    dense: bool,
) -> Tensor:
    """:func:`conv2d` for layers, whose slots say where gradients land (``dense``: not there)."""
    images = autocast(x).unsqueeze(0) if x.dim() == 3 else autocast(x)
    images, block, geometry = resolve(
        images, weight, out_channels, kernel_size, stride, padding, dilation, groups
    )
    check_rest(images, weight, bias, block[0], activation)
    paths = weight_slot, bias_slot, dense
    y = _run(images, weight, bias, block, geometry, activation, *paths)
    return y.squeeze(0) if x.dim() == 3 else y


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: Sizes,
    geometry: Sizes,
    activation: str,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
    dense: bool,
) -> Tensor:
    sizes = block, geometry, activation
    if is_compiling():
        if dense:
            op = torch.ops.sorted_kernels.conv2d
            return op(x, weight, bias, *sizes, activation != "none")[0]
    elif not torch.is_grad_enabled():
        return ops.forward(x, weight, bias, *sizes, False)[0]
    anchor = None
    if not dense:
        weight, bias, anchor = weight.detach(), detached(bias), ANCHOR
    return _Conv2d.apply(x, weight, bias, *sizes, weight_slot, bias_slot, dense, anchor)
