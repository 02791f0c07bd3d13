"""The host side that all kernels share: device limits, row views of activations, launching."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.driver import driver


@dataclass(frozen=True)
class DeviceLimits:
    """What the choice of tiles and grids depends on.

    Attributes:
        multiprocessors: How many blocks run at once, at least.
        shared_memory: Bytes that one block can have.
        large_tiles: Whether the tensor cores take operands from shared memory, as those of
            Hopper and Blackwell do; elsewhere a large tile's operands need too many registers.
    """

    multiprocessors: int
    shared_memory: int
    large_tiles: bool = False


# The interpreter runs programs one after another, so few of them are best; the memory is that of
# the smallest supported GPUs (sm_86, sm_89), whose tiles every other GPU can run too.
_INTERPRETER_LIMITS = DeviceLimits(multiprocessors=4, shared_memory=99 * 1024)


@functools.cache
def _cuda_limits(index: int) -> DeviceLimits:
    properties = driver.active.utils.get_device_properties(index)
    return DeviceLimits(
        properties["multiprocessor_count"],
        properties["max_shared_mem"],
        large_tiles=torch.cuda.get_device_capability(index)[0] in (9, 10),
    )


def device_limits(device: torch.device) -> DeviceLimits:
    """Limits of the GPU that a tensor is on; fixed small ones for CPU tensors (interpreter)."""
    if device.type != "cuda":
        return _INTERPRETER_LIMITS
    return _cuda_limits(device.index)


def launch(kernel: Any, grid: tuple[int, ...], *args: object, device: torch.device, **meta: Any):
    """Launch a kernel on the device of its tensors, which need not be the current one."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


def as_rows(x: Tensor) -> Tensor:
    """(..., k) activations or their gradients as (N, k) with unit inner stride.

    A view wherever one exists. Only an activation whose last axis is not dense is copied (the
    expanded gradient of ``y.sum()``, for example); parameters never pass through here.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def is_aligned(*sizes: int) -> bool:
    """Whether all sizes are multiples of 16, so that masks never split a 16-byte vector.

    Sizes are runtime arguments that kernels are not specialised on. This one bit of them is a
    compile-time flag, because a mask of unknown alignment makes every load one element wide.
    """
    return all(size % 16 == 0 for size in sizes)
