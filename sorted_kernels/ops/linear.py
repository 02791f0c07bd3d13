"""Linear over a weight's prefix: schemas, fake kernels, autograd, public function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import GradientError, OptionError, ShapeError
from sorted_kernels.ops.backend import implementation, linear_implementation
from sorted_kernels.ops.blocks import Blocks, lean_apply
from sorted_kernels.ops.checks import (
    autocast,
    cast_block,
    check_count,
    check_input,
    check_parameter,
    check_same_dtype,
    embed_prefix,
    sums_apart,
)
from sorted_kernels.ops.gradient import (
    ANCHOR,
    IN_PLACE_TWICE,
    GradientSlot,
    detached,
    lands,
    parameters_wanted,
)
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.ops.ragged import checked_rows
from sorted_kernels.ops.ragged_linear import run_ragged_linear
from sorted_kernels.reference import linear as reference
from sorted_kernels.reference.linear import ACTIVATIONS, activate, activation_backward
from sorted_kernels.row_widths import RowWidths

LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, SymInt out_features, str activation, bool save)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define("linear_dgrad(Tensor dy, Tensor weight, SymInt in_features) -> Tensor")
LIBRARY.define("linear_wgrad(Tensor dy, Tensor x, Tensor weight) -> Tensor")
LIBRARY.define("linear_wgrad_(Tensor dy, Tensor x, Tensor(a!) grad) -> ()")
LIBRARY.define("linear_accumulate(Tensor dy, Tensor x, Tensor(a!) token, SymInt handle) -> ()")


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    if weight.dtype != x.dtype:  # autocast casts the block, never the whole weight
        weight = cast_block(weight, out_features, x.shape[-1], x.dtype)
        bias = None if bias is None else bias[:out_features].to(x.dtype)
    sizes = out_features, x.shape[-1]
    module = linear_implementation("forward", (x, weight), *sizes, activation)
    return module.linear(x, weight, bias, out_features, activation, save)


def _dgrad(dy: Tensor, weight: Tensor, in_features: int) -> Tensor:
    if weight.dtype != dy.dtype:
        weight = cast_block(weight, dy.shape[-1], in_features, dy.dtype)
    module = linear_implementation("dgrad", (dy, weight), dy.shape[-1], in_features)
    return module.linear_dgrad(dy, weight, in_features)


def _wgrad(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The full-size gradient: zero outside ``[:m, :k]``."""
    grad = dy.new_zeros(weight.shape, dtype=weight.dtype)
    _wgrad_into(dy, x, grad[: dy.shape[-1], : x.shape[-1]], False)
    return grad


def _wgrad_(dy: Tensor, x: Tensor, grad: Tensor) -> None:
    _wgrad_into(dy, x, grad[: dy.shape[-1], : x.shape[-1]], True)


def _wgrad_into(dy: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> None:
    module = linear_implementation("wgrad", (dy, x, out), *out.shape)
    if sums_apart(dy, out, module is reference):
        product = torch.empty(out.shape, dtype=dy.dtype, device=dy.device)
        _wgrad_into(dy, x, product, False)
        out.add_(product) if accumulate else out.copy_(product)
        return
    module.linear_wgrad_into(dy, x, out, accumulate)


def _bias_grad_into(dy: Tensor, out: Tensor, accumulate: bool) -> None:
    if dy.dtype != out.dtype:
        out.add_(dy.sum(0)) if accumulate else out.copy_(dy.sum(0))
        return
    implementation("linear", dy).bias_grad_into(dy, out, accumulate)


def _accumulate(dy: Tensor, x: Tensor, token: Tensor, handle: int) -> None:
    slot = GradientSlot.by_handle(handle)
    _wgrad_into(dy, x, *slot.prefix(dy.shape[-1], x.shape[-1]))


for _name, _function in {
    "linear": _linear,
    "linear_dgrad": _dgrad,
    "linear_wgrad": _wgrad,
    "linear_wgrad_": _wgrad_,
}.items():
    LIBRARY.impl(_name, _function, "CPU")
    LIBRARY.impl(_name, _function, "CUDA")
LIBRARY.impl("linear_accumulate", _accumulate, "CompositeExplicitAutograd")


@torch.library.register_fake("sorted_kernels::linear", lib=LIBRARY)
def _linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    torch._check(x.shape[-1] <= weight.shape[1])
    torch._check(out_features <= weight.shape[0])
    y = x.new_empty((*x.shape[:-1], out_features))
    saved = save and activation in ("gelu", "silu")
    return y, torch.empty_like(y) if saved else x.new_empty(0)


@torch.library.register_fake("sorted_kernels::linear_dgrad", lib=LIBRARY)
def _dgrad_fake(dy: Tensor, weight: Tensor, in_features: int) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], in_features))


