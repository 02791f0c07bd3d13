"""A small elastic network with width, depth and dropout, and the same sub-models in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sorted_kernels.nn import Linear, ModuleList
from sorted_kernels.submodel import Submodel

FEATURES, WIDTH, DEPTH, CLASSES = 6, 16, 3, 4


class Net(nn.Module):
    """Stem, residual blocks, head; ``width`` of 16 and ``depth`` of 3."""

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = Linear(FEATURES, WIDTH, out_dim="width")
        blocks = [Linear(WIDTH, WIDTH, in_dim="width", out_dim="width") for _ in range(DEPTH)]
        self.blocks = ModuleList(blocks, depth_dim="depth")
        self.dropout = nn.Dropout(dropout)
        self.head = Linear(WIDTH, CLASSES, in_dim="width")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        for block in self.blocks:
            x = x + self.dropout(block(x).tanh())
        return self.head(x)


def sliced_logits(params: dict[str, Tensor], submodel: Submodel, x: Tensor) -> Tensor:
    """What ``Net`` without dropout computes, by slicing its parameters in plain torch."""
    k = submodel.get("width", WIDTH)
    x = (x @ params["stem.weight"][:k].T + params["stem.bias"][:k]).tanh()
    for i in range(submodel.get("depth", DEPTH)):
        weight, bias = params[f"blocks.{i}.weight"], params[f"blocks.{i}.bias"]
        x = x + (x @ weight[:k, :k].T + bias[:k]).tanh()
    return x @ params["head.weight"][:, :k].T + params["head.bias"]


def leaves(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that gradients can be taken of."""
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


def random_data(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, FEATURES, generator=generator, dtype=dtype)
    return inputs, torch.randint(0, CLASSES, (rows,), generator=generator)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights, to compare with later."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), f"{name} differs"
