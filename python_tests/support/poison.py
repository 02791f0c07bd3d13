"""Tensors that show it when something reads or writes outside a prefix."""

import torch
from torch import Tensor

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The elements' bit patterns, so that NaN equals NaN and -0.0 differs from 0.0."""
    return tensor.detach().contiguous().view(_INTEGER[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    different = bits(actual) != bits(expected)
    if different.any():
        where = different.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(different.sum())} of {different.numel()} elements differ, first at {where}: "
            f"{actual[tuple(where)].item()} and {expected[tuple(where)].item()}"
        )


def prefix(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in shape)


def poisoned(block: Tensor, full: tuple[int, ...]) -> Tensor:
    """A parent of shape ``full`` that is NaN outside its leading block."""
    parent = torch.full(full, torch.nan, dtype=block.dtype, device=block.device)
    parent[prefix(block.shape)] = block.detach()
    return parent


def pattern(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Finite, never zero, different everywhere that counts."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) % 97 + 3) / 8).to(dtype).reshape(shape)


def outside(shape: tuple[int, ...], block: tuple[int, ...]) -> Tensor:
    """Mask of the elements outside a leading block."""
    mask = torch.ones(shape, dtype=torch.bool)
    mask[prefix(block)] = False
    return mask


def in_larger_buffer(tensor: Tensor) -> Tensor:
    """The same values as a view with a unit inner stride, amid NaN."""
    shape = [size + 2 * (axis + 2) for axis, size in enumerate(tensor.shape)]
    buffer = torch.full(shape, torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = buffer[tuple(slice(axis + 2, axis + 2 + size) for axis, size in enumerate(tensor.shape))]
    view.copy_(tensor.detach())
    return view


def transposed(tensor: Tensor) -> Tensor:
    """The same values with the last two axes' strides exchanged (one axis: a stride of 2)."""
    if tensor.dim() < 2:
        return tensor.detach().repeat_interleave(2)[::2]
    return tensor.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
