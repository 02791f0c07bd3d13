"""AdamW's step alone."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor, nn

import sorted_kernels as sk
from bench.harness import Case, Contestant
from bench.kernels.common import kernel_case
from bench.shapes import AdamWShape
from bench.torch_contestants import ADAMW, SlicedAdamW, fused_adamw
from sorted_kernels.ops.gradient import slot_of


def adamw_step(shape: AdamWShape, dtype: torch.dtype, device: torch.device) -> Case:
    """One AdamW step over the active blocks of several parameters."""
    m, k = shape.m, shape.k

    def tensors(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        size = (shape.M, shape.K)
        return [
            torch.randn(*size, generator=generator, device=device).to(dtype)
            for _ in range(shape.tensors)
        ]

    def start(rows: int, cols: int) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Parameters of the given size, and gradients that are zero outside the active block."""
        parameters = [nn.Parameter(t[:rows, :cols].clone()) for t in tensors(0)]
        grads = [torch.zeros_like(p) for p in parameters]
        for grad, values in zip(grads, tensors(1), strict=True):
            grad[:m, :k] = values[:m, :k]
        return parameters, grads

    def changes(parameters: list[nn.Parameter]) -> list[Tensor]:
        pairs = zip(parameters, tensors(0), strict=True)
        return [p.detach()[:m, :k] - before[:m, :k] for p, before in pairs]

    def fused(rows: int, cols: int) -> Contestant:
        parameters, grads = start(rows, cols)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer = fused_adamw(parameters)
        return Contestant(optimizer.step, lambda: changes(parameters))

    def expert() -> Contestant:
        parameters, grads = start(shape.M, shape.K)
        optimizer = SlicedAdamW(
            [p.detach()[:m, :k] for p in parameters], [g[:m, :k] for g in grads]
        )
        return Contestant(optimizer.step, lambda: changes(parameters))

    def ours() -> Contestant:
        parameters, grads = start(shape.M, shape.K)
        for parameter, grad in zip(parameters, grads, strict=True):
            view, _ = slot_of(parameter).prefix(m, k)
            view.copy_(grad[:m, :k])
        optimizer = sk.optim.AdamW(parameters, **ADAMW)
        return Contestant(optimizer.step, lambda: changes(parameters))

    providers = {
        "B2": partial(fused, m, k),
        "B1": expert,
        "B0": partial(fused, shape.M, shape.K),
        "ours": ours,
    }
    case = kernel_case(
        "adamw", "step", shape, dtype, device, providers,
        traffic=7 * shape.tensors * m * k,
    )  # fmt: skip
    return dataclasses.replace(case, tolerance=1e-2)
