"""Embedding of the leading features: schemas, fake kernels, autograd, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import DTypeError, GradientError, ShapeError
from sorted_kernels.ops.backend import implementation
from sorted_kernels.ops.checks import FLOATS, check_count, check_parameter, embed_prefix
from sorted_kernels.ops.gradient import ANCHOR, IN_PLACE_TWICE, GradientSlot, lands
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.ops.ragged import check_widths
from sorted_kernels.ops.ragged_embedding import run_ragged_embedding
from sorted_kernels.row_widths import RowWidths

LIBRARY.define("embedding(Tensor indices, Tensor weight, SymInt features, SymInt padding_idx)"
               " -> Tensor")  # fmt: skip
LIBRARY.define(
    "embedding_backward(Tensor dy, Tensor indices, SymInt rows, SymInt padding_idx) -> Tensor"
)
LIBRARY.define(
    "embedding_accumulate(Tensor dy, Tensor indices, Tensor(a!) token, SymInt handle,"
    " SymInt rows, SymInt padding_idx) -> ()"
)


def _embedding(indices: Tensor, weight: Tensor, features: int, padding_idx: int) -> Tensor:
    return implementation("embedding", weight).embedding(indices, weight, features)


def _backward(dy: Tensor, indices: Tensor, rows: int, padding_idx: int) -> Tensor:
    """The (V, k) gradient of the active columns."""
    out = dy.new_empty((rows, dy.shape[-1]))
    _backward_into(dy, indices, out, False, padding_idx)
    return out


def _backward_into(
    dy: Tensor, indices: Tensor, out: Tensor, accumulate: bool, padding_idx: int
) -> None:
    implementation("embedding", dy).embedding_backward_into(
        dy, indices, out, accumulate, padding_idx
    )


def _accumulate(
    dy: Tensor, indices: Tensor, token: Tensor, handle: int, rows: int, padding_idx: int
) -> None:
    out, accumulate = GradientSlot.by_handle(handle).prefix(rows, dy.shape[-1])
    _backward_into(dy, indices, out, accumulate, padding_idx)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("embedding", _embedding, _device)
    LIBRARY.impl("embedding_backward", _backward, _device)
LIBRARY.impl("embedding_accumulate", _accumulate, "CompositeExplicitAutograd")


@torch.library.register_fake("sorted_kernels::embedding", lib=LIBRARY)
def _fake(indices: Tensor, weight: Tensor, features: int, padding_idx: int) -> Tensor:
    torch._check(features <= weight.shape[1])
    return weight.new_empty((*indices.shape, features))


@torch.library.register_fake("sorted_kernels::embedding_backward", lib=LIBRARY)
def _backward_fake(dy: Tensor, indices: Tensor, rows: int, padding_idx: int) -> Tensor:
    return dy.new_empty((rows, dy.shape[-1]))


@torch.library.register_fake("sorted_kernels::embedding_accumulate", lib=LIBRARY)
def _accumulate_fake(
    dy: Tensor, indices: Tensor, token: Tensor, handle: int, rows: int, padding_idx: int
) -> None:
    return None


class _Embedding(Function):
    @staticmethod
    def forward(
        ctx: Any,
        indices: Tensor,
        weight: Tensor,
        features: int,
        padding_idx: int,
        slot: GradientSlot | None,
        dense: bool,
        anchor: Tensor | None,
    ) -> Tensor:
        run = torch.ops.sorted_kernels.embedding if is_compiling() else _embedding
        y = run(indices, weight, features, padding_idx)
        _save(ctx, indices, weight, padding_idx)
        ctx.slot, ctx.dense = slot, dense
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        slot = ctx.slot
        rows = ctx.shape[0]
        if ctx.dense:
            if slot is not None:
                slot.expect(rows, dy.shape[-1])
            return None, _dense_backward(ctx, dy), *[None] * 5
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        if not lands(slot):
            return (None,) * 7
        (indices,) = ctx.saved_tensors
        if is_compiling():
            torch.ops.sorted_kernels.embedding_accumulate(
                dy, indices, slot.token, slot.handle, rows, ctx.padding_idx
            )
        else:
            out, accumulate = slot.prefix(rows, dy.shape[-1])
            _backward_into(dy, indices, out, accumulate, ctx.padding_idx)
        return (None,) * 7


def _save(ctx: Any, indices: Tensor, weight: Tensor, padding_idx: int) -> None:
    ctx.save_for_backward(indices)
    ctx.padding_idx, ctx.shape = padding_idx, weight.shape


def _dense_backward(ctx: Any, dy: Tensor) -> Tensor:
    (indices,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # differentiable: the gradient is linear in dy
        flat = indices.reshape(-1)
        rows = dy.reshape(-1, dy.shape[-1])
        kept = (flat != ctx.padding_idx).unsqueeze(1)
        zeros = dy.new_zeros((ctx.shape[0], dy.shape[-1]))
        return embed_prefix(zeros.index_add(0, flat, rows * kept), ctx.shape)
    gradient = torch.ops.sorted_kernels.embedding_backward(
        dy, indices, ctx.shape[0], ctx.padding_idx
    )
    return embed_prefix(gradient, ctx.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    indices, weight, _, padding_idx = inputs
    _save(ctx, indices, weight, padding_idx)


def _op_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return None, _dense_backward(ctx, dy), None, None


torch.library.register_autograd(
    "sorted_kernels::embedding", _op_backward, setup_context=_setup, lib=LIBRARY
)


def check_embedding(indices: Tensor, weight: Tensor, features: int) -> None:
    """Raise what :func:`embedding` documents."""
    if indices.dtype not in (torch.int64, torch.int32):
        raise DTypeError(f"indices has dtype {indices.dtype}; allowed are int64 and int32")
    check_parameter(weight, indices, "weight", 2)
    if weight.dtype not in FLOATS:
        raise DTypeError(
            f"weight has dtype {weight.dtype}; allowed are float32, bfloat16, float16, float64"
        )
    check_count("features", features, weight.shape[1], "weight's second axis")


def embedding(
    indices: Tensor,
    weight: Tensor,
    *,
    features: int | RowWidths | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """``weight[indices, :k]``, reading k leading features of each row.

    Args:
        indices: int64 or int32 of any shape, each in ``[0, V)`` (checked by PyTorch on the CPU).
        weight: (V, K) with unit inner stride.
        features: k, a count from 1 to K; K when not given. Or RowWidths, with indices (N,): each
            place reads its in_features, and the output is zero past them.
        padding_idx: Row that receives no gradient; a negative one counts from the end, as in torch.

    Returns:
        (*indices.shape, k); (N, largest k) with RowWidths.

    Raises:
        ShapeError: ``features`` outside 1..K, ``padding_idx`` outside the rows, or a wrong rank.
        DTypeError: Indices that are not integers, or an unsupported weight dtype.
        DeviceError: Tensors on different devices.
        StrideError: ``weight`` has no unit inner stride.
    """
    check_parameter(weight, indices, "weight", 2)
    k = weight.shape[1] if features is None else features
    padding = -1
    if padding_idx is not None:
        rows = weight.shape[0]
        if not -rows <= padding_idx < rows:
            raise ShapeError(f"padding_idx={padding_idx} is not in {-rows}..{rows - 1}")
        padding = padding_idx % rows
    if isinstance(k, RowWidths):
        return embedding_of_rows(indices, weight, k, padding, None, True)
    return run_embedding(indices, weight, k, padding, None, True)


def embedding_of_rows(
    indices: Tensor,
    weight: Tensor,
    widths: RowWidths,
    padding_idx: int,
    slot: GradientSlot | None,
    dense: bool,
) -> Tensor:
    """:func:`embedding` on a ragged batch, for layers too."""
    check_widths(widths)
    check_embedding(indices, weight, widths.in_features)
    return run_ragged_embedding(indices, weight, widths, padding_idx, slot, dense)


def run_embedding(
    indices: Tensor,
    weight: Tensor,
    features: int,
    padding_idx: int,
    slot: GradientSlot | None,
    dense: bool,
) -> Tensor:
    """:func:`embedding` for layers, whose slot says where the gradient lands."""
    check_embedding(indices, weight, features)
    if is_compiling():
        if dense:
            return torch.ops.sorted_kernels.embedding(indices, weight, features, padding_idx)
    elif not torch.is_grad_enabled():
        return _embedding(indices, weight, features, padding_idx)
    anchor = None
    if not dense:
        weight, anchor = weight.detach(), ANCHOR
    return _Embedding.apply(indices, weight, features, padding_idx, slot, dense, anchor)
