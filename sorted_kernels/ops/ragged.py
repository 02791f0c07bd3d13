"""What the ragged operations share: their sizes, their checks, their back end."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.compiler import is_compiling

from sorted_kernels.errors import GradientError, ShapeError
from sorted_kernels.ops.backend import implementation
from sorted_kernels.ops.gradient import GradientSlot
from sorted_kernels.reference import ragged as reference
from sorted_kernels.row_widths import RowWidths


def refuse_double_backward() -> None:
    """The gradients of ragged operations cannot be differentiated again.

    Raises:
        GradientError: Called in a backward with ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise GradientError("double backward through ragged operations is not possible")


def triples(runs: list[int]) -> list[tuple[int, int, int]]:
    """The schemas' flat list of integers as ``(rows, out_features, in_features)`` triples."""
    return [(runs[i], runs[i + 1], runs[i + 2]) for i in range(0, len(runs), 3)]


def largest(runs: list[int]) -> tuple[int, int]:
    """Sizes of the largest row: rows are sorted, so all others' blocks lie within its block."""
    return runs[1], runs[2]


def ragged_implementation(op: str, function: str, x: Tensor) -> ModuleType:
    """The module that runs an op on a ragged batch: the uniform op's, where it can."""
    module = implementation(op, x)
    return module if hasattr(module, function) else reference


def dense_rows(x: Tensor) -> Tensor:
    """An activation (N, k) with unit inner stride, as back ends read it.

    Only one that has none is copied: the expanded gradient of a sum, for example.
    """
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def announce(y: Tensor, *expected: tuple[GradientSlot | None, int, int]) -> None:
    """Have the staircases of a layer's parameters know what autograd's dense gradients cover.

    Args:
        y: The layer's output.
        *expected: A parameter's slot, and rows and columns of its largest prefix.
    """
    slots = [(slot, m, k) for slot, m, k in expected if slot is not None]
    if is_compiling() or not slots or torch._C._are_functorch_transforms_active():
        return

    def expect(_: Tensor) -> None:
        for slot, m, k in slots:
            slot.expect(m, k)

    if y.requires_grad:
        y.register_hook(expect)


def check_widths(widths: object) -> None:
    """Sizes that are not a count are RowWidths."""
    if not isinstance(widths, RowWidths):
        raise ShapeError(
            f"features, or a layer's widths, is {widths!r}; the sizes of a ragged batch are given "
            "as RowWidths"
        )


def checked_rows(x: Tensor, widths: RowWidths) -> Tensor:
    """The columns of a ragged batch that its largest row uses.

    Raises:
        ShapeError: ``widths`` are not RowWidths; or x has not two axes, a row for each of the
            widths', and enough features.
    """
    check_widths(widths)
    if x.dim() != 2:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}; a ragged batch has two axes, (rows, features)"
        )
    if x.shape[0] != widths.rows:
        raise ShapeError(f"x has {x.shape[0]} rows; the RowWidths have {widths.rows}")
    if x.shape[1] < widths.in_features:
        raise ShapeError(
            f"x has {x.shape[1]} features, fewer than the largest in_features of the "
            f"RowWidths, {widths.in_features}"
        )
    # No view where it is x itself: the gradient of a slice is a copy.
    return x if x.shape[1] == widths.in_features else x[:, : widths.in_features]
