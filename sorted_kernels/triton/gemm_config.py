"""Tile sizes of the matrix kernels: what a tile is, where it fits, which one a shape gets."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from sorted_kernels.triton.launch import DeviceLimits


@dataclass(frozen=True)
class GemmConfig:
    """One tiling of ``C[rows, cols] = sum over reduction``.

    Attributes:
        block_m: Rows of C in a tile.
        block_n: Columns of C in a tile.
        block_k: Steps of the reduction that are loaded at once.
        num_warps: Warps that share a tile.
        num_stages: Depth of the software pipeline; each stage holds one pair of operand tiles.
        group_m: Row tiles that are finished before the next column of tiles, for L2 reuse.
        input_precision: Of float32 products: ``"ieee"`` is exact, ``"tf32"`` uses tensor cores.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    input_precision: str = "ieee"

    def shared_memory(self, itemsize: int) -> int:
        """Bytes of shared memory that the pipeline takes for operands of ``itemsize`` bytes."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize


# Largest tile first: it reads each operand the fewest times. All have at least 64 rows, since
# wgmma multiplies 64 rows at a time; the narrow ones spread a short batch over all
# multiprocessors, where only the bytes of the weight count. The decode tile multiplies 16 rows at a
# time, with mma.sync.
HALF_CONFIGS = (
    GemmConfig(128, 256, 64, num_warps=8, num_stages=3),
    GemmConfig(128, 128, 64, num_warps=8, num_stages=3),
    GemmConfig(64, 64, 64, num_warps=4, num_stages=4),
    GemmConfig(64, 32, 128, num_warps=4, num_stages=4),
)
HALF_DECODE_CONFIG = GemmConfig(16, 64, 128, num_warps=4, num_stages=4)
# float32 at full precision has no tensor-core instruction: FMA, where registers are the limit.
FLOAT_CONFIGS = (
    GemmConfig(128, 64, 16, num_warps=8, num_stages=3),
    GemmConfig(64, 64, 16, num_warps=4, num_stages=3),
    GemmConfig(32, 32, 32, num_warps=4, num_stages=3),
)
FLOAT_DECODE_CONFIG = GemmConfig(16, 64, 32, num_warps=4, num_stages=3)

DECODE_ROWS = 16
"""Outputs of at most this many rows have a tiling of their own: a larger tile would multiply
padding, and a small one leaves shared memory for more of the weight to be under way."""


def config_supports(
    config: GemmConfig, dtype: torch.dtype, limits: DeviceLimits, aligned: bool
) -> bool:
    """Whether a tiling compiles without register spills for operands of ``dtype`` on a device.

    Args:
        config: The tiling.
        dtype: Of the operands.
        limits: The device's.
        aligned: Whether both feature counts are multiples of 16. Otherwise the kernels hold a
            second loop, for tiles at an odd edge, whose addresses take more registers.
    """
    blocks = (config.block_m, config.block_n, config.block_k)
    powers_of_two = all(block >= 16 and block & (block - 1) == 0 for block in blocks)
    large = config.block_m * config.block_n > 128 * 128
    fits_registers = not large or (aligned and limits.large_tiles)
    fits_memory = config.shared_memory(dtype.itemsize) <= limits.shared_memory
    return powers_of_two and fits_registers and fits_memory


def size_bucket(size: int) -> int:
    """The power of two at or above a size: all that a tiling depends on."""
    return 1 << max(size - 1, 0).bit_length()


def decode_config(dtype: torch.dtype) -> GemmConfig:
    """The tiling of outputs of at most :data:`DECODE_ROWS` rows."""
    return FLOAT_DECODE_CONFIG if dtype == torch.float32 else HALF_DECODE_CONFIG


@functools.cache
def supported_configs(
    rows: int, dtype: torch.dtype, limits: DeviceLimits, aligned: bool
) -> tuple[GemmConfig, ...]:
    """The tilings that an output of so many rows may have on a device, the best guess first."""
    configs = FLOAT_CONFIGS if dtype == torch.float32 else HALF_CONFIGS
    if rows <= DECODE_ROWS:
        configs = (decode_config(dtype), *configs[-2:])
    return tuple(config for config in configs if config_supports(config, dtype, limits, aligned))


def choose_config(
    rows: int, cols: int, dtype: torch.dtype, limits: DeviceLimits, aligned: bool
) -> GemmConfig:
    """The largest supported tile that still gives every multiprocessor work, else the smallest.

    Sizes count as the power of two above them, so a shape's bucket decides, not its exact size.
    """
    return _choose(size_bucket(rows), size_bucket(cols), dtype, limits, aligned)


@functools.cache
def _choose(
    rows: int, cols: int, dtype: torch.dtype, limits: DeviceLimits, aligned: bool
) -> GemmConfig:
    supported = supported_configs(rows, dtype, limits, aligned)
    if rows <= DECODE_ROWS:
        return supported[0]
    for config in supported:
        tiles = -(-rows // config.block_m) * -(-cols // config.block_n)
        if tiles >= limits.multiprocessors:
            return config
    return supported[-1]
