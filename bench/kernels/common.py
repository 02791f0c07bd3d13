"""What the kernels' cases share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bench.goals import goals_for
from bench.harness import Case, Contestant
from bench.rows import parse_sizes


def replace_cache(case: Case, cache: str) -> Case:
    """The same case, hot or cold."""
    return dataclasses.replace(case, cache=cache)


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype == torch.float32 else 2e-2


def kernel_case(
    kernel: str,
    mode: str,
    shape: object,
    dtype: torch.dtype,
    device: torch.device,
    contestants: dict[str, Callable[[], Contestant]],
    flops: int = 0,
    traffic: int = 0,
) -> Case:
    """A case whose clock is the kernel's; ``traffic`` counts elements, not bytes."""
    name, gpu = str(dtype).removeprefix("torch."), device.type == "cuda"
    return Case(
        kernel=kernel,
        mode=mode,
        sizes=str(shape),
        dtype=dtype,
        contestants=contestants,
        device=device,
        flops=flops,
        bytes=traffic * dtype.itemsize,
        clock="kernel",
        tolerance=_tolerance(dtype),
        goals=goals_for(kernel, mode, parse_sizes(str(shape)), name, gpu),
    )


def returning(function: Callable[[], Tensor]) -> Contestant:
    """A contestant whose outcome is what its last call returned."""
    last: list[Tensor] = []

    def call() -> None:
        last[:] = [function()]

    return Contestant(call, lambda: last)
