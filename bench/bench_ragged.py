"""A ragged batch of sixteen sub-models against sixteen prefix calls and against full-size rows."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import sorted_kernels as sk
from bench import shapes
from bench.goals import goals_for
from bench.harness import Case, Contestant
from bench.shapes import RaggedShape


def _data(shape: RaggedShape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """X (N, K), weight (M, K), bias (M,), dy (N, M)."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((shape.N, shape.K), (shape.M, shape.K), (shape.M,), (shape.N, shape.M))
    return [torch.randn(*size, generator=generator, device=device).to(dtype) for size in sizes]


def _layer(weight: Tensor, bias: Tensor) -> sk.nn.Linear:
    layer = sk.nn.Linear(
        weight.shape[1], weight.shape[0], in_dim="in", out_dim="out", device=weight.device,
        dtype=weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def _ours(shape: RaggedShape, dtype: torch.dtype, device: torch.device) -> Contestant:
    """One call for all rows."""
    x, weight, bias, dy = _data(shape, dtype, device)
    layer, leaf, widths = _layer(weight, bias), x.requires_grad_(), sk.RowWidths(shape.runs())

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        leaf.grad = None
        layer(leaf, widths).backward(dy)

    return Contestant(step, lambda: [leaf.grad, layer.weight.grad, layer.bias.grad])


def _separate(shape: RaggedShape, dtype: torch.dtype, device: torch.device) -> Contestant:
    """B1: a prefix call for each sub-model's rows, gradients accumulating in the same weight."""
    x, weight, bias, dy = _data(shape, dtype, device)
    layer, runs, begin = _layer(weight, bias), [], 0
    for rows, m, k in shape.runs():
        leaf = x[begin : begin + rows, :k].clone().requires_grad_()
        submodel = sk.Submodel(**{"in": k, "out": m})
        runs.append((submodel, leaf, dy[begin : begin + rows, :m].clone()))
        begin += rows

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        for submodel, leaf, upstream in runs:
            sk.activate(layer, submodel)
            leaf.grad = None
            layer(leaf).backward(upstream)

    def outcome() -> list[Tensor]:
        dx = x.new_zeros(shape.N, shape.K)
        begin = 0
        for _, leaf, _ in runs:
            dx[begin : begin + len(leaf), : leaf.shape[1]] = leaf.grad
            begin += len(leaf)
        return [dx, layer.weight.grad, layer.bias.grad]

    return Contestant(step, outcome)


def _full(shape: RaggedShape, dtype: torch.dtype, device: torch.device) -> Contestant:
    """All rows at full size: what a mask instead of a slice costs."""
    x, weight, bias, dy = _data(shape, dtype, device)
    layer, leaf = _layer(weight, bias), x.requires_grad_()

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        leaf.grad = None
        layer(leaf).backward(dy)

    return Contestant(step)


def make_case(shape: RaggedShape, dtype: torch.dtype, device: torch.device) -> Case:
    """All contestants on one shape."""
    flops = 3 * sk.RowWidths(shape.runs()).flops
    builders = {"B1": _separate, "full": _full, "ours": _ours}
    return Case(
        kernel="ragged_linear",
        mode="forward+backward",
        sizes=str(shape),
        dtype=dtype,
        contestants={
            name: partial(builder, shape, dtype, device) for name, builder in builders.items()
        },
        device=device,
        flops=flops,
        tolerance=1e-3 if dtype == torch.float32 else 5e-2,
        goals=goals_for("ragged_linear", "forward+backward", {}, str(dtype), device.type == "cuda"),
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Sixteen sub-models; on a GPU in bfloat16 too."""
    chosen = [shapes.RAGGED_QUICK] if quick else shapes.RAGGED
    dtypes = [torch.float32] if quick or device.type == "cpu" else [torch.float32, torch.bfloat16]
    return [make_case(shape, dtype, device) for shape in chosen for dtype in dtypes]


def test_ragged_linear(case, provider, measure):
    measure(case, provider)
