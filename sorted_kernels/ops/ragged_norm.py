"""Layer norm and RMS norm of a ragged batch: each row over its own width (its in_features)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import GradientError
from sorted_kernels.ops.checks import autocast_wide, check_affine, check_input, embed_prefix
from sorted_kernels.ops.gradient import ANCHOR, IN_PLACE_TWICE, GradientSlot, lands
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.ops.ragged import (
    announce,
    checked_rows,
    ragged_implementation,
    refuse_double_backward,
    triples,
)
from sorted_kernels.row_widths import RowWidths

LIBRARY.define(
    "ragged_layer_norm(Tensor x, Tensor? weight, Tensor? bias, SymInt[] runs, float eps)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "ragged_layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight,"
    " SymInt[] runs, bool need_dx, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "ragged_rms_norm(Tensor x, Tensor? weight, SymInt[] runs, float eps) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "ragged_rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor? weight, SymInt[] runs,"
    " bool need_dx, bool need_weight) -> (Tensor, Tensor)"
)


def _layer_backend(x: Tensor) -> Any:
    return ragged_implementation("layer_norm", "ragged_layer_norm", x)


def _rms_backend(x: Tensor) -> Any:
    return ragged_implementation("rms_norm", "ragged_rms_norm", x)


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, runs: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _layer_backend(x).ragged_layer_norm(x, weight, bias, triples(runs), eps)


def _layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    runs: list[int],
    need_dx: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (N, k), weight (k,) and bias (k,), k the largest; empty where not needed."""
    dw, db = (x.new_empty(runs[2] if need else 0) for need in (need_weight, need_bias))
    dx = _layer_backend(x).ragged_layer_norm_backward_into(
        dy, x, mean, rstd, weight, triples(runs), dw if need_weight else None,
        db if need_bias else None, False, False, need_dx,
    )  # fmt: skip
    return x.new_empty(0) if dx is None else dx, dw, db


def _rms_norm(
    x: Tensor, weight: Tensor | None, runs: list[int], eps: float
) -> tuple[Tensor, Tensor]:
    return _rms_backend(x).ragged_rms_norm(x, weight, triples(runs), eps)


