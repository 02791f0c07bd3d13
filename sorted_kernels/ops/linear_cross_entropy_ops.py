"""What the cross-entropy under a linear head consists of: schemas, their kernels and fakes."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from sorted_kernels.ops import compiled_cross_entropy
from sorted_kernels.ops.backend import implementation, in_compiled_torch
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.reference.linear_cross_entropy import Gradients, wide_dtype

LIBRARY.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target,"
    " SymInt ignore_index, float label_smoothing) -> Tensor"
)
LIBRARY.define(
    "linear_cross_entropy_backward(Tensor scale, Tensor hidden, Tensor weight, Tensor? bias,"
    " Tensor target, SymInt ignore_index, float label_smoothing,"
    " bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)


def head_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The weight as it is; under autocast its block in the hidden states' dtype."""
    if weight.dtype == hidden.dtype:
        return weight, bias
    block = weight[:, : hidden.shape[1]].to(hidden.dtype)
    return block, None if bias is None else bias.to(hidden.dtype)


def run_with(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    gradients: Gradients | None,
) -> Tensor:
    """Losses (R,) of rows (R, k), and their gradients where they are wanted."""
    module: ModuleType = compiled_cross_entropy
    if not in_compiled_torch(hidden, compiled_cross_entropy.DTYPES):
        module = implementation("linear_cross_entropy", hidden)
    run = module.linear_cross_entropy
    head, shift = head_of(hidden, weight, bias)
    return run(hidden, head, shift, target, scale, ignore_index, label_smoothing, gradients)


def losses_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Losses (R,) of rows (R, k)."""
    return run_with(hidden, weight, bias, target, None, ignore_index, label_smoothing, None)


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
    run_with(hidden, weight, bias, target, scale, ignore_index, label_smoothing, places)
    return dx, dw, db


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("linear_cross_entropy", losses_of, _device)
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