@torch.library.register_fake("sorted_kernels::linear_wgrad", lib=LIBRARY)
def _wgrad_fake(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return dy.new_empty(weight.shape, dtype=weight.dtype)


@torch.library.register_fake("sorted_kernels::linear_wgrad_", lib=LIBRARY)
def _wgrad_in_place_fake(dy: Tensor, x: Tensor, grad: Tensor) -> None:
    return None


@torch.library.register_fake("sorted_kernels::linear_accumulate", lib=LIBRARY)
def _accumulate_fake(dy: Tensor, x: Tensor, token: Tensor, handle: int) -> None:
    return None


class _Linear(Function):
    """The one autograd node of linear: dense gradients, or in place where a slot is given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
        weight_slot: GradientSlot | None,
        bias_slot: GradientSlot | None,
        dense: bool,
        anchor: Tensor | None,
    ) -> Tensor:
        run = torch.ops.sorted_kernels.linear if is_compiling() else _linear
        y, saved = run(x, weight, bias, out_features, activation, activation != "none")
        _save(ctx, x, weight, bias, activation, y, saved, dense, weight_slot is not None)
        ctx.slots, ctx.dense = (weight_slot, bias_slot), dense
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight_slot, bias_slot = ctx.slots
        if ctx.dense:
            gradients = _dense_backward(ctx, dy)
            if weight_slot is not None:
                weight_slot.expect(dy.shape[-1], ctx.in_features)
            if bias_slot is not None:
                bias_slot.expect(dy.shape[-1])
            return (*gradients, *[None] * 6)
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        x, weight, _, saved = ctx.saved_tensors
        dz = dy if saved is None else activation_backward(dy, saved, ctx.activation)
        dx = None
        if ctx.needs_input_grad[0]:
            run = torch.ops.sorted_kernels.linear_dgrad if is_compiling() else _dgrad
            dx = run(dz, weight, ctx.in_features)
        m = dz.shape[-1]
        rows = dz if dz.dim() == 2 else dz.reshape(-1, m)
        if lands(weight_slot):
            k = ctx.in_features
            x_rows = x if x.dim() == 2 else x.reshape(-1, k)
            if is_compiling():
                torch.ops.sorted_kernels.linear_accumulate(
                    rows, x_rows, weight_slot.token, weight_slot.handle
                )
            else:
                _wgrad_into(rows, x_rows, *weight_slot.prefix(m, k))
        if lands(bias_slot):
            if is_compiling():
                torch.ops.sorted_kernels.accumulate_prefix(
                    rows.sum(0), bias_slot.token, bias_slot.handle
                )
            else:
                _bias_grad_into(rows, *bias_slot.prefix(m))
        return dx, *[None] * 8


class _LinearOnBlocks(Function):
    """In-place gradients in plain PyTorch: as little Python as can be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Blocks, anchor: Tensor) -> Tensor:
        weight = blocks.weight
        ctx.save_for_backward(
            x if blocks.weight_slot is not None else None, weight if x.requires_grad else None
        )
        ctx.blocks = blocks
        return F.linear(x, weight, blocks.bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        x, weight = ctx.saved_tensors
        blocks = ctx.blocks
        dx = None if weight is None else dy @ weight
        if parameters_wanted():
            m, k = blocks.sizes
            rows = dy if dy.dim() == 2 else dy.reshape(-1, m)
            if x is not None:
                x_rows = x if x.dim() == 2 else x.reshape(-1, k)
                reference.linear_wgrad_into(rows, x_rows, *blocks.weight_slot.prefix(m, k))
            if blocks.bias_slot is not None:
                reference.bias_grad_into(rows, *blocks.bias_slot.prefix(m))
        return dx, None, None


_apply_on_blocks = lean_apply(_LinearOnBlocks)


def linear_on_blocks(x: Tensor, blocks: Blocks, activation: str) -> Tensor:
    """:func:`linear` for layers that have their blocks at hand.

    Raises:
        RuntimeError: PyTorch's own error; :func:`check_linear` says what was wrong.
    """
    if blocks.train and torch.is_grad_enabled():
        z = _apply_on_blocks(x, blocks, ANCHOR)
    else:
        z = F.linear(x, blocks.weight, blocks.bias)
    return z if activation == "none" else activate(z, activation)


def _save(
    ctx: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    y: Tensor,
    saved: Tensor,
    dense: bool,
    in_place: bool,
) -> None:
    """Keep what the wanted gradients need, and nothing else.

    The dense path can be differentiated twice, for which the activation's input is computed again
    from x, weight and bias.
    """
    again = dense and activation != "none"
    ctx.save_for_backward(
        x if in_place or ctx.needs_input_grad[1] or again else None,
        weight if ctx.needs_input_grad[0] or again else None,
        bias if again else None,
        None if activation == "none" else y if activation == "relu" else saved,
    )
    ctx.activation, ctx.in_features = activation, x.shape[-1]
    ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
    ctx.bias_shape = None if bias is None else bias.shape


def _dense_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Full-size gradients, in differentiable PyTorch where a double backward was asked for."""
    x, weight, bias, saved = ctx.saved_tensors
    need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
    m, k = dy.shape[-1], ctx.in_features
    dx = dw = db = None
    if torch.is_grad_enabled():
        dz = dy
        if ctx.activation != "none":
            z = F.linear(x, weight[:m, :k].to(x.dtype), None if bias is None else bias[:m])
            (dz,) = torch.autograd.grad(activate(z, ctx.activation), z, dy, create_graph=True)
        rows = dz.reshape(-1, m)
        if need_dx:
            dx = dz @ weight[:m, :k].to(dz.dtype)
        if need_dw:
            block = rows.t() @ x.reshape(-1, k)
            dw = embed_prefix(block, ctx.weight_shape).to(ctx.weight_dtype)
    else:
        dz = dy if saved is None else activation_backward(dy, saved, ctx.activation)
        rows = dz.reshape(-1, m)
        if need_dx:
            dx = torch.ops.sorted_kernels.linear_dgrad(dz, weight, k)
        if need_dw:
            like = dz.new_empty((), dtype=ctx.weight_dtype).expand(ctx.weight_shape)
            dw = torch.ops.sorted_kernels.linear_wgrad(rows, x.reshape(-1, k), like)
    if need_db:
        db = embed_prefix(rows.sum(0), ctx.bias_shape).to(ctx.weight_dtype)
    return dx, dw, db


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, activation, _ = inputs
    _save(ctx, x, weight, bias, activation, *output, dense=True, in_place=False)


def _op_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_dense_backward(ctx, dy), None, None, None)


torch.library.register_autograd(
    "sorted_kernels::linear", _op_backward, setup_context=_setup, lib=LIBRARY
)


def check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, activation: str
) -> None:
    """Raise what :func:`linear` documents."""
    check_input(x)
    check_parameter(weight, x, "weight", 2)
    check_same_dtype(weight, x, "weight")
    check_count("out_features", out_features, weight.shape[0], "weight's first axis")
    if x.shape[-1] > weight.shape[1]:
        raise ShapeError(
            f"x has {x.shape[-1]} features; weight's second axis has {weight.shape[1]} at most"
        )
    if bias is not None:
        check_parameter(bias, x, "bias", 1)
        check_same_dtype(bias, x, "bias")
        if bias.shape[0] < out_features:
            raise ShapeError(f"bias has {bias.shape[0]} elements, fewer than out_features")
    if activation not in ACTIVATIONS:
        raise OptionError(f"activation={activation!r}; allowed are {', '.join(ACTIVATIONS)}")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int | RowWidths | None = None,
    activation: str | None = None,
) -> Tensor:
    """``activation(x @ weight[:m, :k].T + bias[:m])`` on the leading block of a shared weight.

    The weight is read in place through its strides; nothing outside the block is touched. The
    gradient of ``weight`` is the ordinary full-size one, zero outside the block (layers of
    ``sk.nn`` write only the block). Differentiable twice.

    With :class:`~sorted_kernels.RowWidths` the rows belong to different sub-models, each with its
    own m and k: one call, at the cost of what the rows need. What x and the upstream gradient hold
    past a row's size is never read; outputs and gradients are zero there. Differentiable once.

    Args:
        x: (..., k), k at most K. float32, bfloat16, float16 or float64. (N, at least the largest k)
            with RowWidths.
        weight: (M, K) with unit inner stride, x's dtype.
        bias: (M,) or None.
        out_features: m, a count from 1 to M; M when not given. Or RowWidths of N rows.
        activation: None, ``"relu"``, ``"gelu"`` (exact) or ``"silu"``.

    Returns:
        (..., m); (N, largest m) with RowWidths.

    Raises:
        ShapeError: A size below 1 or above the weight's, or a wrong rank.
        StrideError: ``weight`` has no unit inner stride.
        DTypeError: An unsupported dtype, or two that differ outside autocast.
        DeviceError: Tensors on different devices.
        OptionError: An unknown activation.
    """
    check_parameter(weight, x, "weight", 2)
    if isinstance(out_features, RowWidths):
        return linear_of_rows(x, weight, bias, out_features, activation or "none", None, None, True)
    m = weight.shape[0] if out_features is None else out_features
    return run_linear(x, weight, bias, m, activation or "none", None, None, True)


def linear_of_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: RowWidths,
    activation: str,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
    dense: bool,
) -> Tensor:
    """:func:`linear` on a ragged batch, for layers too."""
    x = checked_rows(x, widths)
    check_linear(x, weight, bias, widths.out_features, activation)
    return run_ragged_linear(x, weight, bias, widths, activation, weight_slot, bias_slot, dense)


def run_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
    dense: bool,
) -> Tensor:
    """:func:`linear` for layers, whose slots say where gradients land (``dense``: not there)."""
    x = autocast(x)
    check_linear(x, weight, bias, out_features, activation)
    if is_compiling():
        if dense:
            save = activation != "none"
            op = torch.ops.sorted_kernels.linear
            return op(x, weight, bias, out_features, activation, save)[0]
    elif not torch.is_grad_enabled():
        return _linear(x, weight, bias, out_features, activation, False)[0]
    anchor = None
    if not dense:
        weight, bias, anchor = weight.detach(), detached(bias), ANCHOR
    return _Linear.apply(
        x, weight, bias, out_features, activation, weight_slot, bias_slot, dense, anchor
    )
