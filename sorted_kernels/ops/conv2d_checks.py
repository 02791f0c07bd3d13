"""What a convolution's arguments mean: the active block, and how the kernel walks over the input.

Ops take both as flat lists of sizes, which stay symbolic while torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sorted_kernels.errors import OptionError, ShapeError
from sorted_kernels.ops.checks import (
    check_count,
    check_input,
    check_parameter,
    check_same_dtype,
)
from sorted_kernels.reference.conv2d import Geometry
from sorted_kernels.reference.linear import ACTIVATIONS

Pair = int | Sequence[int]
Sizes = list[int]


@lru_cache(maxsize=4096)
def _geometry(sizes: tuple[int, ...]) -> Geometry:
    return Geometry(sizes[0:2], sizes[2:4], sizes[4:6], sizes[6])  # type: ignore[arg-type]


def geometry_of(sizes: Sequence[int]) -> Geometry:
    """From the flat form: stride, padding, dilation (height and width of each), active groups."""
    return _geometry(tuple(sizes))


def output_size(size: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    """Pixels of the output along one axis."""
    return (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


def output_shape(x: Tensor, block: Sequence[int], geometry: Sequence[int]) -> tuple[int, ...]:
    """(N, Co, OH, OW)."""
    pixels = (output_size(x.shape[2 + i], block[2 + i], *geometry[i:6:2]) for i in range(2))
    return (x.shape[0], block[0], *pixels)


def resolve(
    x: Tensor,
    weight: Tensor,
    out_channels: int | None,
    kernel_size: Pair | None,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
) -> tuple[Tensor, Sizes, Sizes]:
    """Check sizes, and work out the ones that were not given.

    Returns:
        x (padded on its far sides where ``padding="same"`` does not divide evenly), the block
        ``[Co, Ci/groups, KH, KW]``, and the geometry as :func:`geometry_of` takes it.

    Raises:
        ShapeError: As :func:`~sorted_kernels.ops.conv2d.conv2d` documents.
        OptionError: An unknown padding, or ``"same"`` with a stride.
    """
    check_input(x)
    if x.dim() != 4:
        raise ShapeError(f"x has shape {tuple(x.shape)}; (N, C, H, W) or (C, H, W) wanted")
    check_parameter(weight, x, "weight", 4)
    channels, active_groups = _channels(x, weight, out_channels, groups)
    taps = _taps(weight, kernel_size)
    steps = _pair("stride", stride, 1)
    gaps = _pair("dilation", dilation, 1)
    if isinstance(padding, str):
        x, zeros = _named_padding(x, padding, taps, steps, gaps)
    else:
        zeros = _pair("padding", padding, 0)
    for axis, name in enumerate(("height", "width")):
        reach, size = gaps[axis] * (taps[axis] - 1) + 1, x.shape[2 + axis]
        if size < 1 or size + 2 * zeros[axis] < reach:
            raise ShapeError(
                f"x has {name} {size}, with padding {size + 2 * zeros[axis]}; the kernel reaches "
                f"over {reach} pixels"
            )
    return x, [*channels, *taps], [*steps, *zeros, *gaps, active_groups]


def _channels(
    x: Tensor, weight: Tensor, out_channels: int | None, groups: int
) -> tuple[tuple[int, int], int]:
    """(Co, Ci/groups), and how many groups are active."""
    full_out, per_in = weight.shape[:2]
    have = x.shape[1]
    check_count("groups", groups, full_out, "weight's first axis")
    if groups == 1:
        if have < 1 or have > per_in:
            raise ShapeError(f"x has {have} channels; weight takes 1..{per_in}")
        co = full_out if out_channels is None else out_channels
        check_count("out_channels", co, full_out, "weight's first axis")
        return (co, have), 1
    if full_out % groups:
        raise ShapeError(f"groups={groups} does not divide weight's {full_out} output channels")
    if have < 1 or have > groups * per_in or have % per_in:
        raise ShapeError(
            f"x has {have} channels; allowed are whole groups of {per_in}, up to {groups} of them"
        )
    active = have // per_in
    co = active * (full_out // groups)
    if out_channels is not None and out_channels != co:
        raise ShapeError(
            f"out_channels={out_channels}; x has {active} of {groups} groups, which give {co}"
        )
    return (co, per_in), active


def _taps(weight: Tensor, kernel_size: Pair | None) -> list[int]:
    """The active kernel's height and width: the centre of the stored one."""
    stored = weight.shape[2:]
    if kernel_size is None:
        return list(stored)
    taps = _pair("kernel_size", kernel_size, 1)
    for have, full in zip(taps, stored, strict=True):
        if have > full or (full - have) % 2:
            raise ShapeError(
                f"kernel_size={tuple(taps)} is not the centre of the stored {tuple(stored)}; "
                "allowed are sizes up to it that differ from it by an even number of taps"
            )
    return taps


def _named_padding(
    x: Tensor, padding: str, taps: list[int], steps: list[int], gaps: list[int]
) -> tuple[Tensor, list[int]]:
    """``"valid"`` and ``"same"`` as torch has them: an odd zero goes to the far side."""
    if padding == "valid":
        return x, [0, 0]
    if padding != "same":
        raise OptionError(f"padding={padding!r}; allowed are numbers, 'same' and 'valid'")
    if steps[0] != 1 or steps[1] != 1:
        raise OptionError(f"padding='same' needs stride 1, not {tuple(steps)}")
    total = [gap * (tap - 1) for gap, tap in zip(gaps, taps, strict=True)]
    odd_height, odd_width = (zeros % 2 for zeros in total)
    if odd_height or odd_width:
        x = F.pad(x, [0, odd_width, 0, odd_height])
    return x, [zeros // 2 for zeros in total]


def _pair(name: str, value: Pair, least: int) -> list[int]:
    """One number for both axes, or one each."""
    pair: list[int] = list(value) if isinstance(value, Sequence) else [value, value]
    if len(pair) == 1:
        pair *= 2
    for number in pair:
        if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
            raise ShapeError(f"{name}={value!r} must be an integer or two")
        if number < least:
            raise ShapeError(f"{name}={value!r} is below {least}")
    if len(pair) != 2:
        raise ShapeError(f"{name}={value!r} must be an integer or two")
    return pair


def check_rest(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_channels: int, activation: str
) -> None:
    """What does not depend on sizes: dtypes, the bias, and the activation."""
    check_same_dtype(weight, x, "weight")
    if bias is not None:
        check_parameter(bias, x, "bias", 1)
        check_same_dtype(bias, x, "bias")
        if bias.shape[0] < out_channels:
            raise ShapeError(f"bias has {bias.shape[0]} elements, fewer than out_channels")
    if activation not in ACTIVATIONS:
        raise OptionError(f"activation={activation!r}; allowed are {', '.join(ACTIVATIONS)}")
