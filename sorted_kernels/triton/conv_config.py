"""Tilings of convolution as a matrix product, and the layout flags that its kernels take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from sorted_kernels.triton import autotune
from sorted_kernels.triton.gemm_config import GemmConfig, config_supports, size_bucket
from sorted_kernels.triton.launch import DeviceLimits, device_limits, is_aligned

# Largest tile first. Convolution has many rows (pixels) and often few channels, so the tiles are
# narrower than linear's, and some have short steps: aligned, a step never goes beyond one tap.
HALF_CONFIGS = (
    GemmConfig(128, 128, 64, num_warps=8, num_stages=3),
    GemmConfig(128, 64, 64, num_warps=8, num_stages=3),
    GemmConfig(128, 64, 32, num_warps=8, num_stages=4),
    GemmConfig(64, 64, 32, num_warps=4, num_stages=4),
    GemmConfig(64, 32, 32, num_warps=4, num_stages=4),
)
# Loaded one element at a time, each with an address of its own: fewer elements a thread, so that
# the addresses fit its registers.
HALF_ODD_CONFIGS = (
    GemmConfig(128, 64, 16, num_warps=8, num_stages=3),
    GemmConfig(64, 64, 32, num_warps=8, num_stages=3),
    GemmConfig(64, 32, 32, num_warps=4, num_stages=3),
)
FLOAT_CONFIGS = (
    GemmConfig(128, 64, 16, num_warps=8, num_stages=3),
    GemmConfig(64, 64, 16, num_warps=4, num_stages=2),
    GemmConfig(64, 32, 16, num_warps=4, num_stages=3),
)
_SMALLEST = (64, 32, 32)
"""Rows, columns and steps of the smallest tile of half precision: smaller products fill none."""


def all_conv_configs(dtype: torch.dtype, aligned: bool) -> tuple[GemmConfig, ...]:
    """The tilings of a dtype and of the kernels' flag, largest tile first."""
    if dtype == torch.float32:
        return FLOAT_CONFIGS
    return HALF_CONFIGS if aligned else HALF_ODD_CONFIGS


@functools.lru_cache(maxsize=1024)
def conv_configs(
    extents: tuple[int, int, int], dtype: torch.dtype, limits: DeviceLimits, aligned: bool
) -> tuple[GemmConfig, ...]:
    """The tilings that fit into the power of two above each extent, largest tile first.

    A larger tile, or a longer step, would multiply padding.
    """
    most = [max(size_bucket(e), least) for e, least in zip(extents, _SMALLEST, strict=True)]
    return tuple(
        config
        for config in all_conv_configs(dtype, aligned)
        if config.block_m <= most[0]
        and config.block_n <= most[1]
        and config.block_k <= most[2]
        and config_supports(config, dtype, limits, aligned)
    )


def choose_conv_config(
    configs: tuple[GemmConfig, ...], rows: int, cols: int, batch: int, limits: DeviceLimits
) -> GemmConfig:
    """The largest tile that still gives every multiprocessor work, else the smallest."""
    for config in configs:
        tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n) * batch
        if tiles >= limits.multiprocessors:
            return config
    return configs[-1]


def tuned_or_chosen(
    kernel: Any,
    extents: tuple[int, int, int],
    batch: int,
    like: Tensor,
    aligned: bool,
    run: Callable[[GemmConfig], object],
) -> GemmConfig:
    """The tiling of one product of a convolution.

    Args:
        kernel: What will be launched.
        extents: How many rows, columns and reduction indices a tile may span at most.
        batch: How many such products one launch has: groups, phases, taps, parts of the reduction.
        like: An operand: its dtype and device count.
        aligned: The kernel's flag.
        run: Launches on arguments that may be written any number of times.
    """
    limits = device_limits(like.device)
    configs = conv_configs(extents, like.dtype, limits, aligned)
    if autotune.enabled(like.device):
        shape = autotune.GemmShape(kernel.fn.__name__, *extents, str(like.dtype), aligned)
        return autotune.tuned(shape, like, run, configs)
    return choose_conv_config(configs, extents[0], extents[1], batch, limits)


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Strides, 0 for axes of one element, whose strides may be anything."""
    return tuple(
        stride if size > 1 else 0
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def is_dense_aligned(*tensors: Tensor) -> bool:
    """Whether channels (axis 1) are dense and every other step is a multiple of 16 elements."""
    return all(
        tensor.stride(1) == 1 and is_aligned(*strides_of(tensor)[::2], strides_of(tensor)[3])
        for tensor in tensors
    )


def chunk_of(x: Tensor, channels: int) -> int:
    """How the packed reduction is ordered: channels innermost where they are dense, else taps."""
    return channels if x.stride(1) == 1 else 1
