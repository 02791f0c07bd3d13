"""Layer norm and RMS norm alone."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Contestant
from bench.kernels.common import kernel_case, returning
from bench.shapes import NormShape
from sorted_kernels.ops.backend import implementation

NORM_EPS = {"layer_norm": 1e-5, "rms_norm": 1e-6}


@dataclasses.dataclass(frozen=True)
class _NormData:
    """x (N, k), affine parameters (K,), dy (N, k)."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor

    @classmethod
    def make(cls, shape: NormShape, dtype: torch.dtype, device: torch.device) -> _NormData:
        generator = torch.Generator(device).manual_seed(0)
        sizes = ((shape.N, shape.k), (shape.K,), (shape.K,), (shape.N, shape.k))
        return cls(*(torch.randn(*s, generator=generator, device=device).to(dtype) for s in sizes))


def _torch_norm(kernel: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if kernel == "layer_norm":
        return F.layer_norm(x, weight.shape, weight, bias, NORM_EPS[kernel])
    return F.rms_norm(x, weight.shape, weight, NORM_EPS[kernel])


def norm_forward(kernel: str, shape: NormShape, dtype: torch.dtype, device: torch.device) -> Case:
    """The norm of k features with the first k of K affine parameters."""

    def contiguous() -> Contestant:
        d = _NormData.make(shape, dtype, device)
        weight, bias = d.weight[: shape.k].clone(), d.bias[: shape.k].clone()
        return returning(lambda: _torch_norm(kernel, d.x, weight, bias))

    def ours() -> Contestant:
        d = _NormData.make(shape, dtype, device)
        norm = getattr(implementation(kernel, d.x), kernel)
        affine = (d.weight, d.bias) if kernel == "layer_norm" else (d.weight,)
        return returning(lambda: norm(d.x, *affine, NORM_EPS[kernel])[0])

    def sliced() -> Contestant:  # naive and expert PyTorch alike
        d = _NormData.make(shape, dtype, device)
        return returning(lambda: _torch_norm(kernel, d.x, d.weight[: shape.k], d.bias[: shape.k]))

    providers = {"B2": contiguous, "B0": sliced, "ours": ours}
    traffic = 2 * shape.N * shape.k
    return kernel_case(kernel, "forward", shape, dtype, device, providers, traffic=traffic)


def norm_backward(kernel: str, shape: NormShape, dtype: torch.dtype, device: torch.device) -> Case:
    """Gradients of the input and of the first k affine parameters."""
    k, has_bias = shape.k, kernel == "layer_norm"

    def contiguous() -> Contestant:
        d = _NormData.make(shape, dtype, device)
        leaves = [t.clone().requires_grad_() for t in (d.x, d.weight[:k], d.bias[:k])]
        y = _torch_norm(kernel, *leaves)
        wanted, last = leaves if has_bias else leaves[:2], []

        def call() -> None:
            last[:] = torch.autograd.grad(y, wanted, d.dy, retain_graph=True)

        return Contestant(call, lambda: last)

    def sliced(in_place: bool) -> Contestant:
        """B0: full-size gradients of the parameters; B1: views, added to the gradient's prefix."""
        d = _NormData.make(shape, dtype, device)
        x, *full = (t.clone().requires_grad_() for t in (d.x, d.weight, d.bias))
        grads = [torch.zeros_like(t) for t in full][: 1 + has_bias]
        views = [(t.detach()[:k].requires_grad_() if in_place else t[:k]) for t in full]
        y = _torch_norm(kernel, x, *views)
        wanted, last = [x, *(views if in_place else full)[: 1 + has_bias]], []

        def call() -> None:
            dx, *found = torch.autograd.grad(y, wanted, d.dy, retain_graph=True)
            for grad, each in zip(grads, found, strict=True):
                (grad[:k] if in_place else grad).copy_(each)
            last[:] = [dx, *(grad[:k] for grad in grads)]

        return Contestant(call, lambda: last)

    def ours() -> Contestant:
        d = _NormData.make(shape, dtype, device)
        module = implementation(kernel, d.x)
        grads = [torch.zeros_like(t)[:k] for t in (d.weight, d.bias)][: 1 + has_bias]
        last: list[Tensor] = []
        if has_bias:
            _, mean, rstd = module.layer_norm(d.x, d.weight, d.bias, NORM_EPS[kernel])
            saved, overwrite = (d.dy, d.x, mean, rstd, d.weight), (False, False)
        else:
            _, rstd = module.rms_norm(d.x, d.weight, NORM_EPS[kernel])
            saved, overwrite = (d.dy, d.x, rstd, d.weight), (False,)
        backward = getattr(module, f"{kernel}_backward_into")

        def call() -> None:
            last[:] = [backward(*saved, *grads, *overwrite), *grads]

        return Contestant(call, lambda: last)

    providers = {
        "B2": contiguous,
        "B1": partial(sliced, True),
        "B0": partial(sliced, False),
        "ours": ours,
    }
    traffic = 3 * shape.N * k
    return kernel_case(kernel, "backward", shape, dtype, device, providers, traffic=traffic)
