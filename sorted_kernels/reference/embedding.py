"""Embedding that reads the leading features of its rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def embedding(indices: Tensor, weight: Tensor, features: int) -> Tensor:
    """``weight[indices, :k]``.

    Args:
        indices: Integers of any shape, in ``[0, V)``.
        weight: (V, K) parent, unit inner stride.
        features: k.

    Returns:
        (*indices.shape, k).
    """
    return F.embedding(indices, weight[:, :features])


def embedding_backward_into(
    dy: Tensor, indices: Tensor, out: Tensor, accumulate: bool, padding_idx: int = -1
) -> None:
    """``out[i] (+)= sum of dy over the places where indices == i``; out (V, k) is a view.

    Rows that no index names get zero when ``accumulate`` is false; ``padding_idx`` gets nothing.
    """
    if not accumulate:
        out.zero_()
    flat, rows = indices.reshape(-1), dy.reshape(-1, dy.shape[-1])
    if padding_idx >= 0:
        kept = flat != padding_idx
        flat, rows = flat[kept], rows[kept]
    out.index_add_(0, flat, rows)
