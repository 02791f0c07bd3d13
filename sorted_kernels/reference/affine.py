"""What norms share: prefixes of affine parameters, and gradients written into prefixes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def prefix_of(param: Tensor | None, size: int) -> Tensor | None:
    """The first elements of a parameter (C,); the parameter itself where that is all of them."""
    return param if param is None or param.shape[0] == size else param[:size]


def place(out: Tensor | None, gradient: Tensor, accumulate: bool) -> None:
    """``out (+)= gradient`` where there is an ``out``."""
    if out is not None:
        out.add_(gradient) if accumulate else out.copy_(gradient)


def in_one_piece(x: Tensor) -> Tensor:
    """An activation without gaps; copied where it has some.

    Torch's kernel for those with gaps rounds in between in half precision.
    """
    return x if x.is_contiguous() else dense(x, suggest_memory_format(x))


def dense(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """An activation, or its gradient, in a memory format; copied only where it is in another."""
    if x.is_contiguous(memory_format=memory_format):
        return x
    return x.clone(memory_format=memory_format)
