"""Convolution as PyTorch can do it (B0, B1, B2) and as this library does, on the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sorted_kernels as sk
from bench.harness import Contestant
from bench.shapes import ConvShape
from bench.torch_contestants import ADAMW, SlicedAdamW, fused_adamw

convolution_backward = torch.ops.aten.convolution_backward


@dataclass(frozen=True)
class ConvData:
    """x (N, c, H, W), weight (C, C or 1, taps, taps), bias (C,), dy (N, c, H, W)."""

    shape: ConvShape
    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor

    @classmethod
    def make(cls, shape: ConvShape, dtype: torch.dtype, device: torch.device) -> ConvData:
        """Random data, the same for the same shape."""
        generator = torch.Generator(device).manual_seed(0)
        form = torch.channels_last if shape.nhwc else torch.contiguous_format

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).to(dtype)

        s = shape
        images = [normal(s.N, s.c, s.pixels, s.pixels).contiguous(memory_format=form) for _ in "xy"]
        weight = normal(s.C, s.C // s.groups, s.taps, s.taps) * (s.block[1] * s.taps**2) ** -0.5
        return cls(s, images[0], weight, normal(s.C), images[1])

    def leaf(self) -> Tensor:
        """A copy of x that wants a gradient, as the input of an inner layer does."""
        return self.x.clone().requires_grad_()

    def block(self, tensor: Tensor) -> Tensor:
        """The active part of a weight or bias."""
        rows = tensor[: self.shape.c]
        return rows if tensor.dim() == 1 else rows[:, : self.shape.block[1]]

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """PyTorch's convolution with an active weight."""
        s = self.shape
        return F.conv2d(x, weight, bias, padding=s.padding, groups=s.active_groups)

    def gradients(self, weight: Tensor, wants: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
        """PyTorch's gradients of x, the active weight, and its bias."""
        s = self.shape
        return convolution_backward(
            self.dy, self.x, weight, [s.c], (1, 1), (s.padding, s.padding), (1, 1), False, (0, 0),
            s.active_groups, wants,
        )  # fmt: skip

    def change(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """By how much training moved the active weight and bias."""
        pairs = ((weight, self.weight), (bias, self.bias))
        return [self.block(new.detach()) - self.block(old) for new, old in pairs]


class _ViewConv(torch.autograd.Function):
    """Reads views of the parent and adds the gradients to views of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, data: ConvData, views: list[Tensor], grads: list[Tensor]):
        ctx.save_for_backward(x, views[0])
        ctx.data, ctx.grads = data, grads
        return data.run(x, *views)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        s = ctx.data.shape
        dx, *found = convolution_backward(
            dy, x, weight, [s.c], (1, 1), (s.padding, s.padding), (1, 1), False, (0, 0),
            s.active_groups, (True, True, True),
        )  # fmt: skip
        for grad, each in zip(ctx.grads, found, strict=True):
            grad.add_(each)
        return dx, None, None, None


def _step(
    data: ConvData,
    forward: Callable[[Tensor], Tensor],
    zero_grad: Callable[[], None],
    update: Callable[[], object],
) -> Callable[[], None]:
    x = data.leaf()

    def step() -> None:
        x.grad = None
        zero_grad()
        forward(x).backward(data.dy)
        update()

    return step


def naive_conv_step(data: ConvData) -> Contestant:
    """B0: slice the parameter, let autograd and the whole optimizer do their full-size work."""
    weight, bias = (nn.Parameter(tensor.clone()) for tensor in (data.weight, data.bias))
    optimizer = fused_adamw([weight, bias])

    def forward(x: Tensor) -> Tensor:
        return data.run(x, data.block(weight), data.block(bias))

    step = _step(data, forward, optimizer.zero_grad, optimizer.step)
    return Contestant(step, lambda: data.change(weight, bias))


def expert_conv_step(data: ConvData) -> Contestant:
    """B1: touch the active block only, as far as plain PyTorch lets one."""
    parents = [tensor.clone() for tensor in (data.weight, data.bias)]
    views = [data.block(tensor) for tensor in parents]
    grads = [data.block(torch.zeros_like(tensor)) for tensor in parents]
    optimizer = SlicedAdamW(views, grads)

    def forward(x: Tensor) -> Tensor:
        return _ViewConv.apply(x, data, views, grads)

    step = _step(data, forward, optimizer.zero_grad, optimizer.step)
    return Contestant(step, lambda: data.change(*parents))


def standalone_conv_step(data: ConvData) -> Contestant:
    """B2: a layer of the sub-model's size, contiguous, with torch's fused optimizer."""
    s = data.shape
    layer = nn.Conv2d(s.c, s.c, s.taps, padding=s.padding, groups=s.active_groups)
    layer.to(device=data.x.device, dtype=data.x.dtype)
    with torch.no_grad():
        layer.weight.copy_(data.block(data.weight))
        layer.bias.copy_(data.block(data.bias))  # type: ignore[union-attr]
    if s.nhwc:
        layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = fused_adamw(layer.parameters())
    step = _step(data, layer, optimizer.zero_grad, optimizer.step)
    return Contestant(step, lambda: data.change(layer.weight, layer.bias))


def our_conv_step(data: ConvData) -> Contestant:
    """A training step of the active block alone: a full-size layer and the staircase optimizer."""
    s = data.shape
    dims = {"in_dim": "width", "out_dim": "width"}
    layer = sk.nn.Conv2d(s.C, s.C, s.taps, padding=s.padding, groups=s.groups, **dims)
    layer.to(device=data.x.device, dtype=data.x.dtype)
    with torch.no_grad():
        layer.weight.copy_(data.weight)
        layer.bias.copy_(data.bias)
    sk.activate(layer, sk.Submodel(width=s.c))
    optimizer = sk.optim.AdamW(layer.parameters(), **ADAMW)
    step = _step(data, layer, optimizer.zero_grad, optimizer.step)
    return Contestant(step, lambda: data.change(layer.weight, layer.bias))
