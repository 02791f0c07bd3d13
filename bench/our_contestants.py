"""This library: a full-size layer with a sub-model active, and the staircase optimizer."""

from __future__ import annotations

import torch

import sorted_kernels as sk
from bench.harness import Contestant
from bench.torch_contestants import ADAMW, LinearData


def elastic_linear(data: LinearData) -> sk.nn.Linear:
    """An (M, K) layer that holds the data's weights, with the (m, k) block active."""
    s = data.shape
    layer = sk.nn.Linear(s.K, s.M, in_dim="in", out_dim="out")
    layer.to(device=data.x.device, dtype=data.x.dtype)
    with torch.no_grad():
        layer.weight.copy_(data.weight)
        layer.bias.copy_(data.bias)
    sk.activate(layer, sk.Submodel(**{"in": s.k, "out": s.m}))
    return layer


def our_linear_step(data: LinearData) -> Contestant:
    """A training step of the active block alone."""
    layer = elastic_linear(data)
    optimizer = sk.optim.AdamW(layer.parameters(), **ADAMW)
    x = data.leaf()

    def step() -> None:
        x.grad = None
        optimizer.zero_grad(set_to_none=True)
        layer(x).backward(data.dy)
        optimizer.step()

    return Contestant(step, lambda: data.change(layer.weight, layer.bias))
