"""Linear over a ragged batch: rows of different sub-models in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import GradientError
from sorted_kernels.ops import ragged_products
from sorted_kernels.ops.backend import (
    implementation,
    in_compiled_torch,
    linear_implementation,
)
from sorted_kernels.ops.checks import autocast, cast_block, sums_apart
from sorted_kernels.ops.gradient import ANCHOR, IN_PLACE_TWICE, GradientSlot, lands
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.ops.ragged import (
    announce,
    dense_rows,
    largest,
    refuse_double_backward,
    triples,
)
from sorted_kernels.reference import ragged as reference
from sorted_kernels.reference.linear import activation_backward
from sorted_kernels.row_widths import RowWidths

LIBRARY.define(
    "ragged_linear(Tensor x, Tensor weight, Tensor? bias, SymInt[] runs, str activation, bool save)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define("ragged_linear_dgrad(Tensor dy, Tensor weight, SymInt[] runs) -> Tensor")
LIBRARY.define("ragged_linear_wgrad(Tensor dy, Tensor x, Tensor weight, SymInt[] runs) -> Tensor")
LIBRARY.define("ragged_linear_bias_grad(Tensor dy, Tensor bias, SymInt[] runs) -> Tensor")
LIBRARY.define(
    "ragged_linear_accumulate(Tensor dy, Tensor x, Tensor(a!) token, SymInt handle,"
    " SymInt[] runs) -> ()"
)


def _backend(
    product: str, operands: tuple[Tensor, ...], runs: list[int], activation: str = "none"
) -> Any:
    """The module that runs a product; its operands are those of :func:`linear_implementation`."""
    module = linear_implementation(product, operands, *largest(runs), activation, ragged=True)
    return module if hasattr(module, "ragged_linear") else _in_plain_torch(operands[0])


def _in_plain_torch(x: Tensor) -> Any:
    return ragged_products if in_compiled_torch(x) else reference


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, runs: list[int], activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    if weight.dtype != x.dtype:
        m, k = largest(runs)
        weight = cast_block(weight, m, k, x.dtype)
        bias = None if bias is None else bias[:m].to(x.dtype)
    x = dense_rows(x)
    module = _backend("forward", (x, weight), runs, activation)
    return module.ragged_linear(x, weight, bias, triples(runs), activation, save)


def _dgrad(dy: Tensor, weight: Tensor, runs: list[int]) -> Tensor:
    if weight.dtype != dy.dtype:
        weight = cast_block(weight, *largest(runs), dy.dtype)
    dy = dense_rows(dy)
    return _backend("dgrad", (dy, weight), runs).ragged_dgrad(dy, weight, triples(runs))


def _wgrad_into(dy: Tensor, x: Tensor, runs: list[int], out: Tensor, accumulate: bool) -> None:
    dy, x = dense_rows(dy), dense_rows(x)
    module = _backend("wgrad", (dy, x, out), runs)
    if sums_apart(dy, out, module is reference):
        product = torch.empty(out.shape, dtype=dy.dtype, device=dy.device)
        _wgrad_into(dy, x, runs, product, False)
        out.add_(product) if accumulate else out.copy_(product)
        return
    module.ragged_wgrad_into(dy, x, triples(runs), out, accumulate)


def _bias_grad_into(dy: Tensor, runs: list[int], out: Tensor, accumulate: bool) -> None:
    dy = dense_rows(dy)
    module = implementation("linear", dy)
    if not hasattr(module, "ragged_linear"):
        module = _in_plain_torch(dy)
    if dy.dtype != out.dtype:
        total = torch.empty(out.shape, dtype=dy.dtype, device=dy.device)
        module.ragged_bias_grad_into(dy, triples(runs), total, False)
        out.add_(total) if accumulate else out.copy_(total)
        return
    module.ragged_bias_grad_into(dy, triples(runs), out, accumulate)


def _wgrad(dy: Tensor, x: Tensor, weight: Tensor, runs: list[int]) -> Tensor:
    """The full-size gradient: zero outside the largest row's block."""
    grad = dy.new_zeros(weight.shape, dtype=weight.dtype)
    m, k = largest(runs)
    _wgrad_into(dy, x, runs, grad[:m, :k], False)
    return grad


def _bias_grad(dy: Tensor, bias: Tensor, runs: list[int]) -> Tensor:
    grad = dy.new_zeros(bias.shape, dtype=bias.dtype)
    _bias_grad_into(dy, runs, grad[: largest(runs)[0]], False)
    return grad


for _name, _function in {
    "ragged_linear": _linear,
    "ragged_linear_dgrad": _dgrad,
    "ragged_linear_wgrad": _wgrad,
    "ragged_linear_bias_grad": _bias_grad,
}.items():
    LIBRARY.impl(_name, _function, "CPU")
    LIBRARY.impl(_name, _function, "CUDA")


def _accumulate(dy: Tensor, x: Tensor, token: Tensor, handle: int, runs: list[int]) -> None:
    slot = GradientSlot.by_handle(handle)
    _wgrad_into(dy, x, runs, *slot.prefix(*largest(runs)))


LIBRARY.impl("ragged_linear_accumulate", _accumulate, "CompositeExplicitAutograd")


