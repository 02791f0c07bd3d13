"""Embedding of a ragged batch: each place reads its own number of features (its in_features)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from sorted_kernels.errors import GradientError, ShapeError
from sorted_kernels.ops.checks import embed_prefix
from sorted_kernels.ops.gradient import ANCHOR, IN_PLACE_TWICE, GradientSlot, lands
from sorted_kernels.ops.library import LIBRARY
from sorted_kernels.ops.ragged import (
    announce,
    ragged_implementation,
    refuse_double_backward,
    triples,
)
from sorted_kernels.row_widths import RowWidths

LIBRARY.define(
    "ragged_embedding(Tensor indices, Tensor weight, SymInt[] runs, SymInt padding_idx) -> Tensor"
)
LIBRARY.define(
    "ragged_embedding_backward(Tensor dy, Tensor indices, SymInt rows, SymInt[] runs,"
    " SymInt padding_idx) -> Tensor"
)
LIBRARY.define(
    "ragged_embedding_accumulate(Tensor dy, Tensor indices, Tensor(a!) token, SymInt handle,"
    " SymInt rows, SymInt[] runs, SymInt padding_idx) -> ()"
)


def _embedding(indices: Tensor, weight: Tensor, runs: list[int], padding_idx: int) -> Tensor:
    backend = ragged_implementation("embedding", "ragged_embedding", weight)
    return backend.ragged_embedding(indices, weight, triples(runs))


def _backward_into(
    dy: Tensor, indices: Tensor, runs: list[int], out: Tensor, accumulate: bool, padding_idx: int
) -> None:
    backend = ragged_implementation("embedding", "ragged_embedding", dy)
    backend.ragged_embedding_backward_into(dy, indices, triples(runs), out, accumulate, padding_idx)


def _backward(dy: Tensor, indices: Tensor, rows: int, runs: list[int], padding_idx: int) -> Tensor:
    """The (V, k) gradient of the columns up to the largest width."""
    out = dy.new_empty((rows, runs[2]))
    _backward_into(dy, indices, runs, out, False, padding_idx)
    return out


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("ragged_embedding", _embedding, _device)
    LIBRARY.impl("ragged_embedding_backward", _backward, _device)


def _accumulate(
    dy: Tensor,
    indices: Tensor,
    token: Tensor,
    handle: int,
    rows: int,
    runs: list[int],
    padding_idx: int,
) -> None:
    out, accumulate = GradientSlot.by_handle(handle).prefix(rows, runs[2])
    _backward_into(dy, indices, runs, out, accumulate, padding_idx)


LIBRARY.impl("ragged_embedding_accumulate", _accumulate, "CompositeExplicitAutograd")


@torch.library.register_fake("sorted_kernels::ragged_embedding", lib=LIBRARY)
def _fake(indices: Tensor, weight: Tensor, runs: list[int], padding_idx: int) -> Tensor:
    return weight.new_empty((indices.shape[0], runs[2]))


@torch.library.register_fake("sorted_kernels::ragged_embedding_backward", lib=LIBRARY)
def _backward_fake(
    dy: Tensor, indices: Tensor, rows: int, runs: list[int], padding_idx: int
) -> Tensor:
    return dy.new_empty((rows, runs[2]))


@torch.library.register_fake("sorted_kernels::ragged_embedding_accumulate", lib=LIBRARY)
def _accumulate_fake(
    dy: Tensor,
    indices: Tensor,
    token: Tensor,
    handle: int,
    rows: int,
    runs: list[int],
    padding_idx: int,
) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    indices, weight, runs, padding_idx = inputs
    ctx.save_for_backward(indices)
    ctx.runs, ctx.padding_idx, ctx.shape = runs, padding_idx, weight.shape


def _op_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    (indices,) = ctx.saved_tensors
    gradient = torch.ops.sorted_kernels.ragged_embedding_backward(
        dy, indices, ctx.shape[0], ctx.runs, ctx.padding_idx
    )
    return None, embed_prefix(gradient, ctx.shape), None, None


torch.library.register_autograd(
    "sorted_kernels::ragged_embedding", _op_backward, setup_context=_setup, lib=LIBRARY
)


class _RaggedEmbedding(Function):
    """A gradient that lands in place."""

    @staticmethod
    def forward(
        ctx: Any,
        indices: Tensor,
        weight: Tensor,
        runs: list[int],
        padding_idx: int,
        slot: GradientSlot,
        anchor: Tensor,
    ) -> Tensor:
        run = torch.ops.sorted_kernels.ragged_embedding if is_compiling() else _embedding
        y = run(indices, weight, runs, padding_idx)
        _setup(ctx, (indices, weight, runs, padding_idx), y)
        ctx.slot = slot
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        if torch.is_grad_enabled():
            raise GradientError(IN_PLACE_TWICE)
        slot = ctx.slot
        if not lands(slot):
            return (None,) * 6
        (indices,) = ctx.saved_tensors
        rows, runs = ctx.shape[0], ctx.runs
        if is_compiling():
            torch.ops.sorted_kernels.ragged_embedding_accumulate(
                dy, indices, slot.token, slot.handle, rows, runs, ctx.padding_idx
            )
        else:
            out, accumulate = slot.prefix(rows, runs[2])
            _backward_into(dy, indices, runs, out, accumulate, ctx.padding_idx)
        return (None,) * 6


def run_ragged_embedding(
    indices: Tensor,
    weight: Tensor,
    widths: RowWidths,
    padding_idx: int,
    slot: GradientSlot | None,
    dense: bool,
) -> Tensor:
    """:func:`sorted_kernels.embedding` of a ragged batch; the caller has checked the weight."""
    if indices.dim() != 1 or indices.shape[0] != widths.rows:
        raise ShapeError(
            f"indices has shape {tuple(indices.shape)}; a ragged batch has one axis of the "
            f"RowWidths' {widths.rows} rows"
        )
    runs = widths.flat()
    if dense or slot is None or not torch.is_grad_enabled():
        y = torch.ops.sorted_kernels.ragged_embedding(indices, weight, runs, padding_idx)
        announce(y, (slot, weight.shape[0], widths.in_features))
        return y
    return _RaggedEmbedding.apply(indices, weight.detach(), runs, padding_idx, slot, ANCHOR)
