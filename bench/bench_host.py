"""Host time: what a call costs before any arithmetic, and what switching sub-models costs."""

from __future__ import annotations

import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import sorted_kernels as sk
from bench import shapes
from bench.goals import goals_for
from bench.harness import Case, Contestant
from bench.our_contestants import elastic_linear
from bench.rows import format_sizes
from bench.shapes import LinearShape
from bench.torch_contestants import LinearData, expert_linear
from sorted_kernels.models.residual_mlp import elastic_residual_mlp


def _naive(shape: LinearShape, device: torch.device) -> Contestant:
    """B0: slice the parameter; gradients are kept, as between the micro-batches of a step."""
    data = LinearData.make(shape, torch.float32, device)
    weight, bias = (nn.Parameter(t.clone()) for t in (data.weight, data.bias))
    x = data.leaf()

    def call() -> None:
        x.grad = None
        F.linear(x, weight[: shape.m, : shape.k], bias[: shape.m]).backward(data.dy)

    return Contestant(call)


def _standalone(shape: LinearShape, device: torch.device) -> Contestant:
    """B2: a layer of the small size."""
    data = LinearData.make(shape, torch.float32, device)
    layer, x = nn.Linear(shape.k, shape.m, device=device), data.leaf()

    def call() -> None:
        x.grad = None
        layer(x).backward(data.dy)

    return Contestant(call)


def _expert(shape: LinearShape, device: torch.device) -> Contestant:
    """B1: views by hand, gradients added in place."""
    data = LinearData.make(shape, torch.float32, device)
    forward, _, _ = expert_linear(data)
    x = data.leaf()

    def call() -> None:
        x.grad = None
        forward(x).backward(data.dy)

    return Contestant(call)


def _ours(shape: LinearShape, device: torch.device) -> Contestant:
    data = LinearData.make(shape, torch.float32, device)
    layer, x = elastic_linear(data), data.leaf()

    def call() -> None:
        x.grad = None
        layer(x).backward(data.dy)

    return Contestant(call)


def _call_case(shape: LinearShape, device: torch.device) -> Case:
    builders = {"B2": _standalone, "B1": _expert, "B0": _naive, "ours": _ours}
    return Case(
        kernel="host",
        mode="forward+backward",
        sizes=str(shape),
        dtype=torch.float32,
        contestants={name: partial(build, shape, device) for name, build in builders.items()},
        device=device,
        clock="host",
        goals=goals_for("host", "forward+backward", {}, "float32", device.type == "cuda"),
    )


def _switch_case(device: torch.device) -> Case:
    """Activating each of the 96 sub-models of the demo's network in turn."""
    depths, widths = range(1, 13), range(1, 9)

    def build() -> Contestant:
        model = elastic_residual_mlp().to(device)
        submodels = [sk.Submodel(depth=d, width=w) for d in depths for w in widths]
        upcoming = itertools.cycle(submodels)
        return Contestant(lambda: sk.activate(model, next(upcoming)))

    return Case(
        kernel="host",
        mode="switch",
        sizes=format_sizes(submodels=len(depths) * len(widths)),
        dtype=torch.float32,
        contestants={"ours": build},
        device=device,
        clock="host",
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    """A tiny prefix of a large layer, and the switch."""
    return [_call_case(shape, device) for shape in shapes.HOST_LINEAR] + [_switch_case(device)]


def test_host(case, provider, measure):
    measure(case, provider)
