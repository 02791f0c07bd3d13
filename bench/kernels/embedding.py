"""Embedding alone."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Contestant
from bench.kernels.common import kernel_case, returning
from bench.shapes import EmbeddingShape
from sorted_kernels.ops.backend import implementation

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _EmbeddingData:
    """indices (N,), weight (V, K), dy (N, k)."""

    indices: Tensor
    weight: Tensor
    dy: Tensor

    @classmethod
    def make(
        cls, shape: EmbeddingShape, dtype: torch.dtype, device: torch.device
    ) -> _EmbeddingData:
        generator = torch.Generator(device).manual_seed(0)
        indices = torch.randint(shape.V, (shape.N,), generator=generator, device=device)
        weight = torch.randn(shape.V, shape.K, generator=generator, device=device).to(dtype)
        dy = torch.randn(shape.N, shape.k, generator=generator, device=device).to(dtype)
        return cls(indices, weight, dy)


def embedding_forward(shape: EmbeddingShape, dtype: torch.dtype, device: torch.device) -> Case:
    """weight[indices, :k]."""

    def contiguous() -> Contestant:
        d = _EmbeddingData.make(shape, dtype, device)
        weight = d.weight[:, : shape.k].contiguous()
        return returning(lambda: F.embedding(d.indices, weight))

    def ours() -> Contestant:
        d = _EmbeddingData.make(shape, dtype, device)
        embedding = implementation("embedding", d.weight).embedding
        return returning(lambda: embedding(d.indices, d.weight, shape.k))

    def sliced() -> Contestant:  # naive and expert PyTorch alike
        d = _EmbeddingData.make(shape, dtype, device)
        return returning(lambda: F.embedding(d.indices, d.weight[:, : shape.k]))

    providers = {"B2": contiguous, "B0": sliced, "ours": ours}
    traffic = 2 * shape.N * shape.k
    return kernel_case("embedding", "forward", shape, dtype, device, providers, traffic=traffic)


def embedding_backward(shape: EmbeddingShape, dtype: torch.dtype, device: torch.device) -> Case:
    """The gradient of the first k features of the table, other features left alone."""
    k = shape.k

    def naive() -> Contestant:
        d = _EmbeddingData.make(shape, dtype, device)
        full = [shape.V, shape.K]

        def call() -> Tensor:  # what autograd does for weight[:, :k]
            grad = aten.embedding_dense_backward(d.dy, d.indices, shape.V, -1, False)
            return aten.slice_backward(grad, full, 1, 0, k, 1)[:, :k]

        return returning(call)

    def contiguous() -> Contestant:
        d = _EmbeddingData.make(shape, dtype, device)
        return returning(lambda: aten.embedding_dense_backward(d.dy, d.indices, shape.V, -1, False))

    def expert() -> Contestant:
        d = _EmbeddingData.make(shape, dtype, device)
        grad = torch.zeros_like(d.weight)[:, :k]
        return Contestant(lambda: grad.zero_().index_add_(0, d.indices, d.dy), lambda: [grad])

    def ours() -> Contestant:
        d = _EmbeddingData.make(shape, dtype, device)
        grad = torch.zeros_like(d.weight)[:, :k]
        backward_into = implementation("embedding", d.weight).embedding_backward_into
        return Contestant(lambda: backward_into(d.dy, d.indices, grad, False), lambda: [grad])

    providers = {"B2": contiguous, "B1": expert, "B0": naive, "ours": ours}
    traffic = shape.N * k + shape.V * k
    return kernel_case("embedding", "backward", shape, dtype, device, providers, traffic=traffic)
