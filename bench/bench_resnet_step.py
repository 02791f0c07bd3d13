"""Training step of cPreResNet20 on small images: forward, loss, backward, AdamW, at four widths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sorted_kernels as sk
from bench import shapes
from bench.goals import goals_for
from bench.harness import Case, Contestant
from bench.rows import parse_sizes
from bench.shapes import ResNetShape
from bench.torch_contestants import ADAMW, fused_adamw
from sorted_kernels.models.preresnet import WIDTHS, CPreResNet20, elastic_cpreresnet20

CLASSES = 10


def _elastic(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return elastic_cpreresnet20(classes=CLASSES).to(device)


class _Sliced(nn.Module):
    """B0's network: the full one's layers, each called on plain slices of its tensors."""

    def __init__(self, model: CPreResNet20, width: int) -> None:
        super().__init__()
        self.model, self.width = model, width

    def _conv(self, conv: Any, x: Tensor) -> Tensor:
        out_channels = conv.out_channels * self.width // WIDTHS
        weight = conv.weight[:out_channels, : x.shape[1]]
        return F.conv2d(x, weight, None, conv.stride, conv.padding)

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        c = x.shape[1]
        statistics, affine = (norm.running_mean, norm.running_var), (norm.weight, norm.bias)
        slices = [tensor[:c] for tensor in (*statistics, *affine)]
        return F.batch_norm(x, *slices, self.training, norm.momentum, norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self._conv(self.model.stem, x)
        for block in self.model.blocks:
            out = x
            for norm, conv in zip(block.norms, block.convs, strict=True):
                out = self._conv(conv, torch.relu(self._norm(norm, out)))
            x = out + (x if block.shortcut is None else self._conv(block.shortcut, x))
        x = torch.relu(self._norm(self.model.norm, x)).mean(dim=(2, 3))
        return F.linear(x, self.model.head.weight[:, : x.shape[1]], self.model.head.bias)


def _contestant(
    model: nn.Module, optimizer: torch.optim.Optimizer, shape: ResNetShape, device: torch.device
) -> Contestant:
    """A training step; its outcome is the batch's logits, with the running statistics."""
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(shape.batch, 3, shape.pixels, shape.pixels, generator=generator, device=device)
    target = torch.randint(CLASSES, (shape.batch,), generator=generator, device=device)
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    @torch.no_grad()
    def logits() -> list[Tensor]:
        model.eval()
        found = model(x)
        model.train()
        return [found]

    return Contestant(step, logits)


def _naive(shape: ResNetShape, device: torch.device) -> Contestant:
    torch.manual_seed(0)
    model = _Sliced(CPreResNet20(classes=CLASSES).to(device), shape.width)
    return _contestant(model, fused_adamw(model.parameters()), shape, device)


def _standalone(shape: ResNetShape, device: torch.device) -> Contestant:
    """B2: the exported sub-model, plain torch with contiguous weights, and torch's AdamW."""
    model = sk.export(_elastic(device), sk.Submodel(width=shape.width))
    return _contestant(model, fused_adamw(model.parameters()), shape, device)


def _ours(shape: ResNetShape, device: torch.device) -> Contestant:
    """The shared weights with the sub-model active, and this library's AdamW."""
    model = _elastic(device)
    sk.activate(model, sk.Submodel(width=shape.width))
    return _contestant(model, sk.optim.AdamW(model.parameters(), **ADAMW), shape, device)


BUILDERS: dict[str, Callable[[ResNetShape, torch.device], Contestant]] = {
    "B2": _standalone,
    "B0": _naive,
    "ours": _ours,
}


def make_case(shape: ResNetShape, device: torch.device) -> Case:
    """The contestants at one width."""
    images = (shape.batch, 3, shape.pixels, shape.pixels)
    forward = sk.count_flops(_elastic(device), sk.Submodel(width=shape.width), images)
    sizes = parse_sizes(str(shape))
    return Case(
        kernel="resnet_step",
        mode="train",
        sizes=str(shape),
        dtype=torch.float32,
        contestants={name: partial(build, shape, device) for name, build in BUILDERS.items()},
        device=device,
        flops=3 * forward,
        tolerance=1e-2,
        goals=goals_for("resnet_step", "train", sizes, "float32", device.type == "cuda"),
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Widths of 25, 50, 75 and 100 percent."""
    chosen = [shapes.RESNET_QUICK] if quick else shapes.RESNET_STEP
    return [make_case(shape, device) for shape in chosen]


def test_resnet_step(case, provider, measure):
    measure(case, provider)
