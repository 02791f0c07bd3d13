"""The embedding layer whose features follow a dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sorted_kernels.nn.axis import AxisSpec, ElasticAxis
from sorted_kernels.nn.layers import ElasticModule
from sorted_kernels.ops.embedding import embedding_of_rows, run_embedding
from sorted_kernels.row_widths import RowWidths


class Embedding(ElasticModule, torch.nn.Embedding):
    """``torch.nn.Embedding`` whose feature axis follows a named dimension.

    Args:
        num_embeddings: V, rows.
        embedding_dim: K, stored features.
        padding_idx: Row that receives no gradient.
        device: As in torch.
        dtype: As in torch.
        dim: Dimension of the features.
        grad_mode: See :meth:`ElasticModule.make_elastic`.
    """

    AXES = ("features",)
    features_axis: ElasticAxis

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        dim: AxisSpec = None,
        grad_mode: str = "inplace",
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.make_elastic(grad_mode, features=ElasticAxis(dim, embedding_dim))

    def forward(self, indices: Tensor, widths: RowWidths | None = None) -> Tensor:
        """Look up the active features; or, for each place of a ragged batch, its in_features."""
        weight = self.weight
        slot, _, dense = self._gradient_path(weight)
        padding = -1 if self.padding_idx is None else self.padding_idx
        if widths is not None:
            return embedding_of_rows(indices, weight, widths, padding, slot, dense)
        features = self.features_axis.size()
        return run_embedding(indices, weight, features, padding, slot, dense)

    def active_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight (V, k)."""
        return {"weight": (self.num_embeddings, self.features_axis.active)}

    def stock(self) -> torch.nn.Module:
        """A ``torch.nn.Embedding`` of the active width."""
        return torch.nn.Embedding(
            self.num_embeddings, self.features_axis.active, self.padding_idx, device="meta"
        )