def _rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    runs: list[int],
    need_dx: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (N, k) and weight (k,), k the largest; empty where not needed."""
    dw = x.new_empty(runs[2] if need_weight else 0)
    dx = _rms_backend(x).ragged_rms_norm_backward_into(
        dy, x, rstd, weight, triples(runs), dw if need_weight else None, False, need_dx
    )
    return x.new_empty(0) if dx is None else dx, dw


for _name, _function in {
    "ragged_layer_norm": _layer_norm,
    "ragged_layer_norm_backward": _layer_norm_backward,
    "ragged_rms_norm": _rms_norm,
    "ragged_rms_norm_backward": _rms_norm_backward,
}.items():
    LIBRARY.impl(_name, _function, "CPU")
    LIBRARY.impl(_name, _function, "CUDA")


def _statistics(x: Tensor) -> Tensor:
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    return x.new_empty((x.shape[0], 1), dtype=wide)


@torch.library.register_fake("sorted_kernels::ragged_layer_norm", lib=LIBRARY)
def _layer_norm_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, runs: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((x.shape[0], runs[2])), _statistics(x), _statistics(x)


@torch.library.register_fake("sorted_kernels::ragged_layer_norm_backward", lib=LIBRARY)
def _layer_norm_backward_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    runs: list[int],
    need_dx: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty((x.shape[0], runs[2]) if need_dx else 0)
    return dx, x.new_empty(runs[2] if need_weight else 0), x.new_empty(runs[2] if need_bias else 0)


@torch.library.register_fake("sorted_kernels::ragged_rms_norm", lib=LIBRARY)
def _rms_norm_fake(
    x: Tensor, weight: Tensor | None, runs: list[int], eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], runs[2])), _statistics(x)


@torch.library.register_fake("sorted_kernels::ragged_rms_norm_backward", lib=LIBRARY)
def _rms_norm_backward_fake(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    runs: list[int],
    need_dx: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty((x.shape[0], runs[2]) if need_dx else 0)
    return dx, x.new_empty(runs[2] if need_weight else 0)


def _setup_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, runs, _ = inputs
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.runs = runs
    ctx.shapes = [None if param is None else param.shape for param in (weight, bias)]


def _layer_norm_op_backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    x, weight, mean, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    dx, dw, db = torch.ops.sorted_kernels.ragged_layer_norm_backward(
        dy, x, mean, rstd, weight, ctx.runs, *needs
    )
    return (
        dx if needs[0] else None,
        embed_prefix(dw, ctx.shapes[0]) if needs[1] else None,
        embed_prefix(db, ctx.shapes[1]) if needs[2] else None,
        None,
        None,
    )


def _setup_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, runs, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.runs, ctx.shape = runs, None if weight is None else weight.shape


def _rms_norm_op_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    x, weight, rstd = ctx.saved_tensors
    need_dx, need_weight = ctx.needs_input_grad[:2]
    dx, dw = torch.ops.sorted_kernels.ragged_rms_norm_backward(
        dy, x, rstd, weight, ctx.runs, need_dx, need_weight
    )
    dw = embed_prefix(dw, ctx.shape) if need_weight else None
    return dx if need_dx else None, dw, None, None


torch.library.register_autograd(
    "sorted_kernels::ragged_layer_norm", _layer_norm_op_backward, setup_context=_setup_layer_norm,
    lib=LIBRARY,
)  # fmt: skip
torch.library.register_autograd(
    "sorted_kernels::ragged_rms_norm", _rms_norm_op_backward, setup_context=_setup_rms_norm,
    lib=LIBRARY,
)  # fmt: skip


class _RaggedNorm(Function):
    """Gradients that land in place, for both norms: without ``bias_slot`` and bias, RMS norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        runs: list[int],
        eps: float,
        kind: str,
        weight_slot: GradientSlot | None,
        bias_slot: GradientSlot | None,
        anchor: Tensor,
    ) -> Tensor:
        ops, compiling = torch.ops.sorted_kernels, is_compiling()
        if kind == "layer_norm":
            layer_norm = ops.ragged_layer_norm if compiling else _layer_norm
            y, *statistics = layer_norm(x, weight, bias, runs, eps)
        else:
            rms_norm = ops.ragged_rms_norm if compiling else _rms_norm
            y, *statistics = rms_norm(x, weight, runs, eps)
        ctx.save_for_backward(x, weight, *statistics)
        ctx.runs, ctx.kind, ctx.slots = runs, kind, (weight_slot, bias_slot)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        x, weight, *statistics = ctx.saved_tensors
        need_dx = ctx.needs_input_grad[0]
        if is_compiling():
            return _compiled_norm_backward(ctx, dy, x, weight, statistics), *[None] * 8
        runs = triples(ctx.runs)
        (dw, add_weight), (db, add_bias) = (
            slot.prefix(ctx.runs[2]) if slot is not None and lands(slot) else (None, False)
            for slot in ctx.slots
        )
        if ctx.kind == "layer_norm":
            dx = _layer_backend(x).ragged_layer_norm_backward_into(
                dy, x, *statistics, weight, runs, dw, db, add_weight, add_bias, need_dx
            )
        else:
            dx = _rms_backend(x).ragged_rms_norm_backward_into(
                dy, x, *statistics, weight, runs, dw, add_weight, need_dx
            )
        return dx, *[None] * 8


def _compiled_norm_backward(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, statistics: list[Tensor]
) -> Tensor | None:
    """The same as ops that torch.compile keeps in its graph."""
    ops, need_dx = torch.ops.sorted_kernels, ctx.needs_input_grad[0]
    wanted = [lands(slot) for slot in ctx.slots]
    if ctx.kind == "layer_norm":
        dx, *gradients = ops.ragged_layer_norm_backward(
            dy, x, *statistics, weight, ctx.runs, need_dx, *wanted
        )
    else:
        dx, *gradients = ops.ragged_rms_norm_backward(
            dy, x, *statistics, weight, ctx.runs, need_dx, wanted[0]
        )
    for slot, gradient, want in zip(ctx.slots, gradients, wanted, strict=False):
        if want:
            ops.accumulate_prefix(gradient, slot.token, slot.handle)
    return dx if need_dx else None


def run_ragged_norm(
    kind: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    widths: RowWidths,
    eps: float,
    weight_slot: GradientSlot | None,
    bias_slot: GradientSlot | None,
    dense: bool,
) -> Tensor:
    """Layer norm or RMS norm (``kind``, the op's name) of a ragged batch, for layers too."""
    x = autocast_wide(checked_rows(x, widths), weight)
    check_input(x)
    check_affine(x, weight, "weight")
    check_affine(x, bias, "bias")
    runs = widths.flat()
    if dense or not torch.is_grad_enabled():
        ops = torch.ops.sorted_kernels
        if kind == "layer_norm":
            y = ops.ragged_layer_norm(x, weight, bias, runs, eps)[0]
        else:
            y = ops.ragged_rms_norm(x, weight, runs, eps)[0]
        announce(y, *((slot, widths.in_features, 1) for slot in (weight_slot, bias_slot)))
        return y
    weight, bias = (None if param is None else param.detach() for param in (weight, bias))
    return _RaggedNorm.apply(x, weight, bias, runs, eps, kind, weight_slot, bias_slot, ANCHOR)
