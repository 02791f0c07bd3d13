"""A residual MLP in plain PyTorch, and the rules that make its depth and width elastic."""

from __future__ import annotations

import torch
from torch import Tensor

from sorted_kernels.models.elasticize import elasticize


class ResidualBlock(torch.nn.Module):
    """``x + fc2(gelu(fc1(norm(x))))``.

    Args:
        width: Features of the residual stream.
        hidden: Features between the two linear layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.fc1 = torch.nn.Linear(width, hidden)
        self.fc2 = torch.nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(self.norm(x))))


class ResidualMLP(torch.nn.Module):
    """Stem, residual blocks, final norm, classifier: nothing but ``torch.nn``.

    Args:
        in_features: Features of the input.
        width: Features of the residual stream.
        hidden: Features inside a block.
        depth: Number of blocks.
        classes: Number of outputs.
    """

    def __init__(
        self,
        in_features: int = 64,
        width: int = 256,
        hidden: int = 256,
        depth: int = 12,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = torch.nn.Linear(in_features, width)
        self.blocks = torch.nn.ModuleList(ResidualBlock(width, hidden) for _ in range(depth))
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., classes)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


RESIDUAL_MLP_RULES = {
    "stem": {"out": "width"},
    "blocks": {"depth": "depth"},
    "blocks.*.norm": {"features": "width"},
    "blocks.*.fc1": {"in": "width", "out": "width"},
    "blocks.*.fc2": {"in": "width", "out": "width"},
    "norm": {"features": "width"},
    "head": {"in": "width"},
}


def elastic_residual_mlp(
    in_features: int = 64,
    width: int = 256,
    hidden: int = 256,
    depth: int = 12,
    classes: int = 10,
    *,
    widths: int = 8,
) -> torch.nn.Module:
    """A :class:`ResidualMLP` with dimensions ``depth`` and ``width`` (``widths`` equal steps)."""
    model = ResidualMLP(in_features, width, hidden, depth, classes)
    return elasticize(model, RESIDUAL_MLP_RULES, dimensions={"width": widths})
