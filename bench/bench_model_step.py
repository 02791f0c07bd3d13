"""Training step of the demo's whole model: forward, loss, backward, AdamW, at four sub-models."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sorted_kernels as sk
from bench import shapes
from bench.goals import goals_for
from bench.harness import Case, Contestant
from bench.shapes import ModelShape
from bench.torch_contestants import ADAMW, fused_adamw
from sorted_kernels.models.residual_mlp import elastic_residual_mlp

IN_FEATURES, CLASSES = 64, 10


def _elastic(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return elastic_residual_mlp(in_features=IN_FEATURES, classes=CLASSES).to(device)


def _contestant(
    model: nn.Module, optimizer: torch.optim.Optimizer, shape: ModelShape, device: torch.device
) -> Contestant:
    """A training step; its outcome is the batch's logits after all steps so far."""
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(shape.batch, IN_FEATURES, generator=generator, device=device)
    target = torch.randint(CLASSES, (shape.batch,), generator=generator, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    @torch.no_grad()
    def logits() -> list[Tensor]:
        return [model(x)]

    return Contestant(step, logits)


def _standalone(shape: ModelShape, device: torch.device) -> Contestant:
    """B2: the exported sub-model, plain torch with contiguous weights, and torch's AdamW."""
    submodel = sk.Submodel(depth=shape.depth, width=shape.width)
    model = sk.export(_elastic(device), submodel)
    return _contestant(model, fused_adamw(model.parameters()), shape, device)


def _ours(shape: ModelShape, device: torch.device) -> Contestant:
    """The shared weights with the sub-model active, and this library's AdamW."""
    model = _elastic(device)
    sk.activate(model, sk.Submodel(depth=shape.depth, width=shape.width))
    return _contestant(model, sk.optim.AdamW(model.parameters(), **ADAMW), shape, device)


def make_case(shape: ModelShape, device: torch.device) -> Case:
    """Both contestants on one sub-model."""
    submodel = sk.Submodel(depth=shape.depth, width=shape.width)
    forward = sk.count_flops(_elastic(device), submodel, (shape.batch, IN_FEATURES))
    return Case(
        kernel="model_step",
        mode="train",
        sizes=str(shape),
        dtype=torch.float32,
        contestants={
            "B2": partial(_standalone, shape, device),
            "ours": partial(_ours, shape, device),
        },
        device=device,
        flops=3 * forward,
        tolerance=1e-2,
        goals=goals_for("model_step", "train", {}, "float32", device.type == "cuda"),
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Four sub-models, the largest among them."""
    chosen = shapes.MODEL_STEP[-1:] if quick else shapes.MODEL_STEP
    return [make_case(shape, device) for shape in chosen]


def test_model_step(case, provider, measure):
    measure(case, provider)
