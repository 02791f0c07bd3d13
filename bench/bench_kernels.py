"""Each kernel alone: linear forward, dgrad, wgrad; norms; embedding; the optimizer's step."""

from __future__ import annotations

import torch

from bench import shapes
from bench.harness import Case
from bench.kernels.adamw import adamw_step
from bench.kernels.batch_norm import batch_norm_backward, batch_norm_forward
from bench.kernels.common import replace_cache
from bench.kernels.embedding import embedding_backward, embedding_forward
from bench.kernels.linear import linear_dgrad, linear_forward, linear_wgrad
from bench.kernels.norm import norm_backward, norm_forward


def _both_caches(cases: list[Case]) -> list[Case]:
    """Memory-bound kernels: hot and cold."""
    return [replace_cache(case, cache) for case in cases for cache in ("hot", "cold")]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Every family, float32 on a CPU and bfloat16 on a GPU (the optimizer in both there)."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    pick = slice(0, 1) if quick else slice(None)
    linear = (shapes.LINEAR_GPU if gpu else shapes.LINEAR_CPU)[pick]
    norms = (shapes.NORM_GPU if gpu else shapes.NORM_CPU)[pick]
    channel_norms = (shapes.CHANNEL_NORM_GPU if gpu else shapes.CHANNEL_NORM_CPU)[pick]
    embeddings = (shapes.EMBEDDING_GPU if gpu else shapes.EMBEDDING_CPU)[pick]
    adamw = (shapes.ADAMW_GPU if gpu else shapes.ADAMW_CPU)[pick]
    compute_bound = [
        build(shape, dtype, device)
        for shape in linear
        for build in (linear_forward, linear_dgrad, linear_wgrad)
    ]
    memory_bound = [
        build(kernel, shape, dtype, device)
        for shape in norms
        for kernel in ("layer_norm", "rms_norm")
        for build in (norm_forward, norm_backward)
    ]
    memory_bound += [
        build(shape, dtype, device)
        for shape in channel_norms
        for build in (batch_norm_forward, batch_norm_backward)
    ]
    memory_bound += [
        build(shape, dtype, device)
        for shape in embeddings
        for build in (embedding_forward, embedding_backward)
    ]
    steps = [adamw_step(shape, torch.float32, device) for shape in adamw]
    return compute_bound + _both_caches(memory_bound + steps)


def test_kernels(case, provider, measure):
    measure(case, provider)
