"""Tile sizes of the attention kernels: those that compile without register spills."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sorted_kernels.triton.launch import DeviceLimits


@dataclass(frozen=True)
class AttentionConfig:
    """One tiling.

    Attributes:
        block_m: Queries of a tile.
        block_n: Keys of a tile.
        num_warps: Warps that share a tile.
        num_stages: Depth of the software pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionConfigs:
    """The tilings of one problem.

    Attributes:
        forward: Of the forward kernel.
        queries: Of the gradient of q.
        keys: Of the gradients of k and v.
    """

    forward: AttentionConfig
    queries: AttentionConfig
    keys: AttentionConfig


def _configs(*tilings: tuple[int, int, int, int]) -> AttentionConfigs:
    return AttentionConfigs(*(AttentionConfig(*tiling) for tiling in tilings))


# By the features of a head in registers. wgmma multiplies 64 rows at a time; its operands stay in
# shared memory, while those of mma.sync (before Hopper) take registers. A mask with rows of its
# own takes a register or two for each score.
_WGMMA = {
    64: _configs((128, 64, 8, 3), (64, 64, 4, 2), (32, 64, 4, 2)),
    128: _configs((128, 64, 8, 2), (64, 32, 4, 2), (32, 64, 8, 2)),
}
_WGMMA_MASK = {64: _WGMMA[64], 128: _configs((64, 32, 8, 2), (64, 32, 4, 2), (32, 64, 8, 2))}
_MMA = {
    64: _configs((128, 64, 8, 3), (64, 32, 4, 2), (32, 64, 4, 2)),
    128: _configs((128, 32, 8, 2), (64, 32, 4, 2), (32, 64, 8, 2)),
}
_MMA_MASK = {
    64: _configs((128, 64, 8, 3), (64, 32, 4, 2), (32, 32, 4, 2)),
    128: _WGMMA_MASK[128],
}
# Three TF32 parts of each operand.
_FLOAT = {
    64: _configs((32, 32, 4, 2), (16, 32, 8, 1), (32, 32, 8, 1)),
    128: _configs((16, 32, 4, 1), (16, 32, 4, 1), (32, 16, 8, 1)),
}


def block_of(head_dim: int) -> int:
    """The power of two that a head's features are padded to in registers."""
    return 1 << max(head_dim - 1, 15).bit_length()


def choose_configs(
    head_dim: int, dtype: torch.dtype, mask_rows: bool, limits: DeviceLimits
) -> AttentionConfigs:
    """The tilings of a problem on a device.

    Args:
        head_dim: D.
        dtype: Of q, k and v.
        mask_rows: Whether there is a mask whose rows differ.
        limits: The device's.
    """
    if dtype == torch.float32:
        table = _FLOAT
    elif limits.large_tiles:
        table = _WGMMA_MASK if mask_rows else _WGMMA
    else:
        table = _MMA_MASK if mask_rows else _MMA
    return table[max(block_of(head_dim), 64)]
