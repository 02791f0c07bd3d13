"""Argument checks that several ops share. Each error names argument, value and rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sorted_kernels.errors import DeviceError, DTypeError, ShapeError, StrideError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_count(name: str, value: int, limit: int, of: str) -> None:
    """A size argument: a count from 1 to the parent's size."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise ShapeError(f"{name}={value!r} must be an integer (a count, not a ratio)")
    if value < 1 or value > limit:
        raise ShapeError(f"{name}={value} is not in 1..{limit}, the size of {of}")


def check_input(x: Tensor, name: str = "x") -> None:
    """An activation: floating, at least one axis, a last axis of at least one element."""
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; it needs a last axis of at least 1")
    if x.dtype not in FLOATS:
        raise DTypeError(
            f"{name} has dtype {x.dtype}; allowed are float32, bfloat16, float16, float64"
        )


def is_readable(param: Tensor) -> bool:
    """Whether rows lie densely: a unit inner stride, or (a kernel's taps) channels-last memory."""
    return (
        param.stride(-1) == 1 or param.shape[-1] == 1 or (param.dim() == 4 and channels_last(param))
    )


def channels_last(param: Tensor) -> bool:
    """Whether a stored kernel (M, K, KH, KW) lies as M, KH, KW, K, and only so."""
    return param.is_contiguous(memory_format=torch.channels_last) and not param.is_contiguous()


def check_parameter(param: Tensor, like: Tensor, name: str, dim: int) -> None:
    """A parent parameter: the rank, device and layout that an op reads in place."""
    if param.dim() != dim:
        raise ShapeError(
            f"{name} has {param.dim()} axes (shape {tuple(param.shape)}); {dim} wanted"
        )
    if param.device != like.device:
        raise DeviceError(f"{name} is on {param.device}, the input on {like.device}")
    if not is_readable(param):
        raise StrideError(
            f"{name} has strides {param.stride()}; it is read in place, which needs a unit inner "
            "stride (pass a contiguous parent, not a transposed one)"
        )


def check_same_dtype(param: Tensor, like: Tensor, name: str) -> None:
    """A parameter of the input's dtype: weights are never cast silently."""
    if param.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        raise DTypeError(
            f"{name} has dtype {param.dtype}, the input {like.dtype}; convert one of them, or use "
            "torch.autocast"
        )


def autocast(x: Tensor) -> Tensor:
    """Under ``torch.autocast``, the input in its dtype, as torch's own matrix products have it."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype is torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def check_affine(x: Tensor, param: Tensor | None, name: str) -> None:
    """A norm's scale or shift: one axis, at least as long as x's last."""
    if param is None:
        return
    check_parameter(param, x, name, 1)
    check_same_dtype(param, x, name)
    if x.shape[-1] > param.shape[0]:
        raise ShapeError(
            f"x has {x.shape[-1]} features; {name} has {param.shape[0]} elements at most"
        )


def embed_prefix(prefix: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of ``shape`` that is zero outside its leading block; differentiable.

    Axes beyond the second, a kernel's taps, are embedded in their centre.
    """
    pads: list[int] = []
    for axis in reversed(range(prefix.dim())):
        missing = shape[axis] - prefix.shape[axis]
        before = missing // 2 if axis > 1 else 0
        pads += [before, missing - before]
    return torch.nn.functional.pad(prefix, pads)


def active_block(param: Tensor, sizes: Sequence[int]) -> Tensor:
    """The leading block of a parameter, and the centre of its taps if it has any; a view."""
    block = param[: sizes[0]] if sizes else param  # a count has no axis
    if len(sizes) > 1:
        block = block[:, : sizes[1]]
    return centre(block, sizes[2:]) if len(sizes) > 2 else block


def centre(block: Tensor, taps: Sequence[int]) -> Tensor:
    """The view of a block (M, K, KH, KW) that has only the ``taps`` around its kernel's centre."""
    (height, width), (kh, kw) = block.shape[2:], taps
    top, left = (height - kh) // 2, (width - kw) // 2
    return block[:, :, top : top + kh, left : left + kw]


def cast_block(weight: Tensor, m: int, k: int, dtype: torch.dtype) -> Tensor:
    """What autocast multiplies by: ``weight[:m, :k]`` in another dtype, never the whole weight.

    Rows start at multiples of 16 bytes, so that an odd k does not keep it off the fast kernels.
    """
    step = 16 // dtype.itemsize
    block = weight.new_empty((m, -(-k // step) * step), dtype=dtype)[:, :k]
    return block.copy_(weight[:m, :k])


def sums_apart(dy: Tensor, out: Tensor, in_plain_torch: bool) -> bool:
    """Whether autocast's gradient of a weight needs a product of its own before it is added.

    dy has half precision and ``out`` has not. Kernels of ours write into float32; PyTorch's product
    has one dtype.
    """
    return dy.dtype != out.dtype and (in_plain_torch or out.dtype is not torch.float32)


def autocast_wide(x: Tensor, weight: Tensor | None) -> Tensor:
    """Under ``torch.autocast``, norms run in their parameters' dtype, as torch's own do."""
    if weight is not None and x.dtype != weight.dtype:
        return x.to(weight.dtype) if torch.is_autocast_enabled(x.device.type) else x
    return x