@torch.library.register_fake("sorted_kernels::ragged_linear", lib=LIBRARY)
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, runs: list[int], activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((x.shape[0], runs[1]))
    saved = save and activation in ("gelu", "silu")
    return y, torch.empty_like(y) if saved else x.new_empty(0)


@torch.library.register_fake("sorted_kernels::ragged_linear_dgrad", lib=LIBRARY)
def _dgrad_fake(dy: Tensor, weight: Tensor, runs: list[int]) -> Tensor:
    return dy.new_empty((dy.shape[0], runs[2]))


@torch.library.register_fake("sorted_kernels::ragged_linear_wgrad", lib=LIBRARY)
def _wgrad_fake(dy: Tensor, x: Tensor, weight: Tensor, runs: list[int]) -> Tensor:
    return dy.new_empty(weight.shape, dtype=weight.dtype)


@torch.library.register_fake("sorted_kernels::ragged_linear_bias_grad", lib=LIBRARY)
def _bias_grad_fake(dy: Tensor, bias: Tensor, runs: list[int]) -> Tensor:
    return dy.new_empty(bias.shape, dtype=bias.dtype)


@torch.library.register_fake("sorted_kernels::ragged_linear_accumulate", lib=LIBRARY)
def _accumulate_fake(dy: Tensor, x: Tensor, token: Tensor, handle: int, runs: list[int]) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, runs, activation, _ = inputs
    _save(ctx, x, weight, runs, activation, *output)
    # Only the shape and dtype matter; an expanded scalar has them and holds nothing.
    ctx.weight_like = (weight.shape, weight.dtype)
    ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)


def _save(
    ctx: Any, x: Tensor, weight: Tensor, runs: list[int], activation: str, y: Tensor, saved: Tensor
) -> None:
    ctx.save_for_backward(
        x, weight, None if activation == "none" else y if activation == "relu" else saved
    )
    ctx.runs, ctx.activation = runs, activation


def _like(dy: Tensor, shape_dtype: tuple[torch.Size, torch.dtype]) -> Tensor:
    return dy.new_empty((), dtype=shape_dtype[1]).expand(shape_dtype[0])


def _op_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    x, weight, saved = ctx.saved_tensors
    dz = dy if saved is None else activation_backward(dy, saved, ctx.activation)
    need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
    ops, runs = torch.ops.sorted_kernels, ctx.runs
    dx = dw = db = None
    if need_dx:
        dx = ops.ragged_linear_dgrad(dz, weight, runs)
    if need_dw:
        dw = ops.ragged_linear_wgrad(dz, x, _like(dz, ctx.weight_like), runs)
    if need_db:
        db = ops.ragged_linear_bias_grad(dz, _like(dz, ctx.bias_like), runs)
    return dx, dw, db, None, None, None


torch.library.register_autograd(
    "sorted_kernels::ragged_linear", _op_backward, setup_context=_setup, lib=LIBRARY
)


class _RaggedLinear(Function):
    """Gradients that land in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        runs: list[int],
        activation: str,
        weight_slot: GradientSlot | None,
        bias_slot: GradientSlot | None,
        anchor: Tensor,
    ) -> Tensor:
        run = torch.ops.sorted_kernels.ragged_linear if is_compiling() else _linear
        y, saved = run(x, weight, bias, runs, activation, activation != "none")
        _save(ctx, x, weight, runs, activation, y, saved)
        ctx.slots = (weight_slot, bias_slot)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        x, weight, saved = ctx.saved_tensors
        weight_slot, bias_slot = ctx.slots
        dz = dy if saved is None else activation_backward(dy, saved, ctx.activation)
        dx, runs, (m, k) = None, ctx.runs, largest(ctx.runs)
        ops = torch.ops.sorted_kernels
        if ctx.needs_input_grad[0]:
            dgrad = ops.ragged_linear_dgrad if is_compiling() else _dgrad
            dx = dgrad(dz, weight, runs)
        if lands(weight_slot):
            if is_compiling():
                token, handle = weight_slot.token, weight_slot.handle
                ops.ragged_linear_accumulate(dz, x, token, handle, runs)
            else:
                _wgrad_into(dz, x, runs, *weight_slot.prefix(m, k))
        if lands(bias_slot):
            if is_compiling():
                gradient = ops.ragged_linear_bias_grad(dz, dz.new_empty(m), runs)
                ops.accumulate_prefix(gradient, bias_slot.token, bias_slot.handle)
            else:
                _bias_grad_into(dz, runs, *bias_slot.prefix(m))
        return dx, *[None] * 7


def run_ragged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: RowWidths,
    activation: str,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
    dense: bool,
) -> Tensor:
    """:func:`sorted_kernels.linear` on a ragged batch x (N, largest k); the caller has checked."""
    x = autocast(x)
    runs = widths.flat()
    if dense or not torch.is_grad_enabled():
        save = activation != "none"
        y = torch.ops.sorted_kernels.ragged_linear(x, weight, bias, runs, activation, save)[0]
        m, k = largest(runs)
        announce(y, (weight_slot, m, k), (bias_slot, m, 1))
        return y
    return _RaggedLinear.apply(
        x, weight.detach(), None if bias is None else bias.detach(), runs, activation,
        weight_slot, bias_slot, ANCHOR,
    )  # fmt: skip
