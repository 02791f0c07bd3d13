"""Linear alone: forward, dgrad, wgrad."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Contestant, Goal
from bench.kernels.common import kernel_case, returning
from bench.shapes import LinearShape
from bench.torch_contestants import LinearData
from sorted_kernels.ops.backend import implementation
from sorted_kernels.reference import linear as reference_linear

aten = torch.ops.aten


def _backend(x: Tensor, ours: bool) -> ModuleType:
    return implementation("linear", x) if ours else reference_linear


def linear_forward(shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Case:
    """Time ``y = x W[:m, :k]^T + b[:m]``."""
    m, k = shape.m, shape.k

    def contiguous() -> Contestant:
        d = LinearData.make(shape, dtype, device)
        weight, bias = d.weight[:m, :k].contiguous(), d.bias[:m].contiguous()
        return returning(lambda: F.linear(d.x, weight, bias))

    def sliced(ours: bool) -> Contestant:
        d = LinearData.make(shape, dtype, device)
        linear = _backend(d.x, ours).linear
        return returning(lambda: linear(d.x, d.weight, d.bias, m, "none", False)[0])

    providers = {"B2": contiguous, "B1": partial(sliced, False), "ours": partial(sliced, True)}
    return _linear_case("forward", shape, dtype, device, providers)


def linear_dgrad(shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Case:
    """Time ``dx = dy W[:m, :k]``."""
    m, k = shape.m, shape.k

    def contiguous() -> Contestant:
        d = LinearData.make(shape, dtype, device)
        weight = d.weight[:m, :k].contiguous()
        return returning(lambda: d.dy @ weight)

    def sliced(ours: bool) -> Contestant:
        d = LinearData.make(shape, dtype, device)
        dgrad = _backend(d.x, ours).linear_dgrad
        return returning(lambda: dgrad(d.dy, d.weight, k))

    providers = {"B2": contiguous, "B1": partial(sliced, False), "ours": partial(sliced, True)}
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

    def sliced(ours: bool) -> Contestant:
        d = LinearData.make(shape, dtype, device)
        grad = torch.zeros_like(d.weight)[:m, :k]
        wgrad_into = _backend(d.x, ours).linear_wgrad_into
        return Contestant(lambda: wgrad_into(d.dy, d.x, grad, True), lambda: [grad])

    providers: dict[str, Callable[[], Contestant]] = {
        "B2": contiguous,
        "B1": partial(sliced, False),
        "B0": naive,
        "ours": partial(sliced, True),
    }
    return _linear_case("wgrad", shape, dtype, device, providers)


def _linear_case(
    mode: str,
    shape: LinearShape,
    dtype: torch.dtype,
    device: torch.device,
    providers: dict[str, Callable[[], Contestant]],
) -> Case:
    aligned = all(size % 8 == 0 for size in (shape.m, shape.k, shape.M, shape.K))
    goals = (Goal("B1", 1.0 if aligned else 1 / 3),)
    traffic = shape.N * (shape.m + shape.k) + (2 if mode == "wgrad" else 1) * shape.m * shape.k
    return kernel_case(
        "linear", mode, shape, dtype, device, providers, goals, shape.gemm_flops, traffic
    )
