"""Launching the matrix kernels: one program for each tile, in a tiling that fits the shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from sorted_kernels.triton import autotune
from sorted_kernels.triton.gemm_config import GemmConfig, choose_config
from sorted_kernels.triton.launch import device_limits, launch


def like_strided(out: Tensor) -> Tensor:
    """Memory of its own with an output's sizes and strides, to tune with."""
    return out.new_empty_strided(out.shape, out.stride())


def launch_tiles(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple,
    config: GemmConfig,
    aligned: bool,
    device: torch.device,
    **meta: Any,
) -> None:
    """Launch a matrix kernel with the constants of a tiling."""
    launch(
        kernel,
        grid,
        *args,
        device=device,
        ALIGNED=aligned,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        PRECISION=config.input_precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **meta,
    )


def launch_gemm(
    kernel: Any,
    args: tuple,
    output: tuple[int, int],
    reduction: int,
    like: Tensor,
    config: GemmConfig | None,
    aligned: bool,
    rehearsal: Callable[[], tuple] | None = None,
    **meta: Any,
) -> None:
    """Launch one program for each tile of an output of the given shape.

    Args:
        kernel: A kernel that takes a tiling's constants.
        args: Its arguments.
        output: Rows and columns of the output.
        reduction: Length of the sums.
        like: An operand: its dtype and device count.
        config: Tiling, instead of the one tuned or chosen for the shape.
        aligned: Whether all feature counts are multiples of 16.
        rehearsal: Makes arguments to tune with, for a kernel that may not write its output twice.
        meta: Further constants of the kernel.
    """
    rows, cols = output
    if rows == 0 or cols == 0:
        return

    def run(config: GemmConfig, args: tuple = args) -> None:
        grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n),)
        launch_tiles(kernel, grid, args, config, aligned, like.device, **meta)

    if config is None and autotune.enabled(like.device):
        shape = autotune.GemmShape(
            kernel.fn.__name__, rows, cols, reduction, str(like.dtype), aligned
        )
        spare = args if rehearsal is None else rehearsal()
        config = autotune.tuned(shape, like, lambda config: run(config, spare))
    if config is None:
        config = choose_config(rows, cols, like.dtype, device_limits(like.device), aligned)
    run(config)
