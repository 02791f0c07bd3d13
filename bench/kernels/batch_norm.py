"""Batch norm alone, in training: x (N, c, H, H) against parameters and statistics of C."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Contestant
from bench.kernels.common import kernel_case, returning
from bench.shapes import ChannelNormShape
from sorted_kernels.ops.backend import implementation

MOMENTUM, EPS = 0.1, 1e-5


@dataclasses.dataclass(frozen=True)
class _Data:
    """x and dy (N, c, H, H), the rest (C,)."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor

    @classmethod
    def make(cls, shape: ChannelNormShape, dtype: torch.dtype, device: torch.device) -> _Data:
        generator = torch.Generator(device).manual_seed(0)
        like = (shape.N, shape.c, shape.H, shape.H)
        x, dy, weight, bias = (
            torch.randn(*size, generator=generator, device=device).to(dtype)
            for size in (like, like, (shape.C,), (shape.C,))
        )
        if device.type == "cuda":
            x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        return cls(x, dy, weight, bias, torch.zeros_like(weight), torch.ones_like(weight))

    def affine(self, c: int) -> tuple[Tensor, Tensor]:
        """The first c of weight and bias, by themselves."""
        return self.weight[:c].clone(), self.bias[:c].clone()


def batch_norm_forward(shape: ChannelNormShape, dtype: torch.dtype, device: torch.device) -> Case:
    """Output, and running statistics moved."""
    c = shape.c

    def torchs(contiguous: bool) -> Contestant:
        d = _Data.make(shape, dtype, device)
        alone = [t[:c].clone() for t in (d.mean, d.var, d.weight, d.bias)]

        def call() -> Tensor:
            given = alone if contiguous else [t[:c] for t in (d.mean, d.var, d.weight, d.bias)]
            return F.batch_norm(d.x, *given, True, MOMENTUM, EPS)

        return returning(call)

    def ours() -> Contestant:
        d = _Data.make(shape, dtype, device)
        run = implementation("batch_norm", d.x).batch_norm
        args = (d.x, d.weight, d.bias, d.mean, d.var, True, MOMENTUM, EPS)
        return returning(lambda: run(*args)[0])

    providers = {"B2": partial(torchs, True), "B0": partial(torchs, False), "ours": ours}
    traffic = 3 * shape.elements  # x is read for its statistics, and again
    return kernel_case("batch_norm", "forward", shape, dtype, device, providers, traffic=traffic)


def batch_norm_backward(shape: ChannelNormShape, dtype: torch.dtype, device: torch.device) -> Case:
    """Gradients of the input and of the first c affine parameters."""
    c = shape.c

    def contiguous() -> Contestant:
        d = _Data.make(shape, dtype, device)
        leaves = [t.clone().requires_grad_() for t in (d.x, *d.affine(c))]
        y = F.batch_norm(leaves[0], None, None, *leaves[1:], True, MOMENTUM, EPS)
        last: list[Tensor] = []

        def call() -> None:
            last[:] = torch.autograd.grad(y, leaves, d.dy, retain_graph=True)

        return Contestant(call, lambda: last)

    def sliced() -> Contestant:
        """Full-size gradients of the parameters, as naive slicing has them."""
        d = _Data.make(shape, dtype, device)
        leaves = [t.clone().requires_grad_() for t in (d.x, d.weight, d.bias)]
        affine = [leaf[:c] for leaf in leaves[1:]]
        y = F.batch_norm(leaves[0], None, None, *affine, True, MOMENTUM, EPS)
        last: list[Tensor] = []

        def call() -> None:
            dx, *rest = torch.autograd.grad(y, leaves, d.dy, retain_graph=True)
            last[:] = [dx, *(each[:c] for each in rest)]

        return Contestant(call, lambda: last)

    def ours() -> Contestant:
        d = _Data.make(shape, dtype, device)
        module = implementation("batch_norm", d.x)
        _, mean, rstd = module.batch_norm(d.x, d.weight, d.bias, None, None, True, 0.0, EPS)
        grads = [torch.zeros_like(t)[:c] for t in (d.weight, d.bias)]
        saved = (d.dy, d.x, mean, rstd, d.weight, True)
        last: list[Tensor] = []

        def call() -> None:
            last[:] = [module.batch_norm_backward_into(*saved, *grads, False, False), *grads]

        return Contestant(call, lambda: last)

    providers = {"B2": contiguous, "B0": sliced, "ours": ours}
    traffic = 5 * shape.elements  # dy and x are read for their sums, and again
    return kernel_case("batch_norm", "backward", shape, dtype, device, providers, traffic=traffic)
