"""The ways a layer's gradient can take."""

import importlib

import pytest

from sorted_kernels.ops import backend

ROUTES = {
    "leaf": ("inplace", 1 << 40),  # autograd's own node, its result copied into the prefix
    "node": ("inplace", 0),  # a Python node that writes the prefix in plain PyTorch
    "kernel": ("inplace", 0),  # the node that a kernel of ours would run in
    "dense": ("dense", 0),  # the pure path
}
routes = pytest.mark.parametrize("route", ROUTES)
in_place_routes = pytest.mark.parametrize("route", ["leaf", "node", "kernel"])


def take(monkeypatch, route):
    """Force a route; returns the layer option that it needs."""
    mode, elements = ROUTES[route]
    monkeypatch.setattr(backend, "LEAF_ELEMENTS", elements)
    if route == "kernel":
        for family in ("linear", "layer_norm"):
            module = importlib.import_module(f"sorted_kernels.ops.{family}")
            monkeypatch.setattr(module, "in_plain_torch", lambda op, x: False)
    return {"grad_mode": mode}
