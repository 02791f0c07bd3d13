"""Convolution: the training step of a layer, and each kernel alone.

PyTorch copies the weight slice inside its convolutions, for B0, B1 and (on CPUs) us alike; B2 has
nothing to copy. So the distance between B1 and B2 is what the copy costs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench import shapes
from bench.conv_contestants import (
    ConvData,
    expert_conv_step,
    naive_conv_step,
    our_conv_step,
    standalone_conv_step,
)
from bench.goals import goals_for
from bench.harness import Case, Contestant
from bench.kernels.common import kernel_case, returning
from bench.rows import parse_sizes
from bench.shapes import ConvShape
from sorted_kernels.ops import conv2d_ops
from sorted_kernels.ops.conv2d_checks import geometry_of

Builders = dict[str, Callable[[ConvData], Contestant]]


def _contestants(
    builders: Builders, shape: ConvShape, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Contestant]]:
    def build(builder: Callable[[ConvData], Contestant]) -> Contestant:
        return builder(ConvData.make(shape, dtype, device))

    return {name: partial(build, builder) for name, builder in builders.items()}


def step_case(shape: ConvShape, dtype: torch.dtype, device: torch.device) -> Case:
    """Forward, backward (input, weight and bias gradients) and AdamW of one layer."""
    builders: Builders = {
        "B2": standalone_conv_step,
        "B1": expert_conv_step,
        "B0": naive_conv_step,
        "ours": our_conv_step,
    }
    name, gpu = str(dtype).removeprefix("torch."), device.type == "cuda"
    return Case(
        kernel="conv_step",
        mode="train",
        sizes=str(shape),
        dtype=dtype,
        contestants=_contestants(builders, shape, dtype, device),
        device=device,
        flops=3 * shape.flops,
        # x, dy, y, dx once each (backward reads x and dy again), weight twice, gradient written
        # and read, and the optimizer's parameter and two moments read and written
        bytes=dtype.itemsize * (6 * shape.images + 10 * shape.weights),
        tolerance=1e-2 if dtype == torch.float32 else 1e-1,
        goals=goals_for("conv_step", "train", parse_sizes(str(shape)), name, gpu),
    )


def _forward(shape: ConvShape) -> Builders:
    def torch_on(weight: Callable[[ConvData], torch.Tensor], data: ConvData) -> Contestant:
        w, bias = weight(data), data.block(data.bias)
        return returning(lambda: data.run(data.x, w, bias))

    def ours(data: ConvData) -> Contestant:
        arguments = (data.x, data.weight, data.bias, shape.block, shape.geometry, "none", False)
        return returning(lambda: conv2d_ops.forward(*arguments)[0])

    return {**_alone_and_sliced(torch_on), "ours": ours}


def _dgrad(shape: ConvShape) -> Builders:
    def torch_on(weight: Callable[[ConvData], torch.Tensor], data: ConvData) -> Contestant:
        w = weight(data)
        return returning(lambda: data.gradients(w, (True, False, False))[0])

    def ours(data: ConvData) -> Contestant:
        arguments = (data.dy, data.weight, shape.block, shape.geometry, list(data.x.shape[2:]))
        return returning(lambda: conv2d_ops.dgrad(*arguments))

    return {**_alone_and_sliced(torch_on), "ours": ours}


def _wgrad(shape: ConvShape) -> Builders:
    """Added to a gradient of the full size, but for B2."""

    def torch_on(weight: Callable[[ConvData], torch.Tensor], data: ConvData) -> Contestant:
        w = weight(data)
        grad = torch.zeros_like(w) if w.is_contiguous() else data.block(0 * data.weight)

        def call() -> None:
            grad.add_(data.gradients(w, (False, True, False))[1])

        return Contestant(call, lambda: [grad])

    def ours(data: ConvData) -> Contestant:
        grad, geometry = data.block(0 * data.weight), geometry_of(shape.geometry)
        call = partial(conv2d_ops.wgrad_into, data.dy, data.x, geometry, grad, True)
        return Contestant(call, lambda: [grad])

    return {**_alone_and_sliced(torch_on), "ours": ours}


def _alone_and_sliced(
    torch_on: Callable[[Callable[[ConvData], torch.Tensor], ConvData], Contestant],
) -> Builders:
    return {
        "B2": partial(torch_on, lambda data: data.block(data.weight).contiguous()),
        "B1": partial(torch_on, lambda data: data.block(data.weight)),
    }


def kernel_cases(shape: ConvShape, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """Forward, dgrad and wgrad alone."""
    kernel = "conv2d" if shape.groups == 1 else "depthwise"
    modes = {"forward": _forward, "dgrad": _dgrad, "wgrad": _wgrad}
    traffic = 2 * shape.images + shape.weights
    return [
        kernel_case(
            kernel, mode, shape, dtype, device,
            _contestants(builders(shape), shape, dtype, device), shape.flops, traffic,
        )
        for mode, builders in modes.items()
    ]  # fmt: skip


def cases(device: torch.device, quick: bool) -> list[Case]:
    """float32 on a CPU, bfloat16 on a GPU."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    steps = shapes.CONV_STEP_GPU if gpu else shapes.CONV_STEP_CPU
    alone = shapes.CONV_GPU if gpu else shapes.CONV_CPU
    if quick:
        steps, alone = [shapes.CONV_QUICK], [shapes.CONV_QUICK]
    result = [step_case(shape, dtype, device) for shape in steps]
    return result + [case for shape in alone for case in kernel_cases(shape, dtype, device)]


def test_conv(case, provider, measure):
    measure(case, provider)
