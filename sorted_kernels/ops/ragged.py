"""What the ragged operations share: their sizes, their checks, their back end."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from sorted_kernels.errors import GradientError, ShapeError
from sorted_kernels.ops.backend import implementation
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


def check_rows(x: Tensor, widths: RowWidths, name: str = "x") -> None:
    """A ragged batch has two axes, a row for each of the widths', and enough features."""
    if x.dim() != 2:
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}; a ragged batch has two axes, (rows, features)"
        )
    if x.shape[0] != widths.rows:
        raise ShapeError(f"{name} has {x.shape[0]} rows; the RowWidths have {widths.rows}")
    if x.shape[1] < widths.in_features:
        raise ShapeError(
            f"{name} has {x.shape[1]} features, fewer than the largest in_features of the "
            f"RowWidths, {widths.in_features}"
        )
