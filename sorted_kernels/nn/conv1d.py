"""GPT-2's linear layer, which stores its weight as (in, out), up to three side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sorted_kernels.errors import ShapeError
from sorted_kernels.nn.axis import AxisSpec, ElasticAxis
from sorted_kernels.nn.layers import ElasticModule, check_width
from sorted_kernels.ops.transposed_linear import run_transposed_linear


class Conv1D(ElasticModule):
    """The ``Conv1D`` of ``transformers`` (a linear layer) whose features follow named dimensions.

    Args:
        nf: Output features, of all parts together.
        nx: Input features.
        parts: How many projections lie side by side in the outputs (3 where query, key and value
            are packed): each yields its own leading features.
        device: As in torch.
        dtype: As in torch.
        in_dim: Dimension of the input features.
        out_dim: Dimension of the output features of each part.
        grad_mode: See :meth:`ElasticModule.make_elastic`.

    Raises:
        ShapeError: ``nf`` is not a multiple of ``parts``.

    Shape:
        (..., active in_features) -> (..., parts * active out_features).
    """

    AXES = ("in", "out")
    in_axis: ElasticAxis
    out_axis: ElasticAxis
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter

    def __init__(
        self,
        nf: int,
        nx: int,
        parts: int = 1,
        device: Any = None,
        dtype: Any = None,
        *,
        in_dim: AxisSpec = None,
        out_dim: AxisSpec = None,
        grad_mode: str = "inplace",
    ) -> None:
        super().__init__()
        if parts < 1 or nf % parts:
            raise ShapeError(f"nf={nf} is not a multiple of parts={parts}")
        self.nf, self.nx, self.parts = nf, nx, parts
        self.weight = torch.nn.Parameter(torch.empty(nx, nf, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(nf, device=device, dtype=dtype))
        torch.nn.init.normal_(self.weight, std=0.02)
        axes = {"in": ElasticAxis(in_dim, nx), "out": ElasticAxis(out_dim, nf // parts)}
        self.make_elastic(grad_mode, **axes)

    def slot_matrix(self, name: str) -> tuple[int, int] | None:
        """Packed parts are interleaved rows of a matrix as wide as one part."""
        if self.parts == 1:
            return None
        return (self.parts * (self.nx if name == "weight" else 1), self.nf // self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the active block of every part."""
        check_width(x, self.in_axis, "Conv1D")
        weight, bias = self.weight, self.bias
        paths = self._gradient_path(weight, bias)
        return run_transposed_linear(x, weight, bias, self.out_axis.size(), self.parts, *paths)

    def active_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight (k, parts * m), bias (parts * m,)."""
        m = self.parts * self.out_axis.active
        return {"weight": (self.in_axis.active, m), "bias": (m,)}

    def active_view(self, name: str, tensor: Tensor) -> Tensor:
        """Of a tensor of a parameter's shape: (k, parts, m), or (parts, m) of the bias."""
        by_part = tensor.unflatten(-1, (self.parts, -1))[..., : self.out_axis.active]
        return by_part[: self.in_axis.active] if name == "weight" else by_part

    def active_block(self, name: str) -> Tensor:
        """A contiguous copy of the active block of a parameter."""
        return super().active_block(name).flatten(-2)

    def plain(self) -> torch.nn.Module:
        """A ``torch.nn.Linear`` of the active size: torch has no layer of this layout."""
        weight = self.active_block("weight").t().contiguous()
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        layer.weight = torch.nn.Parameter(weight, self.weight.requires_grad)
        layer.bias = torch.nn.Parameter(self.active_block("bias"), self.bias.requires_grad)
        return layer.train(self.training)
