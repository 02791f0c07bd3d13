"""What PyTorch can do: B0 naive, B1 expert, B2 a stand-alone layer of the sub-model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import Contestant
from bench.shapes import LinearShape

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 1e-2
ADAMW = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}


@dataclass(frozen=True)
class LinearData:
    """The same numbers for every contestant: x (N, k), weight (M, K), bias (M,), dy (N, m)."""

    shape: LinearShape
    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor

    @classmethod
    def make(cls, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> LinearData:
        """Random data, the same for the same shape."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).to(dtype)

        s = shape
        weight = normal(s.M, s.K) * s.k**-0.5
        return cls(s, normal(s.N, s.k), weight, normal(s.M), normal(s.N, s.m))

    def leaf(self) -> Tensor:
        """A copy of x that wants a gradient, as the input of an inner layer does."""
        return self.x.clone().requires_grad_()

    def change(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """By how much training moved the active weight and bias."""
        m, k = self.shape.m, self.shape.k
        return [
            weight.detach()[:m, :k] - self.weight[:m, :k],
            bias.detach()[:m] - self.bias[:m],
        ]


def naive_linear_step(data: LinearData) -> Contestant:
    """B0: slice the parameter, let autograd and the whole optimizer do their full-size work."""
    m, k = data.shape.m, data.shape.k
    weight, bias = (nn.Parameter(t.clone()) for t in (data.weight, data.bias))
    optimizer = torch.optim.AdamW([weight, bias], **ADAMW, fused=True)
    x = data.leaf()

    def step() -> None:
        x.grad = None
        optimizer.zero_grad(set_to_none=True)
        F.linear(x, weight[:m, :k], bias[:m]).backward(data.dy)
        optimizer.step()

    return Contestant(step, lambda: data.change(weight, bias))


class _ViewLinear(torch.autograd.Function):
    """B1's layer: strided views, weight gradients added in place into ``.grad[:m, :k]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, m: int) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return F.linear(x, weight[:m, : x.shape[-1]], bias[:m])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        m, k = dy.shape[-1], x.shape[-1]
        weight.grad[:m, :k].addmm_(dy.t(), x)
        bias.grad[:m].add_(dy.sum(0))
        return dy @ weight[:m, :k], None, None, None


class SlicedAdamW:
    """B1's optimizer: AdamW's formula on views, with torch's multi-tensor operators.

    torch's fused kernel takes no views (it walks memory linearly), hence the operators.
    """

    def __init__(self, views: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self.views, self.grads = list(views), list(grads)
        self.averages = [torch.zeros_like(v) for v in views]
        self.squares = [torch.zeros_like(v) for v in views]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """One update of the views."""
        self.steps += 1
        (beta1, beta2), t = BETAS, self.steps
        torch._foreach_mul_(self.views, 1 - LEARNING_RATE * WEIGHT_DECAY)
        torch._foreach_lerp_(self.averages, self.grads, 1 - beta1)
        torch._foreach_mul_(self.squares, beta2)
        torch._foreach_addcmul_(self.squares, self.grads, self.grads, 1 - beta2)
        denominators = torch._foreach_sqrt(self.squares)
        torch._foreach_div_(denominators, (1 - beta2**t) ** 0.5)
        torch._foreach_add_(denominators, EPS)
        torch._foreach_addcdiv_(
            self.views, self.averages, denominators, -LEARNING_RATE / (1 - beta1**t)
        )

    def zero_grad(self) -> None:
        """Clear the views' gradients."""
        torch._foreach_zero_(self.grads)


def expert_linear(
    data: LinearData,
) -> tuple[Callable[[Tensor], Tensor], list[Tensor], list[Tensor]]:
    """B1's layer: its forward, the active blocks of weight and bias, and of their gradients."""
    m, k = data.shape.m, data.shape.k
    weight, bias = (nn.Parameter(t.clone()) for t in (data.weight, data.bias))
    for parameter in (weight, bias):
        parameter.grad = torch.zeros_like(parameter)
    assert weight.grad is not None and bias.grad is not None
    views = [weight.detach()[:m, :k], bias.detach()[:m]]
    grads = [weight.grad[:m, :k], bias.grad[:m]]
    return lambda x: _ViewLinear.apply(x, weight, bias, m), views, grads


def expert_linear_step(data: LinearData) -> Contestant:
    """B1: touch the active block only, as far as plain PyTorch lets one."""
    forward, views, grads = expert_linear(data)
    optimizer = SlicedAdamW(views, grads)
    x = data.leaf()

    def step() -> None:
        x.grad = None
        optimizer.zero_grad()
        forward(x).backward(data.dy)
        optimizer.step()

    return Contestant(step, lambda: data.change(*views))


def standalone_linear_step(data: LinearData) -> Contestant:
    """B2: a layer of the sub-model's size, contiguous, with torch's fused optimizer."""
    m, k = data.shape.m, data.shape.k
    layer = nn.Linear(k, m, device=data.x.device, dtype=data.x.dtype)
    with torch.no_grad():
        layer.weight.copy_(data.weight[:m, :k])
        layer.bias.copy_(data.bias[:m])
    optimizer = fused_adamw(layer.parameters())
    x = data.leaf()

    def step() -> None:
        x.grad = None
        optimizer.zero_grad(set_to_none=True)
        layer(x).backward(data.dy)
        optimizer.step()

    return Contestant(step, lambda: data.change(layer.weight, layer.bias))


def fused_adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """The fastest AdamW that torch has."""
    return torch.optim.AdamW(parameters, **ADAMW, fused=True)
