"""Anytime inference on the demo's network: all twelve exits against the deepest alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import sorted_kernels as sk
from bench import shapes
from bench.harness import Case, Contestant, Goal
from bench.shapes import ModelShape
from sorted_kernels.models.residual_mlp import elastic_residual_mlp

IN_FEATURES, CLASSES = 64, 10


def _contestant(
    run: Callable[[nn.Module, Tensor], Tensor], shape: ModelShape, device: torch.device
) -> Contestant:
    """A run on a batch; its outcome is the deepest exit's logits."""
    torch.manual_seed(0)
    model = elastic_residual_mlp(in_features=IN_FEATURES, classes=CLASSES).to(device).eval()
    sk.activate(model, sk.Submodel(depth=shape.depth, width=shape.width))
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(shape.batch, IN_FEATURES, generator=generator, device=device)
    return Contestant(lambda: run(model, x), lambda: [run(model, x)])


@torch.no_grad()
def _deepest(model: nn.Module, x: Tensor) -> Tensor:
    """B2: the deepest sub-model alone, one prediction."""
    return model(x)


@torch.no_grad()
def _loop(model: nn.Module, x: Tensor) -> Tensor:
    """B1: the loop that an expert writes for this network, every prediction."""
    h = model.stem(x)
    for block in model.blocks:
        h = block(h)
        logits = model.head(model.norm(h))
    return logits


def _ours(model: nn.Module, x: Tensor) -> Tensor:
    for result in sk.inference.anytime(model, x):
        logits = result.output
    return logits


def make_case(shape: ModelShape, device: torch.device) -> Case:
    """The three contestants on one batch."""
    runs = {"B2": _deepest, "B1": _loop, "ours": _ours}
    submodel = sk.Submodel(depth=shape.depth, width=shape.width)
    model = elastic_residual_mlp(in_features=IN_FEATURES, classes=CLASSES)
    return Case(
        kernel="anytime",
        mode="forward",
        sizes=str(shape),
        dtype=torch.float32,
        contestants={name: partial(_contestant, run, shape, device) for name, run in runs.items()},
        device=device,
        flops=sk.count_flops(model, submodel, (shape.batch, IN_FEATURES)),
        tolerance=0.0,
        goals=(Goal("B2", 1.10),),
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Batches from one row up; 360 rows are the demo's test set."""
    chosen = shapes.ANYTIME[:1] if quick else shapes.ANYTIME
    return [make_case(shape, device) for shape in chosen]


def test_anytime(case, provider, measure):
    measure(case, provider)
