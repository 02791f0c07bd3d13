"""The compiled sm_90a GEMM: what it supports, how it is cut into tiles, and its call.

Sources: ``csrc/kernels/gemm_sm90.cuh`` (the kernel), ``csrc/host/gemm_schedule.h`` (the tiles).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sorted_kernels.errors import DependencyError, DeviceError, DTypeError, StrideError
from sorted_kernels.reference.linear import ACTIVATIONS

Runs = tuple[tuple[int, int, int], ...]
MODES = ("forward", "dgrad", "wgrad")
DTYPES = (torch.bfloat16, torch.float16)
ROW_STEP = 8
"""Rows that TMA reads begin at multiples of this many elements (16 bytes)."""


def supports(
    dtype: torch.dtype,
    n: int,
    m: int,
    k: int,
    strides: Sequence[int],
    addresses: Sequence[int],
    arch: tuple[int, int],
) -> str | None:
    """Why the kernel cannot run on these operands; None if it can.

    Args:
        dtype: Of both operands.
        n: Rows of the batch.
        m: Output features.
        k: Input features.
        strides: Row strides of both operands, in elements; of a single row, 0.
        addresses: Of both operands' first elements (or anything congruent to them modulo 16).
        arch: The GPU's compute capability.
    """
    if arch != (9, 0):
        return f"the kernel is compiled for compute capability 9.0, and this GPU's is {arch}"
    if dtype not in DTYPES:
        return f"dtype={dtype}; allowed are bfloat16 and float16"
    for name, size in (("n", n), ("m", m), ("k", k)):
        if not 1 <= size < 2**30:
            return f"{name}={size}; allowed are sizes from 1 to 2^30 - 1"
    for stride in strides:
        if stride % ROW_STEP:
            return f"row stride {stride}; allowed are multiples of {ROW_STEP} elements (16 bytes)"
    for address in addresses:
        if address % 16:
            return f"address {address:#x}; allowed are multiples of 16 bytes"
    return None


@functools.lru_cache(maxsize=4096)
def plan(mode: str, runs: Runs, processors: int) -> Any:
    """The schedule of a product's tiles; ``str()`` of it is a line a tile.

    Args:
        mode: One of :data:`MODES`.
        runs: ``(rows, m, k)`` triples, sorted largest first.
        processors: Multiprocessors of the GPU.

    Raises:
        DependencyError: The planning code was not compiled.
    """
    try:
        host = importlib.import_module("sorted_kernels._host")
    except ImportError as error:
        raise DependencyError("sorted_kernels._host was not compiled; g++ is needed") from error
    return host.schedule_gemm(mode, runs, host.choose_tiles(mode, runs, processors))


class Tables(NamedTuple):
    """A ragged product's schedule in device memory, and the CUDA stream it was made on."""

    tiles: Tensor
    runs: Tensor
    stream: int


_captured: dict[tuple[str, Runs, torch.device], Tables] = {}
"""What CUDA graphs read: they hold addresses only, so it stays for as long as the process."""


def _tables(mode: str, runs: Runs, device: torch.device) -> Tables:
    """The tables of a product; those of a product seen before cost neither work nor a copy.

    While a CUDA graph is captured, the product must have been seen before: a copy from the host
    would be captured with the address that the host's memory has now.
    """
    tables = _made(mode, runs, device)
    stream = torch.cuda.current_stream(device)
    if stream.cuda_stream != tables.stream:
        # The cache may drop the tables while another stream still reads them.
        tables.tiles.record_stream(stream)
        tables.runs.record_stream(stream)
    if torch.cuda.is_current_stream_capturing():
        _captured[mode, runs, device] = tables
    return tables


@functools.lru_cache(maxsize=256)
def _made(mode: str, runs: Runs, device: torch.device) -> Tables:
    schedule = plan(mode, runs, _processors(device))
    # From pageable memory, for which the host waits: any stream may read it afterwards.
    tiles, rows = (torch.from_numpy(part).to(device) for part in (schedule.tiles, schedule.runs))
    return Tables(tiles, rows, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(a: Tensor, b: Tensor) -> None:
    for name, tensor in (("a", a), ("b", b)):
        if tensor.device.type != "cuda":
            raise DeviceError(f"{name} is on {tensor.device}; the CUDA GEMM takes CUDA tensors")
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise StrideError(f"{name} has inner stride {tensor.stride(1)}; allowed is 1")
    reason = supports(
        a.dtype,
        a.shape[0],
        a.shape[1],
        b.shape[1],
        [tensor.stride(0) if tensor.shape[0] > 1 else 0 for tensor in (a, b)],
        [a.data_ptr(), b.data_ptr()],
        torch.cuda.get_device_capability(a.device),
    )
    if reason is not None:
        raise (StrideError if a.dtype in DTYPES else DTypeError)(f"the CUDA GEMM: {reason}")


def run_gemm(
    mode: str,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    runs: Runs,
    *,
    bias: Tensor | None = None,
    saved: Tensor | None = None,
    activation: str = "none",
    accumulate: bool = False,
    sizes: Tensor | None = None,
) -> None:
    """Run the kernel on the current stream.

    Args:
        mode: One of :data:`MODES`.
        a: x (N, k) for forward, else dy (N, m).
        b: W (m, k) for forward and dgrad, x (N, k) for wgrad; views of the parents.
        out: The result's rows, at any address and row stride (those of 16 bytes are stored
            faster); its columns, and padding columns, which become zero, and not for wgrad. A
            ragged product writes no element that its rows do not have, but zeros beside them: give
            it zeros.
        runs: ``(rows, m, k)`` triples, sorted largest first; the first has a's and b's sizes.
        bias: (m,) or longer, for forward.
        saved: Like ``out``: receives what the activation sees.
        activation: One of ``ACTIVATIONS``, for forward.
        accumulate: Add to ``out``, for wgrad.
        sizes: int32 device tensor with the result's rows and columns and the reduction, at most
            those of the shapes: then the kernel reads the sizes when it runs, so that one captured
            graph serves all. For a single run.

    Raises:
        DeviceError, DTypeError, StrideError: What :func:`supports` says no to.
    """
    _check(a, b)
    schedule = plan(mode, runs, _processors(a.device))
    tiles, rows, split = None, None, schedule.choice.split_k
    if len(runs) > 1:
        tiles, rows, _ = _tables(mode, runs, a.device)
    if sizes is not None:
        split = 1
    torch.ops.sorted_kernels.native_gemm(
        MODES.index(mode), a, b, bias, out, saved, tiles, rows, sizes, schedule.choice.tile_n,
        split, schedule.slots, ACTIVATIONS.index(activation), accumulate,
    )  # fmt: skip
