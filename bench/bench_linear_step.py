"""Training step of one layer: forward, backward (input, weight and bias gradients), AdamW."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench import shapes
from bench.goals import goals_for
from bench.harness import Case, Contestant
from bench.our_contestants import our_linear_step
from bench.rows import parse_sizes
from bench.shapes import LinearShape
from bench.torch_contestants import (
    LinearData,
    expert_linear_step,
    naive_linear_step,
    standalone_linear_step,
)


def make_case(shape: LinearShape, dtype: torch.dtype, device: torch.device) -> Case:
    """All contestants on one shape."""
    builders: dict[str, Callable[[LinearData], Contestant]] = {
        "B2": standalone_linear_step,
        "B1": expert_linear_step,
        "B0": naive_linear_step,
        "ours": our_linear_step,
    }

    def build(builder: Callable[[LinearData], Contestant]) -> Contestant:
        return builder(LinearData.make(shape, dtype, device))

    active, name = shape.m * shape.k, str(dtype).removeprefix("torch.")
    sizes, gpu = parse_sizes(str(shape)), device.type == "cuda"
    return Case(
        kernel="linear_step",
        mode="train",
        sizes=str(shape),
        dtype=dtype,
        contestants={name: partial(build, builder) for name, builder in builders.items()},
        device=device,
        flops=3 * shape.gemm_flops,
        # x, dy, y, dx once each (backward reads x and dy again), weight twice, gradient written
        # and read, and the optimizer's parameter and two moments read and written
        bytes=dtype.itemsize * (6 * shape.N * max(shape.m, shape.k) + 10 * active),
        tolerance=1e-2 if dtype == torch.float32 else 1e-1,
        goals=goals_for("linear_step", "train", sizes, name, gpu),
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The shapes with goals in float32, and on a GPU the large ones in bfloat16."""
    small = shapes.LINEAR_STEP_CPU
    if quick:
        return [make_case(shape, torch.float32, device) for shape in (small[0], small[3])]
    result = [make_case(shape, torch.float32, device) for shape in small]
    if device.type == "cuda":
        result += [make_case(shape, torch.bfloat16, device) for shape in shapes.LINEAR_STEP_GPU]
    return result


def test_linear_step(case, provider, measure):
    measure(case, provider)
