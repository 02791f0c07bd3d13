"""Linear alone: forward, dgrad, wgrad."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F

from bench.harness import Case, Contestant
from bench.kernels.common import kernel_case, returning
from bench.shapes import LinearShape
from bench.torch_contestants import LinearData
from sorted_kernels.ops.backend import has_triton, linear_implementation
from sorted_kernels.reference import linear as reference_linear

aten = torch.ops.aten


def _kernel(module: str) -> ModuleType:
    """A kernel of ours alone, whatever the choice for the sizes would be."""
    return importlib.import_module(f"sorted_kernels.{module}.linear")


def _sliced(
    shape: LinearShape,
    dtype: torch.dtype,
    device: torch.device,
    run: Callable[[ModuleType, LinearData], Contestant],
    chosen: Callable[[LinearData], ModuleType],
) -> dict[str, Callable[[], Contestant]]:
    """Those who work on the parent: B1, each kernel of ours that can run, and the one chosen.

    ``ours`` is what users get, so it may be any of the others.
    """

    def build(module: Callable[[LinearData], ModuleType]) -> Contestant:
        data = LinearData.make(shape, dtype, device)
        return run(module(data), data)

    providers = {"B1": partial(build, lambda _: reference_linear)}
    if device.type == "cuda" and has_triton():
        providers["triton"] = partial(build, lambda _: _kernel("triton"))
    return {**providers, "ours": partial(build, chosen)}


def _padded(shape: LinearShape, dtype: torch.dtype) -> tuple[int, int] | None:
    """(m, k) rounded up to what cuBLAS likes, for odd sizes that fit into the parent."""
    step = 16 // dtype.itemsize
    m, k = (-(-size // step) * step for size in (shape.m, shape.k))
    fits = m <= shape.M and k <= shape.K and shape.K % step == 0
    return (m, k) if fits and (m, k) != (shape.m, shape.k) else None


def linear_forward(shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Case:
    """Time ``y = x W[:m, :k]^T + b[:m]``."""
    m, k = shape.m, shape.k

    def contiguous() -> Contestant:
        d = LinearData.make(shape, dtype, device)
        weight, bias = d.weight[:m, :k].contiguous(), d.bias[:m].contiguous()
        return returning(lambda: F.linear(d.x, weight, bias))

    def naive() -> Contestant:
        d = LinearData.make(shape, dtype, device)
        return returning(lambda: F.linear(d.x, d.weight[:m, :k], d.bias[:m]))

    def padded(rows: int, cols: int) -> Contestant:
        d = LinearData.make(shape, dtype, device)
        x = F.pad(d.x, (0, cols - k))
        view, bias = d.weight[:rows, :cols], d.bias[:rows]
        return returning(lambda: F.linear(x, view, bias)[:, :m])

    def run(module: ModuleType, d: LinearData) -> Contestant:
        return returning(lambda: module.linear(d.x, d.weight, d.bias, m, "none", False)[0])

    def chosen(d: LinearData) -> ModuleType:
        return linear_implementation("forward", (d.x, d.weight), m, k)

    providers: dict[str, Callable[[], Contestant]] = {"B2": contiguous, "B0": naive}
    sizes = _padded(shape, dtype)
    if sizes and device.type == "cuda":
        providers["padded"] = partial(padded, *sizes)
    providers |= _sliced(shape, dtype, device, run, chosen)
    return _linear_case("forward", shape, dtype, device, providers)


def linear_dgrad(shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Case:
    """Time ``dx = dy W[:m, :k]``."""
    m, k = shape.m, shape.k

    def contiguous() -> Contestant:
        d = LinearData.make(shape, dtype, device)
        weight = d.weight[:m, :k].contiguous()
        return returning(lambda: d.dy @ weight)

    def naive() -> Contestant:
        d = LinearData.make(shape, dtype, device)
        return returning(lambda: d.dy @ d.weight[:m, :k])

    def run(module: ModuleType, d: LinearData) -> Contestant:
        return returning(lambda: module.linear_dgrad(d.dy, d.weight, k))

    def chosen(d: LinearData) -> ModuleType:
        return linear_implementation("dgrad", (d.dy, d.weight), m, k)

    providers = {"B2": contiguous, "B0": naive, **_sliced(shape, dtype, device, run, chosen)}
    return _linear_case("dgrad", shape, dtype, device, providers)


def linear_wgrad(shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Case:
    """Time ``dW[:m, :k] += dy^T x`` into a gradient of the full size."""
    m, k = shape.m, shape.k

    def naive() -> Contestant:
        d = LinearData.make(shape, dtype, device)
        grad = torch.zeros_like(d.weight)

        def call() -> None:  # what autograd does for weight[:m, :k]
            rows = aten.slice_backward(d.dy.t() @ d.x, [m, shape.K], 1, 0, k, 1)
            grad.add_(aten.slice_backward(rows, [shape.M, shape.K], 0, 0, m, 1))

        return Contestant(call, lambda: [grad[:m, :k]])

    def contiguous() -> Contestant:
        d = LinearData.make(shape, dtype, device)
        grad = torch.zeros(m, k, dtype=dtype, device=device)
        return Contestant(lambda: grad.addmm_(d.dy.t(), d.x), lambda: [grad])

    def run(module: ModuleType, d: LinearData) -> Contestant:
        grad = torch.zeros_like(d.weight)[:m, :k]
        return Contestant(lambda: module.linear_wgrad_into(d.dy, d.x, grad, True), lambda: [grad])

    def chosen(d: LinearData) -> ModuleType:
        return linear_implementation("wgrad", (d.dy, d.x, d.weight), m, k)

    providers = {"B2": contiguous, "B0": naive, **_sliced(shape, dtype, device, run, chosen)}
    return _linear_case("wgrad", shape, dtype, device, providers)


def _linear_case(
    mode: str,
    shape: LinearShape,
    dtype: torch.dtype,
    device: torch.device,
    providers: dict[str, Callable[[], Contestant]],
) -> Case:
    traffic = shape.N * (shape.m + shape.k) + (2 if mode == "wgrad" else 1) * shape.m * shape.k
    return kernel_case("linear", mode, shape, dtype, device, providers, shape.gemm_flops, traffic)
